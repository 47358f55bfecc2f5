"""Rows of code: a linear sweep that begins where instructions are known to, mended where bytes change."""

from __future__ import annotations

import random
import time

import pytest

from kvmbench.debug.instruction import boundaries
from kvmbench_widgets.listing import Listing, Rows

NOP, MOV_EAX, MOV_RAX = b"\x90", b"\xb8\x01\x00\x00\x00", b"\x48\xc7\xc0\x01\x00\x00\x00"


def test_pieces_are_joined_without_a_seam() -> None:
    code = (MOV_RAX + NOP + MOV_EAX) * 1000
    listing = Listing(0x1000, code, bits=64)
    assert [each - 0x1000 for each in listing.starts] == boundaries(code, bits=64)
    assert len(listing.starts) == 3000
    assert listing.bytes_of(listing.starts, 2) == MOV_EAX
    assert listing.bytes_of(listing.starts, 2999) == MOV_EAX


def test_what_runs_into_a_symbol_is_cut() -> None:
    # The byte of data before it would swallow the first bytes of the function.
    code = b"\xb8" + MOV_RAX + NOP
    assert Listing(0, code, bits=64).starts == [0, 5, 7, 8]
    assert Listing(0, code, bits=64, symbols=[1]).starts == [0, 1, 8]


def test_a_name_that_points_into_an_instruction_of_the_source_cuts_nothing() -> None:
    listing = Listing(0, MOV_RAX + NOP, bits=64, symbols=[3], lines=[0, 7])
    assert listing.starts == [0, 7]


def test_rip_inside_a_row_begins_a_row_and_the_rows_meet_again() -> None:
    # eb 01 | b8 90 90 90 90 | c3, entered at the byte behind b8.
    code = b"\xeb\x01\xb8\x90\x90\x90\x90\xc3"
    listing = Listing(0x100, code, bits=64)
    assert listing.starts == [0x100, 0x102, 0x107]
    assert listing.with_rows_at([0x103]) == [0x100, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107]
    assert listing.with_rows_at([0x102, 0x5000]) is listing.starts, "nothing to change, nothing copied"
    # Rows of the first sweep that the new one runs over are gone.
    overlap = Listing(0, b"\xb8\x01\x00\x00\xb8" + NOP * 4 + b"\xc3", bits=64)
    assert overlap.starts == [0, 5, 6, 7, 8, 9]
    assert overlap.with_rows_at([4]) == [0, 1, 3, 4, 9]


def test_changed_bytes_change_the_rows_around_them_only() -> None:
    code = MOV_RAX * 5000
    listing = Listing(0, code, bits=64)
    assert not listing.patch(700, code[700:800])
    began = time.perf_counter()
    assert listing.patch(700, NOP * 7)
    assert time.perf_counter() - began < 0.05
    assert listing.starts[99:109] == [693, *range(700, 707), 707, 714]
    whole = bytes(code[:700] + NOP * 7 + code[707:])
    assert listing.starts == Listing(0, whole, bits=64).starts
    # One byte that makes an instruction longer swallows rows behind it.
    assert listing.patch(700, b"\xb8")
    assert listing.starts[100:104] == [700, 705, 706, 707]


@pytest.mark.parametrize("seed", range(20))
def test_a_patched_listing_equals_one_made_anew(seed: int) -> None:
    chance = random.Random(seed)
    code = bytearray(chance.randbytes(600))
    anchors = sorted(chance.sample(range(600), 9))
    listing = Listing(0x400, bytes(code), bits=32, symbols=[0x400 + each for each in anchors])
    for _ in range(20):
        at = chance.randrange(590)
        code[at : at + 3] = chance.randbytes(3)
        listing.patch(0x400 + at, bytes(code[at : at + 3]))
        anew = Listing(0x400, bytes(code), bits=32, symbols=[0x400 + each for each in anchors])
        assert listing.starts == anew.starts


def test_an_empty_stretch_has_no_rows() -> None:
    listing = Listing(0x5000, b"", bits=16)
    assert listing.starts == []
    assert listing.with_rows_at([0x5000]) == []


def test_rows_number_labels_code_and_ends() -> None:
    rows = Rows([0, 4, 8], [4, 6], before=True, after=True)
    assert rows.total == 6
    assert [rows[n] for n in range(6)] == [
        ("before", 0), ("code", 0), ("label", 4), ("code", 4), ("code", 8), ("after", 0),
    ]  # fmt: skip
    assert [rows.of(address) for address in (0, 4, 8, 6, 12)] == [1, 3, 4, None, None]
