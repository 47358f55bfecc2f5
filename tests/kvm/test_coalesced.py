"""Writes that KVM keeps in a ring, and how they come out of it in order."""

from __future__ import annotations

import mmap
import os
import struct as packing
import threading

import pytest

import kvmbench as kb
from kvmbench import errors
from kvmbench.core import wire
from kvmbench.host.channel import LocalChannel
from kvmbench.kvm import CoalescedWrite, System
from kvmbench.machine import Device, StopRequest
from kvmbench.uapi import Capability

from .test_messages import ask, message, struct

ZONE = 0x4000_0000
BEYOND = ZONE + 0x800
PORTS = range(0x500, 0x504)
END = 0x520
# (4096 - 8) // 24 entries, one of which stays free.
RING = 169


def exits(count: int, *, premature: bool) -> list[int]:
    """Which of `count` writes, from 1 on, find no room and leave the guest, if each empties the ring.

    `premature`: Linux 6.1 reckons (first - last - 1) % 170 without a sign, and 2**32 is no multiple of 170, so a ring
    that starts at 0 seems full at 85 entries. Later kernels compare the places.
    """
    found, first, last = [], 0, 0
    for write in range(1, count + 1):
        full = (first - last - 1) % 2**32 % 170 == 0 if premature else (last + 1) % 170 == first
        if full:
            found.append(write)
            first = last
        else:
            last = (last + 1) % 170
    return found


class Witness(Device):
    """Keeps every write in the order in which it came; may end the run."""

    name = "witness"
    ports = (PORTS, range(END, END + 1))
    mmio = (range(ZONE, ZONE + 0x1000),)

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, int]] = []
        self.stop_at: int | None = None
        self.fail_at: int | None = None

    def _note(self, kind: str, where: int, value: int, size_bytes: int) -> StopRequest | None:
        self.seen.append((kind, where, value, size_bytes))
        if value == self.fail_at:
            raise RuntimeError("out of order")
        return StopRequest("wished") if value == self.stop_at else None

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        return StopRequest("end") if port == END else self._note("out", port, value, size_bytes)

    def mmio_write(self, gpa: int, value: int, size_bytes: int) -> StopRequest | None:
        return self._note("mmio", gpa, value, size_bytes)

    def mmio_read(self, gpa: int, size_bytes: int) -> int:
        self.seen.append(("read", gpa, 0, size_bytes))
        return 0


FINISH = f"\nmov dx, {END:#x}\nout dx, al\nnop\n"


@pytest.fixture(params=[0, 3])
def m(request, host):
    witness = Witness()
    with kb.Machine(host, memory="2M", devices=[witness], user=request.param == 3, cpl=request.param) as m:
        if not m.vm.check_extension(Capability.COALESCED_MMIO):
            pytest.skip("this KVM has no COALESCED_MMIO")
        m.witness = witness
        yield m


def run(m: kb.Machine, source: str) -> list[tuple[str, int, int, int]]:
    m.load_asm(source + FINISH, at=0x1000)
    stop = m.cpu.run(deadline_s=30)
    assert stop.cause is kb.Cause.GUEST_EXIT, stop
    return m.witness.seen


def writes(count: int, start: int = 1) -> str:
    return f"mov eax, {start}\nmov ecx, {count}\nagain: mov [{ZONE:#x}], eax\ninc eax\ndec ecx\njnz again\n"


def test_writes_wait_in_the_ring_until_they_are_taken(m):
    m.vm.register_coalesced_mmio(ZONE, 0x100)
    assert run(m, f"mov eax, 7\nmov [{ZONE:#x}], eax\nmov byte ptr [{ZONE + 0xFF:#x}], 9") == []
    vcpu = m.cpu.vcpu
    assert vcpu.take_coalesced() == [CoalescedWrite(ZONE, b"\7\0\0\0"), CoalescedWrite(ZONE + 0xFF, b"\x09")]
    assert vcpu.take_coalesced() == []


