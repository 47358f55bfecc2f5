"""Names to addresses and back, with help for the misspelt."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError


@pytest.mark.parametrize(
    ("expression", "address"),
    [
        (0x1234, 0x1234),
        ("loop", 0x1003),
        ("loop+8", 0x100B),
        ("loop + 0x10", 0x1013),
        ("loop-3", 0x1000),
        ("0x1000", 0x1000),
        ("4096", 0x1000),
        ("0x1000+8", 0x1008),
        ("demo:loop", 0x1003),
        (np.uint64(0x1003), 0x1003),
    ],
)
def test_expressions_resolve(symbols: Symbols, expression: int | str, address: int) -> None:
    assert symbols.resolve(expression) == address


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("lop", r"no symbol 'lop'; did you mean 'loop'\?"),
        ("LOOP", r"no symbol 'LOOP'; did you mean 'loop'\?"),
        ("zzz", r"no symbol 'zzz'; there are counter, loop, start"),
        ("loop+", r"'loop\+' is not an address"),
        ("", r"'' is not an address"),
        ("loop+x", r"'x' in 'loop\+x' is not a number"),
        ("start-0x2000", r"address -0x1000 \(from 'start-0x2000'\) does not fit 64 bits"),
        (-1, r"address -0x1 \(from -1\) does not fit"),
        (1 << 64, r"does not fit 64 bits"),
        (1.5, r"1.5 is not an address"),
        (None, r"None is not an address"),
    ],
)
def test_a_bad_expression_says_what_is_wrong(symbols: Symbols, expression: object, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        symbols.resolve(expression)  # type: ignore[arg-type]


def test_without_programs_the_error_says_so() -> None:
    with pytest.raises(MisuseError, match="no program with symbols is loaded"):
        Symbols().resolve("loop")


@pytest.mark.parametrize(
    ("address", "label"),
    [(0x1000, "start"), (0x1002, "start+0x2"), (0x1003, "loop"), (0x10FF, "loop+0xfc"), (0xFFF, "")],
)
def test_addresses_are_named_after_the_symbol_below(symbols: Symbols, address: int, label: str) -> None:
    assert symbols.label(address) == label


def test_an_address_far_behind_the_last_symbol_has_no_name(symbols: Symbols) -> None:
    assert symbols.label(0xFFFFFFFF81000000) == ""


def test_a_program_that_knows_its_size_names_nothing_beyond_it() -> None:
    symbols = Symbols()
    symbols.add(
        SimpleNamespace(name="p", symbols={"main": 0x1000}, lines={}, address=0x1000, size_bytes=0x20)
    )
    assert symbols.label(0x101F) == "main+0x1f"
    assert symbols.label(0x1020) == ""


def test_a_later_program_wins_a_shared_name_and_the_first_stays_in_reach(symbols: Symbols) -> None:
    symbols.label(0x2000)
    symbols.add(SimpleNamespace(name="other", symbols={"loop": 0x2000}, lines={0x2000: (1, "nop")}))
    assert symbols["loop"] == 0x2000
    assert symbols["demo:loop"] == 0x1003
    assert symbols.label(0x2001) == "loop+0x1"
    assert symbols.line(0x2000) == (1, "nop")


def test_a_name_given_by_hand_is_known_both_ways(symbols: Symbols) -> None:
    symbols.define("stack_top", 0x8000)
    assert symbols.resolve("stack_top-8") == 0x7FF8
    assert symbols.name_at(0x8000) == "stack_top"
    with pytest.raises(MisuseError, match="cannot name an address"):
        symbols.define("0x10", 0)


def test_symbols_are_listed_by_address(symbols: Symbols) -> None:
    assert list(symbols) == [("start", 0x1000), ("loop", 0x1003), ("counter", 0x1100)]
    assert repr(symbols) == "Symbols(start=0x1000, loop=0x1003, counter=0x1100)"
    assert "loop" in symbols
    assert len(symbols) == 3
