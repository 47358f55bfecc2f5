"""Programs: what they occupy."""

from __future__ import annotations

import pytest

from kvmbench.errors import LoadError, MisuseError
from kvmbench.machine.flat import load_flat
from kvmbench.machine.program import Program


def test_what_a_program_occupies_includes_its_zeros() -> None:
    program = Program("p", ((0x2000, b"ab"), (0x3000, b"c")), 0x2000, blank=((0x3001, 15),))
    assert program.ranges == ((0x2000, 2), (0x3000, 1), (0x3001, 15))
    assert (program.address, program.end, program.size_bytes) == (0x2000, 0x3010, 0x1010)
    assert repr(program) == "Program('p', 18 bytes at 0x2000, entry 0x2000, 64-bit, 0 symbols)"


def test_later_changes_of_the_callers_dict_do_not_reach_a_program() -> None:
    names = {"a": 1}
    program = Program("p", (), 0, symbols=names)
    names["b"] = 2
    assert dict(program.symbols) == {"a": 1}


def test_a_flat_binary_goes_where_it_is_told() -> None:
    program = load_flat(b"\xf4\x90", 0x7C00, bits=16, entry=0x7C01)
    assert (program.segments, program.entry, program.bits) == (((0x7C00, b"\xf4\x90"),), 0x7C01, 16)
    with pytest.raises(LoadError, match="empty"):
        load_flat(b"")
    with pytest.raises(MisuseError, match="at=-1"):
        load_flat(b"x", -1)
    with pytest.raises(MisuseError, match="bits=8"):
        load_flat(b"x", bits=8)
