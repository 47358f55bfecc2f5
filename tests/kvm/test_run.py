"""Free runs: what ends them, and that the machine stays usable afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

import kvmbench as kb
from kvmbench.errors import BusyError, MisuseError


def test_a_guest_that_spins_is_stopped_by_the_deadline_and_stays_usable(machine):
    machine.load_asm("mov eax, 1\nspin: inc rbx\njmp spin", at=0x1000)
    stop = machine.cpu.run(deadline_s=0.1)
    assert stop.cause is kb.Cause.DEADLINE
    assert machine.cpu.regs.rbx > 0
    before = machine.cpu.regs.rbx
    assert machine.cpu.step(2).cause is kb.Cause.STEP
    assert machine.cpu.regs.rbx - before in (0, 1)


def test_a_guest_that_exits_all_the_time_is_stopped_by_the_deadline(machine):
    machine.load_asm("spin: out 0x80, al\njmp spin", at=0x1000)
    stop = machine.cpu.run(deadline_s=0.2)
    assert stop.cause is kb.Cause.DEADLINE
    assert machine.cpu.step(3).cause is kb.Cause.STEP


def test_interrupt_from_another_thread_stops_a_spinning_guest(machine):
    machine.load_asm("spin: jmp spin", at=0x1000)
    cpu = machine.cpu
    result: list[kb.Stop] = []
    thread = threading.Thread(target=lambda: result.append(cpu.run(deadline_s=60)))
    thread.start()
    while thread.is_alive():
        cpu.interrupt()
        thread.join(0.01)
    assert result[0].cause is kb.Cause.INTERRUPTED
    assert result[0].rip == 0x1000
    assert cpu.step().rip == 0x1000


def test_ctrl_c_stops_a_spinning_guest_and_leaves_it_usable(machine):
    machine.load_asm("spin: inc rbx\njmp spin", at=0x1000)
    cpu = machine.cpu
    stopped = threading.Event()

    def press() -> None:
        while not stopped.wait(0.05):
            if cpu.running:
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=press)
    thread.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        cpu.run(deadline_s=60)
    stopped.set()
    thread.join()
    assert time.monotonic() - start < 30
    assert cpu.last_stop.cause is kb.Cause.INTERRUPTED
    assert cpu.step(2).cause is kb.Cause.STEP


def test_ctrl_c_keeps_what_was_recorded(machine):
    machine.load_asm("spin: inc rbx\njmp spin", at=0x1000)
    cpu = machine.cpu
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        cpu.record(50_000_000, progress=False)
    rec = cpu.last_record
    assert 0 < len(rec) < 50_000_000
    # Two steps an iteration, whatever the number: the recording has no hole.
    assert (rec.rip[:-1] != rec.rip[1:]).all()
    assert int(rec.rbx[-1]) == (len(rec) + 1) // 2
    assert cpu.step(2).cause is kb.Cause.STEP


def test_a_triple_fault_is_a_shutdown_and_the_next_machine_works(host):
    with kb.Machine(host, memory="2M") as m:
        m.load_asm("ud2", at=0x1000)
        stop = m.cpu.run(deadline_s=10)
        assert stop.cause is kb.Cause.SHUTDOWN, stop
    with kb.Machine(host, memory="2M") as m:
        m.load_asm("mov eax, 5\nhlt", at=0x1000)
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.HALT
        assert m.cpu.regs.rax == 5


def test_a_guest_ends_itself_through_the_exit_port(machine):
    machine.load_asm("mov al, 0x21\nout 0xf4, al\nhlt", at=0x1000)
    stop = machine.cpu.run(deadline_s=10)
    assert stop.cause is kb.Cause.GUEST_EXIT
    assert stop.exit.code == 0x21 << 1 | 1


def test_the_serial_port_carries_text_both_ways(machine, guest):
    program = machine.load_asm(guest("io_echo.S"), at=0x1000)
    assert program.entry == 0x1000
    machine.serial.write(b"echo me\n")
    machine.cpu.run(deadline_s=5)
    assert "echo me" in machine.serial.text


def test_an_exit_that_is_caught_stops_before_the_device_sees_it(machine):
    machine.load_asm("mov al, 'X'\nout 0xe9, al\nmov al, 'Y'\nout 0xe9, al\nhlt", at=0x1000)
    cpu = machine.cpu
    cpu.catches.add("io", port=0xE9)
    stop = cpu.run(deadline_s=10)
    assert (stop.cause, stop.exit.port, stop.exit.data) == (kb.Cause.CATCH, 0xE9, b"X")
    assert machine.debugcon.text == ""
    assert cpu.run(deadline_s=10).exit.data == b"Y"
    assert machine.debugcon.text == "X"
    cpu.catches.clear()
    assert cpu.run(deadline_s=10).cause is kb.Cause.HALT
    assert machine.debugcon.text == "XY"


def test_registers_written_at_a_caught_in_are_not_overwritten_by_it(machine):
    machine.load_asm("mov dx, 0x3f8\nhere: in al, dx\nnop\nhlt", at=0x1000)
    machine.serial.write(b"\x5a")
    cpu = machine.cpu
    cpu.catches.add("io", port=0x3F8)
    assert cpu.run(deadline_s=10).cause is kb.Cause.CATCH
    cpu.regs.rbx = 77
    cpu.catches.clear()
    assert cpu.run(deadline_s=10).cause is kb.Cause.HALT
    assert (cpu.regs.al, cpu.regs.rbx) == (0x5A, 77)


def test_an_unknown_exit_kind_is_named_with_those_there_are(machine):
    with pytest.raises(MisuseError, match=r"no exit kind 'nonsense'; there are .*hlt"):
        machine.cpu.catches.add("nonsense")


def test_a_running_vcpu_refuses_a_second_caller(machine):
    machine.load_asm("spin: jmp spin", at=0x1000)
    cpu = machine.cpu
    thread = threading.Thread(target=lambda: cpu.run(deadline_s=60))
    thread.start()
    while not cpu.running:
        time.sleep(0.001)
    with pytest.raises(BusyError, match="is running"):
        cpu.step()
    while thread.is_alive():
        cpu.interrupt()
        thread.join(0.01)
    assert cpu.step().cause is kb.Cause.STEP
