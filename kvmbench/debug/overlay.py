"""What `Memory` shows and keeps in place of the bytes that breakpoints have written over instructions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Byte:
    """One written byte.

    Attributes:
        gpa: where.
        opcode: what stands there.
        original: what the instruction begins with.
        address: linear address of the breakpoint that it was written for first.
        users: indexes of the vcpus that want it.
        lifted_for: index of the vcpu for which it is not there at this moment: not yet, for a step past it, or not
            any more. None: it is there, unless the guest has overwritten it.
        cr3: an address space in which `address` was seen to lead there.
    """

    __slots__ = ("address", "cr3", "gpa", "lifted_for", "opcode", "original", "users")

    def __init__(self, gpa: int, opcode: int, original: int, address: int) -> None:
        self.gpa, self.opcode, self.original, self.address = gpa, opcode, original, address
        self.users: set[int] = set()
        self.lifted_for: int | None = None
        self.cr3: int | None = None


class Overlay:
    """What `Memory` shows and keeps in place of the written bytes; never changed, replaced instead."""

    def __init__(self, there: dict[int, Byte], lock: Any) -> None:
        self._there = there
        self.lock = lock

    def _within(self, gpa: int, length: int) -> Iterable[Byte]:
        if length < len(self._there):
            return [one for at in range(gpa, gpa + length) if (one := self._there.get(at)) is not None]
        return [one for at, one in self._there.items() if gpa <= at < gpa + length]

    def shown(self, gpa: int, data: Any) -> Any:
        """Data read from memory, as it would be without the bytes: the same object, or a copy of its kind."""
        found = [one for one in self._within(gpa, len(data)) if data[one.gpa - gpa] == one.opcode]
        if not found:
            return data
        clean = bytearray(data) if isinstance(data, bytes) else data.copy()
        for one in found:
            clean[one.gpa - gpa] = one.original
        return bytes(clean) if isinstance(data, bytes) else clean

    def kept(self, gpa: int, data: Any) -> Any:
        """Data that is about to be written, with the bytes in their places; what they hide is noted. Under `lock`."""
        found = list(self._within(gpa, len(data)))
        if not found:
            return data
        kept = bytearray(data)
        for one in found:
            one.original = kept[one.gpa - gpa]
            if one.lifted_for is None:
                kept[one.gpa - gpa] = one.opcode
        return bytes(kept)

    def filled(self, gpa: int, length: int, value: int) -> list[tuple[int, bytes]]:
        """After a range was filled: what has to be written again. Under `lock`."""
        found = [one for one in self._within(gpa, length) if one.lifted_for is None]
        for one in found:
            one.original = value
        return [(one.gpa, bytes((one.opcode,))) for one in found]
