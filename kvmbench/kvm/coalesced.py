"""Coalesced writes: what the guest wrote to MMIO or a port, kept by KVM until somebody takes it."""

from __future__ import annotations

from dataclasses import dataclass

from kvmbench.errors import InternalError
from kvmbench.uapi import ffi

ENTRY_BYTES: int = ffi.sizeof("struct kvm_coalesced_mmio")


@dataclass(frozen=True)
class CoalescedWrite:
    """One write that did not leave the guest when it was made.

    Attributes:
        addr: guest-physical address; the port, if `pio`.
        data: what was written, 1 to 8 bytes.
        pio: to a port.
    """

    addr: int
    data: bytes
    pio: bool = False

    @property
    def value(self) -> int:
        """The bytes as a number."""
        return int.from_bytes(self.data, "little")

    def __repr__(self) -> str:
        where = "port" if self.pio else "gpa"
        return f"CoalescedWrite({where} {self.addr:#x}, {self.value:#x}, {len(self.data)} bytes)"


def coalesced_writes(raw: bytes) -> list[CoalescedWrite]:
    """The entries of a ring, oldest first.

    Raises:
        InternalError: an entry is no write of 1 to 8 bytes, or is cut off.
    """
    count, rest = divmod(len(raw), ENTRY_BYTES)
    if rest:
        raise InternalError(f"{len(raw)} bytes are no whole number of coalesced writes")
    entries = ffi.new("struct kvm_coalesced_mmio[]", count)
    ffi.memmove(entries, raw, len(raw))
    found = []
    for entry in entries:
        if not 1 <= entry.len <= len(entry.data):
            raise InternalError(f"KVM's ring holds a write of {entry.len} bytes to {entry.phys_addr:#x}")
        data = bytes(ffi.buffer(entry.data))[: entry.len]
        found.append(CoalescedWrite(int(entry.phys_addr), data, bool(entry.pio)))
    return found
