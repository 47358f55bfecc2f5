"""Events that become more: pages are decoded once, and put in order of time with those that are there already.

Whoever looks at a trace that runs sees all of it each time. So rows lie in arrays with room behind them, and what is
handed out are views of the rows so far, which nothing writes to any more. Only where late events belong between those
already shown (another processor's ring was read later) are the arrays copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.traces.event_table import NO_VCPU, EventColumns, EventTable, Gap
from kvmbench.traces.format import EventFormat, PageLayout
from kvmbench.traces.pages import Decoded, Rows, decode

# Rows there is room for behind those that are there.
_LEAST_ROOM = 256
# Pages decoded at once: their rows are there twice for a moment.
_BATCH_BYTES = 16 << 20


class GrowingEvents:
    """All events so far, nobody's vcpu yet.

    Attributes:
        gaps: where events were lost, as the pages tell it.
        bad: pages that made no sense from some point on.
        unknown: events of a kind without a description.
    """

    def __init__(
        self, formats: Mapping[int, EventFormat], *, page_bytes: int, layout: PageLayout, use_core: bool = True
    ) -> None:
        self.gaps: list[Gap] = []
        self.bad = self.unknown = 0
        self._formats = formats
        self._page_bytes = page_bytes
        self._layout = layout
        self._use_core = use_core
        self._kinds: dict[str, _Kind] = {}

    def add(self, pages: Sequence[tuple[int, memoryview]]) -> None:
        """Adds (processor, pages), in the order they were read."""
        whole = sum(len(data) for _, data in pages)
        done = 0
        for batch in _batches(pages):
            done += sum(len(data) for _, data in batch)
            self._add(batch, ahead=whole / done if done else 1.0)

    def _add(self, pages: Sequence[tuple[int, memoryview]], *, ahead: float) -> None:
        of_cpu: dict[int, list[memoryview]] = {}
        for cpu, data in pages:
            of_cpu.setdefault(cpu, []).append(data)
        decoded = []
        for cpu, pieces in of_cpu.items():
            # A reading may be of a page or two, and each piece costs some numpy calls a kind.
            whole = pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))
            found = decode(
                whole, self._formats, page_bytes=self._page_bytes, layout=self._layout, use_core=self._use_core
            )
            decoded += [(cpu, piece) for piece in found]
        self.add_decoded(decoded, ahead=ahead)

    def add_decoded(self, decoded: Sequence[tuple[int, Decoded]], *, ahead: float = 1.0) -> None:
        """Adds (processor, what its pages hold).

        Args:
            decoded: of each processor in the order of its pages; processors in any order.
            ahead: by how much the rows with those to come will be more than now, if these are alike.
        """
        parts: dict[int, list[tuple[int, Rows]]] = {}
        for cpu, piece in decoded:
            for number, rows in piece.rows.items():
                parts.setdefault(number, []).append((cpu, rows))
            self.gaps.extend(Gap(time, cpu, lost) for time, lost in piece.gaps)
            self.bad += piece.bad
            self.unknown += piece.unknown
        for number, found in parts.items():
            described = self._formats[number]
            self._kinds.setdefault(described.name, _Kind(described)).add(found, ahead)

    def table(self, gaps: Sequence[Gap]) -> EventTable:
        """The events so far; `gaps` are `gaps` with what else is known of them."""
        # In the order of the formats, whichever came first.
        names = [f.name for f in self._formats.values() if f.name in self._kinds]
        columns = [self._kinds[name].columns() for name in names]
        return EventTable(columns, gaps=gaps, bad_pages=self.bad, unknown=self.unknown)


def _batches(pages: Iterable[tuple[int, memoryview]]) -> Iterator[list[tuple[int, memoryview]]]:
    batch: list[tuple[int, memoryview]] = []
    size = 0
    for cpu, data in pages:
        batch.append((cpu, data))
        size += len(data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Kind:
    # Events of one kind, in order of time.

    def __init__(self, described: EventFormat) -> None:
        self._format = described
        self._count = 0
        # So many rows were handed out and stay as they are.
        self._shown = 0
        self._time = np.empty(0, np.int64)
        self._cpu = np.empty(0, np.uint16)
        self._tid = np.empty(0, np.int32)
        self._raw = np.empty((0, described.size_bytes), np.uint8)

    def add(self, parts: Sequence[tuple[int, Rows]], ahead: float) -> None:
        time = np.concatenate([rows.time_ns for _, rows in parts])
        cpu = np.concatenate([np.full(len(rows.time_ns), cpu, np.uint16) for cpu, rows in parts])
        tid = np.concatenate([_threads(rows.data) for _, rows in parts])
        # Rows with text are as long as the longest of their piece.
        raw = np.zeros((len(time), max(rows.data.dtype.itemsize for _, rows in parts)), np.uint8)
        start = 0
        for _, rows in parts:
            n, size = len(rows.data), rows.data.dtype.itemsize
            raw[start : start + n, :size] = rows.data.view(np.uint8).reshape(n, size)
            start += n
        keep = self._count
        if np.any(time[1:] < time[:-1]):
            at = np.argsort(time, kind="stable")
            time, cpu, tid, raw = time[at], cpu[at], tid[at], raw[at]
        self._widen(raw.shape[1])
        if raw.shape[1] < self._raw.shape[1]:
            raw = np.pad(raw, ((0, 0), (0, self._raw.shape[1] - raw.shape[1])))
        if keep and time[0] < self._time[keep - 1]:
            keep = int(np.searchsorted(self._time[:keep], time[0], side="right"))
            late = slice(keep, self._count)
            time = np.concatenate([self._time[late], time])
            at = np.argsort(time, kind="stable")
            time = time[at]
            cpu = np.concatenate([self._cpu[late], cpu])[at]
            tid = np.concatenate([self._tid[late], tid])[at]
            raw = np.concatenate([self._raw[late], raw])[at]
        self._make_room(keep, keep + len(time), ahead)
        end = keep + len(time)
        self._time[keep:end], self._cpu[keep:end], self._tid[keep:end] = time, cpu, tid
        self._raw[keep:end] = raw
        self._count = end

    def columns(self) -> EventColumns:
        n = self._shown = self._count
        raw = self._raw[:n]
        data = raw.view(self._format.dtype_of(raw.shape[1])).reshape(n)
        vcpu = np.full(n, NO_VCPU, np.int16)
        return EventColumns(self._format, self._time[:n], self._cpu[:n], self._tid[:n], vcpu, data)

    def _widen(self, stride: int) -> None:
        if stride <= self._raw.shape[1]:
            return
        wider = np.zeros((len(self._raw), stride), np.uint8)
        wider[: self._count, : self._raw.shape[1]] = self._raw[: self._count]
        self._raw = wider

    def _make_room(self, keep: int, count: int, ahead: float) -> None:
        # For `count` rows, of which the first `keep` stay. Room that nothing is written to takes no memory.
        if count <= len(self._time) and keep >= self._shown:
            return
        room = len(self._time) if count <= len(self._time) else int(count * max(1.5, ahead * 1.02)) + _LEAST_ROOM
        self._time = _copied(self._time, keep, room)
        self._cpu = _copied(self._cpu, keep, room)
        self._tid = _copied(self._tid, keep, room)
        self._raw = _copied(self._raw, keep, room)
        self._shown = 0


def _threads(rows: NDArray[np.void]) -> NDArray[np.int32]:
    if "common_pid" not in (rows.dtype.names or ()):
        return np.zeros(len(rows), np.int32)
    return np.ascontiguousarray(rows["common_pid"]).astype(np.int32)


def _copied(column: NDArray[Any], keep: int, room: int) -> NDArray[Any]:
    longer = np.empty((room, *column.shape[1:]), column.dtype)
    longer[:keep] = column[:keep]
    return longer
