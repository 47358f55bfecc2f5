"""Decoding: kinds, lengths, targets, and a cache that never serves stale code."""

from __future__ import annotations

import random

import pytest

from kvmbench.debug.instruction import DECODER, Decoder, Instruction, boundaries, instruction_length
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError


def decode(
    text: str, *, bits: int = 64, address: int = 0x1000, symbols: Symbols | None = None
) -> Instruction:
    return DECODER.decode(bytes.fromhex(text), bits=bits, address=address, symbols=symbols)


@pytest.mark.parametrize(
    ("code", "bits", "kinds"),
    [
        ("e8 00 00 00 00", 64, {"is_call"}),
        ("ff 10", 64, {"is_call"}),
        ("f2 ff 10", 64, {"is_call"}),
        ("9a 00 00 08 00", 16, {"is_call"}),
        ("c3", 64, {"is_ret"}),
        ("f3 c3", 64, {"is_ret"}),
        ("48 cf", 64, {"is_ret"}),
        ("cb", 32, {"is_ret"}),
        ("48 0f 07", 64, {"is_ret"}),
        ("f3 48 a5", 64, {"is_rep"}),
        ("f3 a4", 16, {"is_rep"}),
        ("f2 ae", 32, {"is_rep"}),
        ("cd 80", 32, {"is_interrupt"}),
        ("cc", 64, {"is_interrupt"}),
        ("f3 90", 64, set()),
        ("a4", 64, set()),
        ("eb fe", 64, set()),
        ("0f 05", 64, set()),
    ],
)
def test_calls_returns_repeats_and_interrupts_are_told_apart(code: str, bits: int, kinds: set[str]) -> None:
    found = decode(code, bits=bits)
    assert found.is_valid
    assert {kind for kind in ("is_call", "is_ret", "is_rep", "is_interrupt") if getattr(found, kind)} == kinds


@pytest.mark.parametrize(
    ("code", "bits", "address", "target"),
    [
        ("eb fe", 64, 0x1000, 0x1000),
        ("e8 fb 0f 00 00", 64, 0x1000, 0x2000),
        ("0f 84 00 01 00 00", 64, 0xFFFFFFFF81000000, 0xFFFFFFFF81000106),
        ("e2 fd", 16, 0x7C05, 0x7C04),
        ("e3 00", 64, 0, 2),
        ("ff e0", 64, 0x1000, None),
        ("ff 25 00 00 00 00", 64, 0x1000, None),
        ("ea 00 10 08 00", 16, 0x1000, None),
        ("48 01 d8", 64, 0x1000, None),
    ],
)
def test_direct_branches_have_a_target(code: str, bits: int, address: int, target: int | None) -> None:
    assert decode(code, bits=bits, address=address).target == target


def test_a_16_bit_branch_wraps_at_64_kib() -> None:
    assert decode("e8 00 10", bits=16, address=0xFF00).target == 0x0F03
    assert decode("66 e8 00 00 00 01", bits=16, address=0x7C16).target == 0x01007C1C
    assert decode("66 e8 00 10", bits=32, address=0xFF00).target == 0x0F04
    assert decode("e9 00 10 00 00", bits=32, address=0xFFFFFF00).target == 0xF05


def test_the_same_bytes_mean_something_else_in_another_width() -> None:
    code = "b8 34 12 00 00"
    assert decode(code, bits=16).text == "mov ax, 0x1234"
    assert decode(code, bits=32).text == "mov eax, 0x1234"
    assert decode(code, bits=16).size_bytes == 3


def test_symbols_lines_and_targets_are_named(symbols: Symbols, code: bytes) -> None:
    found = DECODER.decode(code[3:], bits=64, address=0x1003, symbols=symbols)
    assert (found.label, found.line, found.source) == ("loop", 4, "loop:   add rax, rbx   # sum")
    jump = DECODER.decode(code[6:], bits=64, address=0x1006, symbols=symbols)
    assert jump.text == "jmp loop"
    assert jump.comment == ""
    increment = DECODER.decode(code[8:], bits=64, address=0x1008, symbols=symbols)
    assert increment.comment == "counter"
    assert repr(found) == "Instruction: 0x1003 loop  48 01 d8  add rax, rbx"


def test_symbols_are_looked_up_by_linear_address(symbols: Symbols) -> None:
    found = DECODER.decode(b"\xeb\xfe", bits=16, address=3, symbols=symbols, code_base=0x1000)
    assert (found.address, found.label, found.text) == (3, "loop", "jmp loop")


def test_bytes_that_are_no_instruction_are_shown_one_by_one() -> None:
    found = decode("06 90")
    assert (found.text, found.size_bytes, found.is_valid) == (".byte 0x06", 1, False)


def test_code_that_changed_is_decoded_anew() -> None:
    decoder = Decoder()
    assert decoder.decode(b"\x90", bits=64, address=0x1000).text == "nop"
    assert decoder.decode(b"\xf4", bits=64, address=0x1000).text == "hlt"
    assert decoder.decode(b"\x06", bits=64, address=0x1000).text == ".byte 0x06"
    assert decoder.decode(b"\x90", bits=64, address=0x1000).text == "nop"


def test_an_instruction_cut_short_is_whole_when_the_rest_comes() -> None:
    decoder = Decoder()
    assert not decoder.decode(b"\x48\x01", bits=64, address=0x1000).is_valid
    assert decoder.decode(b"\x48\x01\xd8", bits=64, address=0x1000).text == "add rax, rbx"


def test_symbols_loaded_later_are_seen_despite_the_cache(symbols: Symbols) -> None:
    decoder = Decoder()
    assert decoder.decode(b"\xeb\xfe", bits=64, address=0x1003).text == "jmp 0x1003"
    assert decoder.decode(b"\xeb\xfe", bits=64, address=0x1003, symbols=symbols).text == "jmp loop"


def test_lengths_are_those_of_the_encoding() -> None:
    assert instruction_length(b"\x48\x01\xd8\x90", bits=64) == 3
    assert instruction_length(b"\x06", bits=64) == 0
    assert instruction_length(b"\x06", bits=32) == 1
    assert instruction_length(b"", bits=64) == 0


def test_a_width_that_does_not_exist_is_refused() -> None:
    with pytest.raises(MisuseError, match="code of 8 bits cannot be decoded"):
        instruction_length(b"\x90", bits=8)
    with pytest.raises(MisuseError, match="no bytes to decode at 0x1000"):
        decode("")


def test_boundaries_are_those_of_decoding_one_by_one() -> None:
    code = random.Random(7).randbytes(3000)
    offset, found = 0, []
    while offset < len(code):
        found.append(offset)
        offset += instruction_length(code[offset : offset + 15], bits=64) or 1
    assert boundaries(code, bits=64) == found


def test_boundaries_of_another_width_are_refused() -> None:
    with pytest.raises(MisuseError, match="24"):
        boundaries(b"\x90", bits=24)