def test_devices_get_them_in_order_before_the_exit_that_came_later(m):
    m.coalesce(ZONE, 0x100)
    seen = run(
        m,
        f"mov eax, 1\nmov [{ZONE:#x}], eax\ninc eax\nmov [{ZONE + 4:#x}], ax\ninc eax\nmov [{BEYOND:#x}], eax\n"
        f"inc eax\nmov [{ZONE:#x}], eax\nmov ebx, [{ZONE + 8:#x}]\nmov eax, 5\nmov [{ZONE:#x}], eax",
    )
    assert seen == [
        ("mmio", ZONE, 1, 4),
        ("mmio", ZONE + 4, 2, 2),
        ("mmio", BEYOND, 3, 4),
        ("mmio", ZONE, 4, 4),
        ("read", ZONE + 8, 0, 4),
        ("mmio", ZONE, 5, 4),
    ]


def test_the_order_holds_where_one_out_follows_another(m):
    m.coalesce(ZONE, 4)
    source = f"mov edx, {PORTS.start:#x}\nmov ecx, 9\nagain: mov [{ZONE:#x}], ecx\nmov eax, ecx\nout dx, al\n"
    seen = run(m, source + "dec ecx\njnz again")
    assert [(kind, value) for kind, _, value, _ in seen] == [
        (kind, value) for value in range(9, 0, -1) for kind in ("mmio", "out")
    ]


def test_ports_can_be_kept_back_too(m):
    if not m.vm.check_extension(Capability.COALESCED_PIO):
        pytest.skip("this KVM has no COALESCED_PIO")
    m.coalesce(PORTS.start, 2, pio=True)
    seen = run(m, f"mov dx, {PORTS.start:#x}\nmov eax, 0x1234\nout dx, al\nout dx, ax\nadd dx, 2\nout dx, eax")
    port = PORTS.start
    assert seen == [("out", port, 0x34, 1), ("out", port, 0x1234, 2), ("out", port + 2, 0x1234, 4)]
    assert m.coalesced.delivered == 2


@pytest.mark.parametrize("count", [RING, RING + 1, 1000])
def test_a_full_ring_loses_nothing_and_keeps_the_order(m, count):
    m.coalesce(ZONE, 4)
    seen = run(m, writes(count))
    assert [value for _, _, value, _ in seen] == list(range(1, count + 1))
    assert m.coalesced.delivered in [count - len(exits(count, premature=premature)) for premature in (False, True)]


def test_a_ring_that_seems_full_at_85_entries_is_linux_6_1_s_arithmetic(m):
    m.vm.register_coalesced_mmio(ZONE, 4)
    left: list[int] = []
    taken: list[int] = []

    def mmio_write(gpa: int, value: int, size_bytes: int) -> None:
        taken.append(len(m.cpu.vcpu.take_coalesced()))
        left.append(value)

    m.witness.mmio_write = mmio_write
    run(m, writes(1000))
    assert left in [exits(1000, premature=premature) for premature in (False, True)]
    assert set(taken) in ({RING}, {85, RING})


def test_a_run_that_ends_by_itself_has_delivered_all(m):
    m.coalesce(ZONE, 4)
    m.load_asm(writes(3) + "spin: jmp spin")
    assert m.cpu.run(deadline_s=0.3).cause is kb.Cause.DEADLINE
    assert [value for _, _, value, _ in m.witness.seen] == [1, 2, 3]


def test_a_step_has_delivered_its_write_even_when_steps_went_before(m):
    if m.cpu.regs.cs.selector & 3 and 3 not in m.host.mechanisms.step:
        pytest.skip(f"{m.host.info.describe()} has no step at CPL 3")
    m.load_asm(f"nop\nnop\nmov [{ZONE:#x}], eax\nnop\nmov [{ZONE:#x}], eax" + FINISH)
    m.cpu.step()
    m.coalesce(ZONE, 4)
    m.cpu.step()
    assert m.witness.seen == []
    stop = m.cpu.step()
    assert (stop.cause, len(m.witness.seen)) == (kb.Cause.STEP, 1)
    m.cpu.step(2)
    assert len(m.witness.seen) == 2


