"""A trace that is there: events, exits, marks, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmbench.arguments import file_path, instead, integer, spelled_out
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance
from kvmbench.traces.compare import Comparison, compare
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.exits import ExitTable, exit_table
from kvmbench.traces.places import Places
from kvmbench.traces.run_log import RunLog
from kvmbench.traces.summary import KEYS, Summary, summarise
from kvmbench.traces.words import counted
from kvmbench.uapi.exit_reasons import ExitReason


class Mark(NamedTuple):
    """A moment that somebody named.

    Attributes:
        time_ns: by the trace's clock.
        text: what was written; of a guest's mark, its number.
        source: "host" or "guest".
        vcpu: of a guest's mark, else -1.
    """

    time_ns: int
    text: str
    source: str
    vcpu: int


@dataclass(frozen=True)
class TraceData:
    """What a trace is made of.

    Attributes:
        events: the kernel's.
        log: the core's.
        provenance: the host.
        marks: in order of time.
        clock_error_ns: how far the times of events and log may differ; None: nothing tells.
        notes: sentences on what is missing and why.
        statistics: growth of KVM's own statistics, of each vcpu.
        places: names of addresses, and the code there.
        labels: what vcpus are called; "vcpu 0" where there is none.
        clock: the kernel's name of the clock; another program's trace may have another than "mono", or not tell ("").
    """

    events: EventTable
    log: RunLog
    provenance: Provenance = field(default_factory=Provenance)
    marks: tuple[Mark, ...] = ()
    clock_error_ns: int | None = None
    notes: tuple[str, ...] = ()
    statistics: tuple[Mapping[str, int], ...] = ()
    places: Places = field(default_factory=Places)
    labels: tuple[str, ...] = ()
    clock: str = "mono"


def guest_marks(log: RunLog, port: int) -> list[Mark]:
    """What a guest marked by OUT to a port."""
    if not len(log):
        return []
    out = (log["exit"] == ExitReason.IO) & (log["error"] == 0) & (log["detail"] >> 8 & 1 == 1)
    at = np.flatnonzero(out & (log["where"] == port))
    return [Mark(int(log["leave_ns"][n]), f"{int(log['value'][n]):#x}", "guest", int(log.vcpu[n])) for n in at]


def _keys(by: str | Iterable[str]) -> tuple[str, ...]:
    given: tuple[object, ...] = (by,)
    if isinstance(by, Iterable) and not isinstance(by, str | bytes):
        given = tuple(by)
    keys: list[str] = []
    for key in given:
        if not isinstance(key, str) or key not in KEYS:
            raise MisuseError(f"by={key!r:.80}: {instead(key if isinstance(key, str) else '', KEYS)}")
        if key in keys:
            raise MisuseError(f"by={list(given)!r:.80}: {key!r} is there twice")
        keys.append(key)
    if not keys:
        raise MisuseError(f"by={by!r:.80}: give one or several of {', '.join(KEYS)}")
    return tuple(keys)


def _of_both(before: tuple[str, ...], after: tuple[str, ...]) -> list[str]:
    # What is said of one only says of which.
    said = [note if note in after else f"before: {note}" for note in before]
    return said + [f"after: {note}" for note in after if note not in before]


class Trace:
    """Exits and events of a machine's vcpus. Times are nanoseconds by the host's CLOCK_MONOTONIC.

    Where the host runs in an emulator, that is emulator time: `provenance` tells.
    """

    def __init__(self, data: TraceData) -> None:
        self._data = data
        self._exits: tuple[TraceData, ExitTable] | None = None

    @property
    def data(self) -> TraceData:
        """All of it; of a trace that runs, so far."""
        return self._data

    @property
    def events(self) -> EventTable:
        """The kernel's events by kind: ``t.events["kvm_exit"]["guest_rip"]``."""
        return self.data.events

    @property
    def log(self) -> RunLog:
        """The core's own log of each KVM_RUN, which needs no privilege."""
        return self.data.log

    @property
    def exits(self) -> ExitTable:
        """Exits: when, why, and how long until the guest ran again."""
        data = self.data
        if self._exits is None or self._exits[0] is not data:
            self._exits = data, exit_table(data.events, data.log)
        return self._exits[1]

    @property
    def marks(self) -> tuple[Mark, ...]:
        """Named moments, of the host and of the guest."""
        return self.data.marks

    @property
    def provenance(self) -> Provenance:
        """The host."""
        return self.data.provenance

    @property
    def clock_error_ns(self) -> int | None:
        """How far the times of events and those of the log may differ, at most; None: nothing tells."""
        return self.data.clock_error_ns

    @property
    def statistics(self) -> tuple[Mapping[str, int], ...]:
        """What KVM's own statistics of each vcpu grew by meanwhile; empty where the host has none."""
        return self.data.statistics

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what is missing: events lost, sources that the host has not."""
        data = self.data
        notes = list(data.notes)
        if data.events.gaps:
            many = counted(data.events.lost, "event") if data.events.lost else "events"
            gaps = counted(len(data.events.gaps), "gap")
            notes.append(f"{many} lost in {gaps}: take a larger buffer, or fewer events")
        if data.log.lost:
            notes.append(f"{data.log.lost:,} rows of the log were lost: take more log_rows")
        if data.events.bad_pages:
            notes.append(f"{data.events.bad_pages} pages of the ring buffer made no sense from some point on")
        return tuple(notes)

    @property
    def exit_times_ns(self) -> NDArray[np.int64]:
        """When each exit happened, for ``kb.plot.exits``."""
        return self.exits.time_ns

    @property
    def exit_names(self) -> NDArray[np.str_]:
        """The reason of each, for ``kb.plot.exits``."""
        return self.exits.reasons

    @spelled_out
    def summary(self, by: str | Iterable[str] = "reason", *, vcpu: int | None = None) -> Summary:
        """Counts exits and the time they took.

        Args:
            by: what to tell apart: "reason", "vcpu", "rip", "symbol", "instruction", "user_exit" (what
                KVM_RUN returned with), or several of them.
            vcpu: only this vcpu's.

        Raises:
            MisuseError: something else was given.
        """
        keys = _keys(by)
        now = self._now()
        exits = now.exits
        if vcpu is not None:
            vcpu = integer(vcpu, "vcpu", 0)
            exits = exits.take(exits.vcpu == vcpu)
            if not len(exits):
                there = ", ".join(str(v) for v in np.unique(now.exits.vcpu)) or "none"
                raise MisuseError(f"vcpu {vcpu!r} has no exits in this trace; these have: {there}")
        return summarise(
            exits,
            keys,
            places=now.data.places,
            labels=now.data.labels,
            halt_wait_ns=sum(
                grown.get("halt_wait_ns", 0) for n, grown in enumerate(now.statistics) if vcpu in (None, n)
            ),
            clock=self.provenance.time_unit_note,
            warnings=now.notes,
        )

    @spelled_out
    def compare(self, other: Trace, by: str | Iterable[str] = "reason", *, confidence: float = 0.95) -> Comparison:
        """Holds a later trace against this one: counts, mean times, and intervals of their difference.

        Args:
            other: the trace after whatever was changed.
            by: as in `summary`.
            confidence: of the intervals, 0.5 to 0.9999.

        Raises:
            MisuseError: no trace, or another number or word than these.
        """
        if not isinstance(other, Trace):
            raise MisuseError(f"other={other!r:.60}: give the other trace; kb.open_trace(path) reads one from a file")
        if not isinstance(confidence, float | np.floating) or not 0.5 <= confidence <= 0.9999:
            raise MisuseError(f"confidence={confidence!r:.60}: give a number from 0.5 to 0.9999, such as 0.95")
        one, two = self._now(), other._now()
        warnings = []
        if str(self.provenance) != str(other.provenance):
            warnings.append(f"different hosts: {self.provenance} before, {other.provenance} after")
        # Of a trace without exits nothing is told that could be compared.
        both = len(one.exits) and len(two.exits)
        if both and bool((one.exits.isa == 0).all()) != bool((two.exits.isa == 0).all()):
            warnings.append("one has exits of the processor, the other only KVM_RUNs: their times are not comparable")
        return compare(
            one.exits,
            two.exits,
            _keys(by),
            places=(one.data.places, two.data.places),
            confidence=float(confidence),
            clock=self.provenance.time_unit_note or other.provenance.time_unit_note,
            warnings=(*warnings, *_of_both(one.notes, two.notes)),
        )

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the trace to a file; what is in it depends on the suffix.

        ``.npz`` has everything and is opened again with `kb.open_trace`; ``.perfetto-trace`` (or ``.pftrace``) and
        ``.json`` open in Perfetto's viewer; ``.csv`` and ``.parquet`` hold the exits.

        Raises:
            MisuseError: another suffix.
            HostUnavailable: the format needs a package that is not installed; named.
            OSError: the directory is not there, or the file cannot be written; an older one is left as it was.
        """
        from kvmbench.traces.files import save_as

        # Asked first: a trace that ends meanwhile has an end that is not in the file.
        runs = bool(getattr(self, "running", False))
        return save_as(self._now(), file_path(path, "exits.npz"), runs=runs)

    def _now(self) -> Trace:
        # What does not grow while it is looked at: figures of one view belong together.
        return self

    def _kind(self) -> str:
        return "Trace"

    def __repr__(self) -> str:
        now = self._now()
        what = [counted(len(now.exits), "exit"), counted(now.events.count, "event"), counted(len(now.log), "KVM_RUN")]
        if now.marks:
            what.append(counted(len(now.marks), "mark"))
        text = f"<{self._kind()}: {', '.join(what)}; {now.provenance}>"
        return "\n".join([text, *now.notes])

    def _repr_html_(self) -> str:
        now = self._now()
        counts = ((len(now.exits), "exit"), (now.events.count, "event"), (len(now.log), "KVM_RUN"))
        head = ", ".join(counted(count, what) for count, what in counts)
        return f"<p><b>{head}</b> on {escape(str(now.provenance))}</p>{now.summary()._repr_html_()}"
