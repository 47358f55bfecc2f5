"""Guest memory: a range of guest-physical addresses with bytes of the core's behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvmbench.core import wire
from kvmbench.kvm.descriptor import Descriptor
from kvmbench.uapi import constants

if TYPE_CHECKING:
    from kvmbench.kvm.vm import VM

PAGE_BYTES = 4096


class Region(Descriptor):
    """A memory slot of a VM; `VM.add_region` makes it.

    Offsets count from the region's start, not from guest-physical address 0.

    Attributes:
        gpa: guest-physical address of its first byte.
        size_bytes: its length, whole pages.
        flags: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY.
    """

    _noun = "memory region"

    def __init__(self, vm: VM, handle: int, *, gpa: int, size_bytes: int, flags: int) -> None:
        super().__init__(vm.core, handle, vm)
        self.gpa = gpa
        self.size_bytes = size_bytes
        self.flags = flags

    def __repr__(self) -> str:
        return f"<{self._noun} [{self.gpa:#x}, {self.end:#x}){' (closed)' if self.closed else ''}>"

    def read(self, offset: int, length_bytes: int) -> bytes:
        """Copies bytes out.

        Raises:
            AddressError: the range leaves the region.
        """
        return self.core.read_region(self._open_handle(), offset, length_bytes)

    def write(self, offset: int, data: bytes) -> None:
        """Copies bytes in, also where the guest may only read.

        Raises:
            AddressError: the range leaves the region.
        """
        self.core.write_region(self._open_handle(), offset, data)

    def fill(self, offset: int, length_bytes: int, byte: int = 0) -> None:
        """Sets all bytes of a range to one value, without sending them.

        Raises:
            AddressError: the range leaves the region.
        """
        self.core.fill_region(self._open_handle(), offset, length_bytes, byte)

    def map(self) -> memoryview | None:
        """The bytes themselves, writable and without a copy; None when the core is not in this process.

        The view stays valid as long as it is held, even past `close()`, but then it is no longer the guest's.
        """
        return self.core.map_region(self._open_handle())

    def dirty_log(self) -> NDArray[np.bool_]:
        """Which pages the guest wrote since the last call: one bool a 4096-byte page, and starts over.

        Needs KVM_MEM_LOG_DIRTY_PAGES among the flags. What is written from here is not logged.
        Capability: basic. Source: KVM API, KVM_GET_DIRTY_LOG.

        Raises:
            KvmIoctlError: the region has no dirty log (ENOENT).
        """
        bitmap = np.frombuffer(self.core.dirty_log(self._open_handle()), dtype=np.uint8)
        return np.unpackbits(bitmap, bitorder="little")[: self.size_bytes // PAGE_BYTES].astype(np.bool_)

    def protect(self, offset: int, length_bytes: int, protection: wire.Protection) -> None:
        """Makes accesses to whole pages leave the guest as MMIO exits, or takes that back.

        Args:
            offset: of the first page, a multiple of 4096.
            length_bytes: a multiple of 4096.
            protection: `Protection.WRITE` for writes, ``ALL`` for reads and writes, ``NONE`` for neither.

        Raises:
            AddressError: the range leaves the region.
            MisuseError: it is not made of whole pages.
        """
        self.core.protect(self._open_handle(), offset, length_bytes, int(protection))

    def set(self, *, gpa: int | None = None, flags: int | None = None) -> None:
        """Moves the region or changes its flags; its bytes stay.

        Capability: USER_MEMORY; READONLY_MEM for KVM_MEM_READONLY.
        Source: KVM API, KVM_SET_USER_MEMORY_REGION.

        Raises:
            AddressError: another region is there.
        """
        gpa = self.gpa if gpa is None else gpa
        flags = self.flags if flags is None else flags
        self.core.set_region(self._open_handle(), gpa, flags)
        self.gpa, self.flags = gpa, flags

    @property
    def end(self) -> int:
        """The first guest-physical address behind it."""
        return self.gpa + self.size_bytes

    @property
    def readonly(self) -> bool:
        """True when the guest's writes leave it as MMIO exits."""
        return bool(self.flags & constants.KVM_MEM_READONLY)

    @property
    def logs_dirty_pages(self) -> bool:
        """True when `dirty_log` works."""
        return bool(self.flags & constants.KVM_MEM_LOG_DIRTY_PAGES)
