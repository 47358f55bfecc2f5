"""Addresses told with the labels of a guest."""

from __future__ import annotations

import pytest

from kvmbench.conformance.prepared import place
from kvmbench.machine import Program

PROGRAM = Program("guest", ((0x1000, bytes(16)),), 0x1000, symbols={"start": 0x1000, "loop": 0x1004, "OUTSIDE": 0x20})


@pytest.mark.parametrize(
    ("address", "told"),
    [
        (0x1000, "start"),
        (0x1003, "start+0x3"),
        (0x1004, "loop"),
        (0x1010, "loop+0xc"),
        (0x20, "0x20"),
        (0xFFF0, "0xfff0"),
        (0x9000, "0x9000"),
    ],
)
def test_an_address_is_told_by_the_label_before_it_if_it_is_of_the_program(address, told):
    assert place(PROGRAM, address) == told


def test_without_labels_it_is_told_in_hex():
    assert place(Program("guest", ((0x1000, b"\x90"),), 0x1000), 0x1000) == "0x1000"
