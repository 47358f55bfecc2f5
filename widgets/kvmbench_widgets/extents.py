"""Which row of a long list of memory shows which address: stretches of memory, each gap between them one row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvmbench.debug.mode import CodeMode
from kvmbench.machine.size import show_size

# JavaScript counts rows exactly to 2**53. Of 57-bit addresses 2**54 at each end are listed, of 48-bit ones all.
_LISTED_57 = 1 << 54


class Extent(NamedTuple):
    """A stretch of addresses, or with a `note` a gap, which has one row."""

    address: int
    size_bytes: int
    note: str = ""


class Extents:
    """The rows of some stretches, each of a whole number of rows.

    Attributes:
        total: how many rows there are.
        digits: how many hex digits the longest address has, at least 8.
    """

    def __init__(self, stretches: Iterable[Extent], row_bytes: int) -> None:
        self.row_bytes = row_bytes
        self._parts: list[tuple[int, int, Extent]] = []  # first row, rows, extent
        row = 0
        for each in stretches:
            rows = 1 if each.note else each.size_bytes // row_bytes
            self._parts.append((row, rows, each))
            row += rows
        self.total = row
        last = max((extent.address + extent.size_bytes - 1 for _, _, extent in self._parts), default=0)
        self.digits = max(8, len(f"{last:x}"))

    def at(self, row: int) -> tuple[int, str] | None:
        """The row's first address, and what it says if it is a gap; None beyond the last row."""
        for first, rows, extent in self._parts:
            if first <= row < first + rows:
                return extent.address + (0 if extent.note else (row - first) * self.row_bytes), extent.note
        return None

    def row_of(self, address: int) -> int | None:
        """The row that shows an address, or None if none does."""
        for first, _, extent in self._parts:
            if extent.address <= address < extent.address + extent.size_bytes:
                return first if extent.note else first + (address - extent.address) // self.row_bytes
        return None


def physical(regions: Iterable[tuple[int, int]], row_bytes: int) -> Extents:
    """Of regions of guest memory as (gpa, end), ascending."""
    stretches: list[Extent] = []
    behind: int | None = None
    for gpa, end in regions:
        if behind is not None and gpa > behind:
            words = f"no memory up to {gpa - 1:#x} ({show_size(gpa - behind)})"
            stretches.append(Extent(behind, gpa - behind, words))
        stretches.append(Extent(gpa, end - gpa))
        behind = end
    return Extents(stretches, row_bytes)


def linear(mode: CodeMode, row_bytes: int) -> Extents:
    """Of the linear addresses a mode has."""
    if mode.name not in ("long", "compatibility"):
        return Extents([Extent(0, 1 << 32)], row_bytes)
    half, words = 1 << 47, "no canonical addresses"
    if mode.paging == "5-level":
        half, words = _LISTED_57, "not listed, or no canonical addresses"
    top = (1 << 64) - half
    gap = Extent(half, top - half, f"{words} up to {top - 1:#x}")
    return Extents([Extent(0, half), gap, Extent(top, half)], row_bytes)
