"""Descriptors and gates, bit by bit."""

from __future__ import annotations

import pytest

from kvmbench.machine.segment import TYPE_TSS_BUSY, available_tss, encode_gate


@pytest.mark.parametrize(
    ("bits", "options", "expected"),
    [
        (16, {}, "34120800"),
        (32, {}, "34120800008e0000"),
        (32, {"dpl": 3}, "3412080000ee0000"),
        (64, {"trap": True}, "34120800008f0000" + "00" * 8),
    ],
)
def test_a_gate_has_its_fields_where_the_manual_has_them(bits: int, options: dict[str, int], expected: str) -> None:
    assert encode_gate(0x1234, 8, bits=bits, **options).hex() == expected  # type: ignore[arg-type]


def test_a_far_handler_of_64_bits_is_split_in_three() -> None:
    gate = encode_gate(0x1122_3344_5566_7788, 0x10, bits=64)
    assert (gate[0:2], gate[6:8], gate[8:12]) == (b"\x88\x77", b"\x66\x55", b"\x44\x33\x22\x11")
    assert gate[12:] == bytes(4)


def test_an_available_tss_is_the_busy_one_without_its_bit() -> None:
    assert (available_tss(TYPE_TSS_BUSY), available_tss(0x3), available_tss(0x9)) == (0x9, 0x1, 0x9)
