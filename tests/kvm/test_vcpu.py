"""A vcpu's state, set and read back, on real KVM."""

from __future__ import annotations

import pytest

from kvmbench import errors
from kvmbench.kvm import System
from kvmbench.uapi import Capability, ffi
from kvmbench.uapi import constants as c


@pytest.fixture
def system(host):
    return System(host.core)


@pytest.fixture
def vm(system):
    with system.create_vm() as vm:
        yield vm


@pytest.fixture
def vcpu(vm):
    return vm.create_vcpu(0)


@pytest.fixture
def vcpu_with_apic(vm):
    vm.create_irqchip()
    return vm.create_vcpu(0)


def refused(errno: int, hint: str):
    return pytest.raises(errors.KvmIoctlError, match=rf"errno {errno}\): .*{hint}")


def test_a_new_vcpu_is_at_the_reset_vector(vcpu):
    assert vcpu.get_regs().rip == 0xFFF0
    assert vcpu.get_sregs().cs.base == 0xFFFF0000


def test_named_registers_are_set_and_the_others_stay(vcpu):
    vcpu.set_regs(rax=(1 << 64) - 1, rip=0x1000)
    vcpu.set_regs(rbx=7)
    regs = vcpu.get_regs()
    assert (regs.rax, regs.rbx, regs.rip) == ((1 << 64) - 1, 7, 0x1000)


def test_a_struct_of_registers_is_the_callers_own(vcpu):
    regs = vcpu.get_regs()
    regs.r15 = 99
    assert vcpu.get_regs().r15 == 0
    vcpu.set_regs(regs)
    assert vcpu.get_regs().r15 == 99


def test_a_wrong_struct_field_or_value_is_misuse_and_changes_nothing(vcpu):
    before = bytes(ffi.buffer(vcpu.get_regs()))
    for wrong in (
        lambda: vcpu.set_regs(vcpu.get_sregs()),
        lambda: vcpu.set_regs(7),
        lambda: vcpu.set_regs(vcpu.get_regs(), rax=1),
        lambda: vcpu.set_regs(ax=1),
        lambda: vcpu.set_regs(rax=1 << 64),
    ):
        with pytest.raises(errors.MisuseError, match="KVM_SET_REGS"):
            wrong()
    assert bytes(ffi.buffer(vcpu.get_regs())) == before


def test_special_registers_are_kept(vcpu):
    sregs = vcpu.get_sregs()
    sregs.gs.base = 0x12345000
    sregs.cr2 = 0xDEAD
    vcpu.set_sregs(sregs)
    assert (vcpu.get_sregs().gs.base, vcpu.get_sregs().cr2) == (0x12345000, 0xDEAD)


def test_control_bits_that_cannot_be_are_refused_with_the_likely_cause(vcpu):
    with refused(22, r"CR0\.PG without CR0\.PE"):
        vcpu.set_sregs(cr0=1 << 31)


def test_sregs2_has_the_same_registers(vcpu, system):
    if not system.check_extension(Capability.SREGS2):
        pytest.skip("this KVM has no SREGS2")
    vcpu.set_sregs2(cr2=0xBEEF)
    assert vcpu.get_sregs2().cr2 == vcpu.get_sregs().cr2 == 0xBEEF


def test_fpu_state_is_kept(vcpu):
    fpu = vcpu.get_fpu()
    fpu.xmm[3][0] = 0x5A
    fpu.fcw = 0x27F
    vcpu.set_fpu(fpu)
    assert vcpu.get_fpu().xmm[3][0] == 0x5A
    assert vcpu.get_fpu().fcw == 0x27F


def test_xsave_state_is_kept_and_holds_the_fpu(vcpu, system):
    if not system.check_extension(Capability.XSAVE):
        pytest.skip("this KVM has no XSAVE")
    xsave = vcpu.get_xsave()
    xsave.region[0] = 0x27F
    # XSTATE_BV: without its bit a component counts as initial, whatever its bytes say.
    xsave.region[128] |= 3
    vcpu.set_xsave(xsave)
    assert vcpu.get_xsave().region[0] & 0xFFFF == vcpu.get_fpu().fcw == 0x27F


def test_xsave2_is_as_long_as_the_capability_says(vcpu, vm):
    size = vm.check_extension(Capability.XSAVE2)
    if not size:
        pytest.skip("this KVM has no XSAVE2")
    xsave = vcpu.get_xsave2()
    assert ffi.sizeof(xsave[0]) == size
    vcpu.set_xsave(xsave)


def test_xcr0_is_kept(vcpu, system):
    if not system.check_extension(Capability.XCRS):
        pytest.skip("this KVM has no XCRS")
    vcpu.set_cpuid2(system.get_supported_cpuid())
    xcrs = vcpu.get_xcrs()
    assert xcrs.nr_xcrs == 1
    xcrs.xcrs[0].value = 3
    vcpu.set_xcrs(xcrs)
    assert vcpu.get_xcrs().xcrs[0].value == 3


