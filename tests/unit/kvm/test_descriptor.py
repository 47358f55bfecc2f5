"""Structs on their way to and from KVM."""

from __future__ import annotations

import pytest

from kvmbench import uapi
from kvmbench.errors import MisuseError
from kvmbench.kvm.descriptor import array_struct, set_fields, struct_bytes, struct_from


def test_a_struct_and_a_pointer_to_it_have_the_same_bytes():
    regs = uapi.ffi.new("struct kvm_regs *", {"rip": 0x1000})
    assert struct_bytes(regs) == struct_bytes(regs[0])
    assert len(struct_bytes(regs)) == 144


def test_the_bytes_of_a_struct_include_its_flexible_array():
    msrs = array_struct("struct kvm_msrs", "nmsrs", "entries", [{"index": 0x10, "data": 7}, {"index": 0x174}])
    data = struct_bytes(msrs)
    assert len(data) == 8 + 2 * 16
    assert data[:4] == b"\2\0\0\0"
    back = struct_from("struct kvm_msrs", data, "entries")
    assert [(entry.index, entry.data) for entry in back.entries] == [(0x10, 7), (0x174, 0)]


def test_a_struct_made_from_bytes_is_a_copy():
    data = bytearray(144)
    regs = struct_from("struct kvm_regs", bytes(data))
    regs.rax = 5
    assert data == bytes(144)


def test_more_bytes_than_a_struct_has_are_cut_off():
    assert struct_bytes(struct_from("struct kvm_mp_state", b"\1\0\0\0\xff\xff")) == b"\1\0\0\0"


def test_an_array_of_structs_can_be_given_as_structs_too():
    entry = uapi.ffi.new("struct kvm_msr_entry *", {"index": 0x1B})
    assert array_struct("struct kvm_msrs", "nmsrs", "entries", [entry[0]]).entries[0].index == 0x1B


def test_an_unknown_field_is_named_with_those_there_are():
    with pytest.raises(MisuseError, match=r"KVM_SET_REGS: no field 'rpi'; there are rax, rbx,.*rip"):
        set_fields(uapi.ffi.new("struct kvm_regs *"), {"rpi": 1}, "KVM_SET_REGS")


@pytest.mark.parametrize("value", [-1, 1 << 64, "text", 1.5])
def test_a_value_that_does_not_fit_its_field_is_named(value):
    with pytest.raises(MisuseError, match="KVM_SET_REGS: rax="):
        set_fields(uapi.ffi.new("struct kvm_regs *"), {"rax": value}, "KVM_SET_REGS")


def test_an_array_entry_that_does_not_fit_is_named():
    with pytest.raises(MisuseError, match=r"kvm_msrs\.entries\[1\]"):
        array_struct("struct kvm_msrs", "nmsrs", "entries", [{"index": 1}, {"index": -1}])
