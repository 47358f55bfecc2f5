"""C arithmetic on constants, with the widths that C has."""

from __future__ import annotations

import pytest

from kvmbench.uapi.expression import evaluate


def value(text: str) -> int | None:
    return evaluate(text, known={"two": 2}, size_of={"struct kvm_regs": 144}.__getitem__)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        ("0x1F", 31),
        ("010", 8),
        ("1 << 4 | two", 18),
        ("(((2U) << (((0+8)+8)+14)) | (((0xAE)) << (0+8)) | ((sizeof(struct kvm_regs)) << 16))", 0x8090AE00),
        ("-1", -1),
        ("-1ul", (1 << 64) - 1),
        ("(-1ul)", (1 << 64) - 1),
        ("((__u32)(-1))", (1 << 32) - 1),
        ("~0U", (1 << 32) - 1),
        ("1ULL << 63", 1 << 63),
        ("0xffffffff", 0xFFFFFFFF),
        ("-7 / 2", -3),
        ("sizeof(__u64)", 8),
        ("!0", 1),
        ("3 > 2", 1),
    ],
)
def test_a_constant_has_the_value_that_c_gives_it(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    "text", ["name", '"text"', "f(1)", "1 +", "sizeof(struct unknown)", "1 / 0", "x[2]", "1.5"]
)
def test_what_is_no_integer_constant_is_none(text):
    assert value(text) is None
