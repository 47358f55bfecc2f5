"""Segment and descriptor-table registers as values.

KVM hands out the *hidden* part of each segment register, already decoded from
its descriptor (``struct kvm_segment``; KVM API, KVM_GET_SREGS), so what is
shown here is what the processor uses, not what the GDT in memory says now.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import Any, NoReturn

from kvmbench.errors import MisuseError

# Width in bits of each field of struct kvm_segment that can be set; the flags are single bits.
_WIDTHS = {
    "selector": 16, "base": 64, "limit": 32, "type": 4, "dpl": 2, "present": 1, "s": 1, "l": 1, "db": 1,
    "g": 1, "avl": 1, "unusable": 1,
}  # fmt: skip

# System descriptor types (SDM volume 3, "System Descriptor Types"), for s = 0.
_SYSTEM_TYPES = {
    1: "16-bit TSS available", 2: "LDT", 3: "16-bit TSS busy", 9: "TSS available", 11: "TSS busy",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment register, hidden part included (``struct kvm_segment``).

    Attributes:
        selector: what a ``mov`` from the register would read.
        base: linear address where the segment starts.
        limit: last valid offset, in bytes (KVM has applied `g` already).
        type: bits 0 to 3 of the descriptor's type, with the accessed bit.
        dpl: descriptor privilege level; for ``ss`` it is the CPL.
        present: descriptor present.
        s: 1 for code and data, 0 for system segments (TSS, LDT).
        l: 64-bit code segment.
        db: default operand size of code (1: 32 bits), stack width of ``ss``.
        g: limit counted in 4 KiB pages in the descriptor.
        avl: bit left to software.
        unusable: loaded with a null selector; any use of it faults.
    """

    selector: int
    base: int
    limit: int
    type: int = 3
    dpl: int = 0
    present: int = 1
    s: int = 1
    l: int = 0  # noqa: E741 - the bit is called L in both manuals and in struct kvm_segment
    db: int = 0
    g: int = 0
    avl: int = 0
    unusable: int = 0

    def __post_init__(self) -> None:
        for name, width in _WIDTHS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 1 << width:
                shown = hex(value) if isinstance(value, int) else repr(value)
                raise MisuseError(f"segment {name} = {shown} does not fit its {width} bit(s)")

    @classmethod
    def from_kvm(cls, segment: Any) -> Segment:
        """Copies a ``struct kvm_segment`` (any object with its fields)."""
        return cls(**{name: int(getattr(segment, name)) for name in _WIDTHS})

    def to_kvm(self, segment: Any) -> None:
        """Writes this value into a ``struct kvm_segment``."""
        for name in _WIDTHS:
            setattr(segment, name, getattr(self, name))

    @property
    def rpl(self) -> int:
        """Requested privilege level: the selector's two low bits (the CPL, for ``cs``)."""
        return self.selector & 3

    @property
    def words(self) -> str:
        """What the descriptor is: ``code64 execute/read``, ``data read/write``, ``TSS busy``."""
        if self.unusable:
            return "unusable"
        if not self.present:
            return "not present"
        if not self.s:
            return _SYSTEM_TYPES.get(self.type, f"system type {self.type}")
        if self.type & 8:
            width = 64 if self.l else 32 if self.db else 16
            rights = "execute/read" if self.type & 2 else "execute"
            conforming = " conforming" if self.type & 4 else ""
            return f"code{width} {rights}{conforming}"
        rights = "read/write" if self.type & 2 else "read"
        return f"data {rights}{' expand-down' if self.type & 4 else ''}"

    def __repr__(self) -> str:
        return f"{self.selector:#06x} base {self.base:#x} limit {self.limit:#x} DPL {self.dpl} {self.words}"


@dataclass(frozen=True, slots=True)
class DescriptorTable:
    """GDTR or IDTR (``struct kvm_dtable``).

    Attributes:
        base: linear address of the first descriptor.
        limit: size of the table in bytes, less one.
    """

    base: int
    limit: int

    def __post_init__(self) -> None:
        for name, width in (("base", 64), ("limit", 16)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 1 << width:
                shown = hex(value) if isinstance(value, int) else repr(value)
                raise MisuseError(f"descriptor table {name} = {shown} does not fit its {width} bits")

    @classmethod
    def from_kvm(cls, table: Any) -> DescriptorTable:
        """Copies a ``struct kvm_dtable``."""
        return cls(base=int(table.base), limit=int(table.limit))

    def to_kvm(self, table: Any) -> None:
        """Writes this value into a ``struct kvm_dtable``."""
        table.base = self.base
        table.limit = self.limit

    def __repr__(self) -> str:
        return f"base {self.base:#x} limit {self.limit:#x}"


def _refuse(self: object, name: str, value: object) -> NoReturn:
    raise FrozenInstanceError(
        f"this is a value, not the register: assign dataclasses.replace(regs.cs, {name}={value!r}) to regs.cs, "
        "or to whichever register it is of"
    )


# dataclasses' own words say only that it cannot be done, to somebody who wrote regs.cs.base = 0.
Segment.__setattr__ = DescriptorTable.__setattr__ = _refuse  # type: ignore[method-assign]
