"""/dev/kvm itself: what it says of itself, and VMs that come and go."""

from __future__ import annotations

import pytest

from kvmbench import errors
from kvmbench.core import wire
from kvmbench.kvm import System
from kvmbench.uapi import Capability, constants, ffi
from kvmbench.uapi.cpuid import feature_names


@pytest.fixture
def system(host):
    return System(host.core)


def test_the_api_version_is_12(system):
    assert system.get_api_version() == constants.KVM_API_VERSION == 12


def test_capabilities_say_what_there_is_and_how_much(system):
    capabilities = system.capabilities()
    assert capabilities[Capability.USER_MEMORY] == 1
    assert capabilities[Capability.NR_MEMSLOTS] > 30
    assert Capability.PPC_PAPR not in capabilities
    assert system.check_extension(Capability.MAX_VCPUS) == capabilities[Capability.MAX_VCPUS]


def test_a_capability_that_no_kernel_has_is_answered_with_0(system):
    assert system.check_extension(100_000) == 0


def test_a_vcpus_mapping_holds_kvm_run_and_a_page_for_port_data(system):
    assert system.get_vcpu_mmap_size() >= 2 * 4096 > ffi.sizeof("struct kvm_run")


def test_the_list_of_msrs_has_those_that_every_guest_has(system):
    indices = system.get_msr_index_list()
    assert 0x10 in indices
    assert constants.MSR_KVM_SYSTEM_TIME_NEW in indices
    assert len(set(indices)) == len(indices)


def test_feature_msrs_that_are_listed_can_be_read(system):
    if not system.check_extension(Capability.GET_MSR_FEATURES):
        pytest.skip("this KVM has no GET_MSR_FEATURES")
    indices = system.get_msr_feature_index_list()
    assert list(system.get_msrs(indices)) == indices


def test_an_msr_that_does_not_exist_is_named(system):
    with pytest.raises(errors.UnsupportedError, match="MSR 0xdeadbeef"):
        system.get_msrs([0xDEADBEEF])


def test_the_supported_cpuid_offers_long_mode_and_kvms_own_leaves(system):
    cpuid = system.get_supported_cpuid()
    leaves = {entry.function: entry for entry in cpuid.entries[0 : cpuid.nent]}
    assert len(cpuid.entries) == cpuid.nent
    assert "lm" in feature_names(0x80000001, 0, edx=leaves[0x80000001].edx)
    assert "clocksource2" in feature_names(0x40000001, 0, eax=leaves[0x40000001].eax)


def test_the_emulated_cpuid_is_a_list_too(system):
    cpuid = system.get_emulated_cpuid()
    assert len(cpuid.entries) == cpuid.nent


def test_an_unknown_type_of_vm_is_refused_by_kvm(system):
    with pytest.raises(errors.KvmIoctlError, match=r"KVM_CREATE_VM.*no such type of VM") as caught:
        system.create_vm(type=0x12345)
    assert caught.value.ioctl == "KVM_CREATE_VM"


def test_a_closed_system_leaves_the_host_open(host, system):
    with system:
        pass
    system.close()
    with pytest.raises(errors.ClosedError, match="the system is closed"):
        system.get_api_version()
    assert System(host.core).get_api_version() == 12


def test_vms_can_be_made_and_closed_many_times(system):
    for _ in range(30):
        with system.create_vm() as vm:
            vm.add_region(0, 4096)
            vm.create_vcpu(0)


def test_closing_a_vm_closes_what_was_made_in_it(system):
    vm = system.create_vm()
    region, vcpu = vm.add_region(0, 4096), vm.create_vcpu(0)
    vm.close()
    vm.close()
    assert region.closed
    assert vcpu.closed
    with pytest.raises(errors.ClosedError, match="the vcpu is closed"):
        vcpu.get_regs()
    with pytest.raises(errors.ClosedError, match="the memory region is closed"):
        region.read(0, 1)
    vcpu.close()
    assert "closed" in repr(vm)


@pytest.mark.parametrize(
    ("name", "data", "value"),
    [
        ("KVM_GET_API_VERSION", b"", 1),
        ("KVM_GET_API_VERSION", b"\0", 0),
        ("KVM_GET_SUPPORTED_CPUID", b"", 0),
        ("KVM_GET_MSRS", b"\1\0\0\0", 0),
        ("KVM_GET_MSRS", b"\2\0\0\0" + bytes(4) + bytes(16), 0),
        ("KVM_GET_MSRS", b"\xff\xff\xff\xff" + bytes(4) + bytes(16), 0),
        ("KVM_GET_REGS", b"", 0),
        ("KVM_RUN", b"", 0),
        ("KVM_CREATE_VM", b"", 0),
        ("KVM_IRQFD", bytes(32), 0),
    ],
)
def test_a_request_that_is_not_as_the_table_says_never_reaches_the_kernel(host, name, data, value):
    with pytest.raises(errors.MisuseError):
        host.core.ioctl(wire.KB_SYSTEM_HANDLE, name, data, value=value)
