"""One block of a machine's memory: a region of the VM with a name, and its bytes where they can be had."""

from __future__ import annotations

from kvmbench import kvm
from kvmbench.kvm import VM
from kvmbench.machine.size import show_size


class Region(kvm.Region):
    """A block of guest memory; `Memory.map` makes it.

    Attributes:
        name: what the caller called it.
        view: its bytes without a copy, where the core is in this process; else None.
    """

    def __init__(self, vm: VM, handle: int, *, gpa: int, size_bytes: int, flags: int, name: str = "") -> None:
        super().__init__(vm, handle, gpa=gpa, size_bytes=size_bytes, flags=flags)
        self.name = name
        self.view = self.map()

    def __str__(self) -> str:
        marks = " read-only" if self.readonly else ""
        name = f" {self.name!r}" if self.name else ""
        return f"{self.gpa:#x} to {self.end - 1:#x} ({show_size(self.size_bytes)}{marks}{name})"
