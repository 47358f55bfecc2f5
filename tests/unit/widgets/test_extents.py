"""Rows of a list of memory: which address each shows."""

from __future__ import annotations

import pytest

from kvmbench.debug.mode import CodeMode
from kvmbench_widgets import extents

LONG = CodeMode("long", 64, 0, "4-level", 0)
LONG_57 = CodeMode("long", 64, 0, "5-level", 0)
PROTECTED = CodeMode("protected", 32, 0, "32-bit", 0)


@pytest.mark.parametrize("mode", [LONG, LONG_57, PROTECTED])
@pytest.mark.parametrize("row_bytes", [8, 16])
def test_every_row_is_found_again_and_javascript_can_count_them(mode: CodeMode, row_bytes: int) -> None:
    rows = extents.linear(mode, row_bytes)
    assert rows.total < 1 << 53
    for row in (0, 1, rows.total // 2 - 1, rows.total // 2, rows.total // 2 + 1, rows.total - 1):
        found = rows.at(row)
        assert found is not None
        assert rows.row_of(found[0]) == row
    last = rows.at(rows.total - 1)
    assert last == ((1 << (32 if mode is PROTECTED else 64)) - row_bytes, "")
    assert rows.at(rows.total) is None
    assert rows.digits == (8 if mode is PROTECTED else 16)


def test_addresses_that_are_not_canonical_are_one_row() -> None:
    rows = extents.linear(LONG, 16)
    gap = rows.row_of(0x8000_0000_0000_0000)
    assert gap == (1 << 47) // 16
    assert rows.at(gap) == (1 << 47, "no canonical addresses up to 0xffff7fffffffffff")
    assert rows.row_of(0xFFFF_8000_0000_0000) == gap + 1


def test_regions_that_touch_have_no_row_between_them() -> None:
    rows = extents.physical([(0, 0x1000), (0x1000, 0x2000), (0x10_0000_0000, 0x10_0000_1000)], 8)
    assert rows.total == 3 * 512 + 1
    assert rows.at(1024) == (0x2000, "no memory up to 0xfffffffff (67108856K)")
    assert rows.digits == 10
    assert rows.row_of(0x10_0000_1000) is None
    assert extents.physical([], 16).total == 0
