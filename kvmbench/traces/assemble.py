"""Makes tables out of what a collector took: decodes, and finds out whose each event was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kvmbench.traces.event_table import NO_VCPU, EventColumns, EventTable, Gap
from kvmbench.traces.format import TAIL, EventFormat, PageLayout
from kvmbench.traces.growing import GrowingEvents
from kvmbench.traces.run_log import ROW, RunLog

#: First word of the raw mark by which the core says which vcpu a thread runs (core/trace.c).
THREAD_MARK_MAGIC = 0x6D62766B
_RAW_MARK = "raw_data"
# Words behind the magic: thread, vcpu's handle, nothing.
_MARK_WORDS = 3


def run_log(rows: Iterable[tuple[int, memoryview, int]], vcpus: Mapping[int, int]) -> RunLog:
    """The log, from its pieces.

    Args:
        rows: (vcpu's handle, rows, rows lost behind them).
        vcpus: handle to place in ``m.cpus``.
    """
    pieces, numbers, lost = [], [], 0
    under_way: dict[int, np.void] = {}
    left: dict[int, int] = {}
    holes: list[tuple[int, int]] = []
    for handle, data, missing in rows:
        piece = np.frombuffer(data[: len(data) // ROW.itemsize * ROW.itemsize], dtype=ROW)
        number = vcpus.get(handle, NO_VCPU)
        lost += missing
        if len(piece) and not piece["leave_ns"][-1]:
            # What was told before has ended, or is told again by its row.
            under_way[number] = piece[-1]
            piece = piece[:-1]
        if len(piece):
            left[number] = int(piece["leave_ns"][-1])
        if missing and number in left:
            holes.append((number, left[number]))
        pieces.append(piece)
        numbers.append(np.full(len(piece), number, np.int16))
    if not pieces:
        return RunLog(np.zeros(0, np.int16), np.zeros(0, ROW), lost)
    joined, vcpu = np.concatenate(pieces), np.concatenate(numbers)
    if np.any(joined["enter_ns"][1:] < joined["enter_ns"][:-1]):
        at = np.argsort(joined["enter_ns"], kind="stable")
        vcpu, joined = vcpu[at], joined[at]
    still = []
    for number, row in under_way.items():
        mine = joined["enter_ns"][vcpu == number]
        if not len(mine) or mine[-1] < row["enter_ns"]:
            still.append((number, int(row["thread"]), int(row["enter_ns"])))
    return RunLog(vcpu, joined, lost, tuple(still), tuple(holes))


def without_cut(log: RunLog, events: EventTable, since_ns: int) -> RunLog:
    """The log without KVM_RUNs whose exits happened before `since_ns`: without these they would be taken for others."""
    exits = events.get("kvm_exit")
    if exits is None:
        return log
    keep = np.ones(len(log), np.bool_)
    for n in np.flatnonzero((log["enter_ns"] < since_ns) & (log["leave_ns"] >= since_ns)):
        mine = exits.time_ns[exits.vcpu == log.vcpu[n]]
        first, end = np.searchsorted(mine, since_ns), np.searchsorted(mine, log["leave_ns"][n], side="right")
        keep[n] = not len(mine) or first < end
    return replace(log, vcpu=log.vcpu[keep], data=log.data[keep])


def event_table(
    pages: Sequence[tuple[int, memoryview]],
    formats: Mapping[int, EventFormat],
    *,
    page_bytes: int,
    layout: PageLayout,
    lost: Mapping[int, int] | None = None,
    use_core: bool = True,
) -> EventTable:
    """All events, nobody's vcpu yet; `lost` is what the kernel counted, by processor."""
    events = GrowingEvents(formats, page_bytes=page_bytes, layout=layout, use_core=use_core)
    events.add(pages)
    return events.table(count_gaps(events.gaps, lost or {}))


def count_gaps(gaps: Iterable[Gap], lost: Mapping[int, int]) -> list[Gap]:
    """Gaps with what the pages did not tell.

    Args:
        gaps: as the pages tell them.
        lost: by processor, what the kernel counted in sum.
    """
    counted = list(gaps)
    for cpu, number in lost.items():
        missing = number - sum(gap.lost for gap in counted if gap.cpu == cpu)
        at = [n for n, gap in enumerate(counted) if gap.cpu == cpu and not gap.lost]
        if missing > 0 and at:
            counted[at[0]] = replace(counted[at[0]], lost=missing)
    return counted


def attribute(
    events: EventTable, log: RunLog, vcpus: Mapping[int, int], *, dedicated: bool = True, alone: bool = True
) -> EventTable:
    """Says of each event whose it was, and leaves out the core's own marks.

    A thread that ran one vcpu only made that one's events, also between two KVM_RUNs (an ioctl makes some). Where a
    thread ran several, the log's times decide; what was between two KVM_RUNs is nobody's.

    Args:
        events: nobody's yet.
        log: of the same trace.
        vcpus: handle to place in ``m.cpus``.
        dedicated: each vcpu has a thread of its own, as in an agent. In this process a thread may run those of other
            machines, too, of which the trace has no log.
        alone: there are no other machines whose events these could be.
    """
    marks = events.get(_RAW_MARK)
    threads = _threads(marks, vcpus, log)
    # Without the log its times cannot tell, nor where rows are lost.
    trusted = dedicated or (alone and bool(log.lost)) or not (len(log) or log.under_way)
    single = {tid: next(iter(of)) for tid, of in threads.items() if len(of) == 1 and trusted}
    shared = {tid for tid in threads if tid not in single}
    columns = []
    for c in events.values():
        if c.name == _RAW_MARK:
            continue
        vcpu = np.full(len(c), NO_VCPU, np.int16)
        for tid, number in single.items():
            vcpu[c.tid == tid] = number
        for tid in shared:
            at = np.flatnonzero(c.tid == tid)
            vcpu[at] = _by_time(c.time_ns[at], log, _thread_number(tid, marks))
        columns.append(EventColumns(c.format, c.time_ns, c.cpu, c.tid, vcpu, c.data))
    return events.with_columns(columns)


def without_others(events: EventTable, *, marked: str, only_ours: bool) -> EventTable:
    """What is to be shown: without our own marks, which begin with `marked` and are nobody's events.

    Where only this machine's are wanted, an event whose thread ran another machine's vcpu, or none, is left out.
    """
    columns = []
    for c in events.values():
        keep = np.ones(len(c), np.bool_)
        if c.name == "print":
            keep = np.array([not c.text(n).startswith(marked) for n in range(len(c))], np.bool_)
        elif only_ours:
            keep = c.vcpu != NO_VCPU
        if keep.all():
            columns.append(c)
        elif keep.any():
            columns.append(c.take(keep))
    return events.with_columns(columns)


def _read_marks(marks: EventColumns | None) -> NDArray[np.uint32]:
    """Raw marks of the core as rows of (kernel's number of the thread, the core's, the vcpu's handle)."""
    if marks is None or TAIL not in (marks.data.dtype.names or ()) or "id" not in marks.fields:
        return np.zeros((0, 3), np.uint32)
    ours = marks.data["id"].astype(np.uint32) == THREAD_MARK_MAGIC
    rows = [np.frombuffer(tail.tobytes()[:12].ljust(12, b"\0"), "<u4") for tail in marks.data[TAIL][ours]]
    return np.array([(tid, row[0], row[1]) for tid, row in zip(marks.tid[ours], rows, strict=True)], np.uint32).reshape(
        -1, 3
    )


def _threads(marks: EventColumns | None, vcpus: Mapping[int, int], log: RunLog) -> dict[int, set[int]]:
    # The kernel's number of each thread to the vcpus it ran; NO_VCPU stands for another machine's.
    found: dict[int, set[int]] = {}
    known: dict[int, int] = {}
    for tid, thread, handle in _read_marks(marks).tolist():
        found.setdefault(tid, set()).add(vcpus.get(handle, NO_VCPU))
        known[thread] = tid
    # A mark may have been lost; outside a container the two numbers are one.
    pairs = [(thread, vcpu) for vcpu, thread, _ in log.under_way]
    if len(log):
        for vcpu in np.unique(log.vcpu).tolist():
            pairs += [(thread, vcpu) for thread in np.unique(log["thread"][log.vcpu == vcpu]).tolist()]
    for thread, vcpu in pairs:
        found.setdefault(known.get(thread, thread), set()).add(vcpu)
    return found


def _thread_number(tid: int, marks: EventColumns | None) -> int:
    for kernels, thread, _ in _read_marks(marks).tolist():
        if kernels == tid:
            return int(thread)
    return tid


def _by_time(time: NDArray[np.int64], log: RunLog, thread: int) -> NDArray[np.int16]:
    mine = log["thread"] == thread
    still = [(vcpu, enter) for vcpu, of, enter in log.under_way if of == thread]
    enter = np.concatenate([log["enter_ns"][mine], np.array([enter for _, enter in still], np.int64)])
    leave = np.concatenate([log["leave_ns"][mine], np.full(len(still), np.iinfo(np.int64).max)])
    vcpu = np.concatenate([log.vcpu[mine], np.array([vcpu for vcpu, _ in still], np.int16)])
    if not len(enter):
        return np.full(len(time), NO_VCPU, np.int16)
    at = np.searchsorted(enter, time, side="right") - 1
    inside = (at >= 0) & (time <= leave[np.maximum(at, 0)])
    return np.where(inside, vcpu[np.maximum(at, 0)], np.int16(NO_VCPU)).astype(np.int16)
