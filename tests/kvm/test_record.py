"""Recordings: what single steps would show, in columns."""

from __future__ import annotations

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import MisuseError

# Every register, flags, memory, stack, a call and I/O.
BUSY = """
start:  mov rcx, 20
again:  lea rax, [rax + rcx * 4]
        xor rbx, rax
        imul rdx, rax, 77
        mov r8, rdx
        rol r9, 3
        add r9, r8
        push r9
        pop r10
        call leaf
        mov [0x3000 + rcx * 8], r10
        out 0x80, al
        dec rcx
        jnz again
        hlt
leaf:   not r11
        sub r12, r11
        ret
"""
STEPS = 1 + 20 * 16


def stepped(machine, steps):
    rows = []
    for _ in range(steps):
        machine.cpu.step()
        regs = machine.cpu.regs
        names = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"]
        names += [f"r{n}" for n in range(8, 16)] + ["rip", "rflags"]
        rows.append([int(getattr(regs, name)) for name in names])
    return rows


def test_a_recording_equals_the_same_steps_one_by_one(host):
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(BUSY, at=0x1000)
        one_by_one = stepped(m, STEPS)
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(BUSY, at=0x1000)
        rec = m.cpu.record(STEPS)
        assert m.cpu.last_stop.cause is kb.Cause.STEP
    names = rec.rows.dtype.names[:18]
    recorded = [[int(row[name]) for name in names] for row in rec.rows]
    assert recorded == one_by_one


def test_a_recording_is_152_bytes_a_step_and_keeps_where_it_came_from(machine):
    machine.load_asm(BUSY, at=0x1000)
    rec = machine.cpu.record(100)
    assert (len(rec), rec.nbytes) == (100, 15200)
    assert rec.provenance.module == machine.host.info.module
    assert rec.executed_rip[0] == 0x1000
    assert np.array_equal(rec.executed_rip[1:], rec.rip[:-1])


def test_a_recording_ends_where_the_guest_halts_and_says_so(machine):
    machine.load_asm(BUSY, at=0x1000)
    rec = machine.cpu.record(10_000)
    assert machine.cpu.last_stop.cause in (kb.Cause.HALT,)
    assert STEPS <= len(rec) <= STEPS + 1


def test_exits_are_marked_on_the_step_that_made_them(machine):
    machine.load_asm(BUSY, at=0x1000)
    rec = machine.cpu.record(STEPS)
    marked = np.flatnonzero(rec.exit != 4)
    assert len(marked) == 20
    outs = {int(rip) for rip in rec.executed_rip[marked]}
    assert len(outs) == 1
    assert machine.memory.read(outs.pop(), 2) == b"\xe6\x80"


def test_a_breakpoint_ends_a_recording(machine):
    machine.load_asm(BUSY, at=0x1000)
    machine.cpu.breakpoints.add("leaf")
    rec = machine.cpu.record(1000)
    assert machine.cpu.last_stop.cause is kb.Cause.BREAKPOINT
    assert int(rec.rip[-1]) == machine.symbols["leaf"]


def test_a_long_recording_is_put_together_from_pieces_without_a_seam(machine):
    machine.load_asm("again: inc rax\njmp again", at=0x1000)
    rec = machine.cpu.record(20_001)
    assert len(rec) == 20_001
    assert rec.rax[::2].tolist() == list(range(1, 10_002))
    assert rec.rip[1::2].tolist() == [0x1000] * 10_000


def test_the_deadline_ends_a_recording_and_the_steps_stay(machine):
    machine.load_asm("again: inc rax\njmp again", at=0x1000)
    rec = machine.cpu.record(100_000_000, deadline_s=0.2, progress=False)
    assert machine.cpu.last_stop.cause is kb.Cause.DEADLINE
    assert 0 < len(rec) < 100_000_000


def test_a_recording_of_no_steps_is_refused(machine):
    machine.load_asm(BUSY, at=0x1000)
    for steps in (0, -1, 1.5):
        with pytest.raises(MisuseError, match="cannot record"):
            machine.cpu.record(steps)


def test_a_recording_is_shown_and_saved_after_its_host_is_closed(fresh_host, tmp_path):
    with kb.Machine(fresh_host, memory="2M") as m:
        m.load_asm(BUSY)
        rec = m.cpu.record(50, progress=False)
        stop = m.cpu.last_stop
    fresh_host.close()
    assert "50 steps" in rec._repr_html_()
    assert "again" in rec.disassemble()
    rec.save(tmp_path / "rec.npz")
    rec.to_csv(tmp_path / "rec.csv")
    assert str(stop)
    assert stop._repr_html_()


def test_a_recording_says_what_ended_it_early(machine):
    machine.load_asm("start: nop\nloop: nop\nnop\nhlt", at=0x1000)
    cpu = machine.cpu
    assert cpu.record(1).ended == ""
    cpu.breakpoints.add("loop")
    cpu.regs.rip = 0x1000
    rec = cpu.record(9)
    assert rec.ended == "breakpoint 1 at loop"
    assert "; ended: breakpoint 1 at loop; " in repr(rec)
    cpu.breakpoints.clear()
    rec = cpu.record(9)
    assert rec.ended == "halt"
