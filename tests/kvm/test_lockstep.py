"""Lock-step: several vcpus one instruction at a time, in an order that repeats exactly."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.debug.lockstep_record import LockstepRecord
from kvmbench.debug.schedule import Schedule
from kvmbench.errors import ClosedError, MisuseError
from kvmbench.machine import Device

from .interrupt_table import LOAD, TABLE, write_gates

ADDS = """
again:  mov rax, [0x5000]
        inc rax
        mov [0x5000], rax
        dec rcx
        jnz again
        hlt
"""
LOCKED_ADDS = """
again:  lock inc qword ptr [0x5000]
        dec rcx
        jnz again
        hlt
"""
# Loads and stores of shared memory, I/O, a call, a string instruction.
BUSY = """
again:  mov rax, [0x5000]
        lea rax, [rax + rax*4 + 7]
        mov [0x5000], rax
        call port
        mov ecx, 3
        mov edi, 0x5100
        rep stosb
        jmp again
port:   out 0xe9, al
        in al, 0x99
        xor [0x5008], al
        ret
"""


class Counter(Device):
    """Answers each read with a number one higher."""

    name = "counter"
    ports = (range(0x99, 0x9A),)

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        self.count = 0

    def port_in(self, port: int, size_bytes: int) -> int:
        self.count += 1
        return self.count


def start(m: kb.Machine, source: str, *, rcx: int = 5) -> None:
    m.reset()
    m.load_asm(source, at=0x1000)
    for cpu in m.cpus:
        cpu.regs.rcx = rcx


@pytest.mark.parametrize("options", [{"order": "round-robin"}, {"order": [0, 1, 1, 0, 2]}, {"seed": 7}], ids=str)
def test_the_same_order_from_the_same_state_gives_the_same_steps(host, options):
    counter = Counter()
    with kb.Machine(host, memory="2M", vcpus=3, devices=[counter]) as m:
        runs = []
        for _ in range(2):
            start(m, BUSY)
            record = m.lockstep(400, **options, deadline_s=60)
            runs.append((record, m.memory.read(0x5000, 512), m.debugcon.output, counter.count))
        (one, *rest), (other, *again) = runs
        assert rest == again
        assert len(one) == 400
        assert one.first_difference(other) is None
        assert one.schedule == other.schedule
        for vcpu, record in one.records.items():
            np.testing.assert_array_equal(record.rows, other.records[vcpu].rows)
        assert one.ended == "the schedule is done"
        start(m, BUSY)
        assert m.lockstep(order=one.schedule).first_difference(one) is None


def test_lock_step_makes_the_steps_that_single_steps_would_make(host):
    counter = Counter()
    with kb.Machine(host, memory="2M", vcpus=2, devices=[counter]) as m:
        start(m, BUSY)
        schedule = Schedule.random([0, 1], 120, seed=3)
        record = m.lockstep(order=schedule)
        memory, count, output = m.memory.read(0x5000, 512), counter.count, m.debugcon.output
        start(m, BUSY)
        for place, vcpu in enumerate(schedule):
            stop = m.cpus[vcpu].step()
            assert stop.cause is kb.Cause.STEP
            for name in ("rip", "rax", "rcx", "rdi", "rsp"):
                assert int(record.rows[name][place]) == getattr(m.cpus[vcpu].regs, name), (place, name)
        assert (m.memory.read(0x5000, 512), counter.count, m.debugcon.output) == (memory, count, output)


def test_a_schedule_loses_an_update_and_with_lock_none_does(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        start(m, ADDS, rcx=1)
        # Both load before either stores.
        record = m.lockstep(order="0 1 0*2 1*2")
        assert m.memory.read_u64(0x5000) == 1
        assert record[3].step.executed_rip == record[5].step.executed_rip == m.symbols.resolve("again") + 11
        start(m, ADDS, rcx=1)
        m.lockstep(order="0*3 1*3")
        assert m.memory.read_u64(0x5000) == 2
        sums = set()
        for seed in range(10):
            start(m, ADDS)
            m.lockstep(200, seed=seed)
            sums.add(m.memory.read_u64(0x5000))
            start(m, LOCKED_ADDS)
            m.lockstep(200, seed=seed)
            assert m.memory.read_u64(0x5000) == 10
        assert min(sums) < 10


def test_a_step_is_in_the_record_with_its_vcpu_place_and_registers(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("mov eax, 1\nmov eax, 2\nmov eax, 3\nspin: jmp spin", at=0x1000)
        record = m.lockstep(order=[1, 0, 0, 1])
        assert record.vcpu.tolist() == [1, 0, 0, 1]
        assert record.rip.tolist() == [0x1005, 0x1005, 0x100A, 0x100A]
        assert record.rax.tolist() == [1, 1, 2, 2]
        assert record.where(0).tolist() == [1, 2]
        assert (record[2].vcpu, record[2].step.index, record[2].step.executed_rip) == (0, 1, 0x1005)
        assert record[-1].step.changes == {"rax": (1, 2), "rip": (0x1005, 0x100A)}
        assert [len(record.records[vcpu]) for vcpu in (0, 1)] == [2, 2]
        here = dataclasses.replace(host.provenance, created=record.records[0].provenance.created)
        assert record.records[0].provenance == here
        lines = record.disassemble().splitlines()
        assert lines[0].split() == ["step", "vcpu", "0", "vcpu", "1"]
        assert lines[1].endswith("mov eax, 1")
        assert lines[1].index("mov") > lines[2].index("mov")
        for cpu in m.cpus:
            assert (cpu.last_stop.cause, cpu.last_stop.steps, cpu.regs.rip) == ("step", 2, 0x100A)
            assert cpu.last_stop.is_current
            assert cpu.step().rip == 0x100F


def test_a_breakpoint_of_one_vcpu_ends_it_for_all(host):
    with kb.Machine(host, memory="2M", vcpus=3) as m:
        start(m, ADDS)
        mine = m.cpus[1].breakpoints.add("again+11")  # the store
        record = m.lockstep(100)
        assert record.ended == "vcpu 1 hit breakpoint 1 at again+0xb"
        assert record.vcpu.tolist() == [0, 1, 2, 0, 1]
        assert record.stops.first.breakpoint is mine
        assert (mine.hits, m.cpus[1].regs.rip, m.memory.read_u64(0x5000)) == (1, 0x100B, 0)
        assert {stop.vcpu: stop.held for stop in record.stops if stop.held} == {0: record.ended, 2: record.ended}
        record = m.lockstep(7, order=[1, 0])
        assert record.vcpu.tolist() == [1, 0, 1, 0, 1, 0, 1]
        assert record.ended == "the schedule is done"


def test_a_condition_is_asked_at_its_turn_and_may_let_the_schedule_go_on(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        start(m, ADDS)
        asked = []

        def third(cpu: object) -> bool:
            asked.append(m.memory.read_u64(0x5000))
            return len(asked) == 3

        one = m.cpus[0].breakpoints.add("again+11", condition=third)
        record = m.lockstep(100)
        start(m, ADDS)
        m.cpus[0].breakpoints.clear()
        plain = m.lockstep(100)
        assert record.stops.first.breakpoint is one
        assert (one.hits, one.passes) == (1, 2)
        assert record.rip.tolist() == plain.rip[: len(record)].tolist()


@pytest.mark.parametrize("mechanism", [None, "stepping loop"], ids=str)
def test_a_watchpoint_of_one_vcpu_is_hit_by_its_own_writes_only(host, mechanism):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("mov dword ptr [0x5000], 1\nspin: jmp spin", at=0x1000)
        m.load_asm("nop\nnop\nnop\nmov dword ptr [0x5000], 2\njmp $", at=0x2000, start=False)
        m.cpus[1].regs.rip = 0x2000
        watch = m.cpus[1].breakpoints.watch(0x5000, 4, "w", mechanism=mechanism)
        record = m.lockstep(20)
        assert record.stops.first.breakpoint is watch
        assert record.vcpu.tolist() == [0, 1] * 4
        assert m.memory.read_u32(0x5000) == 2


def test_a_vcpu_that_halts_is_passed_over_and_the_record_says_so(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("nop\nhlt\nnop\nnop", at=0x1000)
        m.load_asm("spin: inc rax\njmp spin", at=0x2000, start=False)
        m.cpus[1].regs.rip = 0x2000
        record = m.lockstep(20)
        assert record.vcpu.tolist() == [0, 1, 0] + [1] * 9
        assert record.notes == ("vcpu 0 halted after 2 steps; 8 turns of it were passed over",)
        assert [str(stop.cause) for stop in record.stops] == ["halt", "step"]
        again = m.lockstep(order=[0, 1, 1])
        assert again.vcpu.tolist() == [1, 1]
        assert again.notes == ("vcpu 0 has halted; 1 turns of it were passed over",)
        with pytest.raises(MisuseError, match="no vcpu to step: vcpu 0 has halted"):
            m.lockstep(order=[0])
        m.cpu.regs.rip = 0x1000
        assert m.lockstep(10, order=[0, 1], at_halt="end").ended == "vcpu 0 halted"
        m.reset()
        assert m.lockstep(50).ended == "vcpu 0 halted after 2 steps; vcpu 1 halted after 2 steps"


def test_each_vcpu_enters_its_handlers_as_when_it_is_stepped_alone(host):
    source = """
        again:  ud2
                jmp again
        ud:     inc ebx
                add qword ptr [rsp], 2
                iretq
    """
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm(LOAD + source + TABLE, at=0x1000)
        write_gates(m, {6: "ud"})
        for cpu, stack in zip(m.cpus, (0x9000, 0xA000), strict=True):
            cpu.regs.rsp = stack
        record = m.lockstep(60, order=[0, 1, 1])
        alone = m.cpus[0]
        m.reset()
        write_gates(m, {6: "ud"})
        alone.regs.rsp = 0x9000
        expected = alone.record(len(record.records[0]))
        assert record.records[0].first_difference(expected) is None, record.disassemble()
        assert record.records[0].rows["flags"].tolist() == expected.rows["flags"].tolist()
        assert int(record.records[0].rbx[-1]) >= 3
        entered = [step for step in record if step.step.after["rip"] == m.symbols.resolve("ud")]
        assert {step.vcpu for step in entered} == {0, 1}


def test_a_guest_that_ends_itself_or_dies_ends_it_for_all(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        for source, cause in (("nop\nmov al, 3\nout 0xf4, al\nnop", "guest exit"), ("nop\nud2", "shutdown")):
            m.reset()
            m.load_asm("spin: jmp spin", at=0x2000)
            m.load_asm(source, at=0x1000, start=False)
            m.cpus[1].regs.rip = 0x1000
            record = m.lockstep(100, order="0*2 1")
            assert record.stops.first.cause == cause
            assert record.stops.first.vcpu == 1
            assert record.stops.of(0).held == record.ended
            assert len(record) < 12


def test_an_exit_that_is_caught_belongs_to_the_step_that_is_made_next(host):
    counter = Counter()
    with kb.Machine(host, memory="2M", vcpus=2, devices=[counter]) as m:
        start(m, "again: in al, 0x99\nmov [0x5000], al\njmp again")
        m.cpus[1].catches.add("io", port=0x99)
        record = m.lockstep(20)
        assert record.stops.first.cause is kb.Cause.CATCH
        assert record.vcpu.tolist() == [0]
        assert counter.count == 1
        m.cpus[1].catches.clear()
        record = m.lockstep(order="1 0 0 1 0")
        assert record.rip.tolist() == [0x1002, 0x1009, 0x1000, 0x1009, 0x1002]
        assert (counter.count, m.cpus[1].regs.rax & 0xFF, m.cpus[0].regs.rax & 0xFF) == (3, 2, 3)
        assert record.exit.tolist()[0] == record.exit.tolist()[4] == 2


def test_a_device_that_fails_ends_it_and_the_steps_so_far_are_kept(host):
    class Failing(Counter):
        def port_in(self, port: int, size_bytes: int) -> int:
            if super().port_in(port, size_bytes) == 3:
                raise ZeroDivisionError
            return 0

    device = Failing()
    with kb.Machine(host, memory="2M", vcpus=2, devices=[device]) as m:
        start(m, "again: in al, 0x99\njmp again")
        with pytest.raises(ZeroDivisionError):
            m.lockstep(100)
        record = m.last_lockstep
        assert record.vcpu.tolist() == [0, 1, 0, 1]
        assert m.lockstep(2).vcpu.tolist() == [0, 1]
        assert device.count == 4


def test_vcpus_that_wait_in_the_kernel_take_their_turns_from_when_they_are_started(host):
    with kb.Machine(host, memory="2M", vcpus=2, irqchip=True, waiting=True) as m:
        m.load_asm("mov word ptr [0x3000], 0x1234\nspin1: jmp spin1", at=0x2000, bits=16, start=False)
        source = """
            mov eax, 0xfee00300
            nop
            mov dword ptr [rax], 0xc4500
            nop
            mov dword ptr [rax], 0xc4602
            spin: jmp spin
        """
        m.load_asm(source, at=0x1000)
        record = m.lockstep(20)
        # After the fifth step of vcpu 0, the SIPI, vcpu 1 has its turns.
        assert record.vcpu.tolist() == [0] * 5 + [1, 0] * 5 + [1]
        assert record.notes == ("vcpu 1 waited in the kernel in 4 of its turns, which were passed over",)
        assert m.memory.read_u16(0x3000) == 0x1234


def test_a_halted_vcpu_is_woken_by_another_s_interrupt_at_its_next_turn(host):
    sender = """
        mov eax, 0xfee000f0
        mov dword ptr [rax], 0x1ff
        nop
        nop
        mov eax, 0xfee00300
        mov dword ptr [rax], 0xc4040    # vector 0x40 to all others
        spin: jmp spin
    """
    sleeper = """
        mov eax, 0xfee000f0
        mov dword ptr [rax], 0x1ff
        sti
        hlt
        cli
        spin2: jmp spin2
    """
    records = []
    for _ in range(2):
        with kb.Machine(host, memory="2M", vcpus=2, irqchip=True) as m:  # a reset leaves the local APICs alone
            m.load_asm(sleeper, at=0x2000, start=False)
            m.load_asm(sender, at=0x1000)
            m.cpus[1].regs.rip = 0x2000
            records.append(m.lockstep(30))
            spin = m.symbols.resolve("spin2")
    one, other = records
    assert one.first_difference(other) is None
    # CLI is the first thing that vcpu 1 does after the HLT: in the turn after the interrupt was sent.
    woken = np.flatnonzero(one.records[1].rip == spin)
    sent = int(one.where(0)[5])
    halted = int(one.where(1)[3])
    assert len(woken), one.disassemble()
    assert one.vcpu.tolist()[halted + 1 : sent + 1] == [0] * (sent - halted), one.disassemble()
    assert one.vcpu.tolist()[sent + 1] == 1, one.disassemble()


def test_when_all_vcpus_wait_it_ends(host):
    with kb.Machine(host, memory="2M", vcpus=2, irqchip=True) as m:
        m.load_asm("nop\nhlt", at=0x1000)
        record = m.lockstep(100_000, deadline_s=60)
        assert len(record) == 4
        assert record.ended.startswith("all vcpus wait in the kernel")
        assert "it waits" in m.run(deadline_s=0.1)[0].held or m.cpus[0].last_stop.cause is kb.Cause.DEADLINE


def test_the_deadline_and_an_interrupt_end_it(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("spin: inc rax\nmov [0x5000], rax\njmp spin", at=0x1000)
        record = m.lockstep(2_000_000, deadline_s=0.3, progress=False)
        assert record.ended == "the deadline passed"
        assert {stop.cause for stop in record.stops} == {kb.Cause.DEADLINE}
        before = m.memory.read_u64(0x5000)
        assert len(record) > 0

        def stop() -> None:
            while m.memory.read_u64(0x5000) <= before:
                pass
            m.cpus[1].interrupt()

        stopper = threading.Thread(target=stop)
        stopper.start()
        record = m.lockstep(2_000_000, deadline_s=60, progress=False)
        stopper.join()
        assert record.ended == "interrupted"
        assert int(record.rax[-1]) == m.cpus[int(record.vcpu[-1])].regs.rax


def test_ctrl_c_keeps_the_steps_so_far_and_the_machine_goes_on(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("spin: inc rax\nmov [0x5000], rax\njmp spin", at=0x1000)

        def press() -> None:
            while m.memory.read_u64(0x5000) < 100:
                pass
            os.kill(os.getpid(), signal.SIGINT)

        presser = threading.Thread(target=press)
        presser.start()
        with pytest.raises(KeyboardInterrupt):
            m.lockstep(2_000_000, deadline_s=60, progress=False)
        presser.join()
        record = m.last_lockstep
        assert record.ended == "Ctrl-C"
        for cpu in m.cpus:
            made = record.records[cpu.index]
            assert not cpu.running
            assert cpu.regs.rax == (int(made.rax[-1]) if len(made) else 0), "no step is missing"
        assert len(m.lockstep(10)) == 10


def test_other_threads_find_the_vcpus_busy(host):
    from kvmbench.errors import BusyError

    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("spin: inc rax\njmp spin", at=0x1000)
        runner = threading.Thread(target=lambda: m.lockstep(2_000_000, deadline_s=60, progress=False))
        runner.start()
        while not m.cpus[1].running:
            assert runner.is_alive()
        with pytest.raises(BusyError):
            m.cpus[1].step()
        with pytest.raises(BusyError):
            m.lockstep(10)
        while runner.is_alive():
            m.interrupt()
        runner.join()
        assert len(m.lockstep(10)) == 10


def test_thousands_of_steps_are_a_handful_of_exchanges(host, monkeypatch):
    channel = host.core.channel
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("spin: inc rax\njmp spin", at=0x1000)
        m.lockstep(10)
        calls = []
        name = "call" if hasattr(type(channel), "call") and not hasattr(channel, "call_into") else "call_into"
        monkeypatch.setattr(channel, name, count(getattr(channel, name), calls))
        record = m.lockstep(8000, seed=1, deadline_s=120)
        assert len(record) == 8000
        assert len(calls) <= 12


def count(function, calls):
    def counted(*args, **options):
        calls.append(1)
        return function(*args, **options)

    return counted


def test_a_record_is_saved_and_loaded(host, tmp_path):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        start(m, ADDS)
        record = m.lockstep(100, seed=5)
        loaded = LockstepRecord.load(record.save(tmp_path / "race.zip"))
        assert loaded.first_difference(record) is None
        assert (loaded.ended, loaded.notes) == (record.ended, record.notes)
        assert loaded.disassemble() == record.disassemble()
        schedule = Schedule.load(record.schedule.save(tmp_path / "race.txt"))
        start(m, ADDS)
        assert m.lockstep(order=schedule).first_difference(loaded) is None
        frame = record.to_dataframe()
        assert frame["vcpu"].tolist() == record.vcpu.tolist()
        assert frame["rip"].tolist() == record.rip.tolist()


def test_orders_that_make_no_sense_are_refused_before_a_step(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("spin: inc rax\njmp spin", at=0x1000)
        for words, call in (
            ("there is no vcpu 2; there are 0 to 1", lambda: m.lockstep(order=[0, 2])),
            ("an order without turns", lambda: m.lockstep(order=[])),
            ("an order without turns", lambda: m.lockstep(order="")),
            ("'robin' in an order", lambda: m.lockstep(order="robin")),
            ("is no order", lambda: m.lockstep(order=5)),
            ("say how many steps", lambda: m.lockstep()),
            ("say how many steps", lambda: m.lockstep(seed=1)),
            ("steps=0", lambda: m.lockstep(0)),
            ("steps=-1", lambda: m.lockstep(-1, order=[0])),
            ("steps=1.5", lambda: m.lockstep(1.5)),
            ("seed='x'", lambda: m.lockstep(10, seed="x")),
            ("not both", lambda: m.lockstep(10, seed=1, order=[0])),
            ("give 'skip' or 'end'", lambda: m.lockstep(10, at_halt="stop")),
            ("names its vcpus itself", lambda: m.lockstep(order=[0], cpus=[1])),
            ("deadline", lambda: m.lockstep(10, deadline_s=0)),
            ("there is no vcpu 7", lambda: m.lockstep(10, cpus=[7])),
            ("no option 'order_'", lambda: m.lockstep(10, order_=[0])),
        ):
            with pytest.raises(MisuseError, match=words):
                call()
        assert [cpu.regs.rax for cpu in m.cpus] == [0, 0]
        assert not any(cpu.running for cpu in m.cpus)
        m.cpus[0].held = True
        assert m.lockstep(6).vcpu.tolist() == [1] * 6
        assert m.lockstep(order=[0, 1]).vcpu.tolist() == [0, 1], "named, so stepped"
    with pytest.raises(ClosedError):
        m.lockstep(10)
