"""Several vcpus: each with its own state, running at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import kvmbench as kb
from kvmbench.errors import MisuseError
from kvmbench.machine import Device

COUNT = """
again:  lock inc qword ptr [0x3000]
        jmp again
"""


def test_each_vcpu_steps_by_itself(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("mov eax, 1\nmov eax, 2\nmov eax, 3\nhlt", at=0x1000)
        first, second = m.cpus
        second.regs.rip = 0x1005
        first.step()
        second.step(2)
        assert (first.regs.eax, second.regs.eax) == (1, 3)
        assert (first.regs.rip, second.regs.rip) == (0x1005, 0x100F)


def test_two_vcpus_run_at_once_and_one_stop_stops_both(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("waiting: cmp qword ptr [0x3000], 0\nje waiting\nhlt", at=0x1000)
        m.load_asm("mov qword ptr [0x3000], 1\nspin: jmp spin", at=0x2000)
        m.cpus[0].regs.rip = 0x1000
        m.cpus[1].regs.rip = 0x2000
        stops = m.run(deadline_s=60)
        assert stops[0].cause is kb.Cause.HALT, "the other vcpu let it go"
        assert stops[1].cause is kb.Cause.INTERRUPTED
        assert stops[1].vcpu == 1
        assert m.cpus[1].step().cause is kb.Cause.STEP


def test_a_deadline_stops_all_vcpus(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm(COUNT, at=0x1000)
        for cpu in m.cpus:
            cpu.regs.rip = 0x1000
        stops = m.run(deadline_s=0.3)
        assert {stop.cause for stop in stops} <= {kb.Cause.DEADLINE, kb.Cause.INTERRUPTED}
        assert kb.Cause.DEADLINE in {stop.cause for stop in stops}
        assert m.memory.read_u64(0x3000) > 0


def test_two_machines_in_one_host_do_not_meet(host):
    with kb.Machine(host, memory="2M") as a, kb.Machine(host, memory="2M") as b:
        for m, value in ((a, 1), (b, 2)):
            m.load_asm(f"mov eax, {value}\nmov [0x3000], eax\nhlt", at=0x1000)
        a.cpu.step()
        b.cpu.run(deadline_s=10)
        a.cpu.run(deadline_s=10)
        assert (a.memory.read_u32(0x3000), b.memory.read_u32(0x3000)) == (1, 2)


def test_a_watchpoint_of_one_vcpu_loses_nothing_that_another_writes_or_reads(host, require):
    require("readonly_slot")
    require("no_slot")
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("mov dword ptr [0x3000], 7\nmov eax, [0x4000]\nhlt", at=0x1000)
        m.memory.write_u32(0x4000, 99)
        first, second = m.cpus
        first.breakpoints.watch(0x3010, 8, "w", mechanism="read-only slot")
        first.breakpoints.watch(0x4010, 8, "rw", mechanism="absent slot")
        assert second.run(deadline_s=10).cause is kb.Cause.HALT
        assert (second.regs.eax, m.memory.read_u32(0x3000), m.bus.unclaimed) == (99, 7, {})


def test_a_page_stays_protected_until_the_last_vcpu_s_watchpoint_is_gone(host, require):
    require("readonly_slot")
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("again: inc dword ptr [0x3000]\njmp again", at=0x1000)
        first, second = m.cpus
        mine = first.breakpoints.watch(0x3000, 4, "w", mechanism="read-only slot")
        other = second.breakpoints.watch(0x3000, 4, "w", mechanism="read-only slot")
        first.breakpoints.remove(mine)
        stop = second.run(deadline_s=10)
        assert (stop.cause, stop.breakpoint) == (kb.Cause.WATCHPOINT, other)
        second.breakpoints.clear()
        assert m.protected == {}


SPIN = "spin: inc rax\njmp spin"


def together(m: kb.Machine, *programs: str) -> None:
    """Gives each vcpu a program of its own, at 0x1000, 0x2000, ..."""
    for index, source in enumerate(programs):
        m.load_asm(source, at=0x1000 * (index + 1), start=False)
    for index, cpu in enumerate(m.cpus):
        cpu.regs.rip = 0x1000 * (index + 1)


def test_each_held_vcpu_says_which_one_stopped_them_all(host):
    with kb.Machine(host, memory="2M", vcpus=3) as m:
        together(m, SPIN, "mov rcx, 500\nagain: dec rcx\njnz again\nhere: hlt", SPIN)
        m.cpus[1].breakpoints.add("here")
        stops = m.run(deadline_s=60)
        assert [stop.cause for stop in stops] == ["interrupted", "breakpoint", "interrupted"]
        assert stops.first is stops[1]
        assert stops.first.held == ""
        for stop in (stops[0], stops[2]):
            assert stop.held == "vcpu 1 hit breakpoint 1 at here"
            assert f"held: {stop.held}" in stop.notes
            assert m.cpus[stop.vcpu].last_stop is stop
        assert stops.of(2) is stops[2]
        assert 0 <= stops.held_s < 5
        assert "held: vcpu 1 hit breakpoint 1 at here" in repr(stops)
        assert m.cpus[0].step().cause is kb.Cause.STEP


def test_whatever_one_vcpu_stops_for_holds_the_others(host, require):
    require("readonly_slot")
    cases = {
        "hlt": "vcpu 1 halted",
        "ud2": "vcpu 1 shut down",
        "mov al, 3\nout 0xf4, al": "vcpu 1 stopped for guest exit: ",
        "mov dword ptr [0x5000], 1": "vcpu 1 hit watchpoint 1 at 0x5000 (w, 4 bytes)",
        "out 0x99, al": "vcpu 1 stopped for catch: ",
    }
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.cpus[1].breakpoints.watch(0x5000, 4, "w", mechanism="read-only slot")
        m.cpus[1].catches.add("io", port=0x99)
        for source, because in cases.items():
            together(m, SPIN, source)
            m.cpus[0].regs.rip, m.cpus[1].regs.rip = 0x1000, 0x2000
            stops = m.run(deadline_s=60)
            assert stops[0].held.startswith(because), (source, stops)
            m.reset()


def test_a_vcpu_can_be_left_out_held_and_released(host):
    with kb.Machine(host, memory="2M", vcpus=3) as m:
        together(m, SPIN, SPIN, SPIN)
        m.cpus[1].held = True
        stops = m.run(deadline_s=0.1)
        assert [stop.vcpu for stop in stops] == [0, 2]
        assert m.cpus[1].regs.rax == 0
        stops = m.run(cpus=[m.cpus[1]], deadline_s=0.1)
        assert [stop.vcpu for stop in stops] == [1]
        assert m.cpus[1].regs.rax > 0
        m.cpus[1].held = False
        assert [stop.vcpu for stop in m.run(deadline_s=0.1)] == [0, 1, 2]


def test_a_vcpu_that_halted_is_left_out_until_it_is_moved_or_named(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        together(m, "mov ebx, 7\nhlt\nmov ebx, 8\nhlt", "waiting: cmp ebx, 9\njne waiting\nhlt")
        assert m.run(deadline_s=60).because == "vcpu 0 halted"
        assert [stop.vcpu for stop in m.run(deadline_s=0.1)] == [1]
        m.cpus[1].regs.ebx = 9
        assert m.run(deadline_s=60).because == "vcpu 1 halted"
        with pytest.raises(MisuseError, match=r"no vcpu to run: vcpu 0 has halted; vcpu 1 has halted"):
            m.run(deadline_s=60)
        assert m.run(cpus=[0], deadline_s=60).because == "vcpu 0 halted"
        assert m.cpu.regs.ebx == 8
        m.cpu.regs.rip = 0x1000
        assert [stop.vcpu for stop in m.run(deadline_s=60)] == [0]
        assert m.cpu.regs.ebx == 7


def test_one_vcpu_steps_while_the_others_run(host):
    with kb.Machine(host, memory="2M", vcpus=3) as m:
        together(m, "again: mov rbx, [0x5000]\njmp again", "again1: inc qword ptr [0x5000]\njmp again1", SPIN)
        m.cpus[2].held = True
        first = m.cpus[0]
        first.step(2)
        assert first.regs.rbx == 0, "the others are held"
        seen = [0]
        with m.others_running(first) as others:
            while len(seen) < 4:
                first.step(2, deadline_s=60)
                if first.regs.rbx > seen[-1]:
                    seen.append(first.regs.rbx)
            assert others.stops is None
        assert [stop.vcpu for stop in others.stops] == [1]
        assert others.stops[0].held == "others_running ended"
        count = m.memory.read_u64(0x5000)
        assert count >= seen[-1]
        first.step(2)
        assert m.memory.read_u64(0x5000) == count
        assert m.cpus[2].regs.rax == 0


def test_another_vcpu_s_stop_interrupts_the_one_that_runs_beside(host):
    with kb.Machine(host, memory="2M", vcpus=3) as m:
        together(m, SPIN, "waiting: cmp qword ptr [0x5000], 0\nje waiting\nhlt", SPIN)
        with m.others_running(0) as others:
            m.cpus[0].step(10)
            m.memory.write_u64(0x5000, 1)
            assert m.cpus[0].run(deadline_s=60).cause is kb.Cause.INTERRUPTED
            assert others.stopped.is_set()
        assert others.stops.because == "vcpu 1 halted"
        assert others.stops.of(2).held == "vcpu 1 halted"


def test_an_error_in_the_block_holds_the_others(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        together(m, SPIN, SPIN)
        with pytest.raises(ZeroDivisionError), m.others_running(0):
            raise ZeroDivisionError
        assert not m.cpus[1].running
        assert m.cpus[1].step().cause is kb.Cause.STEP


def test_an_error_of_one_vcpu_holds_the_others_and_is_raised(host):
    class Broken(Device):
        name = "broken"
        ports = (range(0x99, 0x9A),)

        def port_out(self, port: int, value: int, size_bytes: int) -> None:
            raise ZeroDivisionError

    with kb.Machine(host, memory="2M", vcpus=2) as m:
        together(m, SPIN, "out 0x99, al\nhlt")
        m.attach(Broken())
        with pytest.raises(ZeroDivisionError):
            m.run(deadline_s=60)
        assert m.cpus[0].last_stop.held.startswith("vcpu 1 failed: ")
        assert not m.cpus[0].running


def test_ctrl_c_stops_all_vcpus(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        together(m, SPIN, SPIN)

        def press() -> None:
            while not all(cpu.running for cpu in m.cpus):
                pass
            os.kill(os.getpid(), signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            m.run(deadline_s=60)
        presser.join()
        assert [cpu.running for cpu in m.cpus] == [False, False]
        assert "Ctrl-C" in {cpu.last_stop.held for cpu in m.cpus}
        for cpu in m.cpus:
            assert cpu.step(2).cause is kb.Cause.STEP


def test_interrupt_stops_all_vcpus(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        together(m, SPIN, SPIN)

        def stop() -> None:
            while not all(cpu.running for cpu in m.cpus):
                pass
            while any(cpu.running for cpu in m.cpus):
                m.interrupt()

        stopper = threading.Thread(target=stop)
        stopper.start()
        stops = m.run(deadline_s=60)
        stopper.join()
        assert {stop.cause for stop in stops} == {kb.Cause.INTERRUPTED}


def test_a_vcpu_that_waits_for_another_to_start_it_says_so_when_it_is_held(host):
    with kb.Machine(host, memory="2M", vcpus=2, irqchip=True, waiting=True) as m:
        m.load_asm("mov ecx, 1000\nagain: loop again\nhere: jmp here", at=0x1000)
        m.cpu.breakpoints.add("here")
        stops = m.run(deadline_s=60)
        assert stops[1].held == "vcpu 0 hit breakpoint 1 at here; it waits for INIT"


def test_vcpus_that_cannot_be_run_are_named(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m, kb.Machine(host, memory="2M") as other:
        m.load_asm(SPIN, at=0x1000)
        with pytest.raises(MisuseError, match="there is no vcpu 2; there are 0 to 1"):
            m.run(cpus=[2])
        with pytest.raises(MisuseError, match="twice"):
            m.run(cpus=[1, m.cpus[1]])
        with pytest.raises(MisuseError, match="another machine"):
            m.run(cpus=[other.cpu])
        with pytest.raises(MisuseError, match="at least one"):
            m.run(cpus=[])
        with pytest.raises(MisuseError, match="list of vcpus"):
            m.run(cpus=1)
        with pytest.raises(MisuseError, match="deadline"):
            m.run(deadline_s=-1)
        for cpu in m.cpus:
            cpu.held = True
        with pytest.raises(MisuseError, match="vcpu 0 is held; vcpu 1 is held"):
            m.run()
        with pytest.raises(MisuseError, match="moved by the caller"), m.others_running(1, cpus=[0, 1]):
            pass
        with pytest.raises(MisuseError, match="vcpu 1 is held"), m.others_running(0):
            pass