def test_debug_registers_are_kept(vcpu):
    vcpu.set_debugregs(db=[1, 2, 3, 4])
    assert list(vcpu.get_debugregs().db) == [1, 2, 3, 4]
    with refused(22, "DR6 or DR7"):
        vcpu.set_debugregs(dr7=1 << 40)


def test_msrs_are_read_in_the_order_asked_for_and_set(vcpu):
    vcpu.set_msrs({0x174: 0x8, 0x175: 0x1234000})
    assert list(vcpu.get_msrs([0x175, 0x174]).items()) == [(0x175, 0x1234000), (0x174, 0x8)]
    assert vcpu.get_msrs([]) == {}


def test_more_msrs_than_one_call_takes_are_read_in_several(vcpu):
    assert len(vcpu.get_msrs([0x174] * 600 + [0x175])) == 2


def test_an_msr_that_kvm_refuses_is_named_and_those_before_it_are_set(vcpu):
    with pytest.raises(errors.UnsupportedError, match="0x1 for MSR 0xdeadbeef; those before it are set"):
        vcpu.set_msrs({0x174: 0x77, 0xDEADBEEF: 1})
    assert vcpu.get_msrs([0x174]) == {0x174: 0x77}


def test_cpuid_is_what_was_set(vcpu, system):
    supported = system.get_supported_cpuid()
    vcpu.set_cpuid2(supported)
    assert vcpu.get_cpuid2().nent == supported.nent


def test_cpuid_can_be_given_as_dictionaries(host, vcpu):
    vcpu.set_cpuid2([{"function": 0, "eax": 1}, {"function": 1, "edx": 1 << 6}])
    found = {entry.function: (entry.eax, entry.edx) for entry in vcpu.get_cpuid2().entries}
    assert found[0] == (1, 0)
    if host.info.module != "kvm_pvm":  # which puts features back that its guests cannot do without
        assert found[1][1] & (1 << 6 | 1 << 0) == 1 << 6


def test_events_are_kept(vcpu):
    events = vcpu.get_vcpu_events()
    events.nmi.masked = 1
    events.flags = 0
    vcpu.set_vcpu_events(events)
    assert vcpu.get_vcpu_events().nmi.masked == 1
    events.exception.injected, events.exception.nr = 1, 2
    with refused(22, "vector is 2 or above 31"):
        vcpu.set_vcpu_events(events)


def test_an_interrupt_is_queued_and_a_second_takes_its_place(vcpu):
    vcpu.interrupt(0x41)
    vcpu.interrupt(0x42)
    events = vcpu.get_vcpu_events()
    assert (events.interrupt.injected, events.interrupt.nr) == (1, 0x42)
    with refused(22, "above 255"):
        vcpu.interrupt(0x100)


def test_an_interrupt_past_an_in_kernel_controller_is_refused(vcpu_with_apic):
    with refused(6, r"use VM\.irq_line"):
        vcpu_with_apic.interrupt(0x41)


def test_an_nmi_is_pending_until_the_vcpu_runs(vcpu):
    vcpu.nmi()
    assert vcpu.get_vcpu_events().nmi.pending


def test_the_state_of_a_vcpu_can_be_changed_with_an_in_kernel_controller(vcpu_with_apic):
    assert vcpu_with_apic.get_mp_state() == c.KVM_MP_STATE_RUNNABLE
    vcpu_with_apic.set_mp_state(c.KVM_MP_STATE_HALTED)
    assert vcpu_with_apic.get_mp_state() == c.KVM_MP_STATE_HALTED


def test_a_halted_state_without_one_is_refused(vcpu):
    with refused(22, "need in-kernel interrupt controllers"):
        vcpu.set_mp_state(c.KVM_MP_STATE_HALTED)


def test_an_address_is_itself_while_paging_is_off(vcpu):
    answer = vcpu.translate(0x1234)
    assert (answer.valid, answer.physical_address) == (1, 0x1234)


def test_an_address_that_the_page_tables_do_not_map_is_not_valid(vm, vcpu, system):
    vm.add_region(0, 0x1000)
    vcpu.set_cpuid2(system.get_supported_cpuid())
    vcpu.set_sregs(cr0=0x80000011, cr3=0, cr4=0x20, efer=0x500)
    assert vcpu.translate(0x1234).valid == 0


def test_the_local_apic_is_readable_with_an_in_kernel_controller_only(vcpu_with_apic):
    lapic = vcpu_with_apic.get_lapic()
    vcpu_with_apic.set_lapic(lapic)
    assert bytes(ffi.buffer(lapic.regs))[0x30] & 0xF0 == 0x10  # version: an integrated APIC


def test_the_local_apic_without_one_is_refused(vcpu):
    with refused(22, "create_irqchip"):
        vcpu.get_lapic()


def test_the_tscs_frequency_can_be_set_to_what_it_is(host, vcpu, system):
    if not system.check_extension(Capability.GET_TSC_KHZ):
        pytest.skip("this KVM has no GET_TSC_KHZ: its TSC is not stable")
    khz = vcpu.get_tsc_khz()
    # An emulator's TSC may not calibrate, and then counts 0 kHz; or Linux calibrates it anew after KVM was
    # loaded, and KVM then refuses its own frequency.
    if not host.info.emulated:
        assert 100_000 < khz < 20_000_000
        vcpu.set_tsc_khz(khz)
        assert vcpu.get_tsc_khz() == khz


