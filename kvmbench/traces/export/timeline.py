"""What a viewer of timelines draws: slices that lie one in another, moments, and spans in which events were lost."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from kvmbench.host.cache import replacing
from kvmbench.host.provenance import Provenance
from kvmbench.traces.event_table import EventColumns, EventTable, plain
from kvmbench.traces.exits import NOT_TOLD, ExitTable
from kvmbench.traces.format import TAIL

#: Kinds of slices. `RUN`: guest and KVM together, where no exit of the processor was told.
GUEST, RUN, EXIT, USER, STOPPED = range(5)
#: What slices of a kind are called; those of `EXIT` have the name of their reason.
NAMES = {GUEST: "guest", RUN: "KVM_RUN", USER: "user space", STOPPED: "stopped"}
# The slices of exits show these.
_SHOWN_AS_EXITS = frozenset(("kvm_exit", "kvm_entry"))
_BLOCK = 1 << 16
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
_CLOCKS = {
    "mono": "CLOCK_MONOTONIC",
    "mono_raw": "CLOCK_MONOTONIC_RAW",
    "boot": "CLOCK_BOOTTIME",
    "tai": "CLOCK_TAI",
}


class Slice(NamedTuple):
    """A span of a vcpu's time.

    Attributes:
        start_ns: by the trace's clock.
        end_ns: no later than that of the slice it lies in.
        kind: `GUEST`, `RUN`, `EXIT`, `USER` or `STOPPED`.
        row: of the exit it belongs to.
    """

    start_ns: int
    end_ns: int
    kind: int
    row: int


@dataclass(frozen=True)
class Lost:
    """A span in which events were lost.

    Attributes:
        start_ns: the processor's last event before it; `end_ns` where there is none.
        end_ns: its first event behind it.
        cpu: the processor; -1: the log of a vcpu.
        count: how many; 0: nobody counted them.
    """

    start_ns: int
    end_ns: int
    cpu: int
    count: int

    @property
    def name(self) -> str:
        """ "1,234 events lost"."""
        what = "rows of the log" if self.cpu < 0 else "events"
        return f"{self.count:,} {what} lost" if self.count else f"{what} lost"


class Moment(NamedTuple):
    """Something without a length.

    Attributes:
        time_ns: by the trace's clock.
        vcpu: whose it is; -1: nobody's.
        cpu: the processor it happened on.
        values: its fields.
    """

    time_ns: int
    vcpu: int
    cpu: int
    values: dict[str, Any]


def clock_name(clock: str, provenance: Provenance) -> str:
    """The clock in words: "CLOCK_MONOTONIC", "trace clock local, emulator time"."""
    name = _CLOCKS.get(clock) or (f"trace clock {clock}" if clock else "clock not told")
    return f"{name}, {provenance.time_unit_note}" if provenance.time_unit_note else name


def vcpus_of(events: EventTable, exits: ExitTable) -> list[int]:
    """The vcpus that anything is told of."""
    found = [exits.vcpu, *(c.vcpu for c in events.values())]
    return sorted({int(v) for column in found for v in np.unique(column) if v >= 0})


def vcpu_name(vcpu: int, labels: Sequence[str]) -> str:
    """What a vcpu's track is called."""
    return labels[vcpu] if 0 <= vcpu < len(labels) else f"vcpu {vcpu}"


def slices_of(exits: ExitTable, vcpu: int) -> Iterator[Slice]:
    """A vcpu's slices in order of their start, each inside the one before it or behind it.

    An exit lasts until the guest ran again. What user space did lies in it, and so do KVM_RUNs that were answered
    without the processor entering the guest. Times that contradict each other are cut to fit.
    """
    rows = np.flatnonzero(exits.vcpu == vcpu)
    start, end, kind, row = _raw_slices(exits, rows)
    order = np.lexsort((kind, -end, start))
    open_ends: list[int] = []
    for first in range(0, len(order), _BLOCK):
        at = order[first : first + _BLOCK]
        block = (start[at].tolist(), end[at].tolist(), kind[at].tolist(), row[at].tolist())
        for begins, ends, what, whose in zip(*block, strict=True):
            while open_ends and open_ends[-1] <= begins:
                open_ends.pop()
            if open_ends and ends > open_ends[-1]:
                ends = open_ends[-1]
            open_ends.append(ends)
            yield Slice(begins, ends, what, whose)


