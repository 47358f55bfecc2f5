"""The register table agrees with KVM's struct and names each part once."""

from __future__ import annotations

import pytest

from kvmbench.debug.register_table import (
    CONTROL,
    GENERAL,
    INTEGER,
    SEGMENTS,
    SUBREGISTERS,
    TABLES,
    short_name,
)
from kvmbench.uapi import ffi


def test_the_integer_registers_are_the_fields_of_struct_kvm_regs_in_order() -> None:
    assert [name for name, _ in ffi.typeof("struct kvm_regs").fields] == list(INTEGER)


def test_segments_tables_and_control_registers_are_the_fields_of_struct_kvm_sregs_in_order() -> None:
    fields = [name for name, _ in ffi.typeof("struct kvm_sregs").fields]
    assert fields == [*SEGMENTS, *TABLES, *CONTROL, "interrupt_bitmap"]


def test_every_general_register_has_parts_of_32_16_and_8_bits() -> None:
    for name in GENERAL:
        widths = [
            sub.width_bits for sub in SUBREGISTERS.values() if sub.parent == name and not sub.shift_bits
        ]
        assert sorted(widths) == [8, 16, 32], name


def test_only_the_four_old_registers_have_a_high_byte() -> None:
    high = {sub.name: sub.parent for sub in SUBREGISTERS.values() if sub.shift_bits}
    assert high == {"ah": "rax", "bh": "rbx", "ch": "rcx", "dh": "rdx"}
    assert all(SUBREGISTERS[name].shift_bits == SUBREGISTERS[name].width_bits == 8 for name in high)


def test_only_writes_of_32_bits_clear_the_upper_half() -> None:
    assert all(sub.clears_upper == (sub.width_bits == 32) for sub in SUBREGISTERS.values())


@pytest.mark.parametrize(
    ("name", "bits", "shown"),
    [("rax", 64, "rax"), ("rax", 32, "eax"), ("rsp", 16, "esp"), ("r9", 32, "r9d"), ("rflags", 32, "eflags")],
)
def test_a_register_has_its_short_name_in_narrow_code(name: str, bits: int, shown: str) -> None:
    assert short_name(name, bits) == shown
