"""Page tables that map linear addresses to the same physical ones.

Two shapes (SDM volume 3, "Paging"): PAE with three levels and 4 GiB, and
four levels for long mode. Pages are 2 MiB or 4 KiB.

Accessed and dirty bits start clear, so that what the processor (or KVM's
shadow paging) sets can be watched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmbench.errors import AddressError, MisuseError
from kvmbench.kvm.region import PAGE_BYTES

PRESENT, WRITABLE, USER, PAGE_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 7

LARGE_PAGE_BYTES = 2 << 20
_ENTRIES = 512
_PD_SPAN = 1 << 30  # mapped by one page directory
_PDPT_SPAN = 1 << 39  # mapped by one page-directory-pointer table
_PAE_SPAN = 1 << 32
_LONG_SPAN = 1 << 47  # linear addresses above need a sign extension, so are no identity


@dataclass(frozen=True, slots=True)
class PageTables:
    """Tables ready to be placed.

    Attributes:
        root: gpa of the top table, for CR3.
        tables: gpa of each table to its 512 entries (4 for the top table of PAE), top level first.
        page_bytes: size of the mapped pages.
    """

    root: int
    tables: dict[int, list[int]]
    page_bytes: int

    @property
    def size_bytes(self) -> int:
        """Memory that the tables take, in whole pages."""
        return len(self.tables) * PAGE_BYTES

    def placements(self) -> tuple[tuple[int, bytes], ...]:
        """Pairs of (gpa, bytes), each table cut after its last entry; the rest must be zero already."""
        pieces = []
        for gpa, entries in self.tables.items():
            used = next((n for n in range(len(entries), 0, -1) if entries[n - 1]), 0)
            if used:
                pieces.append((gpa, b"".join(entry.to_bytes(8, "little") for entry in entries[:used])))
        return tuple(pieces)


def identity_tables(
    at: int,
    ranges: Iterable[tuple[int, int]],
    *,
    long: bool,
    user: bool = False,
    page_bytes: int = LARGE_PAGE_BYTES,
) -> PageTables:
    """Builds tables at `at` that map each range to itself, readable, writable and executable.

    Args:
        at: gpa of the top table; the others follow it page by page.
        ranges: pairs of (gpa, size in bytes), widened to whole pages; they may overlap.
        long: four levels for long mode; else the three of PAE, which reach 4 GiB.
        user: set the user bit at every level, so that code at CPL 3 may use the pages.
        page_bytes: 4096 or 2 MiB.

    Raises:
        MisuseError: another page size, or `at` is not on a page.
        AddressError: a range that the mode cannot map to itself.
    """
    if page_bytes not in (PAGE_BYTES, LARGE_PAGE_BYTES):
        raise MisuseError(f"page_bytes={page_bytes!r}: pages have 4096 or {LARGE_PAGE_BYTES} bytes")
    if at % PAGE_BYTES:
        raise MisuseError(f"page tables at {at:#x}: not a multiple of {PAGE_BYTES}")
    span = _LONG_SPAN if long else _PAE_SPAN
    rights = PRESENT | WRITABLE | (USER if user else 0)
    builder = _Builder(at)
    root = builder.table()
    if not long:
        # The PDPT of PAE has 4 entries, in which the writable and user bits are reserved.
        builder.tables[root] = [0, 0, 0, 0]
    for gpa, size in ranges:
        if gpa < 0 or size <= 0 or gpa + size > span:
            raise AddressError(
                f"{size:#x} bytes at {gpa:#x} cannot be identity mapped in {'long' if long else 'pae'} mode, "
                f"which reaches {span:#x}"
            )
        first = gpa - gpa % page_bytes
        for page in range(first, gpa + size, page_bytes):
            pdpt = builder.below(root, page // _PDPT_SPAN, rights) if long else root
            directory = builder.below(pdpt, page // _PD_SPAN % _ENTRIES, rights if long else PRESENT)
            slot = page // LARGE_PAGE_BYTES % _ENTRIES
            if page_bytes == LARGE_PAGE_BYTES:
                builder.tables[directory][slot] = page | rights | PAGE_SIZE
            else:
                table = builder.below(directory, slot, rights)
                builder.tables[table][page // PAGE_BYTES % _ENTRIES] = page | rights
    return PageTables(root, builder.tables, page_bytes)


class _Builder:
    # Hands out tables one after the other from `at`.

    def __init__(self, at: int) -> None:
        self._next = at
        self.tables: dict[int, list[int]] = {}

    def table(self) -> int:
        gpa = self._next
        self._next += PAGE_BYTES
        self.tables[gpa] = [0] * _ENTRIES
        return gpa

    def below(self, table: int, slot: int, rights: int) -> int:
        # The table that an entry points to, made if the entry is still empty.
        entry = self.tables[table][slot]
        if not entry:
            entry = self.tables[table][slot] = self.table() | rights
        return entry & ~(PAGE_BYTES - 1)
