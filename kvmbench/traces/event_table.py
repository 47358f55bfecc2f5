"""Events of a trace: columns for each kind, and all of them in order of time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.arguments import integer
from kvmbench.traces.format import TAIL, EventFormat
from kvmbench.traces.words import counted

if TYPE_CHECKING:
    import pandas as pd

#: `EventColumns.vcpu` of an event that no vcpu of the trace's machine made.
NO_VCPU = -1
_COMMON = frozenset(("common_type", "common_flags", "common_preempt_count", "common_pid"))
# Rows that a repr shows.
_SHOWN = 5


@dataclass(frozen=True)
class Gap:
    """Events that the kernel had no room for.

    Attributes:
        time_ns: when the first event behind them happened.
        cpu: the processor; -1: the log of a vcpu.
        lost: how many; 0: not told. The kernel tells it by page, where the page has room left for the number, and in
            sum: of several gaps of a processor without a number the first has that of all.
    """

    time_ns: int
    cpu: int
    lost: int


@dataclass(frozen=True)
class EventColumns:
    """All events of one kind, in order of time; every column has the shape (n,).

    Attributes:
        format: what the kernel says of it.
        time_ns: by the trace's clock, int64.
        cpu: processor of the host, uint16.
        tid: the kernel's number of the thread, int32.
        vcpu: whose it was, its place in ``m.cpus``, int16; `NO_VCPU`: nobody's or not told.
        data: the event's own fields, a structured array.
    """

    format: EventFormat
    time_ns: NDArray[np.int64]
    cpu: NDArray[np.uint16]
    tid: NDArray[np.int32]
    vcpu: NDArray[np.int16]
    data: NDArray[np.void] = field(repr=False)

    @property
    def name(self) -> str:
        """ "kvm_exit"."""
        return self.format.name

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the event's own fields."""
        names = self.data.dtype.names or ()
        return tuple(name for name in names if name not in _COMMON and name != TAIL)

    def __len__(self) -> int:
        return len(self.time_ns)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """A column by its name: time_ns, cpu, tid, vcpu, or a field."""
        if name in ("time_ns", "cpu", "tid", "vcpu"):
            column: NDArray[Any] = getattr(self, name)
            return column
        if name not in self.fields:
            raise KeyError(f"{self.name} has no field {name!r}; it has {', '.join(self.fields)}")
        return self.data[name]

    def take(self, at: NDArray[Any]) -> EventColumns:
        """Those rows, by place or by a mask."""
        if at.dtype == np.bool_ and at.all():
            return self
        return EventColumns(self.format, self.time_ns[at], self.cpu[at], self.tid[at], self.vcpu[at], self.data[at])

    def text(self, row: int) -> str:
        """What follows the fixed part of a row, as text: of a mark, what was written."""
        if TAIL not in (self.data.dtype.names or ()):
            return ""
        return bytes(self.data[TAIL][row].tobytes()).split(b"\0", 1)[0].decode("utf-8", "replace").rstrip("\n")

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas frame with a column a field."""
        import pandas as pd

        columns: dict[str, Any] = {"time_ns": self.time_ns, "cpu": self.cpu, "tid": self.tid, "vcpu": self.vcpu}
        for name in self.fields:
            values = self.data[name]
            columns[name] = list(values) if values.ndim > 1 else values
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return f"<EventColumns {self.format.system}/{self.name}: {len(self):,} events; {', '.join(self.fields)}>"


class EventTable(Mapping[str, EventColumns]):
    """Events by kind: ``events["kvm_exit"]["guest_rip"]``; and in order of time where that is asked for.

    Attributes:
        gaps: where events were lost, in order of time.
        bad_pages: pages of the ring buffer that made no sense from some point on.
        unknown: events of a kind without a description.
    """

    def __init__(
        self,
        columns: Iterable[EventColumns] = (),
        *,
        gaps: Iterable[Gap] = (),
        bad_pages: int = 0,
        unknown: int = 0,
    ) -> None:
        self._columns = {c.name: c for c in columns}
        self.gaps = tuple(sorted(gaps, key=lambda gap: gap.time_ns))
        self.bad_pages = bad_pages
        self.unknown = unknown
        self._order: tuple[NDArray[np.uint16], NDArray[np.int64]] | None = None

    def __getitem__(self, name: str) -> EventColumns:
        try:
            return self._columns[name.rpartition("/")[2]]
        except (KeyError, AttributeError):
            there = ", ".join(self._columns) or "none at all"
            raise KeyError(f"there are no events {name!r}; there are {there}") from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.rpartition("/")[2] in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    @property
    def count(self) -> int:
        """Events of all kinds."""
        return sum(len(c) for c in self._columns.values())

    @property
    def counts(self) -> dict[str, int]:
        """Events by kind, the most frequent first."""
        return dict(sorted(((n, len(c)) for n, c in self._columns.items()), key=lambda item: -item[1]))

    @property
    def lost(self) -> int:
        """Events that the kernel counted as lost."""
        return sum(gap.lost for gap in self.gaps)

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds, as `order` numbers them."""
        return tuple(self._columns)

    @property
    def order(self) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """All events in order of time: of each its kind (a place in `names`), and its row there; shape (n,) each."""
        if self._order is None:
            columns = list(self._columns.values())
            kinds = [np.full(len(c), n, np.uint16) for n, c in enumerate(columns)]
            rows = [np.arange(len(c)) for c in columns]
            if columns:
                at = np.argsort(np.concatenate([c.time_ns for c in columns]), kind="stable")
                self._order = np.concatenate(kinds)[at], np.concatenate(rows)[at]
            else:
                self._order = np.zeros(0, np.uint16), np.zeros(0, np.int64)
        return self._order

    def of_vcpu(self, *vcpus: int) -> EventTable:
        """Only what these vcpus made."""
        return self.with_columns(c.take(np.isin(c.vcpu, vcpus)) for c in self._columns.values())

    def with_columns(self, columns: Iterable[EventColumns]) -> EventTable:
        """Other columns with what was lost and not understood on the way to them."""
        return EventTable(columns, gaps=self.gaps, bad_pages=self.bad_pages, unknown=self.unknown)

    def between(self, start_ns: int, end_ns: int) -> EventTable:
        """Only what happened in [start_ns, end_ns)."""
        start_ns, end_ns = integer(start_ns, "start_ns"), integer(end_ns, "end_ns")
        kept = []
        for c in self._columns.values():
            first, last = np.searchsorted(c.time_ns, (start_ns, end_ns))
            kept.append(c.take(np.arange(first, last)))
        return EventTable(kept, gaps=(g for g in self.gaps if start_ns <= g.time_ns < end_ns))

    def rows(self, first: int = 0, count: int = 20) -> list[tuple[int, int, int, str, dict[str, Any]]]:
        """Events in order of time: (time_ns, cpu, vcpu, name, fields) each.

        Args:
            first: place of the first one; negative: from the end.
            count: at most so many.
        """
        first, count = integer(first, "first"), integer(count, "count", 0)
        kinds, rows = self.order
        start = first if first >= 0 else max(0, len(kinds) + first)
        names = self.names
        shown = []
        for kind, row in zip(kinds[start : start + count], rows[start : start + count], strict=True):
            c = self._columns[names[kind]]
            values = {name: plain(c.data[name][row]) for name in c.fields}
            if TAIL in (c.data.dtype.names or ()):
                values["text"] = c.text(int(row))
            shown.append((int(c.time_ns[row]), int(c.cpu[row]), int(c.vcpu[row]), c.name, values))
        return shown

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas frame of all events in order of time: time_ns, cpu, tid, vcpu, event.

        The fields, which differ from kind to kind, are in ``events[name].to_dataframe()``.
        """
        import pandas as pd

        kinds, rows = self.order
        columns: dict[str, NDArray[Any]] = {}
        for name in ("time_ns", "cpu", "tid", "vcpu"):
            parts = [np.asarray(getattr(c, name)) for c in self._columns.values()]
            joined = np.empty(len(kinds), dtype=parts[0].dtype if parts else np.int64)
            for kind, part in enumerate(parts):
                at = kinds == kind
                joined[at] = part[rows[at]]
            columns[name] = joined
        frame = pd.DataFrame(columns)
        frame["event"] = pd.Categorical.from_codes(kinds.astype(np.int32), categories=list(self.names))
        return frame

    def __repr__(self) -> str:
        counts = list(self.counts.items())
        shown = ", ".join(f"{name} {count:,}" for name, count in counts[:_SHOWN])
        more = f", and {counted(len(counts) - _SHOWN, 'more kind')}" if len(counts) > _SHOWN else ""
        lost = f"; lost: {self.lost:,} in {counted(len(self.gaps), 'gap')}" if self.gaps else ""
        bad = f"; {counted(self.bad_pages, 'page')} made no sense" if self.bad_pages else ""
        shown = f"; {shown}" if shown else ""
        return f"<EventTable: {counted(self.count, 'event')}{shown}{more}{lost}{bad}>"


def plain(value: Any) -> Any:
    """A numpy value as one of Python's: a number, text, a list of numbers."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, bytes):
        return value.split(b"\0", 1)[0].decode("utf-8", "replace")
    return value.item() if hasattr(value, "item") else value
