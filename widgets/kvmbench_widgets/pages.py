"""Guest memory a page at a time, for panels: what it holds now, and what it held at the stop shown before."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from kvmbench.debug.cpu import Cpu
from kvmbench.debug.machine import Machine
from kvmbench.kvm.region import PAGE_BYTES

# Pages remembered for comparison: 4 MiB.
_MOST = 1024
_MASK = (1 << 64) - 1


class Page(NamedTuple):
    """One page as it is now.

    Attributes:
        data: its bytes, or None where there is no memory.
        note: why not.
        before: its bytes at the stop shown before, if they were looked at then.
    """

    data: bytes | None
    note: str = ""
    before: bytes | None = None


class Pages:
    """Reads pages and remembers those read for one stop more.

    Only what a panel shows is read and compared: a whole machine's memory would be a copy of
    gigabytes a step, or a transfer of them on a remote host.
    """

    def __init__(self) -> None:
        self._stop: Any = None
        self._now: dict[Hashable, bytes] = {}
        self._before: dict[Hashable, bytes] = {}
        self._fresh: dict[Hashable, Page] = {}

    def begin(self, machine: Machine) -> None:
        """Called before each look while all vcpus rest: notices a new stop."""
        stop = tuple(cpu.stop_serial for cpu in machine.cpus)
        self._fresh = {}
        if stop != self._stop:
            self._stop, self._before, self._now = stop, self._now, {}

    def peek(self) -> None:
        """Called before each look while the guest runs: what changed since the last stop is marked."""
        self._fresh = {}

    def physical(self, machine: Machine, page: int, *, live: bool = False) -> Page:
        """The page at a gpa; with `live` compared with the last stop, and not remembered."""
        return self._page(("gpa", page), machine, page, live)

    def linear(self, cpu: Cpu, page: int) -> Page:
        """The page at a linear address, through the vcpu's page tables."""
        key = ("gva", cpu.index, page)
        if key in self._fresh:
            return self._fresh[key]
        gpa = cpu.translate(page)
        if gpa is None:
            found = self._fresh[key] = Page(None, "not mapped")
            return found
        return self._page(key, cpu.machine, gpa, False)

    def read(self, cpu: Cpu, address: int, size_bytes: int) -> bytes:
        """Bytes at a linear address, as many as there are."""
        found = b""
        while len(found) < size_bytes:
            at = (address + len(found)) & _MASK
            data = self.linear(cpu, at & -PAGE_BYTES).data
            if data is None:
                break
            found += data[at % PAGE_BYTES : at % PAGE_BYTES + size_bytes - len(found)]
        return found

    def _page(self, key: Hashable, machine: Machine, gpa: int, live: bool) -> Page:
        if key in self._fresh:
            return self._fresh[key]
        if not machine.memory.holds(gpa, PAGE_BYTES):
            found = Page(None, f"mapped to gpa {gpa:#x}, where there is no memory")
        else:
            data = machine.memory.read(gpa, PAGE_BYTES)
            if live:
                found = Page(data, "", self._now.get(key))
            else:
                found = Page(data, "", self._before.get(key))
                if len(self._now) < _MOST or key in self._now:
                    self._now[key] = data
        self._fresh[key] = found
        return found
