"""Breakpoints in a handler that is stepped over: which ways of going on stop there."""

from __future__ import annotations

import pytest

import kvmbench as kb

from .interrupt_table import LOAD, TABLE, write_gates

SOURCE = (
    LOAD
    + """
fault:  ud2
after:  nop
        hlt
ud:     inc ebx
inside: add qword ptr [rsp], 2
        mov qword ptr [0x3000], 7
        iretq
"""
    + TABLE
)
WAYS = {
    "step(1)": lambda cpu: cpu.step(),
    "step(2)": lambda cpu: cpu.step(2),
    "record": lambda cpu: cpu.record(2),
    "step_over": lambda cpu: cpu.step_over(),
    "run": lambda cpu: cpu.run(deadline_s=10),
}


def before_the_fault(machine):
    machine.load_asm(SOURCE, at=0x1000)
    write_gates(machine, {6: "ud"})
    machine.cpu.regs.rsp = 0x9000
    machine.cpu.run_until("fault", deadline_s=10)
    machine.cpu.handlers = "over"


@pytest.mark.parametrize("way", WAYS)
def test_an_execute_breakpoint_stops_each_in_the_handler(machine, way):
    before_the_fault(machine)
    cpu = machine.cpu
    one = cpu.breakpoints.add("inside")
    WAYS[way](cpu)
    stop = cpu.last_stop
    assert (stop.cause, machine.symbols.label(stop.rip), one.hits) == (kb.Cause.BREAKPOINT, "inside", 1)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "run"])
def test_a_watchpoint_stops_each_and_may_be_told_after_the_handler(machine, way):
    before_the_fault(machine)
    cpu = machine.cpu
    one = cpu.watch(0x3000, 8, "w")
    WAYS[way](cpu)
    stop = cpu.last_stop
    assert (stop.cause, stop.breakpoint is one, one.hits) == (kb.Cause.WATCHPOINT, True, 1)
