"""Eventfds that interrupt a guest."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench import errors
from kvmbench.kvm import System
from kvmbench.uapi import Capability, ffi
from kvmbench.uapi import constants as c

LINE = 4


@pytest.fixture
def waiting(host, guest):
    """A guest that waits in HLT, inside KVM, for an interrupt on line 4, and then ends."""
    with kb.Machine(host, memory="2M", mode="protected", irqchip=True) as m:
        m.load_asm(guest("serial_interrupt.S"))
        yield m


def start(m: kb.Machine) -> None:
    assert m.cpu.run(deadline_s=0.2).cause is kb.Cause.DEADLINE, "it waits in HLT, inside KVM"


def interrupted(m: kb.Machine) -> bool:
    return m.cpu.run(deadline_s=30).cause is kb.Cause.GUEST_EXIT


def test_an_eventfd_interrupts_the_guest(waiting):
    fd = waiting.vm.create_eventfd()
    waiting.vm.irqfd(fd, LINE)
    start(waiting)
    fd.write()
    assert interrupted(waiting)
    assert fd.read() == 0, "KVM has taken the count"


def test_a_count_from_before_interrupts_too(waiting):
    fd = waiting.vm.create_eventfd()
    start(waiting)
    fd.write()
    waiting.vm.irqfd(fd, LINE)
    assert interrupted(waiting)


def test_one_that_is_taken_back_or_closed_interrupts_no_more(waiting):
    fd, other = waiting.vm.create_eventfd(), waiting.vm.create_eventfd()
    waiting.vm.irqfd(fd, LINE)
    waiting.vm.irqfd(fd, LINE, deassign=True)
    waiting.vm.irqfd(other, LINE)
    other.close()
    start(waiting)
    fd.write()
    start(waiting)
    assert fd.read() == 1
    waiting.irq(LINE, 1)
    assert interrupted(waiting)


def test_a_level_is_up_until_the_guest_has_acknowledged_and_then_the_other_eventfd_rises(waiting):
    if not waiting.vm.check_extension(Capability.IRQFD_RESAMPLE):
        pytest.skip("this KVM has no IRQFD_RESAMPLE")
    fd, acknowledged = waiting.vm.create_eventfd(), waiting.vm.create_eventfd()
    waiting.vm.irqfd(fd, LINE, resample=acknowledged)
    start(waiting)
    assert acknowledged.read() == 0
    fd.write()
    assert interrupted(waiting)
    assert acknowledged.read() == 1


def test_a_guest_s_write_interrupts_the_guest_itself(host, guest):
    """A doorbell whose eventfd is an interrupt: nothing of it in user space."""
    source = guest("serial_interrupt.S").replace("    sti\n", "    sti\n    mov dx, 0x500\n    out dx, al\n")
    with kb.Machine(host, memory="2M", mode="protected", irqchip=True) as m:
        m.load_asm(source)
        fd = m.vm.create_eventfd()
        m.vm.ioeventfd(fd, 0x500, 1, pio=True)
        m.vm.irqfd(fd, LINE)
        assert interrupted(m)
        assert m.bus.unclaimed.get(("out", 0x500)) is None


def test_interrupts_need_controllers_and_an_eventfd_interrupts_once(host):
    with System(host.core).create_vm() as vm:
        with pytest.raises(errors.KvmIoctlError, match="create_irqchip"):
            vm.irqfd(vm.create_eventfd(), LINE)
        vm.create_irqchip()
        fd = vm.create_eventfd()
        vm.irqfd(fd, LINE)
        with pytest.raises(errors.KvmIoctlError, match="interrupts already"):
            vm.irqfd(fd, LINE + 1)


def test_eventfds_that_are_none_of_this_vm_are_refused(host):
    with System(host.core).create_vm() as vm, System(host.core).create_vm() as other:
        vm.create_irqchip()
        mine, theirs, closed = vm.create_eventfd(), other.create_eventfd(), vm.create_eventfd()
        closed.close()
        with pytest.raises(errors.MisuseError, match="another VM"):
            vm.irqfd(theirs, LINE)
        with pytest.raises(errors.MisuseError, match="another VM"):
            vm.irqfd(mine, LINE, resample=theirs)
        with pytest.raises(errors.ClosedError, match="eventfd is closed"):
            vm.irqfd(mine, LINE, resample=closed)
        resample = int(c.KVM_IRQFD_FLAG_RESAMPLE)
        for fields, expected in (
            ({"fd": mine.handle, "resamplefd": theirs.handle, "flags": resample}, errors.ClosedError),
            ({"fd": mine.handle, "resamplefd": 3, "flags": resample}, errors.ClosedError),
            ({"fd": theirs.handle}, errors.ClosedError),
            ({"fd": mine.handle, "resamplefd": 3}, errors.MisuseError),
            ({"fd": mine.handle, "flags": 4}, errors.MisuseError),
        ):
            raw = bytes(ffi.buffer(ffi.new("struct kvm_irqfd *", fields)))
            with pytest.raises(expected):
                vm.core.ioctl(vm.handle, "KVM_IRQFD", raw)
        vm.irqfd(mine, LINE)
