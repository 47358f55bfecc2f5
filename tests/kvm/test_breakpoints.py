"""Breakpoints, by every mechanism that the host's self-check found to work."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench.errors import AddressError, MisuseError

from .mechanisms import LOOP, MECHANISMS


def test_a_breakpoint_stops_before_its_instruction_each_time_it_is_reached(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("again", mechanism=mechanism)
    seen = []
    while (stop := cpu.run(deadline_s=10)).cause is kb.Cause.BREAKPOINT:
        assert stop.breakpoint is one
        seen.append((stop.rip, cpu.regs.eax))
    assert seen == [(0x1005, n) for n in range(5)]
    assert stop.cause is kb.Cause.HALT
    assert one.hits == 5
    assert mechanism in repr(one)


def test_a_condition_lets_the_guest_go_on_until_it_holds(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("again", mechanism=mechanism, condition=lambda cpu: cpu.regs.ecx == 2)
    stop = cpu.run(deadline_s=10)
    assert (stop.cause, cpu.regs.ecx, cpu.regs.eax) == (kb.Cause.BREAKPOINT, 2, 3)
    assert (one.hits, one.passes) == (1, 3)
    assert cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_memory_never_shows_a_breakpoint_s_byte_while_stopped(machine, mechanism):
    program = machine.load_asm(LOOP, at=0x1000)
    code = machine.memory.read(0x1000, 16)
    machine.cpu.breakpoints.add("again", mechanism=mechanism)
    machine.cpu.run(deadline_s=10)
    assert machine.memory.read(0x1000, 16) == code
    assert machine.cpu.disassemble("again", count=1)[0].mnemonic == "inc"
    assert program.symbols["again"] == 0x1005


def test_a_removed_or_disabled_breakpoint_stops_nothing(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    gone = cpu.breakpoints.add("again", mechanism=mechanism)
    off = cpu.breakpoints.add("end", mechanism=mechanism)
    cpu.breakpoints.remove(gone)
    off.enabled = False
    assert cpu.run(deadline_s=10).cause is kb.Cause.HALT
    with pytest.raises(MisuseError, match="no breakpoint 1; there are"):
        cpu.breakpoints.remove(1)


def test_a_step_onto_a_breakpoint_is_told_as_one_and_a_run_from_it_goes_on(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("again", mechanism=mechanism)
    stop = cpu.step()
    assert (stop.cause, stop.breakpoint, stop.rip, stop.steps, one.hits) == (kb.Cause.BREAKPOINT, one, 0x1005, 1, 1)
    stop = cpu.run(deadline_s=10)
    assert (stop.rip, cpu.regs.ecx, one.hits) == (0x1005, 4, 2)
    assert cpu.step().cause is kb.Cause.STEP


@pytest.mark.parametrize("way", ["alone", "with a watchpoint", "over", "whole", "disabled and enabled"])
def test_single_steps_reach_a_breakpoint_as_often_as_a_run_does(machine, way):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("again")
    if way == "with a watchpoint":
        cpu.watch(0x8000, 8)
    elif way == "over":
        cpu.handlers = "over"
    elif way == "whole":
        cpu.rep = "whole"
    elif way == "disabled and enabled":
        one.enabled = False
        cpu.step()
        one.enabled = True
        machine.reset()
    stops = [cpu.step() for _ in range(9)]
    assert [stop.breakpoint for stop in stops if stop.cause is not kb.Cause.STEP] == [one] * one.hits
    assert one.hits == sum(stop.rip == 0x1005 for stop in stops) > 1


def test_run_until_a_condition_asks_each_breakpoint_once(machine):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    cpu.watch(0x8000, 8)
    one = cpu.breakpoints.add("again", condition=lambda cpu: False)
    assert cpu.run_until(lambda cpu: cpu.regs.eax == 3).cause is kb.Cause.UNTIL
    assert (one.hits, one.passes) == (0, 3)


def test_run_until_leaves_no_breakpoint_behind(machine):
    machine.load_asm(LOOP, at=0x1000)
    stop = machine.cpu.run_until("end", deadline_s=10)
    assert (stop.cause, stop.rip, len(machine.cpu.breakpoints)) == (kb.Cause.UNTIL, 0x100B, 0)


def test_run_until_a_condition_holds(machine):
    machine.load_asm(LOOP, at=0x1000)
    stop = machine.cpu.run_until(lambda cpu: cpu.regs.eax == 3)
    assert (stop.cause, stop.rip) == (kb.Cause.UNTIL, 0x1007)


def test_a_breakpoint_at_an_unmapped_address_is_refused_in_words(machine):
    machine.load_asm(LOOP, at=0x1000)
    with pytest.raises(AddressError, match="nothing is mapped at 0x7fff00000000"):
        machine.cpu.breakpoints.add(0x7FFF_0000_0000)
    with pytest.raises(MisuseError, match="did you mean 'again'"):
        machine.cpu.breakpoints.add("agian")
    assert len(machine.cpu.breakpoints) == 0
    assert machine.cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_a_condition_that_fails_is_named_and_the_guest_stays_usable(machine):
    machine.load_asm(LOOP, at=0x1000)
    machine.cpu.breakpoints.add("again", condition=lambda cpu: cpu.regs.nonsense)
    with pytest.raises(MisuseError, match="condition of breakpoint 1 at again failed"):
        machine.cpu.run(deadline_s=10)
    machine.cpu.breakpoints.clear()
    assert machine.cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_the_mechanism_is_chosen_from_what_works_and_said(machine):
    machine.load_asm(LOOP, at=0x1000)
    one = machine.cpu.breakpoints.add("again")
    assert getattr(machine.host.mechanisms, MECHANISMS[str(one.mechanism)])
    assert str(one.mechanism) in repr(one)


STORE = """
        mov rbx, 0x3000
        mov eax, 0x11
        mov [rbx], eax
        mov [rbx + 8], eax
        inc eax
        mov [rbx], eax
        nop
        hlt
