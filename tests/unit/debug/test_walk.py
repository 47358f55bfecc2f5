"""The walk of a guest's page tables: where an address leads, and whether CPL 3 may go there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvmbench.debug.walk import Walk, walk
from kvmbench.errors import AddressError

PG, PAE, PSE, LA57, LMA = 1 << 31, 1 << 5, 1 << 4, 1 << 12, 1 << 10


class Tables:
    """A few entries; the rest of memory is zero, and what lies above 1 MiB is none."""

    def __init__(self, entries: dict[int, int]) -> None:
        self._entries = entries

    def read_u64(self, gpa: int) -> int:
        if gpa >= 1 << 20:
            raise AddressError(f"{gpa:#x} is no memory")
        return self._entries.get(gpa, 0)

    read_u32 = read_u64


def sregs(cr0: int = PG, cr3: int = 0x1000, cr4: int = PAE, efer: int = LMA) -> SimpleNamespace:
    return SimpleNamespace(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer)


LONG = {0x1000: 0x2007, 0x2000: 0x3007, 0x3000: 0x4007, 0x3008: 0x40_0087, 0x4000 + 5 * 8: 0x9003}


@pytest.mark.parametrize(
    ("state", "tables", "gva", "found"),
    [
        (sregs(cr0=0), {}, 0x1_2345_6789, Walk(0x2345_6789, True)),
        (sregs(), LONG, 0x5123, Walk(0x9123, False)),
        (sregs(cr3=0x1018 | 1 << 63), LONG, 0x5123, Walk(0x9123, False)),
        (sregs(), {**LONG, 0x4000 + 5 * 8: 0x9007}, 0x5123, Walk(0x9123, True)),
        (sregs(), {**LONG, 0x1000: 0x2003, 0x4000 + 5 * 8: 0x9007}, 0x5123, Walk(0x9123, False)),
        (sregs(), {**LONG, 0x4000 + 5 * 8: 0x9007 | 1 << 63}, 0x5123, Walk(0x9123, True)),
        (sregs(), LONG, 0x20_0123, Walk(0x40_0123, True)),
        (sregs(), LONG, 0x6000, None),
        (sregs(), LONG, 0xFFFF_8000_0000_0000, None),
        (sregs(cr3=0x10_0000), LONG, 0x5123, None),
        (sregs(cr4=PAE | LA57), {**LONG, 0x8000: 0x1007}, 0x5123, None),
        (sregs(cr3=0x8000, cr4=PAE | LA57), {**LONG, 0x8000: 0x1007}, 0x5123, Walk(0x9123, False)),
        (sregs(cr3=0x1020, efer=0), {0x1020: 0x3001, 0x3000: 0x83}, 0x1234, Walk(0x1234, False)),
        (sregs(cr4=0, efer=0), {0x1000: 0x2007, 0x2004: 0x9007}, 0x1123, Walk(0x9123, True)),
        (sregs(cr4=PSE, efer=0), {0x1004: 0x80_2083}, 0x40_1123, Walk(0x1_0080_1123, False)),
        (sregs(cr4=0, efer=0), {}, 0x1123, None),
    ],
)
def test_an_address_is_followed_through_the_tables_of_each_mode(state, tables, gva, found):
    assert walk(Tables(tables), state, gva) == found


def test_another_address_space_may_be_named():
    assert walk(Tables(LONG), sregs(cr3=0x7000), 0x5123, 0x1000) == Walk(0x9123, False)