def test_a_wish_to_stop_and_an_error_of_a_device_lose_no_write(m):
    m.coalesce(ZONE, 4)
    m.witness.stop_at = 2
    m.witness.fail_at = 4
    m.load_asm(writes(5) + f"mov [{BEYOND:#x}], eax" + FINISH)
    with pytest.raises(RuntimeError, match="out of order"):
        m.cpu.run(deadline_s=30)
    assert [value for _, _, value, _ in m.witness.seen] == [1, 2, 3, 4]
    stop = m.cpu.run(deadline_s=30)
    assert stop.exit.reason == "end"
    assert [value for _, _, value, _ in m.witness.seen] == [1, 2, 3, 4, 5, 6]


def test_a_wish_to_stop_counts_where_an_exit_is_served(m):
    m.coalesce(ZONE, 4)
    m.witness.stop_at = 2
    m.load_asm(writes(3) + f"mov [{BEYOND:#x}], eax" + FINISH)
    assert m.cpu.run(deadline_s=30).exit.reason == "wished"
    assert [value for _, _, value, _ in m.witness.seen] == [1, 2, 3, 4]
    assert m.cpu.run(deadline_s=30).exit.reason == "end"


def test_a_range_that_is_taken_back_makes_exits_again(m):
    m.coalesce(ZONE, 4)
    m.vm.unregister_coalesced_mmio(ZONE, 4)
    assert len(run(m, writes(3))) == 3
    assert m.coalesced.delivered == 0


def test_the_ring_is_the_vm_s_and_comes_out_of_any_vcpu(host):
    with kb.Machine(host, memory="2M", vcpus=2, devices=[Witness()]) as m:
        m.vm.register_coalesced_mmio(ZONE, 4)
        m.load_asm(writes(3) + FINISH)
        m.cpu.run(deadline_s=30)
        assert [write.value for write in m.cpus[1].vcpu.take_coalesced()] == [1, 2, 3]
        assert m.cpu.vcpu.take_coalesced() == []


def test_two_vcpus_lose_nothing_and_keep_each_its_order(host):
    witness = Witness()
    source = """
        mov ebx, 1
        lock xadd [number], ebx
        shl ebx, 16
        mov ecx, 400
again:  inc ebx
        mov [0x40000000], ebx
        test cl, 15
        jnz on
        mov [0x40000800], ebx
on:     dec ecx
        jnz again
        lock inc dword ptr [done]
spin:   cmp dword ptr [done], 2
        jne spin
        mov dx, 0x520
        out dx, al
        .balign 8
number: .quad 0
done:   .quad 0
    """
    with kb.Machine(host, memory="2M", vcpus=2, devices=[witness]) as m:
        m.coalesce(ZONE, 4)
        m.load_asm(source)
        stops = m.run(deadline_s=60)
        assert any(stop.cause is kb.Cause.GUEST_EXIT for stop in stops), stops
        for number in (0, 1):
            mine = [(gpa, value) for _, gpa, value, _ in witness.seen if value >> 16 == number]
            kept = [value & 0xFFFF for gpa, value in mine if gpa == ZONE]
            assert kept == list(range(1, 401))
            # What left the guest at once came after the write before it.
            for place, (gpa, value) in enumerate(mine):
                if gpa == BEYOND:
                    assert mine[place - 1] == (ZONE, value)


