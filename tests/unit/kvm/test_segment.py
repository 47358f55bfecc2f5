"""Segments are copied from KVM's struct, checked, described and written back."""

from __future__ import annotations

import dataclasses

import pytest

from kvmbench.errors import MisuseError
from kvmbench.kvm.segment import DescriptorTable, Segment
from kvmbench.uapi import ffi


def test_a_segment_survives_the_way_to_kvm_and_back() -> None:
    fields = {"selector": 0x10, "base": 1 << 40, "limit": 0xFFFF_FFFF, "type": 11, "dpl": 3}
    fields |= dict.fromkeys(("present", "s", "l", "g"), 1)
    given, fresh = ffi.new("struct kvm_segment *", fields), ffi.new("struct kvm_segment *")
    Segment.from_kvm(given).to_kvm(fresh)
    assert bytes(ffi.buffer(fresh)) == bytes(ffi.buffer(given))


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
