"""A VM: memory, interrupt controllers, clock, capabilities."""

from __future__ import annotations

import pytest

from kvmbench import errors
from kvmbench.core.wire import Protection
from kvmbench.kvm import System
from kvmbench.kvm.vm import MsrFilterRange
from kvmbench.uapi import Capability, ffi
from kvmbench.uapi import constants as c


@pytest.fixture
def vm(host):
    with System(host.core).create_vm() as vm:
        yield vm


@pytest.fixture
def vm_with_irqchip(vm):
    vm.create_irqchip()
    return vm


def refused(errno: int, hint: str):
    return pytest.raises(errors.KvmIoctlError, match=rf"errno {errno}\): .*{hint}")


# Memory.


def test_memory_starts_as_zeros_and_keeps_what_is_written(vm):
    region = vm.add_region(0x10000, 0x4000)
    assert region.read(0, 0x4000) == bytes(0x4000)
    region.write(0x123, b"bytes")
    region.fill(0x3FFF, 1, 0xAB)
    assert region.read(0x120, 10) == b"\0\0\0bytes\0\0"
    assert region.read(0x3FFE, 2) == b"\0\xab"


def test_a_mapping_is_the_same_memory_or_none(vm):
    region = vm.add_region(0, 0x2000)
    view = region.map()
    if view is None:
        pytest.skip("the core is in another process")
    view[5:8] = b"abc"
    assert region.read(5, 3) == b"abc"
    assert len(view) == 0x2000
    region.close()
    assert bytes(view[5:8]) == b"abc"


@pytest.mark.parametrize(("offset", "length"), [(0x2000, 1), (0x1FFF, 2), (0, 0x2001), (1 << 63, 1 << 63)])
def test_a_range_that_leaves_the_region_is_refused(vm, offset, length):
    region = vm.add_region(0, 0x2000)
    with pytest.raises(errors.AddressError):
        region.read(offset, length)
    with pytest.raises(errors.AddressError):
        region.fill(offset, length)


def test_a_region_over_another_is_refused_and_leaves_it_alone(vm):
    region = vm.add_region(0x1000, 0x3000)
    with pytest.raises(errors.AddressError, match="overlaps"):
        vm.add_region(0x3000, 0x1000)
    vm.add_region(0x4000, 0x1000)
    region.write(0, b"x")


@pytest.mark.parametrize(("gpa", "size"), [(0x800, 0x1000), (0, 0x1800), (0, 0)])
def test_a_region_not_made_of_pages_is_refused(vm, gpa, size):
    with pytest.raises(errors.MisuseError):
        vm.add_region(gpa, size)


def test_a_region_can_be_moved_with_its_bytes(vm):
    region = vm.add_region(0, 0x1000)
    region.write(0, b"stay")
    region.set(gpa=0x100000)
    assert region.gpa == 0x100000
    assert region.read(0, 4) == b"stay"
    vm.add_region(0, 0x1000)
    with pytest.raises(errors.AddressError):
        region.set(gpa=0)
    assert region.gpa == 0x100000


def test_a_dirty_log_has_a_flag_for_each_page_and_none_are_set_before_the_guest_runs(vm):
    region = vm.add_region(0, 0x9000, flags=c.KVM_MEM_LOG_DIRTY_PAGES)
    assert region.logs_dirty_pages
    log = region.dirty_log()
    assert log.shape == (9,)
    assert not log.any()


def test_a_region_without_a_dirty_log_says_how_to_get_one(vm):
    region = vm.add_region(0, 0x1000)
    with refused(2, "KVM_MEM_LOG_DIRTY_PAGES"):
        region.dirty_log()
    region.set(flags=c.KVM_MEM_LOG_DIRTY_PAGES)
    region.dirty_log()


def test_pages_can_be_protected_and_stay_readable_from_here(vm):
    region = vm.add_region(0, 0x4000)
    region.protect(0x1000, 0x2000, Protection.WRITE)
    region.protect(0x2000, 0x1000, Protection.ALL)
    region.write(0x1FFF, b"ab")
    assert region.read(0x1FFF, 2) == b"ab"
    region.protect(0, 0x4000, Protection.NONE)
    with pytest.raises(errors.MisuseError):
        region.protect(0x10, 0x1000, Protection.WRITE)


