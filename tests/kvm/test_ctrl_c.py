"""Ctrl-C at every point: nothing of the guest is lost, done twice, or left changed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import pytest

import kvmbench as kb
from kvmbench.machine import Device

from .every_point import Press

LOOP = """
    again: inc r8
    out: out 0x99, al
    in al, 0x98
    movzx eax, al
    add r9, rax
    mov edi, 0x2000
    mov edx, 0x98
    mov ecx, 3
    rep insb
    mov ebx, 0xd0000000
    mov eax, [rbx]
    add r10, rax
    jmp again
"""

# What is cut short, and from how many places of the loop.
ACTIONS: dict[str, tuple[Callable[[kb.Machine], object], int]] = {
    "run": (lambda m: m.cpu.run(deadline_s=10), 1),
    "step": (lambda m: m.cpu.step(), 15),
    "step, each with a reply": (lambda m: m.cpu.step(deadline_s=3), 15),
    "steps": (lambda m: m.cpu.step(15), 1),
    "step_over": (lambda m: m.cpu.step_over(deadline_s=10), 12),
    "record": (lambda m: m.cpu.record(15), 1),
    "run until": (lambda m: m.cpu.run_until(lambda cpu: cpu.regs.rdi == 0x2003, deadline_s=10), 1),
    "run until an address": (lambda m: m.cpu.run_until("out", deadline_s=10), 1),
    "run, of the machine": (lambda m: m.run(deadline_s=10), 1),
    "lockstep": (lambda m: m.lockstep(15), 1),
}

# Every so many of the points, of which there are thousands; KVMBENCH_CTRL_C=all tries each, which takes 3 minutes.
STRIDES = {"local": 3, "agent": 11}


class Counter(Device):
    """Counts accesses, and answers one."""

    name = "counter"
    ports = (range(0x98, 0x9A),)
    mmio = (range(0xD000_0000, 0xD000_1000),)

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.written = self.read = self.mmio_read_ = 0

    def port_out(self, port, value, size_bytes):
        self.written += 1

    def port_in(self, port, size_bytes):
        self.read += 1
        return 1

    def mmio_read(self, gpa, size_bytes):
        self.mmio_read_ += 1
        return 1


def press_everywhere(
    machine: kb.Machine, counter: Counter, action: Callable[[kb.Machine], object], place: int, stride: int
) -> list[str]:
    """Takes the action again and again, each time with a Ctrl-C some points later, until it ends before that.

    Args:
        place: how many steps into the loop it is taken.
        stride: how many points later; 1 tries each.

    Returns:
        What was wrong then.
    """
    cpu = machine.cpu
    beginnings = {0x1000, *(cpu.step().rip for _ in range(30))}
    asked = 0

    def third(cpu: kb.Cpu) -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    one = cpu.breakpoints.add("again", mechanism="HLT", condition=third)
    settings = cpu.handlers, cpu.hold_interrupts, cpu.step_flags
    code = machine.memory.as_array("u1", 0x1000, 0x40).tobytes()
    asked = 2
    assert cpu.run(deadline_s=10).breakpoint is one
    counter.reset()
    cpu.regs.r8 = cpu.regs.r9 = cpu.regs.r10 = 0
    wrong = []
    for target in itertools.count(1, stride):
        asked = 2
        assert cpu.run(deadline_s=10).breakpoint is one
        for _ in range(place):
            cpu.step()
        asked = 0
        press = Press(target)
        raised = press.during(lambda: action(machine))
        if not press.where:
            break
        faults = {
            "swallowed": not raised,
            "rip": int(cpu.regs.rip) not in beginnings and hex(cpu.regs.rip),
            "registers": cpu.regs.rip != cpu.vcpu.get_regs().rip,
            "code": machine.memory.as_array("u1", 0x1000, 0x40).tobytes() != code,
            "running": cpu.running,
            "breakpoints": len(cpu.breakpoints) != 1 and str(cpu.breakpoints),
            "settings": (cpu.handlers, cpu.hold_interrupts, cpu.step_flags) != settings,
            "breakpoint": (one.overwritten, one.remarks, str(one.mechanism)) != (0, [], "HLT"),
        }
        for _ in range(3):
            cpu.step()
        asked = 2
        cpu.run(deadline_s=10)
        loops = int(cpu.regs.r8)
        done = (counter.written, counter.read, int(cpu.regs.r9), counter.mmio_read_, int(cpu.regs.r10))
        faults["devices"] = done != (loops, 4 * loops, loops, loops, loops) and (loops, *done)
        counter.reset()
        cpu.regs.r8 = cpu.regs.r9 = cpu.regs.r10 = 0
        told = ", ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
        if told:
            wrong.append(f"{place} steps on, {target} {press.where}: {told}")
    assert target > 5
    cpu.breakpoints.remove(one)
    return wrong


@pytest.mark.parametrize("name", ACTIONS)
def test_ctrl_c_at_every_point(request, host, name):
    stride = STRIDES.get(request.node.callspec.params["host"])
    if stride is None:
        pytest.skip("the same Python as with an agent on this machine; elsewhere thousands of presses take long")
    if os.environ.get("KVMBENCH_CTRL_C") == "all":
        stride = 1
    action, places = ACTIONS[name]
    wrong = []
    counter = Counter()
    with kb.Machine(host, memory="2M", devices=[counter]) as machine:
        machine.load_asm(LOOP, at=0x1000)
        for place in range(places):
            wrong += press_everywhere(machine, counter, action, place, stride)
    assert not wrong, "\n".join(wrong)