def test_a_frequency_that_looks_like_an_interrupted_call_is_no_endless_one(host, vcpu):
    # The ioctl returns the rate as a number: 0xfffffffc kHz is -4, which is -EINTR.
    try:
        vcpu.set_tsc_khz(0xFFFFFFFC)
    except errors.KvmIoctlError as error:
        pytest.skip(f"this KVM refuses the rate: {error}")
    with pytest.raises(errors.KvmIoctlError, match="KVM_GET_TSC_KHZ"):
        vcpu.get_tsc_khz()


def test_a_clock_that_the_guest_has_not_set_up_cannot_be_paused(vcpu):
    with refused(22, "has not set kvmclock up"):
        vcpu.kvmclock_ctrl()


def test_guest_debug_can_be_set_and_taken_away(vcpu):
    control = c.KVM_GUESTDBG_ENABLE | c.KVM_GUESTDBG_USE_HW_BP
    vcpu.set_guest_debug(control, debugreg=[0x1000, 0, 0, 0, 0, 0, 0, 1])
    vcpu.set_guest_debug(0)
    with pytest.raises(errors.MisuseError, match="8 debug registers"):
        vcpu.set_guest_debug(0, debugreg=range(9))


def test_a_signal_mask_can_be_set_and_taken_away(vcpu):
    vcpu.set_signal_mask([2, 64])
    vcpu.set_signal_mask(None)
    with pytest.raises(errors.MisuseError, match="from 1 to 64"):
        vcpu.set_signal_mask([0])


def test_an_attribute_is_there_or_not(vcpu, system):
    if not system.check_extension(Capability.VCPU_ATTRIBUTES):
        pytest.skip("this KVM has no VCPU_ATTRIBUTES")
    assert vcpu.has_device_attr(c.KVM_VCPU_TSC_CTRL, c.KVM_VCPU_TSC_OFFSET)
    assert not vcpu.has_device_attr(99, 0)
    with refused(6, "no such attribute"):
        vcpu.get_device_attr(99, 0)


def test_the_tscs_offset_is_kept(host, vcpu, system):
    if not system.check_extension(Capability.VCPU_ATTRIBUTES):
        pytest.skip("this KVM has no VCPU_ATTRIBUTES")
    before = vcpu.get_tsc_offset()
    vcpu.set_tsc_offset(-12345)
    if host.info.module == "kvm_pvm":
        assert vcpu.get_tsc_offset() == 0  # it takes the offset and goes on saying 0
    elif host.info.emulated:
        # An emulator's TSC counts as unstable: KVM adjusts the offset whenever it loads the vcpu.
        assert vcpu.get_tsc_offset() != before
    else:
        assert vcpu.get_tsc_offset() == (1 << 64) - 12345


def test_machine_check_banks_can_be_set_up(vcpu, system):
    vcpu.x86_setup_mce(system.x86_get_mce_cap_supported() & ~0xFF | 4)
    vcpu.x86_set_mce(bank=1, status=1 << 63)
    with refused(22, "bank"):
        vcpu.x86_set_mce(bank=9, status=1 << 63)


def test_a_vcpu_has_statistics(vcpu, vm):
    if not vm.check_extension(Capability.BINARY_STATS_FD):
        pytest.skip("this KVM has no BINARY_STATS_FD")
    with vcpu.get_stats_fd() as stats:
        assert stats.id.endswith("/vcpu-0")
        assert stats.read()["exits"] == 0
        assert stats.descriptors["halt_wait_ns"].scale == pytest.approx(1e-9)


def test_a_second_vcpu_of_the_same_id_is_refused(vm, vcpu):
    with refused(17, "a vcpu of that id already"):
        vm.create_vcpu(0)
    assert vm.create_vcpu(1).id == 1


def test_a_closed_vcpu_says_so(vcpu):
    vcpu.close()
    with pytest.raises(errors.ClosedError, match="the vcpu is closed"):
        vcpu.get_regs()
    assert repr(vcpu) == "<vcpu 0 (closed)>"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("KVM_SET_REGS", bytes(143)),
        ("KVM_SET_REGS", bytes(145)),
        ("KVM_SET_XSAVE", bytes(4095)),
        ("KVM_SET_XSAVE", bytes(1 << 20)),
        ("KVM_SET_CPUID2", b"\x05\0\0\0" + bytes(4)),
        ("KVM_SET_SIGNAL_MASK", b"\x10\0\0\0" + bytes(8)),
        ("KVM_SET_DEVICE_ATTR", bytes(23)),
        ("KVM_SET_DEVICE_ATTR", bytes(24 + 4097)),
        ("KVM_SET_NESTED_STATE", bytes(128)),
    ],
)
def test_a_request_of_the_wrong_length_never_reaches_the_kernel(vcpu, name, data):
    with pytest.raises(errors.MisuseError):
        vcpu.core.ioctl(vcpu.handle, name, data)