def _raw_slices(exits: ExitTable, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    time, guest = exits.time_ns[rows], exits.guest_ns[rows]
    told = guest != NOT_TOLD
    alone = exits.isa[rows] == 0
    end = _ends(exits, rows)
    lasts = end > time
    answered, stood = exits.user_ns[rows], exits.outside_ns[rows]
    # Where KVM_RUN returned; the exit's end where the log does not tell.
    logged = exits.log_row[rows]
    left = np.where(alone, time, np.maximum(end - answered - stood, time))
    if len(exits.log):
        left = np.where(logged >= 0, exits.log["leave_ns"][np.maximum(logged, 0)], left)
    parts = (
        (time - guest, time, np.where(alone, RUN, GUEST), told),
        (time, end, np.full(len(rows), EXIT), lasts),
        (left, left + answered, np.full(len(rows), USER), answered > 0),
        (left, left + stood, np.full(len(rows), STOPPED), (stood > 0) & (answered == 0)),
    )
    columns = zip(*((s[m], e[m], k[m], rows[m]) for s, e, k, m in parts), strict=True)
    start, finish, kind, row = (np.concatenate(column).astype(np.int64) for column in columns)
    return start, finish, kind, row


def _ends(exits: ExitTable, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    # When the guest ran again: what the next exit's time in the guest began with, or the sum of the parts.
    time, kvm = exits.time_ns[rows], exits.kvm_ns[rows]
    parts = np.maximum(kvm, 0) + exits.user_ns[rows] + exits.outside_ns[rows]
    alone = exits.isa[rows] == 0
    end = time + np.where(alone | (kvm != NOT_TOLD), parts, 0)
    real = np.flatnonzero(~alone)
    if len(real) > 1:
        resumed = time[real[1:]] - exits.guest_ns[rows][real[1:]]
        known = (exits.guest_ns[rows][real[1:]] != NOT_TOLD) & (kvm[real[:-1]] != NOT_TOLD)
        end[real[:-1]] = np.where(known, np.maximum(resumed, time[real[:-1]]), end[real[:-1]])
    return end


def without_length(exits: ExitTable, vcpu: int) -> NDArray[np.int64]:
    """Rows of exits of which nothing tells how long they took."""
    rows = np.flatnonzero(exits.vcpu == vcpu)
    return rows[_ends(exits, rows) <= exits.time_ns[rows]]


def lost_of(events: EventTable) -> list[Lost]:
    """The table's gaps with their beginnings, in order of time."""
    if not events.gaps:
        return []
    # All processors' events behind one another, each processor's in order of time.
    cpus = np.concatenate([np.zeros(0, np.uint16), *(c.cpu for c in events.values())])
    times = np.concatenate([np.zeros(0, np.int64), *(c.time_ns for c in events.values())])
    at = np.lexsort((times, cpus))
    cpus, times = cpus[at], times[at]
    lost = []
    for gap in sorted(events.gaps, key=lambda gap: gap.cpu):
        start = gap.time_ns
        if gap.cpu >= 0:
            first, end = (int(np.searchsorted(cpus, np.uint16(gap.cpu), side)) for side in ("left", "right"))
            before = first + int(np.searchsorted(times[first:end], gap.time_ns)) - 1
            start = int(times[before]) if before >= first else gap.time_ns
        lost.append(Lost(start, gap.time_ns, gap.cpu, gap.lost))
    return sorted(lost, key=lambda one: one.end_ns)


def other_kinds(events: EventTable, *, with_print: bool) -> list[EventColumns]:
    """The kinds whose events are drawn as moments: all that the slices do not show.

    Args:
        events: all of them.
        with_print: what was written into the trace, too; its marks are that already.
    """
    return [c for c in events.values() if len(c) and (with_print or c.name != "print")]


def moments_of(columns: EventColumns) -> Iterator[Moment]:
    """One kind's events, in order of time; of kvm_exit and kvm_entry those of no vcpu, which no slice shows."""
    if columns.name in _SHOWN_AS_EXITS:
        columns = columns.take(columns.vcpu < 0)
    has_text = TAIL in (columns.data.dtype.names or ())
    located = [f for f in columns.format.own_fields if f.located]
    names = [name for name in columns.fields if not any(f.name == name for f in located)]
    for first in range(0, len(columns), _BLOCK):
        part = columns.take(np.arange(first, min(first + _BLOCK, len(columns))))
        lists = [part.data[name].tolist() for name in names]
        frame = zip(part.time_ns.tolist(), part.vcpu.tolist(), part.cpu.tolist(), strict=True)
        for row, (time, vcpu, cpu) in enumerate(frame):
            values = {name: plain(values[row]) for name, values in zip(names, lists, strict=True)}
            if located:
                raw = part.data[row].tobytes()
                values |= {f.name: _located(raw, int(part.data[f.name][row]), f.c_type) for f in located}
            elif has_text:
                values["text"] = part.text(row)
            yield Moment(time, vcpu, cpu, values)


def _located(raw: bytes, place: int, c_type: str) -> str:
    # length << 16 | offset: in the event, or from behind the field with __rel_loc, which is left as it is.
    if c_type.startswith("__rel_loc"):
        return f"{place:#x}"
    start, length = place & 0xFFFF, place >> 16 & 0xFFFF
    piece = raw[start : start + length]
    return piece.split(b"\0", 1)[0].decode("utf-8", "replace") if "char" in c_type else piece.hex()


class Words:
    """Exits in words, each combination of numbers once.

    Args:
        exits: the table.
    """

    # So many different ones are remembered: with a fault address in it, nearly each is different.
    _MOST = 1 << 16

    def __init__(self, exits: ExitTable) -> None:
        self._exits = exits
        self._known: dict[tuple[int, ...], str] = {}
        columns = (exits.isa, exits.number, exits.info1, exits.info2, exits.intr_info, exits.error_code)
        self._columns = columns
        self._logged = exits.log_row >= 0

    def __call__(self, row: int) -> str:
        """Those of one exit."""
        if self._logged[row]:
            return self._exits.words(row)
        key = tuple(int(column[row]) for column in self._columns)
        words = self._known.get(key)
        if words is None:
            words = self._exits.words(row)
            if len(self._known) < self._MOST:
                self._known[key] = words
        return words


@contextmanager
def text_file(path: Path) -> Iterator[TextIO]:
    """A new file of text, which takes the place of `path` when all of it is there."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        try:
            yield text
        finally:
            text.detach()
