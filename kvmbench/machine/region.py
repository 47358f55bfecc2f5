"""One block of guest memory: where it lies, and its handle in the core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kvmbench.machine.size import show_size


class RegionStore(Protocol):
    """The requests that memory is made of (`kvmbench.host.client.Core` serves them)."""

    def add_region(self, vm: int, gpa: int, size_bytes: int, flags: int = 0) -> int: ...
    def set_region(self, handle: int, gpa: int, flags: int) -> None: ...
    def read_region(self, handle: int, offset: int, length: int) -> bytes: ...
    def write_region(self, handle: int, offset: int, data: bytes) -> None: ...
    def fill_region(self, handle: int, offset: int, length: int, byte: int = 0) -> None: ...
    def dirty_log(self, handle: int) -> bytes: ...
    def map_region(self, handle: int) -> memoryview | None: ...
    def close_handle(self, handle: int) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A block of guest memory.

    Attributes:
        gpa: address of its first byte.
        size_bytes: its length, whole pages.
        handle: its number in the core.
        readonly: the guest's writes leave the guest as MMIO exits (KVM_MEM_READONLY).
        log_dirty: KVM notes which pages the guest writes (KVM_MEM_LOG_DIRTY_PAGES).
        name: what the caller called it.
        view: its bytes without a copy, where the core is in this process; else None.
    """

    gpa: int
    size_bytes: int
    handle: int
    readonly: bool = False
    log_dirty: bool = False
    name: str = ""
    view: memoryview | None = field(default=None, repr=False)

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.gpa + self.size_bytes

    def __str__(self) -> str:
        marks = " read-only" if self.readonly else ""
        name = f" {self.name!r}" if self.name else ""
        return f"{self.gpa:#x} to {self.end - 1:#x} ({show_size(self.size_bytes)}{marks}{name})"
