"""Devices written in Python, used by a guest."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench.errors import AddressError, MisuseError
from kvmbench.machine import Device, StopRequest


class Adder(Device):
    """Adds up what is written at an MMIO address or a port; reading gives the sum."""

    name = "adder"
    ports = (range(0x200, 0x201),)
    mmio = (range(0xD000_0000, 0xD000_1000),)

    def __init__(self) -> None:
        self.sum = 0

    def port_out(self, port, value, size_bytes):
        self.sum += value
        return StopRequest("enough", self.sum) if self.sum > 1000 else None

    def port_in(self, port, size_bytes):
        return self.sum

    def mmio_write(self, gpa, value, size_bytes):
        self.sum += value

    def mmio_read(self, gpa, size_bytes):
        return self.sum


@pytest.mark.parametrize("user", [False, True])
def test_a_guest_talks_over_the_serial_port(host, guest, user):
    with kb.Machine(host, memory="2M", user=user) as m:
        m.load_asm(guest("io_echo.S"))
        m.serial.write(b"good day\n")
        stop = m.cpu.run(deadline_s=30)
        assert stop.cause is kb.Cause.GUEST_EXIT, stop
        assert m.serial.text == "good day\n"
        assert m.debug_exit.code == 3


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_user_code_may_use_ports(host, mode):
    with kb.Machine(host, memory="2M", mode=mode, user=True) as m:
        m.load_asm("mov al, 0x55\nout 0xe9, al\nmov al, 1\nout 0xf4, al\nspin: jmp spin")
        stop = m.cpu.run(deadline_s=20)
        assert stop.cause is kb.Cause.GUEST_EXIT, stop
        assert m.debugcon.text == "U"


def test_a_device_answers_at_ports_and_addresses(host):
    adder = Adder()
    with kb.Machine(host, memory="2M", devices=[adder]) as m:
        m.load_asm("""
            mov edi, 0xd0000000
            mov dword ptr [rdi], 40       # MMIO write
            mov dx, 0x200
            mov eax, 2
            out dx, eax                   # port write
            mov ebx, [rdi + 8]            # MMIO read
            in eax, dx                    # port read
            hlt
        """)
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert (m.cpu.regs.ebx, m.cpu.regs.eax, adder.sum) == (42, 42, 42)


def test_a_device_can_stop_the_run(host):
    with kb.Machine(host, memory="2M", devices=[Adder()]) as m:
        m.load_asm("mov dx, 0x200\nmov eax, 400\nagain: out dx, eax\njmp again")
        stop = m.cpu.run(deadline_s=20)
        assert stop.cause is kb.Cause.GUEST_EXIT
        assert stop.exit == StopRequest("enough", 1200)


def test_rep_outs_and_rep_ins_move_every_byte(host):
    with kb.Machine(host, memory="2M") as m:
        program = m.load_asm("""
            mov rsi, offset text
            mov ecx, 14
            mov dx, 0xe9
            rep outsb
            mov rdi, offset room
            mov ecx, 8
            mov dx, 0x3f8
            rep insb
            hlt
        text: .ascii "many at a time"
        room: .skip 9
        """)
        m.serial.write(b"12345678")
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert m.debugcon.text == "many at a time"
        assert m.memory.read(program.symbols["room"], 9) == b"12345678\0"


def test_fw_cfg_is_read_by_a_guest_through_dma(host):
    with kb.Machine(host, memory="2M") as m:
        m.fw_cfg.add_file("opt/test", b"from the host")
        program = m.load_asm("""
            mov eax, offset request       # low half of the address, big-endian
            bswap eax
            mov dx, 0x518
            out dx, eax
            hlt
        .balign 16
        request:
            .byte 0, 0x20, 0, 0x0a        # select item 0x20, and read
            .byte 0, 0, 0, 13
            .byte 0, 0, 0, 0, 0, 0, 0x20, 0
        """)
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert m.memory.read(0x2000, 13) == b"from the host"
        assert m.memory.read_u32(program.symbols["request"]) == 0


def test_ports_and_addresses_without_a_device_read_all_ones(host):
    with kb.Machine(host, memory="2M", mapped=[(0xC000_0000, 4096)]) as m:
        m.load_asm("mov dx, 0x300\nin al, dx\nmov ebx, 0xc0000000\nmov ecx, [rbx]\nhlt")
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert m.cpu.regs.eax & 0xFF == 0xFF
        assert m.cpu.regs.ecx == 0xFFFF_FFFF
        assert m.bus.unclaimed == {("in", 0x300): 1, ("mmio read", 0xC000_0000): 1}


def test_a_device_in_memory_or_over_another_is_refused(host):
    class InMemory(Device):
        name = "in memory"
        mmio = (range(0x1000, 0x2000),)

    class OnSerial(Device):
        name = "on serial"
        ports = (range(0x3FF, 0x401),)

    with kb.Machine(host, memory="2M") as m:
        with pytest.raises(AddressError, match="0x1000 to 0x1fff of in memory lies in memory"):
            m.attach(InMemory())
        with pytest.raises(AddressError, match="port 0x3ff of on serial is claimed by serial at 0x3f8"):
            m.attach(OnSerial())
        with pytest.raises(MisuseError, match="irqchip=True"):
            m.irq(4, 1)
    with pytest.raises(AddressError, match="lies in memory"):
        kb.Machine(host, memory="2M", devices=[InMemory()])


def test_serial_input_interrupts_a_guest_with_controllers_in_the_kernel(host, guest):
    with kb.Machine(host, memory="2M", mode="protected", irqchip=True, pit=True) as m:
        m.load_asm(guest("serial_interrupt.S"))
        m.serial.write(b"!")
        stop = m.cpu.run(deadline_s=30)
        assert stop.cause is kb.Cause.GUEST_EXIT, stop
        assert m.debugcon.text == "!"


def test_a_line_raised_from_here_reaches_the_guest(host, guest):
    with kb.Machine(host, memory="2M", mode="protected", irqchip=True) as m:
        m.load_asm(guest("serial_interrupt.S"))
        assert m.cpu.run(deadline_s=0.2).cause is kb.Cause.DEADLINE, "it waits in HLT, inside KVM"
        m.irq(4, 1)
        assert m.cpu.run(deadline_s=30).cause is kb.Cause.GUEST_EXIT
        with pytest.raises(MisuseError, match="lines are 0 to 23"):
            m.irq(24, 1)


class Faulty(Device):
    """Raises at every access, and keeps what it was told."""

    name = "faulty"
    ports = (range(0x200, 0x201),)

    def __init__(self) -> None:
        self.seen: list[int] = []

    def port_out(self, port, value, size_bytes):
        self.seen.append(value)
        raise RuntimeError("out of order")

    def port_in(self, port, size_bytes):
        raise RuntimeError("out of order")


def test_a_device_that_raises_sees_each_exit_once_and_the_guest_goes_on(host):
    faulty = Faulty()
    with kb.Machine(host, memory="2M", devices=[faulty]) as m:
        # The exits after the first take a shorter way on local.
        m.load_asm("mov dx, 0x200\nmov al, 1\nout dx, al\nout 0xe9, al\ninc al\nout dx, al\nin al, dx\nhlt")
        for seen in ([1], [1, 2], [1, 2]):
            with pytest.raises(RuntimeError, match="out of order"):
                m.cpu.run(deadline_s=20)
            assert faulty.seen == seen
            m.cpu.regs.rbx = 7
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert (m.cpu.regs.al, m.cpu.regs.rbx, faulty.seen) == (0xFF, 7, [1, 2])


def test_a_machine_whose_device_raised_can_be_reset_and_loaded(host):
    faulty = Faulty()
    with kb.Machine(host, memory="2M", devices=[faulty]) as m:
        for again in (m.reset, lambda: m.load_asm("hlt")):
            m.load_asm("mov dx, 0x200\nrep_in: in al, dx\nhlt")
            with pytest.raises(RuntimeError):
                m.cpu.step(5)
            again()
            assert (m.cpu.regs.rip, m.cpu.regs.rax) == (0x1000, 0)
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT


def test_a_reset_drops_the_exit_that_no_device_has_seen(machine):
    machine.load_asm("mov al, 'X'\nout 0xe9, al\nhlt")
    machine.cpu.catches.add("io", port=0xE9)
    assert machine.cpu.run(deadline_s=20).cause is kb.Cause.CATCH
    machine.reset()
    assert (machine.debugcon.text, machine.cpu.regs.rip) == ("", 0x1000)
    machine.cpu.catches.clear()
    assert machine.cpu.run(deadline_s=20).cause is kb.Cause.HALT
    assert machine.debugcon.text == "X"


def test_both_halves_of_an_access_across_pages_arrive_when_a_register_is_written_between(host):
    class Wide(Device):
        name = "wide"
        mmio = (range(0xC000_0000, 0xC000_2000),)

        def mmio_write(self, gpa, value, size_bytes):
            seen.append((gpa, value, size_bytes))

    seen: list[tuple[int, int, int]] = []
    with kb.Machine(host, memory="2M", devices=[Wide()]) as m:
        m.load_asm("mov rdi, 0xc0000ffc\nmov rax, 0x1122334455667788\nmov [rdi], rax\nnop\nhlt")
        m.cpu.catches.add("mmio")
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.CATCH
        m.cpu.regs.rbx = 5
        assert seen == [(0xC000_0FFC, 0x55667788, 4), (0xC000_1000, 0x11223344, 4)]
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert (len(seen), m.cpu.regs.rbx) == (2, 5)


def test_a_device_that_leaves_the_bus_while_it_is_asked_is_not_asked_again(machine):
    class Once(Device):
        name = "once"
        ports = (range(0x500, 0x501),)

        def __init__(self) -> None:
            super().__init__()
            self.values: list[int] = []

        def port_out(self, port: int, value: int, size_bytes: int) -> None:
            self.values.append(value)
            if value == 3:
                machine.bus.detach(self)

    once = Once()
    machine.bus.attach(once)
    machine.load_asm("mov dx, 0x500\nmov ecx, 6\nagain: inc al\nout dx, al\nloop again\nhlt", at=0x1000)
    assert machine.cpu.run(deadline_s=20).cause is kb.Cause.HALT
    assert once.values == [1, 2, 3]
    assert machine.bus.unclaimed[("out", 0x500)] == 3
