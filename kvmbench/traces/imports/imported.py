"""What a reader of somebody else's trace returns, and whose vcpu each of its events was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvmbench.host.provenance import Provenance, software_versions
from kvmbench.traces.event_table import NO_VCPU, EventColumns, EventTable
from kvmbench.traces.imports.runs import log_of

if TYPE_CHECKING:
    from kvmbench.traces.trace import TraceData

# The events that a vcpu's own thread makes for its own vcpu. Others have a vcpu_id too, but of whom they act upon.
_OWN = ("kvm_exit", "kvm_entry")
# What only a thread in KVM_RUN makes: where nothing tells a vcpu_id, the threads are told apart by these.
_IN_RUN = ("kvm_exit", "kvm_entry", "kvm_userspace_exit")
# `EventColumns.vcpu` is a 16-bit number.
_MOST_VCPUS = 1 << 15


@dataclass(frozen=True)
class Imported:
    """A trace that another program took.

    Attributes:
        events: with `vcpu` numbered by thread, for vcpus of several machines have the same vcpu_id.
        labels: of each vcpu its thread and vcpu_id: "CPU 0/KVM tid 1234 vcpu 0".
        clock: the kernel's name of the trace's clock, "mono", "local"; "": nothing tells.
        comms: names of threads by number.
        kernel: what ``uname -a`` said there; "": nothing tells.
        notes: sentences on what is missing and what was not understood.
        ignored: lines of a text that were not understood.
    """

    events: EventTable
    labels: tuple[str, ...] = ()
    clock: str = ""
    comms: Mapping[int, str] = field(default_factory=dict)
    kernel: str = ""
    notes: tuple[str, ...] = ()
    ignored: int = 0

    def provenance(self) -> Provenance:
        """What the file tells of its host."""
        words = self.kernel.split()
        release = words[2] if len(words) > 2 else self.kernel
        clock = f"; trace clock {self.clock}" if self.clock else ""
        return Provenance(kernel=release, versions=software_versions(), note=f"taken by another program{clock}")

    def trace_data(self) -> TraceData:
        """What a `Trace` is made of; its KVM_RUNs are made of the events (`kvmbench.traces.imports.runs`)."""
        # Not above: kvmbench.traces.trace may import this module.
        from kvmbench.traces.trace import Mark, TraceData

        log, note = log_of(self.events)
        notes = [*self.notes, *([note] if note else [])]
        if not len(log) and not len(self.events.get("kvm_exit", ())):
            notes.append(
                "it has no exits: there is no kvm_exit, and a kvm_userspace_exit makes one only beside kvm_fpu or "
                "kvm_entry; record all of them: trace-cmd record -e kvm, or perf record -e 'kvm:*'"
            )
        marks: tuple[Mark, ...] = ()
        printed = self.events.get("print")
        if printed is not None:
            marks = tuple(Mark(int(t), printed.text(n), "host", -1) for n, t in enumerate(printed.time_ns))
        return TraceData(
            self.events,
            log,
            self.provenance(),
            marks=marks,
            notes=tuple(notes),
            labels=self.labels,
            clock=self.clock,
        )

    def __repr__(self) -> str:
        return f"<Imported: {self.events!r}; {len(self.labels)} vcpus{'; ' + self.clock if self.clock else ''}>"


def number_vcpus(
    events: EventTable, comms: Mapping[int, str], processes: Mapping[int, int] | None = None
) -> tuple[EventTable, tuple[str, ...]]:
    """Numbers the vcpus by thread and vcpu_id, and says of each event whose it was.

    Where all vcpu_ids differ they are the order, so a single machine's vcpus are numbered as its own; else the
    processes or threads come first. An event that tells no vcpu_id belongs to the vcpu that its thread ran last.

    Args:
        events: nobody's yet.
        comms: names of threads.
        processes: of threads, where known.

    Returns:
        The events, and a label for each vcpu.
    """
    processes = processes or {}
    told = [c for name in _OWN if (c := events.get(name)) is not None and "vcpu_id" in c.fields and len(c)]
    with_id = bool(told)
    told = told or [c for name in _IN_RUN if (c := events.get(name)) is not None and len(c)]
    if not told:
        return events, ()
    tid = np.concatenate([c.tid for c in told]).astype(np.int64)
    number = np.concatenate([_vcpu_id(c, with_id) for c in told])
    time = np.concatenate([c.time_ns for c in told])
    pairs, which = np.unique(np.stack([tid, number], axis=1), axis=0, return_inverse=True)
    which = which.reshape(-1)
    alone = len(np.unique(pairs[:, 1])) == len(pairs) and with_id
    group = [0 if alone else processes.get(int(t), 0) for t, _ in pairs]
    keys = [(group[n], *((int(v), int(t)) if alone else (int(t), int(v)))) for n, (t, v) in enumerate(pairs)]
    order = sorted(range(len(pairs)), key=keys.__getitem__)
    place = np.full(len(pairs), NO_VCPU, np.int16)
    place[order[:_MOST_VCPUS]] = np.arange(min(len(order), _MOST_VCPUS), dtype=np.int16)
    labels = tuple(_label(int(pairs[n, 0]), int(pairs[n, 1]), with_id, comms, processes) for n in order[:_MOST_VCPUS])
    vcpu = place[which]
    numbered = []
    for c in events.values():
        if with_id and c.name in _OWN and "vcpu_id" in c.fields:
            of = _of_pairs(c, pairs, place)
        else:
            of = _of_thread(c, tid, vcpu, time)
        numbered.append(replace(c, vcpu=of))
    return EventTable(numbered, gaps=events.gaps, bad_pages=events.bad_pages, unknown=events.unknown), labels


def _vcpu_id(c: EventColumns, with_id: bool) -> NDArray[np.int64]:
    return c["vcpu_id"].astype(np.int64) if with_id else np.zeros(len(c), np.int64)


def _label(tid: int, number: int, with_id: bool, comms: Mapping[int, str], processes: Mapping[int, int]) -> str:
    parts = [comms[tid]] if comms.get(tid, "<...>") != "<...>" else []
    if processes.get(tid, tid) != tid:
        parts.append(f"pid {processes[tid]}")
    parts.append(f"tid {tid}")
    return " ".join([*parts, f"vcpu {number}"] if with_id else parts)


def _of_pairs(c: EventColumns, pairs: NDArray[np.int64], place: NDArray[np.int16]) -> NDArray[np.int16]:
    mine, back = np.unique(
        np.stack([c.tid.astype(np.int64), c["vcpu_id"].astype(np.int64)], axis=1), axis=0, return_inverse=True
    )
    index = {(int(t), int(v)): n for n, (t, v) in enumerate(pairs)}
    return np.array([place[index[int(t), int(v)]] for t, v in mine], np.int16)[back.reshape(-1)]


def _of_thread(
    c: EventColumns, tid: NDArray[np.int64], vcpu: NDArray[np.int16], time: NDArray[np.int64]
) -> NDArray[np.int16]:
    found = np.full(len(c), NO_VCPU, np.int16)
    for thread in np.intersect1d(c.tid, tid):
        at = tid == thread
        several = np.unique(vcpu[at])
        mine = c.tid == thread
        if len(several) == 1:
            found[mine] = several[0]
            continue
        by_time = np.argsort(time[at], kind="stable")
        before = np.searchsorted(time[at][by_time], c.time_ns[mine], side="right") - 1
        found[mine] = vcpu[at][by_time][np.maximum(before, 0)]
    return found
