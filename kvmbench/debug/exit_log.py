"""The exits that reached user space, as they happen: the latest in full, all of them counted.

Off until asked for (`Cpu.log_exits`): an exit served by a device costs about a
microsecond in Python, and a line in the log adds a third of that
(benchmarks/exit_roundtrip.py).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import NamedTuple

from kvmbench.errors import MisuseError

#: How many exits are kept in full if nothing else is asked for; about 0.2 kB each.
CAPACITY = 10_000
# Different places counted one by one; a guest that touches all ports and addresses must not fill our memory.
_PLACES = 4096
_ELSEWHERE = -1


class ExitEntry(NamedTuple):
    """One exit.

    Attributes:
        time_ns: when it was served, of CLOCK_MONOTONIC on the machine Python runs on.
        kind: "out", "in", "mmio write", "mmio read", or an exit reason such as "HLT".
        where: port, guest physical address, or None.
        size_bytes: bytes of one access, or 0.
        value: what was written, as a number; None for a read.
        rip: offset of the instruction (or of the one after it, for an OUT), or None where the host did not send it.
    """

    time_ns: int
    kind: str
    where: int | None
    size_bytes: int
    value: int | None
    rip: int | None


class ExitLog:
    """The latest exits of one vcpu, oldest first.

    One thread writes, the vcpu's; any may read.

    Attributes:
        total: exits since the log was made or cleared.
        counts: (kind, where) to how often; beyond 4096 places the rest is counted at -1.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity <= 10_000_000:
            raise MisuseError(f"a log keeps 1 to 10,000,000 exits, not {capacity!r}")
        self._entries: deque[ExitEntry] = deque(maxlen=capacity)
        self.total = 0
        self.counts: dict[tuple[str, int | None], int] = {}

    @property
    def capacity(self) -> int:
        """How many exits are kept in full."""
        return self._entries.maxlen or 0

    def add(self, kind: str, where: int | None, size_bytes: int, value: int | None, rip: int | None) -> None:
        """Notes an exit that is happening now."""
        self._entries.append(ExitEntry(time.monotonic_ns(), kind, where, size_bytes, value, rip))
        self.total += 1
        place = (kind, where)
        counts = self.counts
        if place not in counts and len(counts) >= _PLACES:
            place = (kind, _ELSEWHERE)
        counts[place] = counts.get(place, 0) + 1

    def entries(self, first: int = 0, count: int | None = None) -> list[ExitEntry]:
        """Kept exits from the `first`-th on (0 is the oldest kept); all of them if `count` is None."""
        for _ in range(100):
            try:
                # The writer may append meanwhile, which ends an iteration with an error.
                return list(itertools.islice(self._entries, first, None if count is None else first + count))
            except RuntimeError:
                continue
        return []

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.counts.clear()
        self.total = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        places = sorted(self.counts.items(), key=lambda item: -item[1])[:4]
        shown = [f"{kind}{'' if where is None else f' {where:#x}'}: {count:,}" for (kind, where), count in places]
        return f"<ExitLog: {', '.join([f'{self.total:,} exits', *shown])}>"