"""
WATCHES = {"debug register": "hw_write", "read-only slot": "readonly_slot", "stepping loop": "step"}


@pytest.fixture(params=WATCHES)
def watch_mechanism(request, require):
    require(WATCHES[request.param])
    return request.param


def test_a_write_watchpoint_stops_after_each_write_to_its_bytes_only(machine, watch_mechanism):
    machine.load_asm(STORE, at=0x1000)
    cpu = machine.cpu
    one = cpu.watch(0x3000, 4, "w", mechanism=watch_mechanism)
    seen = []
    while (stop := cpu.run(deadline_s=10)).cause is kb.Cause.WATCHPOINT:
        assert stop.breakpoint is one
        seen.append((stop.instruction.text, machine.memory.read_u32(0x3000)))
    assert [value for _, value in seen] == [0x11, 0x12]
    assert [text.split()[0] for text, _ in seen] == ["mov", "nop"]
    assert stop.cause is kb.Cause.HALT
    assert machine.memory.read_u32(0x3008) == 0x11


def test_single_steps_and_recordings_stop_at_watchpoints(machine, watch_mechanism):
    machine.load_asm(STORE, at=0x1000)
    machine.cpu.watch(0x3000, 4, "w", mechanism=watch_mechanism)
    stop = machine.cpu.step(5)
    assert (stop.cause, stop.steps) == (kb.Cause.WATCHPOINT, 3)
    rec = machine.cpu.record(10)
    assert machine.cpu.last_stop.cause is kb.Cause.WATCHPOINT
    assert len(rec) == 3


READS = {"debug register": "hw_read", "absent slot": "no_slot"}


@pytest.mark.parametrize("mechanism", READS)
def test_a_read_watchpoint_stops_after_reads_and_writes(machine, require, mechanism):
    require(READS[mechanism])
    machine.load_asm("mov rbx, 0x3000\nmov eax, [rbx]\ninc eax\nmov [rbx], eax\nnop\nhlt", at=0x1000)
    machine.memory.write_u32(0x3000, 41)
    cpu = machine.cpu
    cpu.watch(0x3000, 4, "rw", mechanism=mechanism)
    assert cpu.run(deadline_s=10).cause is kb.Cause.WATCHPOINT
    assert cpu.regs.eax == 41
    assert cpu.run(deadline_s=10).cause is kb.Cause.WATCHPOINT
    assert machine.memory.read_u32(0x3000) == 42
    assert cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_a_removed_watchpoint_gives_its_page_back(machine, require):
    require("readonly_slot")
    machine.load_asm(STORE, at=0x1000)
    one = machine.cpu.watch(0x3000, 4, "w", mechanism="read-only slot")
    machine.cpu.breakpoints.remove(one)
    assert machine.cpu.run(deadline_s=10).cause is kb.Cause.HALT
    assert machine.memory.read_u32(0x3000) == 0x12


def test_more_watchpoints_than_debug_registers_still_all_stop(machine):
    source = "\n".join(f"mov dword ptr [{0x3000 + 0x100 * n}], 1" for n in range(6)) + "\nhlt"
    machine.load_asm(source, at=0x1000)
    for n in range(6):
        machine.cpu.watch(0x3000 + 0x100 * n, 4)
    stops = [machine.cpu.run(deadline_s=10) for _ in range(6)]
    assert [stop.breakpoint.number for stop in stops] == [1, 2, 3, 4, 5, 6]
    assert machine.cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_a_watchpoint_of_no_sense_is_refused(machine):
    with pytest.raises(MisuseError, match="'w' \\(write\\) or 'rw'"):
        machine.cpu.watch(0x3000, 4, "x")
    with pytest.raises(MisuseError, match="1 to 4096 bytes"):
        machine.cpu.watch(0x3000, 0)
    with pytest.raises(AddressError, match="nothing is mapped"):
        machine.cpu.watch(0x7FFF_0000_0000, 4)


def test_a_false_condition_is_asked_once_a_visit_also_at_neighbours(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    asked: list[tuple[str, int]] = []

    def note(name: str):
        return lambda cpu: asked.append((name, cpu.regs.ecx))

    machine.cpu.breakpoints.add("again", mechanism=mechanism, condition=note("first"))
    machine.cpu.breakpoints.add("again+2", mechanism=mechanism, condition=note("second"))
    assert machine.cpu.run(deadline_s=10).cause is kb.Cause.HALT
    assert asked == [(name, n) for n in (5, 4, 3, 2, 1) for name in ("first", "second")]


def test_a_false_condition_does_not_hide_another_breakpoint_at_the_same_place(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    cpu.breakpoints.add("again", mechanism=mechanism, condition=lambda cpu: False)
    stop = cpu.run_until("again", deadline_s=10)
    assert (stop.cause, stop.rip) == (kb.Cause.UNTIL, 0x1005)
    other = cpu.breakpoints.add("again", mechanism=mechanism)
    assert cpu.run(deadline_s=10).breakpoint is other


def test_what_a_condition_writes_stays_written(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu

    def write(cpu: kb.Cpu) -> bool:
        cpu.regs.rbx += 1
        return cpu.regs.rbx == 3

    cpu.breakpoints.add("again", mechanism=mechanism, condition=write)
    assert cpu.run(deadline_s=10).cause is kb.Cause.BREAKPOINT
    assert (cpu.regs.rbx, cpu.vcpu.get_regs().rbx) == (3, 3)


def test_run_until_a_condition_stops_at_breakpoints(machine):
    machine.load_asm(LOOP, at=0x1000)
    one = machine.cpu.breakpoints.add("again+2")
    stop = machine.cpu.run_until(lambda cpu: cpu.regs.ecx == 1, deadline_s=30)
    assert (stop.cause, stop.breakpoint, machine.cpu.regs.ecx) == (kb.Cause.BREAKPOINT, one, 5)


def test_a_step_is_one_step_though_a_watchpoint_s_condition_is_false(machine):
    machine.load_asm("mov dword ptr [0x3000], 7\nmov eax, 1\nmov eax, 2\nhlt", at=0x1000)
    one = machine.cpu.watch(0x3000, 4, "w", condition=lambda cpu: False)
    stop = machine.cpu.step()
    assert (stop.cause, stop.rip, stop.steps) == (kb.Cause.STEP, 0x100B, 1)
    assert (one.hits, one.passes, machine.memory.read_u32(0x3000)) == (0, 1, 7)


def test_a_false_condition_does_not_hide_another_watchpoint_on_the_same_page(machine, require):
    require("readonly_slot")
    machine.load_asm("mov dword ptr [0x3000], 7\nhlt", at=0x1000)
    watch = machine.cpu.breakpoints.watch
    watch(0x3000, 4, "w", mechanism="read-only slot", condition=lambda cpu: False)
    other = watch(0x3002, 1, "w", mechanism="read-only slot")
    assert machine.cpu.run(deadline_s=10).breakpoint is other
