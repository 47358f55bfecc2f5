"""Eventfds that a guest's writes signal, without an exit to user space."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench import errors
from kvmbench.core import wire
from kvmbench.kvm import System
from kvmbench.machine import Device, StopRequest
from kvmbench.uapi import Capability, ffi
from kvmbench.uapi import constants as c

from .test_messages import ask, message, struct

DOORBELL = 0x4000_0000
PORT = 0x500
END = 0x501


class End(Device):
    """Ends the run at a write to port 0x501, and keeps all that came before it to the ports and memory about."""

    name = "end"
    ports = (range(PORT, END + 3),)
    mmio = (range(DOORBELL, DOORBELL + 0x1000),)

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        if port == END:
            return StopRequest("end")
        self.seen.append(("out", port, value, size_bytes))
        return None

    def mmio_write(self, gpa: int, value: int, size_bytes: int) -> None:
        self.seen.append(("mmio", gpa, value, size_bytes))


FINISH = f"\nmov dx, {END:#x}\nout dx, al\nnop\n"


@pytest.fixture(params=[0, 3])
def bell(request, host):
    """A machine at CPL 0 and at 3, whose device sees what no eventfd takes."""
    end = End()
    with kb.Machine(host, memory="2M", devices=[end], user=request.param == 3, cpl=request.param) as m:
        m.end = end
        yield m


@pytest.fixture
def vm(host):
    with System(host.core).create_vm() as vm:
        yield vm


def run(m: kb.Machine, source: str) -> list[tuple[str, int, int, int]]:
    m.load_asm(source + FINISH, at=0x1000)
    m.end.seen.clear()
    stop = m.cpu.run(deadline_s=30)
    assert stop.cause is kb.Cause.GUEST_EXIT, stop
    return m.end.seen


def test_writes_to_a_port_count_and_reach_no_device(bell):
    fd = bell.vm.create_eventfd()
    bell.vm.ioeventfd(fd, PORT, 1, pio=True)
    assert run(bell, f"mov dx, {PORT:#x}\nmov ecx, 7\nagain: out dx, al\ndec ecx\njnz again") == []
    assert fd.read() == 7
    assert fd.read() == 0


def test_writes_to_memory_count_and_reach_no_device(bell):
    fd = bell.vm.create_eventfd()
    bell.vm.ioeventfd(fd, DOORBELL, 4)
    assert run(bell, f"mov ecx, 7\nagain: mov [{DOORBELL:#x}], eax\ndec ecx\njnz again") == []
    assert fd.read() == 7


@pytest.mark.parametrize(("length", "register"), [(1, "al"), (2, "ax"), (4, "eax"), (8, "rax")])
def test_only_a_write_of_its_length_counts(bell, length, register):
    fd = bell.vm.create_eventfd()
    bell.vm.ioeventfd(fd, DOORBELL, length)
    writes = "\n".join(f"mov [{DOORBELL:#x}], {each}" for each in ("al", "ax", "eax"))
    seen = run(bell, f"xor eax, eax\n{writes}\nmov rdi, {DOORBELL:#x}\nmov [rdi], rax")
    assert fd.read() == 1, register
    assert {size for _, _, _, size in seen} == {1, 2, 4, 8} - {length}


def test_length_0_takes_writes_of_any_length(bell):
    if not bell.vm.check_extension(Capability.IOEVENTFD_ANY_LENGTH):
        pytest.skip("this KVM has no IOEVENTFD_ANY_LENGTH")
    fd, port = bell.vm.create_eventfd(), bell.vm.create_eventfd()
    bell.vm.ioeventfd(fd, DOORBELL, 0)
    bell.vm.ioeventfd(port, PORT, 0, pio=True)
    writes = "\n".join(f"mov [{DOORBELL:#x}], {each}" for each in ("al", "ax", "eax"))
    outs = "\n".join(f"out dx, {each}" for each in ("al", "ax", "eax"))
    assert run(bell, f"{writes}\nmov dx, {PORT:#x}\n{outs}") == []
    assert (fd.read(), port.read()) == (3, 3)


def test_datamatch_takes_one_value_and_leaves_the_others_to_the_device(bell):
    fd, other = bell.vm.create_eventfd(), bell.vm.create_eventfd()
    bell.vm.ioeventfd(fd, DOORBELL, 4, datamatch=0x12345678)
    bell.vm.ioeventfd(other, DOORBELL, 4, datamatch=0)
    seen = run(
        bell,
        f"mov eax, 0x12345678\nmov [{DOORBELL:#x}], eax\nxor eax, eax\nmov [{DOORBELL:#x}], eax\n"
        f"mov eax, 0x12345679\nmov [{DOORBELL:#x}], eax",
    )
    assert (fd.read(), other.read()) == (1, 1)
    assert seen == [("mmio", DOORBELL, 0x12345679, 4)]


def test_what_is_taken_back_reaches_the_device_again(bell):
    fd = bell.vm.create_eventfd()
    bell.vm.ioeventfd(fd, PORT, 2, datamatch=5, pio=True)
    with pytest.raises(errors.KvmIoctlError, match=r"errno 2\)"):
        bell.vm.ioeventfd(fd, PORT, 2, pio=True, deassign=True)  # without the value it is another
    bell.vm.ioeventfd(fd, PORT, 2, datamatch=5, pio=True, deassign=True)
    assert run(bell, f"mov dx, {PORT:#x}\nmov ax, 5\nout dx, ax") == [("out", PORT, 5, 2)]
    assert fd.read() == 0


def test_a_closed_eventfd_leaves_its_doorbell_and_the_guest_runs_on(bell):
    fd = bell.vm.create_eventfd()
    bell.vm.ioeventfd(fd, PORT, 1, pio=True)
    fd.close()
    assert run(bell, f"mov dx, {PORT:#x}\nout dx, al") == []


def test_steps_over_a_doorbell_are_plain_steps(bell):
    fd = bell.vm.create_eventfd()
    bell.vm.ioeventfd(fd, DOORBELL, 4)
    bell.load_asm(f"nop\nmov [{DOORBELL:#x}], eax\nnop\nnop" + FINISH, at=0x1000)
    if bell.cpu.regs.cs.selector & 3 and 3 not in bell.host.mechanisms.step:
        pytest.skip(f"{bell.host.info.describe()} has no step at CPL 3")
    bell.cpu.step()
    stop = bell.cpu.step()
    assert stop.cause is kb.Cause.STEP, stop
    assert stop.rip == 0x1008
    assert fd.read() == 1


# What goes wrong.


def test_an_eventfd_counts_what_is_added_from_here(vm):
    with vm.create_eventfd() as fd:
        fd.write()
        fd.write(41)
        assert fd.read() == 42
        fd.write(2**64 - 2)
        with pytest.raises(errors.MisuseError, match=r"would pass 2\*\*64 - 2"):
            fd.write()
        assert fd.read() == 2**64 - 2
        for wrong in (-1, 2**64 - 1, 1.0, "1", True):
            with pytest.raises(errors.MisuseError, match="add="):
                fd.write(wrong)
    for call in (fd.read, fd.write, lambda: vm.ioeventfd(fd, PORT, 1, pio=True)):
        with pytest.raises(errors.ClosedError, match="eventfd is closed"):
            call()


def test_an_eventfd_is_closed_with_its_vm(host):
    vm = System(host.core).create_vm()
    fd = vm.create_eventfd()
    vm.close()
    assert fd.closed
    assert ask(host, message(wire.KB_READ_EVENTFD, struct("kb_handle", handle=fd.handle)))[0] == wire.KB_BAD_HANDLE


def test_an_eventfd_of_another_vm_is_refused(host, vm):
    with System(host.core).create_vm() as other:
        theirs = other.create_eventfd()
        with pytest.raises(errors.MisuseError, match="another VM"):
            vm.ioeventfd(theirs, PORT, 1, pio=True)
        # And by the core, whatever Python says.
        raw = ffi.new("struct kvm_ioeventfd *", {"addr": PORT, "len": 1, "flags": c.KVM_IOEVENTFD_FLAG_PIO})
        raw.fd = ffi.cast("int32_t", theirs.handle)
        with pytest.raises(errors.ClosedError):
            vm.core.ioctl(vm.handle, "KVM_IOEVENTFD", bytes(ffi.buffer(raw)))


@pytest.mark.parametrize("number", [*range(12), -1, 0x7FFF_FFFF])
def test_a_descriptor_s_number_is_no_eventfd(vm, number):
    eventfd = vm.create_eventfd()  # so there is a descriptor that would do
    assert number != eventfd.handle
    for name in ("ioeventfd", "irqfd"):
        raw = ffi.new(f"struct kvm_{name} *")
        raw.fd = ffi.cast("int32_t" if name == "ioeventfd" else "uint32_t", number)
        with pytest.raises(errors.ClosedError):
            vm.core.ioctl(vm.handle, f"KVM_{name.upper()}", bytes(ffi.buffer(raw)))


@pytest.mark.parametrize("kind", ["system", "vm", "vcpu", "region"])
def test_the_handle_of_something_else_is_no_eventfd(host, vm, kind):
    handle = {
        "system": lambda: wire.KB_SYSTEM_HANDLE,
        "vm": lambda: vm.handle,
        "vcpu": lambda: vm.create_vcpu(0).handle,
        "region": lambda: vm.add_region(0, 0x1000).handle,
    }[kind]()
    raw = ffi.new("struct kvm_ioeventfd *", {"len": 1})
    raw.fd = ffi.cast("int32_t", handle)
    with pytest.raises(errors.ClosedError):
        vm.core.ioctl(vm.handle, "KVM_IOEVENTFD", bytes(ffi.buffer(raw)))
    for request in (
        message(wire.KB_READ_EVENTFD, struct("kb_handle", handle=handle)),
        message(wire.KB_WRITE_EVENTFD, struct("kb_eventfd", handle=handle, add=1)),
    ):
        assert ask(host, request)[0] == wire.KB_BAD_HANDLE


def test_flags_and_lengths_that_the_core_does_not_know_do_not_reach_the_kernel(vm):
    fd = vm.create_eventfd()
    for flags in (c.KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY, 1 << 4, 1 << 31):
        raw = ffi.new("struct kvm_ioeventfd *", {"len": 1, "flags": flags})
        raw.fd = ffi.cast("int32_t", fd.handle)
        with pytest.raises(errors.MisuseError, match="not defined"):
            vm.core.ioctl(vm.handle, "KVM_IOEVENTFD", bytes(ffi.buffer(raw)))
        with pytest.raises(errors.MisuseError, match="wrong length"):
            vm.core.ioctl(vm.handle, "KVM_IOEVENTFD", bytes(ffi.buffer(raw))[:-4])


def test_a_doorbell_twice_or_none_to_take_back_says_so(vm):
    fd = vm.create_eventfd()
    vm.ioeventfd(fd, PORT, 1, pio=True)
    with pytest.raises(errors.KvmIoctlError, match="has an eventfd already"):
        vm.ioeventfd(fd, PORT, 1, pio=True)
    with pytest.raises(errors.KvmIoctlError, match="none to take back"):
        vm.ioeventfd(fd, PORT + 1, 1, pio=True, deassign=True)
    with pytest.raises(errors.KvmIoctlError, match="wraps around"):
        vm.ioeventfd(fd, 2**64 - 1, 8)


def test_an_eventfd_takes_no_type_and_no_flags(host, vm):
    for fields in ({"type": 1}, {"flags": 1}):
        body = struct("kb_create", parent=vm.handle, **fields)
        assert ask(host, message(wire.KB_CREATE_EVENTFD, body))[0] == wire.KB_BAD_VALUE
    body = struct("kb_eventfd", handle=vm.create_eventfd().handle, add=2**64 - 1)
    assert ask(host, message(wire.KB_WRITE_EVENTFD, body))[0] == wire.KB_BAD_VALUE
    assert ask(host, message(wire.KB_CREATE_EVENTFD, struct("kb_create", parent=1)))[0] == wire.KB_BAD_HANDLE


def test_closed_machines_leave_none_of_their_eventfds_behind(host):
    # More in all than a process may have open (1024) or the core has handles (4096).
    for _ in range(5):
        with System(host.core).create_vm() as vm:
            for n in range(250):
                vm.create_eventfd()
                vm.ioeventfd(vm.create_eventfd(), n, 1, pio=True)


@pytest.mark.parametrize(
    ("addr", "length", "options", "said"),
    [
        (DOORBELL, 3, {}, "length=3"),
        (DOORBELL, -1, {}, "length=-1"),
        (DOORBELL, 16, {}, "length=16"),
        (DOORBELL, 4.0, {}, "length=4.0"),
        (DOORBELL, True, {}, "length=True"),
        (-1, 4, {}, "addr=-1"),
        (1 << 64, 4, {}, "addr="),
        (DOORBELL, 4, {"datamatch": 1 << 32}, "datamatch="),
        (DOORBELL, 1, {"datamatch": 256}, "datamatch=256"),
        (DOORBELL, 8, {"datamatch": 1 << 64}, "datamatch="),
        (DOORBELL, 4, {"datamatch": -1}, "datamatch=-1"),
        (DOORBELL, 4, {"datamatch": "1"}, "datamatch='1'"),
        (DOORBELL, 0, {"datamatch": 0}, "datamatch needs a length"),
        (0x10000, 1, {"pio": True}, "addr="),
        (PORT, 8, {"pio": True}, "length=8"),
        (0xFFFF, 2, {"pio": True}, "ends beyond port 0xffff"),
    ],
)
def test_numbers_that_cannot_be_right_are_named(vm, addr, length, options, said):
    fd = vm.create_eventfd()
    with pytest.raises(errors.MisuseError, match=said):
        vm.ioeventfd(fd, addr, length, **options)
    with pytest.raises(errors.MisuseError, match="gsi="):
        vm.irqfd(fd, 1 << 32)
