"""Segments are copied from KVM's struct, checked, described and written back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvmbench.debug.mode import CodeMode
from kvmbench.debug.segments import DescriptorTable, Segment
from kvmbench.errors import MisuseError
from kvmbench.uapi import ffi


def test_a_segment_survives_the_way_to_kvm_and_back(long_sregs: Any) -> None:
    code = Segment.from_kvm(long_sregs.cs)
    fresh = ffi.new("struct kvm_segment *")
    code.to_kvm(fresh)
    assert bytes(ffi.buffer(fresh)) == bytes(ffi.buffer(ffi.addressof(long_sregs, "cs")))


def test_every_field_of_struct_kvm_segment_is_kept() -> None:
    fields = {name for name, _ in ffi.typeof("struct kvm_segment").fields}
    assert fields - {"padding"} == {field.name for field in dataclasses.fields(Segment)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"type": 11, "l": 1}, "code64 execute/read"),
        ({"type": 11, "db": 1}, "code32 execute/read"),
        ({"type": 13}, "code16 execute conforming"),
        ({"type": 3}, "data read/write"),
        ({"type": 5}, "data read expand-down"),
        ({"type": 11, "s": 0}, "TSS busy"),
        ({"type": 2, "s": 0}, "LDT"),
        ({"present": 0}, "not present"),
        ({"unusable": 1}, "unusable"),
    ],
)
def test_a_segment_says_what_it_is(changes: dict[str, int], words: str) -> None:
    assert dataclasses.replace(Segment(selector=8, base=0, limit=0), **changes).words == words


def test_a_value_that_does_not_fit_is_named_with_its_width() -> None:
    with pytest.raises(MisuseError, match=r"segment selector = 0x10000 does not fit its 16 bit"):
        Segment(selector=0x10000, base=0, limit=0)
    with pytest.raises(MisuseError, match=r"descriptor table limit = 0x12345 does not fit its 16 bits"):
        DescriptorTable(base=0, limit=0x12345)


def test_the_mode_is_read_off_the_control_state(long_sregs: Any, real_sregs: Any) -> None:
    mode = CodeMode.from_kvm(long_sregs, 2)
    assert (mode.name, mode.bits, mode.cpl, mode.paging) == ("long", 64, 0, "4-level")
    assert str(mode) == "long, CPL 0"
    mode = CodeMode.from_kvm(real_sregs, 2)
    assert (mode.name, mode.bits, mode.paging, mode.linear(0x20)) == ("real", 16, "off", 0x10020)


def test_compatibility_protected_and_virtual_8086_modes_are_told_apart(long_sregs: Any) -> None:
    long_sregs.cs.l, long_sregs.cs.db, long_sregs.ss.dpl = 0, 1, 3
    assert str(CodeMode.from_kvm(long_sregs, 2)) == "compatibility, CPL 3"
    long_sregs.efer = 0
    protected = CodeMode.from_kvm(long_sregs, 2)
    assert (protected.name, protected.bits, protected.paging) == ("protected", 32, "PAE")
    assert CodeMode.from_kvm(long_sregs, 2 | 1 << 17).name == "virtual-8086"
    long_sregs.cs.db = 0
    assert str(CodeMode.from_kvm(long_sregs, 2)) == "protected 16-bit, CPL 3"
    long_sregs.cr4 = 0
    assert CodeMode.from_kvm(long_sregs, 2).paging == "32-bit"


def test_the_address_space_wraps_at_4_gib_outside_long_mode(long_sregs: Any) -> None:
    long_sregs.efer, long_sregs.cs.l, long_sregs.cs.db, long_sregs.cs.base = 0, 0, 1, 0xFFFFF000
    assert CodeMode.from_kvm(long_sregs, 2).linear(0x2000) == 0x1000
