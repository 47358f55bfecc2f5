"""Whether a jump will be taken, and where its arrow is drawn."""

from __future__ import annotations

import itertools

import pytest

from kvmbench.debug.flags import Flags
from kvmbench.debug.instruction import DECODER
from kvmbench_widgets.branches import is_jump, lanes, will_jump

CF, PF, ZF, SF, OF = 1 << 0, 1 << 2, 1 << 6, 1 << 7, 1 << 11


def jump(code: str, flags: int = 0, rcx: int = 0, bits: int = 64) -> bool | None:
    return will_jump(DECODER.decode(bytes.fromhex(code), bits=bits, address=0x1000), Flags(flags), rcx)


def test_conditions_come_in_pairs_that_exclude_each_other() -> None:
    for bits in itertools.product((0, CF), (0, PF), (0, ZF), (0, SF), (0, OF)):
        flags = sum(bits)
        for opcode in range(0x70, 0x80, 2):
            assert jump(f"{opcode:02x}00", flags) is not jump(f"{opcode + 1:02x}00", flags)


@pytest.mark.parametrize(
    ("code", "flags"),
    [("7000", OF), ("7200", CF), ("7400", ZF), ("7600", CF), ("7600", ZF), ("7800", SF), ("7a00", PF), ("7c00", SF),
     ("7c00", OF), ("7e00", ZF), ("7f00", SF | OF), ("0f8400000000", ZF), ("eb00", 0)],
)  # fmt: skip
def test_a_condition_that_holds_jumps(code: str, flags: int) -> None:
    assert jump(code, flags) is True


@pytest.mark.parametrize(
    ("code", "flags", "rcx", "bits", "taken"),
    [
        ("e200", 0, 1, 64, False), ("e200", 0, 0, 64, True), ("e200", 0, 1 << 32 | 1, 64, True),
        ("67e200", 0, 1 << 32 | 1, 64, False), ("e200", 0, 1 << 16 | 1, 16, False),
        ("67e200", 0, 1 << 16 | 1, 16, True),
        ("e100", ZF, 2, 32, True), ("e100", 0, 2, 32, False), ("e000", 0, 2, 32, True), ("e000", ZF, 2, 32, False),
        ("e300", 0, 0, 64, True), ("e300", 0, 1 << 40, 64, False), ("67e300", 0, 1 << 40, 64, True),
        ("e300", 0, 1 << 16, 16, True),
    ],
)  # fmt: skip
def test_counting_jumps_look_at_the_counter_as_wide_as_addresses(
    code: str, flags: int, rcx: int, bits: int, taken: bool
) -> None:
    assert jump(code, flags, rcx, bits) is taken


def test_a_call_is_no_jump() -> None:
    call = DECODER.decode(bytes.fromhex("e800000000"), bits=64, address=0)
    assert not is_jump(call)
    assert jump("e800000000") is None
    assert jump("90") is None


def test_arrows_that_overlap_get_lanes_of_their_own_the_short_ones_inside() -> None:
    assert lanes([(1, 9), (2, 4), (5, 8), (12, 10)]) == [1, 0, 0, 0]
    assert lanes([]) == []
    many = lanes([(0, 50 + n) for n in range(20)])
    assert max(many) == 7
    assert many[:8] == list(range(8))
