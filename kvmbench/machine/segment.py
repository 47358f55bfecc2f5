"""Segments as a boot loader leaves them, and the descriptors that say the same in a GDT.

KVM loads the hidden part of a segment register directly; the GDT in memory is
for the guest's own far jumps and segment loads. Both are made from one
`Segment`, so that they agree.
"""

from __future__ import annotations

from kvmbench.kvm.segment import Segment

# Descriptor types (SDM volume 3, "Code- and Data-Segment Descriptor Types", "System Descriptor Types").
# The accessed bit is set: hidden parts always show it, and some processors insist on it.
TYPE_DATA = 0x3
TYPE_CODE = 0xB
TYPE_LDT = 0x2
TYPE_TSS16_BUSY = 0x3
TYPE_TSS_BUSY = 0xB


def real_segment(selector: int, *, code: bool = False) -> Segment:
    """A segment as real mode loads it: base is 16 times the selector, 64 KiB long."""
    return Segment(selector, selector << 4, 0xFFFF, TYPE_CODE if code else TYPE_DATA)


def flat_data(selector: int, dpl: int = 0, *, bits: int = 32) -> Segment:
    """Read/write data from 0 to 4 GiB (64 KiB for 16 bits)."""
    if bits == 16:
        return Segment(selector, 0, 0xFFFF, TYPE_DATA, dpl)
    return Segment(selector, 0, 0xFFFF_FFFF, TYPE_DATA, dpl, db=1, g=1)


def flat_code(selector: int, dpl: int = 0, *, bits: int) -> Segment:
    """Execute/read code of 16, 32 or 64 bits from 0 on."""
    if bits == 16:
        return Segment(selector, 0, 0xFFFF, TYPE_CODE, dpl)
    wide = bits == 64
    # L and D together are reserved (SDM volume 3, "Segment Descriptors").
    return Segment(selector, 0, 0xFFFF_FFFF, TYPE_CODE, dpl, l=int(wide), db=int(not wide), g=1)


def no_ldt() -> Segment:
    """An LDTR loaded with the null selector."""
    return Segment(0, 0, 0, TYPE_LDT, present=0, s=0, unusable=1)


def encode_descriptor(segment: Segment, *, long: bool = False) -> bytes:
    """The descriptor in a GDT that loads as this segment.

    Args:
        long: a system descriptor of IA-32e mode, 16 bytes, with all 64 bits of base.

    Returns:
        8 bytes, or 16 (SDM volume 3, "Segment Descriptors" and "TSS Descriptor in 64-bit Mode").
    """
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3
    word = (
        (limit & 0xFFFF)
        | (segment.base & 0xFF_FFFF) << 16
        | access << 40
        | (limit >> 16 & 0xF) << 48
        | flags << 52
        | (segment.base >> 24 & 0xFF) << 56
    )
    low = word.to_bytes(8, "little")
    return low + (segment.base >> 32).to_bytes(8, "little") if long else low


def encode_gate(offset: int, selector: int, *, bits: int, dpl: int = 0, trap: bool = False) -> bytes:
    """An interrupt or trap gate of the IDT; for 16 bits an entry of real mode's table.

    Args:
        bits: 16 (4 bytes), 32 (8 bytes) or 64 (16 bytes).
        dpl: the lowest privilege that may call it by INT n.

    Source: SDM volume 3, "IDT Descriptors" and "64-Bit Mode IDT".
    """
    if bits == 16:
        return offset.to_bytes(2, "little") + selector.to_bytes(2, "little")
    low = (offset & 0xFFFF) | selector << 16 | (0x8E | int(trap) | dpl << 5) << 40 | (offset >> 16 & 0xFFFF) << 48
    return low.to_bytes(8, "little") + ((offset >> 32).to_bytes(8, "little") if bits == 64 else b"")


def wants_available_tss(module: str) -> bool:
    """Whether TR has to hold an available TSS on a host: SVM takes either, VMX only a busy one.

    QEMU's SVM ends QEMU ("invalid tss type") at an entry from CPL 3 outside long mode if it is busy, and kvm_amd
    tells of it as busy, so what was read and is written back needs it, too (test_user_code_faults_into_its_kernel).
    """
    return module == "kvm_amd"


def available_tss(kind: int) -> int:
    """The type of a TSS without the busy bit (SDM volume 3, "TSS Descriptor")."""
    return int(kind) & ~0x2 if kind in (TYPE_TSS16_BUSY, TYPE_TSS_BUSY) else int(kind)
