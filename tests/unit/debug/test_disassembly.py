"""Listings: marks, labels, sources, and the end of readable memory."""

from __future__ import annotations

import pytest

from kvmbench.debug.disassembly import disassemble
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError


def test_a_listing_shows_labels_rip_breakpoints_and_source(symbols: Symbols, code: bytes) -> None:
    listing = disassemble(
        code, address=0x1000, bits=64, symbols=symbols, rip=0x1003, breakpoints={0x1003, 0x1006}
    )
    assert repr(listing).splitlines() == [
        "start:",
        "    0x1000  48 31 c0              xor rax, rax                           line 3",
        "loop:",
        "b=> 0x1003  48 01 d8              add rax, rbx                           "
        "line 4: loop:   add rax, rbx   # sum",
        "b   0x1006  eb fb                 jmp loop",
        "    0x1008  48 ff 05 f1 00 00 00  inc qword ptr [rip + 0xf1]  ; counter",
        "    0x100f  06                    .byte 0x06",
        "    0x1010  f4                    hlt",
    ]


def test_a_listing_is_a_sequence_of_instructions(code: bytes) -> None:
    listing = disassemble(code, address=0x1000, bits=64)
    assert len(listing) == 6
    assert [one.address for one in listing] == [0x1000, 0x1003, 0x1006, 0x1008, 0x100F, 0x1010]
    assert listing[-1].mnemonic == "hlt"
    assert [one.mnemonic for one in listing[1:3]] == ["add", "jmp"]


def test_reading_from_memory_takes_linear_addresses_and_a_count(code: bytes) -> None:
    asked: list[tuple[int, int]] = []

    def reader(gva: int, length_bytes: int) -> bytes:
        asked.append((gva, length_bytes))
        return code[:length_bytes]

    listing = disassemble(reader, address=0x20, bits=64, count=2, code_base=0x1000)
    assert asked == [(0x1020, 30)]
    assert [one.address for one in listing] == [0x20, 0x23]
    with pytest.raises(MisuseError, match="needs count="):
        disassemble(reader, address=0, bits=64)


def test_the_end_of_readable_memory_is_said() -> None:
    listing = disassemble(lambda gva, length: b"\x90", address=0x1FFF, bits=64, count=3)
    assert len(listing) == 1
    assert repr(listing).endswith("(nothing readable at 0x2000)")
    empty = disassemble(lambda gva, length: b"", address=0x5000, bits=64, count=3)
    assert repr(empty) == "nothing readable at 0x5000"


def test_html_escapes_what_the_source_says(code: bytes) -> None:
    symbols = Symbols.of({"<b>": 0x1000}, {0x1000: (1, "xor rax, rax # <script>")})
    html = disassemble(code, address=0x1000, bits=64, symbols=symbols, rip=0x1000)._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;:" in html
    assert html.count("kb-here>") == 1


def test_a_negative_count_is_refused(code: bytes) -> None:
    with pytest.raises(MisuseError, match="count=-1: give at least 0"):
        disassemble(code, address=0, bits=64, count=-1)
