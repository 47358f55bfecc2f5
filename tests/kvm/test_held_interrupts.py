"""Interrupts while stepping: held, or their handlers are entered; a run that is made of steps lets them come."""

from __future__ import annotations

import pytest

import kvmbench as kb

from .interrupt_table import guest


def prepare_pic(m):
    """The 8259's first controller to vectors 0x20 up, line 0 open, as a guest would."""
    words = ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xFE))
    setup = "".join(f"mov al, {value}\nout {port}, al\n" for port, value in words)
    start = m.cpu.regs.rip
    m.load_asm(f"setup: {setup}\nready: hlt", at=0x20000)
    m.cpu.run_until("ready", deadline_s=10)
    m.cpu.regs.rip = start


def test_an_interrupt_is_held_while_stepping_or_its_handler_is_entered(host):
    source = """
        sti
loop:   inc ebx
        jmp loop
tick:   inc esi
        mov al, 0x20
        out 0x20, al
        iretq
"""
    with guest(host, source, {0x20: "tick"}, irqchip=True) as m:
        if not m.can_hold_interrupts:
            pytest.skip("KVM has no KVM_GUESTDBG_BLOCKIRQ here")
        prepare_pic(m)
        m.cpu.step(4)
        m.irq(0, 1)
        held = [m.cpu.step().entered_vector for _ in range(10)]
        assert held == [None] * 10
        m.cpu.hold_interrupts = False
        free = [m.cpu.step() for _ in range(4)]
        assert [stop.entered_vector for stop in free].count(0x20) == 1
        at = next(stop for stop in free if stop.entered_vector is not None)
        assert at.rip == m.symbols["tick"]
        assert not at.tainted


SELF_IPI = """
        mov edi, 0xfee00000
        mov dword ptr [rdi + 0xf0], 0x1ff
        sti
        mov dword ptr [rdi + 0x300], 0x40040
        mov ecx, 100
wait:   dec ecx
        jnz wait
done:   hlt
        jmp done
irq:    inc r9
        mov dword ptr [rdi + 0xb0], 0
        iretq
"""


@pytest.mark.parametrize("way", ["breakpoint", "watchpoint", "condition"])
def test_a_run_made_of_steps_lets_interrupts_come(host, way):
    with guest(host, SELF_IPI, {0x40: "irq"}, irqchip=True, mapped=[(0xFEE00000, 0x1000)]) as m:
        if way == "breakpoint":
            m.cpu.breakpoints.add("irq", mechanism="stepping loop")
            stop = m.cpu.run(deadline_s=20)
            assert (stop.cause, stop.rip) == (kb.Cause.BREAKPOINT, m.symbols["irq"])
        elif way == "watchpoint":
            # Nothing writes there; the run is made of steps for it, and ends on the HLT.
            m.cpu.watch(0x7000, 8, "w", mechanism="stepping loop")
            m.cpu.breakpoints.add("done")
            stop = m.cpu.run(deadline_s=20)
            assert (stop.cause, m.cpu.regs.r9) == (kb.Cause.BREAKPOINT, 1)
        else:
            stop = m.cpu.run_until(lambda cpu: cpu.regs.ecx == 10, deadline_s=20)
            assert (stop.cause, m.cpu.regs.r9) == (kb.Cause.UNTIL, 1)
        assert m.cpu.hold_interrupts == m.can_hold_interrupts


def test_single_steps_still_hold_interrupts_after_a_run_made_of_steps(host):
    with guest(host, SELF_IPI, {0x40: "irq"}, irqchip=True, mapped=[(0xFEE00000, 0x1000)]) as m:
        if not m.can_hold_interrupts:
            pytest.skip("KVM has no KVM_GUESTDBG_BLOCKIRQ here")
        m.cpu.breakpoints.add("start+0x8", mechanism="stepping loop")
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.BREAKPOINT
        m.cpu.step(30)
        assert m.cpu.regs.r9 == 0
        assert len(m.cpu.record(30)) == 30
        assert m.cpu.regs.r9 == 0
