"""Tables of names: ioctls, capabilities, exit reasons, MSRs, CPUID bits."""

from __future__ import annotations

import pytest

from kvmbench import uapi
from kvmbench.uapi import cpuid, msrs


def test_an_ioctl_has_number_direction_size_and_struct():
    assert uapi.IOCTLS["KVM_GET_REGS"] == ("KVM_GET_REGS", 0x8090AE81, "out", 144, "struct kvm_regs")
    assert uapi.IOCTLS["KVM_NMI"] == ("KVM_NMI", 0xAE9A, "none", 0, "")
    assert uapi.IOCTLS["KVM_TRANSLATE"].direction == "inout"
    assert uapi.IOCTLS["KVM_GET_MSRS"].size_bytes == 8


def test_the_size_in_an_ioctls_number_is_that_of_its_struct():
    for ioctl in uapi.IOCTLS.values():
        if ioctl.struct.startswith("struct "):
            assert uapi.ffi.sizeof(ioctl.struct) == ioctl.size_bytes, ioctl.name


def test_an_ioctl_is_found_by_its_number():
    for ioctl in uapi.IOCTLS.values():
        assert uapi.ioctl_by_number(ioctl.number).number == ioctl.number
    assert uapi.ioctl_by_number(0x8138AE83).name == "KVM_GET_SREGS"
    assert uapi.ioctl_by_number(0x12345678) is None


def test_the_table_of_ioctls_has_none_of_other_architectures():
    assert not [name for name in uapi.IOCTLS if name.startswith(("KVM_S390", "KVM_PPC", "KVM_ARM"))]


def test_exit_reasons_are_a_gapless_list_without_the_kinds_inside_an_exit():
    assert [int(reason) for reason in uapi.ExitReason] == list(range(len(uapi.ExitReason)))
    assert uapi.ExitReason(5) is uapi.ExitReason.HLT
    assert {"HYPERV_SYNIC", "XEN_HCALL", "IO_IN"}.isdisjoint(uapi.ExitReason.__members__)


def test_capabilities_have_the_headers_numbers():
    assert uapi.Capability.SYNC_REGS == 74
    assert uapi.Capability(195) is uapi.Capability.SET_GUEST_DEBUG2


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (0x10, "IA32_TIME_STAMP_COUNTER"),
        (0x1B, "IA32_APIC_BASE"),
        (0x207, "IA32_MTRR_PHYSMASK3"),
        (0x26F, "IA32_MTRR_FIX4K_F8000"),
        (0x40D, "IA32_MC3_STATUS"),
        (0x491, "IA32_VMX_VMFUNC"),
        (0x830, "IA32_X2APIC_ICR"),
        (0xC0000080, "IA32_EFER"),
        (0xC0010117, "VM_HSAVE_PA"),
        (0x4B564D01, "MSR_KVM_SYSTEM_TIME_NEW"),
        (0x12, "MSR_KVM_SYSTEM_TIME"),
    ],
)
def test_an_msr_has_its_manuals_name(index, name):
    assert msrs.msr_name(index) == name
    assert msrs.MSR_INDICES[name] == index


def test_an_msr_without_a_name_is_shown_in_hex():
    assert msrs.msr_name(0xDEAD0000) == "0xdead0000"


def test_no_two_msrs_share_a_name():
    assert len(msrs.MSR_INDICES) == len(msrs.MSR_NAMES)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("hypervisor", (0x1, 0, "ecx", 31)),
        ("smep", (0x7, 0, "ebx", 7)),
        ("la57", (0x7, 0, "ecx", 16)),
        ("nx", (0x80000001, 0, "edx", 20)),
        ("svm", (0x80000001, 0, "ecx", 2)),
        ("npt", (0x8000000A, 0, "edx", 0)),
        ("clocksource2", (0x40000001, 0, "eax", 3)),
        ("xsaves", (0xD, 1, "eax", 3)),
    ],
)
def test_a_feature_is_found_at_its_manuals_place(name, place):
    register, bit = cpuid.find_feature(name)
    assert (*register, bit) == place


def test_features_are_named_from_the_bits_that_are_set():
    assert cpuid.feature_names(0x80000001, 0, edx=1 << 20 | 1 << 29, ecx=1 << 2) == ["svm", "nx", "lm"]
    assert cpuid.feature_names(0x12345, 0, eax=0xFFFFFFFF) == []


def test_no_two_features_share_a_name_and_every_bit_is_in_a_register():
    names = [name for bits in cpuid.FEATURES.values() for name in bits.values()]
    assert len(set(names)) == len(names)
    assert all(0 <= bit < 32 for bits in cpuid.FEATURES.values() for bit in bits)


def test_an_unknown_feature_is_a_key_error():
    with pytest.raises(KeyError, match="warp_drive"):
        cpuid.find_feature("warp_drive")