def test_a_write_taken_for_one_vcpu_reaches_its_device_before_a_later_exit_of_another(host):
    other_seen = threading.Event()

    class Slow(Witness):
        def mmio_write(self, gpa: int, value: int, size_bytes: int) -> StopRequest | None:
            other_seen.wait(1)  # in vain, if the other vcpu's exit is held up as it should
            return super().mmio_write(gpa, value, size_bytes)

        def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
            if port == PORTS.start + 1:
                other_seen.set()
            return super().port_out(port, value, size_bytes)

    source = f"""
        mov ebx, 1
        lock xadd [number], ebx
        test ebx, ebx
        jnz second
        mov dword ptr [{ZONE:#x}], 7
        mov dword ptr [written], 1
        mov dx, {PORTS.start:#x}
        out dx, al
        jmp on
second: cmp dword ptr [written], 0
        je second
        mov dx, {PORTS.start + 1:#x}
        out dx, al
on:     lock inc dword ptr [done]
spin:   cmp dword ptr [done], 2
        jne spin
        mov dx, {END:#x}
        out dx, al
        .balign 4096
number: .quad 0
written: .quad 0
done:   .quad 0
    """
    witness = Slow()
    with kb.Machine(host, memory="2M", vcpus=2, devices=[witness]) as m:
        m.coalesce(ZONE, 4)
        m.load_asm(source)
        m.run(deadline_s=60)
        assert witness.seen[0] == ("mmio", ZONE, 7, 4)
        assert len(witness.seen) == 3


# What goes wrong.


@pytest.fixture
def vm(host):
    with System(host.core).create_vm() as vm:
        yield vm


def test_a_ring_without_a_zone_is_empty_and_no_vcpu_is_no_ring(host, vm):
    vcpu = vm.create_vcpu(0)
    assert vcpu.take_coalesced() == []
    for handle in (0, 1, vm.handle, vm.create_eventfd().handle, 0xFFFF_FFFF):
        assert ask(host, message(wire.KB_TAKE_COALESCED, struct("kb_handle", handle=handle)))[0] == wire.KB_BAD_HANDLE
    vcpu.close()
    with pytest.raises(errors.ClosedError, match="vcpu is closed"):
        vcpu.take_coalesced()


def test_a_machine_that_is_closed_keeps_nothing_back(host):
    with kb.Machine(host, memory="2M") as m:
        pass
    with pytest.raises(errors.ClosedError):
        m.coalesce(ZONE, 4)


def test_indices_that_leave_the_ring_are_not_believed(host):
    """The ring is memory that other code of the process could write to: here it does."""
    if not isinstance(host.core.channel, LocalChannel):
        pytest.skip("the core is in another process, and so is its ring")
    with System(host.core).create_vm() as vm:
        vcpu = vm.create_vcpu(0)
        page = vm.check_extension(Capability.COALESCED_MMIO) * mmap.PAGESIZE
        with mmap.mmap(_descriptor_of_the_newest_vcpu(), page + mmap.PAGESIZE) as run:
            for first, last in ((0, 170), (170, 0), (0, 2**32 - 1), (2**32 - 1, 0), (2**31, 2**31)):
                run[page : page + 8] = packing.pack("<II", first, last)
                with pytest.raises(errors.AddressError, match="ring of coalesced writes lies outside"):
                    vcpu.take_coalesced()
                assert run[page : page + 8] == packing.pack("<II", first, last)
            # A length that no write has: said, and not used.
            run[page + 8 : page + 32] = packing.pack("<QII8s", ZONE, 9, 0, bytes(8))
            run[page : page + 8] = packing.pack("<II", 0, 1)
            with pytest.raises(errors.InternalError, match="a write of 9 bytes"):
                vcpu.take_coalesced()
            # Around the end of the ring.
            for place in (169, 0):
                at = page + 8 + place * 24
                run[at : at + 24] = packing.pack("<QII8s", ZONE + place, 1, 0, b"\5" + bytes(7))
            run[page : page + 8] = packing.pack("<II", 169, 1)
            assert [write.addr for write in vcpu.take_coalesced()] == [ZONE + 169, ZONE]


def _descriptor_of_the_newest_vcpu() -> int:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("anon_inode:kvm-vcpu"):
                found.append(int(name))
        except FileNotFoundError:  # that of the listing
            continue
    return max(found)
