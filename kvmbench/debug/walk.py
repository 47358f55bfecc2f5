"""A walk of the guest's page tables for one linear address: where it leads, and whether CPL 3 may go there.

KVM_TRANSLATE knows the current address space only, and of rights it says what is not
so (usermode is always 0): hence a walk of our own, a read of memory a level.
Source: SDM volume 3, "Paging".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvmbench.errors import AddressError

if TYPE_CHECKING:
    from kvmbench.machine.memory import Memory

_PG, _PSE, _PAE, _LA57, _LMA = 1 << 31, 1 << 4, 1 << 5, 1 << 12, 1 << 10
_PRESENT, _USER, _LARGE = 1 << 0, 1 << 2, 1 << 7
_ADDRESS = 0x000F_FFFF_FFFF_F000


@dataclass(frozen=True)
class Walk:
    """The end of a walk.

    Attributes:
        gpa: where the address leads.
        user: whether code at CPL 3 may go there; always, where paging is off.
        tables: guest physical addresses of the pages that the walk went through, from the top; not compared.
    """

    gpa: int
    user: bool
    tables: tuple[int, ...] = field(default=(), compare=False)


def walk(memory: Memory, sregs: Any, gva: int, cr3: int | None = None) -> Walk | None:
    """Follows the tables, or None where something on the way is not present or no memory.

    Args:
        sregs: ``struct kvm_sregs``.
        cr3: of another address space than the current one.
    """
    cr0, cr4, efer = int(sregs.cr0), int(sregs.cr4), int(sregs.efer)
    if not cr0 & _PG:
        return Walk(gva & 0xFFFF_FFFF, True)
    top = int(sregs.cr3) if cr3 is None else cr3
    try:
        if efer & _LMA:
            return _long(memory, top & _ADDRESS, 5 if cr4 & _LA57 else 4, gva)
        gva &= 0xFFFF_FFFF
        if cr4 & _PAE:
            entry = memory.read_u64((top & 0xFFFF_FFE0) + (gva >> 30) * 8)
            return _long(memory, entry & _ADDRESS, 2, gva, (top & 0xFFFF_F000,)) if entry & _PRESENT else None
        return _legacy(memory, top & 0xFFFF_F000, gva, bool(cr4 & _PSE))
    except AddressError:  # a table outside of memory
        return None


def _long(memory: Memory, table: int, level: int, gva: int, tables: tuple[int, ...] = ()) -> Walk | None:
    user = True
    while True:
        tables += (table,)
        shift = 12 + 9 * (level - 1)
        entry = memory.read_u64(table + (gva >> shift & 0x1FF) * 8)
        if not entry & _PRESENT:
            return None
        user = user and bool(entry & _USER)
        if level == 1 or (level <= 3 and entry & _LARGE):
            offset = (1 << shift) - 1
            return Walk(entry & _ADDRESS & ~offset | gva & offset, user, tables)
        table, level = entry & _ADDRESS, level - 1


def _legacy(memory: Memory, table: int, gva: int, large_pages: bool) -> Walk | None:
    entry = memory.read_u32(table + (gva >> 22) * 4)
    if not entry & _PRESENT:
        return None
    user = bool(entry & _USER)
    if entry & _LARGE and large_pages:
        # PSE-36: bits 13 to 20 are address bits 32 to 39.
        return Walk(entry & 0xFFC0_0000 | (entry & 0x1F_E000) << 19 | gva & 0x3F_FFFF, user, (table,))
    tables = (table, entry & 0xFFFF_F000)
    entry = memory.read_u32((entry & 0xFFFF_F000) + (gva >> 12 & 0x3FF) * 4)
    if not entry & _PRESENT:
        return None
    return Walk(entry & 0xFFFF_F000 | gva & 0xFFF, user and bool(entry & _USER), tables)
