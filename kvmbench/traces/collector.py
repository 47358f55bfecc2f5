"""Takes what a trace writes out of the host, on a thread of its own, and keeps it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable

import numpy as np

from kvmbench.core import wire
from kvmbench.errors import ClosedError, HostLost, KvmbenchError
from kvmbench.host.client import Core
from kvmbench.host.trace_messages import trace_read
from kvmbench.traces.run_log import ROW

# One reading; the rings are emptied in as many as it takes.
_READ_BYTES = 4 << 20
# At a stretch while the guest writes on.
_MOST_BYTES = 32 << 20
# Between readings. A ring of 4 MiB takes 100 ms of the fastest guest seen (0.7 M events of 60 bytes a second).
_BUSY_S, _IDLE_S = 0.01, 0.05
_BUSY_BYTES = 1 << 18
# How long the reader may take to notice that it is to end: a reading over a slow channel.
_END_S = 30.0


class Collector:
    """Pages and rows of one trace, in the order they came.

    Attributes:
        pages: (processor, pages) of the ring buffer.
        rows: (vcpu's handle, rows, rows lost behind them) of the log.
        readings: places in `pages` at which a reading began, of those before which nothing was left in the rings.
        taken_bytes: of both.
        trouble: why reading ended early, in words; "" while nothing is wrong.
        full: the limit was reached: what came later was not kept.
    """

    def __init__(self, core: Core, handle: int, *, limit_bytes: int, when_full: Callable[[], None]) -> None:
        self.pages: list[tuple[int, memoryview]] = []
        self.rows: list[tuple[int, memoryview, int]] = []
        self.readings: list[int] = []
        self.taken_bytes = 0
        self.trouble = ""
        self.full = False
        self._core = core
        self._handle = handle
        self._limit = limit_bytes
        self._when_full = when_full
        self._reading = threading.Lock()
        self._emptied = True
        self._wake = threading.Event()
        self._ending = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to read."""
        self._ending = False
        self._wake.clear()
        self._thread = threading.Thread(target=self._work, name="kvmbench trace", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and takes what is left."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ending = True
        self._wake.set()
        thread.join(_END_S)
        if thread.is_alive():
            self.trouble = self.trouble or f"the reader did not end within {_END_S:g} s"
            return
        self.drain(to_the_end=True)

    def drain(self, *, to_the_end: bool = False) -> int:
        """Takes all there is now, also while the guest runs; returns the bytes taken.

        Args:
            to_the_end: until there is no more: only where nothing is written any more, for a guest may be faster.
        """
        before = self.taken_bytes
        with self._reading:
            more = not self.trouble and not self.full
            began, emptied, self._emptied = len(self.pages), self._emptied, False
            while more:
                try:
                    chunks, more = trace_read(self._core, self._handle, _READ_BYTES)
                except (HostLost, ClosedError) as error:
                    self.trouble = f"the trace ends here: {error}"
                    break
                except KvmbenchError as error:
                    self.trouble = f"the trace cannot be read any more: {error}"
                    break
                self._emptied = not more
                for chunk in chunks:
                    if chunk.sort == wire.KB_TRACE_CHUNK_PAGE:
                        self.pages.append((chunk.index, chunk.data))
                    elif chunk.sort == wire.KB_TRACE_CHUNK_LOG:
                        self.rows.append((chunk.index, chunk.data, chunk.lost))
                    self.taken_bytes += len(chunk.data)
                if not chunks or (not to_the_end and self.taken_bytes - before >= _MOST_BYTES):
                    break
                if self.taken_bytes >= self._limit:
                    self.full = True
                    more = False
            if emptied and len(self.pages) > began:
                self.readings.append(began)
        if self.full and self.taken_bytes > before:
            # Where the host is lost, there is nothing to switch off.
            with contextlib.suppress(KvmbenchError):
                self._when_full()
        return self.taken_bytes - before

    def forget(self) -> None:
        """Lets go of what was taken."""
        self.pages, self.rows, self.readings = [], [], []

    def end(self, most_bytes: int) -> tuple[list[tuple[int, memoryview]], list[tuple[int, memoryview, int]], int]:
        """The last pages and rows, and since when they are all there are.

        The first pages of each processor are among them, for these say which thread runs which vcpu; and KVM_RUNs that
        began before the last rows and may not have ended, for these are told once.
        """
        # In this order: another thread may be reading.
        readings, rows, pages = list(self.readings), list(self.rows), list(self.pages)
        first: dict[int, int] = {}
        for n, (cpu, _) in enumerate(pages):
            first.setdefault(cpu, n)
        # Whole readings: of a part of one, what other processors wrote at that time would be missing.
        at, size = len(pages), 0
        for began in reversed(readings):
            if size >= most_bytes:
                break
            size += sum(len(data) for _, data in pages[began:at])
            at = began
        # The rest of a page that was read in part begins with the time of the last event of that part.
        since = _complete_since((cpu, int.from_bytes(data[:8], "little") + 1) for cpu, data in pages[at:])
        row, size = len(rows), 0
        if at == len(pages):
            while row > 0 and size < most_bytes:
                row -= 1
                size += len(rows[row][1])
            since = _complete_since((handle, _left_ns(data)) for handle, data, _ in rows[row:])
        else:
            row = _first_since(rows, since)
        last = {handle: data[-ROW.itemsize :] for handle, data, _ in rows[:row] if len(data)}
        begun = [(handle, data, 0) for handle, data in last.items() if not np.frombuffer(data, ROW)["leave_ns"][0]]
        return [pages[n] for n in sorted(first.values()) if n < at] + pages[at:], begun + rows[row:], since

    def _work(self) -> None:
        while not self._ending and not self.full and not self.trouble:
            taken = self.drain()
            self._wake.wait(_BUSY_S if taken > _BUSY_BYTES else _IDLE_S)


def _complete_since(times: Iterable[tuple[int, int]]) -> int:
    # From the times of pieces of several sources (a page begins with that of its first event), in the order they were
    # read: since when no piece is missing. A source that begins late was quiet, else it would have been read before.
    begun: dict[int, int] = {}
    last = 0
    for source, time in times:
        begun.setdefault(source, time)
        last = max(last, time)
    middle = (min(begun.values(), default=0) + last) // 2
    return max((time for time in begun.values() if time <= middle), default=0)


def _first_since(rows: list[tuple[int, memoryview, int]], since_ns: int) -> int:
    # From which piece on all rows since then are there. Of one reading that of a vcpu may be old and another's not, so
    # it takes two old ones of the same.
    old: set[int] = set()
    row = len(rows)
    while row > 0:
        handle, data, _ = rows[row - 1]
        if _left_ns(data) < since_ns:
            if handle in old:
                break
            old.add(handle)
        row -= 1
    return row


def _left_ns(rows: memoryview) -> int:
    # When the last KVM_RUN of some rows ended, or began if it has not.
    whole = len(rows) // ROW.itemsize * ROW.itemsize
    last = np.frombuffer(rows[:whole], dtype=ROW)[-1:]
    return int(max(last["leave_ns"].max(initial=0), last["enter_ns"].max(initial=0)))