def test_a_closed_region_makes_room_for_another(vm):
    with vm.add_region(0, 0x1000) as region:
        assert not region.readonly
    vm.add_region(0, 0x1000, flags=c.KVM_MEM_READONLY)


# Interrupts.


def test_an_ioapic_keeps_the_state_that_is_set(vm_with_irqchip):
    chip = vm_with_irqchip.get_irqchip(c.KVM_IRQCHIP_IOAPIC)
    assert chip.chip.ioapic.base_address == 0xFEC00000
    assert chip.chip.ioapic.redirtbl[3].fields.mask == 1
    chip.chip.ioapic.redirtbl[3].fields.vector = 0x43
    vm_with_irqchip.set_irqchip(chip)
    assert vm_with_irqchip.get_irqchip(c.KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[3].fields.vector == 0x43


def test_a_pic_has_its_own_state(vm_with_irqchip):
    chip = vm_with_irqchip.get_irqchip(c.KVM_IRQCHIP_PIC_MASTER)
    chip.chip.pic.irq_base = 0x20
    vm_with_irqchip.set_irqchip(chip)
    assert vm_with_irqchip.get_irqchip(c.KVM_IRQCHIP_PIC_MASTER).chip.pic.irq_base == 0x20
    assert vm_with_irqchip.get_irqchip(c.KVM_IRQCHIP_PIC_SLAVE).chip.pic.irq_base == 0


def test_a_line_that_is_masked_says_so(vm_with_irqchip):
    vm_with_irqchip.create_vcpu(0)
    vm_with_irqchip.irq_line(5, 1)
    vm_with_irqchip.irq_line(5, 0)
    assert vm_with_irqchip.irq_line_status(20, 1) < 0  # a line of the I/O APIC only, masked after reset


def test_interrupt_lines_need_an_irqchip_and_the_hint_says_so(vm):
    with refused(6, "create_irqchip"):
        vm.irq_line(1, 1)


def test_an_irqchip_can_be_made_once_and_before_the_first_vcpu(host, vm_with_irqchip):
    with refused(17, "already"):
        vm_with_irqchip.create_irqchip()
    with System(host.core).create_vm() as late:
        late.create_vcpu(0)
        with refused(22, "before the VM's first vcpu"):
            late.create_irqchip()


def test_routes_can_be_given_as_dictionaries(vm_with_irqchip):
    pin = {"gsi": 4, "type": c.KVM_IRQ_ROUTING_IRQCHIP, "u": {"irqchip": {"irqchip": 2, "pin": 4}}}
    msi = {"address_lo": 0xFEE00000, "data": 0x31}
    message = {"gsi": 24, "type": c.KVM_IRQ_ROUTING_MSI, "u": {"msi": msi}}
    vm_with_irqchip.set_gsi_routing([pin, message])
    vm_with_irqchip.set_gsi_routing([])
    with refused(22, "unknown type"):
        vm_with_irqchip.set_gsi_routing([{**pin, "type": 77}])
    with pytest.raises(errors.MisuseError, match="entries"):
        vm_with_irqchip.set_gsi_routing([{"pin": 4}])


def test_a_message_to_a_vcpu_that_is_not_ready_is_not_delivered(vm_with_irqchip):
    vm_with_irqchip.create_vcpu(0)
    assert vm_with_irqchip.signal_msi(address=0xFEE00000, data=0x41) <= 0


def test_a_pit_keeps_the_state_that_is_set(vm_with_irqchip):
    vm_with_irqchip.create_pit2()
    vm_with_irqchip.set_pit2(flags=c.KVM_PIT_FLAGS_HPET_LEGACY)
    pit = vm_with_irqchip.get_pit2()
    assert pit.flags & c.KVM_PIT_FLAGS_HPET_LEGACY
    vm_with_irqchip.set_pit2(pit)
    vm_with_irqchip.reinject_control(False)
    with refused(17, "already"):
        vm_with_irqchip.create_pit2()


def test_a_pit_that_is_not_there_has_no_state(vm):
    with refused(6, "create_pit2"):
        vm.get_pit2()


# Time.


def test_the_clock_runs_and_can_be_set(vm):
    # Where the host's TSC is unusable, as under an emulator, the clock moves by whole timer ticks.
    first = vm.get_clock().clock
    assert vm.get_clock().clock >= first
    vm.set_clock(clock=10**15)
    assert 10**15 <= vm.get_clock().clock < 10**15 + 10**11


def test_the_tscs_frequency_is_known(vm):
    if not vm.check_extension(Capability.VM_TSC_CONTROL):
        pytest.skip("this KVM has no VM_TSC_CONTROL")
    khz = vm.get_tsc_khz()
    assert 10_000 < khz < 20_000_000  # 50,000 in Bochs
    vm.set_tsc_khz(khz)


# Addresses, capabilities, filters.


def test_addresses_for_real_mode_on_intel_can_be_set(vm):
    vm.set_identity_map_addr(0xFFFBC000)
    vm.set_tss_addr(0xFFFBD000)


def test_an_identity_map_after_the_first_vcpu_is_refused(vm):
    vm.create_vcpu(0)
    with refused(22, "before the VM's first vcpu"):
        vm.set_identity_map_addr(0xFFFBC000)


def test_a_vm_is_asked_for_its_own_capabilities(vm):
    assert vm.check_extension(Capability.CHECK_EXTENSION_VM) == 1
    assert vm.check_extension(Capability.IRQ_ROUTING) > 0


def test_a_capability_whose_argument_is_a_number_can_be_enabled(vm):
    if not vm.check_extension(Capability.X86_USER_SPACE_MSR):
        pytest.skip("this KVM has no X86_USER_SPACE_MSR")
    vm.enable_cap(Capability.X86_USER_SPACE_MSR, c.KVM_MSR_EXIT_REASON_FILTER)
    with refused(22, "arguments are not allowed"):
        vm.enable_cap(Capability.X86_USER_SPACE_MSR, 1 << 40)


def test_a_capability_that_takes_an_address_or_descriptor_is_not_let_through(vm):
    with pytest.raises(errors.MisuseError, match="plain numbers"):
        vm.enable_cap(Capability.VM_COPY_ENC_CONTEXT_FROM, 0)
    with pytest.raises(errors.MisuseError, match="plain numbers"):
        vm.create_vcpu(0).enable_cap(Capability.HYPERV_ENLIGHTENED_VMCS, 0x1000)


def test_an_msr_filter_takes_ranges_with_bitmaps(vm):
    if not vm.check_extension(Capability.X86_MSR_FILTER):
        pytest.skip("this KVM has no X86_MSR_FILTER")
    both = c.KVM_MSR_FILTER_READ | c.KVM_MSR_FILTER_WRITE
    vm.x86_set_msr_filter([MsrFilterRange(0x10, [False] * 65, both), MsrFilterRange(0x174, [True] * 3, both)])
    vm.x86_set_msr_filter([])
    with pytest.raises(errors.MisuseError, match="at most 16"):
        vm.x86_set_msr_filter([MsrFilterRange(0x10, [True], both)] * 17)


@pytest.mark.parametrize("member", ["bitmap", "addr"])
def test_a_pointer_in_a_message_is_refused(vm, member):
    if member == "bitmap":
        filter = ffi.new("struct kvm_msr_filter *")
        filter.ranges[0].bitmap = ffi.cast("uint8_t *", 0x1000)
        request = ("KVM_X86_SET_MSR_FILTER", bytes(ffi.buffer(filter)))
        handle = vm.handle
    else:
        attr = ffi.new("struct kvm_device_attr *", {"addr": 0x1000})
        request = ("KVM_GET_DEVICE_ATTR", bytes(ffi.buffer(attr)))
        handle = vm.create_vcpu(0).handle
    with pytest.raises(errors.MisuseError):
        vm.core.ioctl(handle, *request)


def test_a_vm_has_statistics(vm):
    if not vm.check_extension(Capability.BINARY_STATS_FD):
        pytest.skip("this KVM has no BINARY_STATS_FD")
    with vm.get_stats_fd() as stats:
        assert stats.id.startswith("kvm-")
        sample = stats.read()
        assert "remote_tlb_flush" in sample
        assert stats.read().since(sample) == {}
    with pytest.raises(errors.ClosedError, match="statistics file is closed"):
        stats.read()


def test_a_device_that_x86_has_not_got_is_refused(vm):
    with refused(19, "no such device"):
        vm.create_device(c.KVM_DEV_TYPE_XICS)
