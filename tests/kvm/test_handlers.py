"""Exceptions while stepping: their handlers are entered with a stop, and see nothing of us."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import MisuseError
from kvmbench.machine.segment import encode_gate

from .interrupt_table import LOAD, STACK, TABLE, agree, gate, guest, steps, write_gates

FAULTS = """
        xor ecx, ecx
        div ecx
after:  nop
        ud2
end:    hlt
de:     inc ebx
        add {word} ptr [{sp}], 2
        iret{suffix}
ud:     inc ebx
        add {word} ptr [{sp}], 2
        iret{suffix}
"""
WIDE = {"word": "qword", "sp": "rsp", "suffix": "q"}
NARROW = {"word": "dword", "sp": "esp", "suffix": "d"}


def places(m, stops):
    return [m.symbols.label(stop.rip) for stop in stops]


@pytest.mark.parametrize("mode", ["long", "protected", "pae"])
def test_a_step_that_faults_ends_at_its_handler_and_the_handler_is_stepped_and_left(host, mode):
    words = WIDE if mode == "long" else NARROW
    if mode == "protected" and host.info.module == "kvm_pvm":
        pytest.skip("kvm_pvm runs CPL 0 by KVM's instruction emulator, which has no IRET of protected mode")
    with guest(host, FAULTS.format(**words), {0: "de", 6: "ud"}, mode=mode) as m:
        stops = steps(m)
        vectors = {n: stop.entered_vector for n, stop in enumerate(stops) if stop.entered_vector is not None}
        names = [name.partition("+")[0] for name in places(m, stops)]
        assert names == ["start"] * 2 + ["de"] * 3 + ["after"] * 2 + ["ud"] * 3 + ["end"] + ["de"]
        assert vectors == {2: 0, 7: 6}
        assert [stops[n].rip for n in (2, 5, 7, 10)] == [m.symbols[name] for name in ("de", "after", "ud", "end")]
        assert stops[-1].cause is kb.Cause.HALT
        assert not any(stop.tainted for stop in stops)
        assert m.cpu.regs.ebx == 2


def test_a_recording_has_the_same_steps_and_says_which_entered_what(host):
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud"}) as m:
        single = [stop.rip for stop in steps(m)]
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud"}) as m:
        rec = m.cpu.record(100)
        assert rec.rip.tolist() == single
        assert np.flatnonzero(rec.entered_vector >= 0).tolist() == [2, 7]
        assert rec[2].taints == ("entered vector 0 (#DE)",)
        assert rec[7].entered_vector == 6


def test_a_stop_behind_many_steps_names_the_vector_of_the_last_step_only(host):
    # The HLT ends at the address of a handler that was entered long before.
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud"}) as m:
        m.cpu.record(100)
        stop = m.cpu.last_stop
        assert (stop.cause, stop.rip, stop.entered_vector) == (kb.Cause.HALT, m.symbols["de"], None)
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud", 5: "ud"}) as m:
        # Two vectors lead there, so only the step itself can tell.
        assert [m.cpu.step(count).entered_vector for count in (3, 3, 2)] == [0, None, None]
        assert m.cpu.step(2).cause is kb.Cause.STEP
    with guest(host, "ud2\njmp ud\nud: add qword ptr [rsp], 2\niretq", {6: "ud"}) as m:
        stop = m.cpu.step(5)
        assert (stop.rip, stop.entered_vector) == (m.symbols["ud"], None), "it jumped there"


def test_running_freely_comes_to_the_same_end(host):
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud"}) as m:
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.HALT
        assert m.cpu.regs.ebx == 2


def test_an_iret_is_one_step(host):
    with guest(host, "ud2\nback: nop\nnop\nhlt\nud: add qword ptr [rsp], 2\nreturn: iretq\n", {6: "ud"}) as m:
        m.cpu.step(3)
        assert m.cpu.step().rip == m.symbols["back"]
        assert m.cpu.step().rip == m.symbols["back"] + 1


REAL = """
start:  mov ax, 0
        mov ss, ax
        mov sp, 0x9000
        int 0x30
        xor cx, cx
        div cx
        int 0x31
        hlt
de:     pop ax
        add ax, 2
        push ax
        iret
h30:    iret
h31:    iret
"""


def test_real_mode_handlers_that_lie_byte_by_byte_are_told_apart(host):
    with guest(host, REAL, {0: "de", 0x30: "h30", 0x31: "h31"}, mode="real", tables=False) as m:
        stops = steps(m)
        assert [stop.entered_vector for stop in stops if stop.entered_vector is not None] == [0x30, 0, 0x31]
        assert stops[-1].cause is kb.Cause.HALT
        assert m.cpu.regs.sp == STACK
        assert m.memory.read(m.symbols["h30"], 2) == b"\xcf\xcf"


def test_a_step_over_handlers_runs_them_as_a_part_of_the_step(host):
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud"}) as m:
        m.cpu.handlers = "over"
        names = places(m, steps(m))
        assert names[2:] == ["after", "after+0x1", "end", "de"]
        assert m.cpu.regs.ebx == 2
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud"}) as m:
        m.cpu.handlers = "over"
        rec = m.cpu.record(100)
        assert [m.symbols.label(int(rip)) for rip in rec.rip][2:] == names[2:]
        assert "ran a handler to its end" in rec[2].taints


def test_a_handler_that_talks_to_devices_is_still_a_part_of_the_step(host):
    source = """
        ud2
next:   hlt
ud:     mov dx, 0x3f8
        mov al, '!'
        out dx, al
        mov dx, 0x3fd
        in al, dx
        add qword ptr [rsp], 2
        iretq
"""
    for way in ("step", "record"):
        with guest(host, source, {6: "ud"}) as m:
            m.cpu.step()
            m.cpu.handlers = "over"
            rip = m.cpu.step().rip if way == "step" else int(m.cpu.record(1).rip[0])
            assert rip == m.symbols["next"]
            assert m.serial.text == "!"


def test_a_breakpoint_in_a_handler_stops_there_though_it_is_stepped_over(host):
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud"}) as m:
        m.cpu.handlers = "over"
        m.cpu.breakpoints.add("de", mechanism="stepping loop")
        assert m.cpu.step(10).cause is kb.Cause.BREAKPOINT
        assert m.cpu.regs.rip == m.symbols["de"]
        assert m.symbols.label(m.cpu.step().rip) == "de+0x2", "who stops in a handler steps in it"


def test_step_over_leaves_the_handlers_it_meets_behind(host):
    with guest(host, FAULTS.format(**WIDE), {0: "de", 6: "ud"}) as m:
        names = [m.symbols.label(m.cpu.step_over().rip) for _ in range(5)]
        assert names[2:] == ["after", "after+0x1", "end"]
        assert m.cpu.handlers == "enter"


def test_a_fault_that_its_handler_mends_is_one_step_over(host):
    # #PF: the handler corrects the pointer and the load is tried again.
    source = """
        mov rbx, 0x7fff00000000
load:   mov rax, [rbx]
next:   hlt
pf:     mov rbx, 0x1000
        add rsp, 8
        iretq
"""
    with guest(host, source, {14: "pf"}) as m:
        m.cpu.run_until("load")
        m.cpu.handlers = "over"
        stop = m.cpu.step()
        assert (stop.rip, stop.steps) == (m.symbols["next"], 1)
        assert m.cpu.regs.rax == int.from_bytes(m.memory.read(0x1000, 8), "little")


def test_a_rep_instruction_is_one_step_where_that_is_wished(host):
    source = "mov ecx, 200\nmov edi, 0x3000\nmov al, 7\nrep stosb\ndone: hlt"
    with guest(host, source, {}) as m:
        m.cpu.rep = "whole"
        rec = m.cpu.record(20)
        assert m.symbols.label(int(rec.rip[4])) == "done"
        assert m.memory.read(0x3000, 201) == b"\x07" * 200 + b"\0"
    with guest(host, source, {}) as m:
        rounds = len(m.cpu.record(1000)) - 5
        # KVM's instruction emulator makes many rounds in one.
        assert 1 < rounds < 200 if host.info.module == "kvm_pvm" else rounds == 200


@pytest.mark.parametrize(("name", "value"), [("rep", "all"), ("handlers", "skip"), ("handlers", 1)])
def test_a_choice_that_is_none_is_refused(machine, name, value):
    with pytest.raises(MisuseError, match=f"cpu.{name} = {value!r}: there are"):
        setattr(machine.cpu, name, value)


def test_a_dead_guest_tells_the_instruction_and_the_exceptions_before(host):
    # #DE is handled, #UD has no gate: a triple fault.
    with guest(host, FAULTS.format(**WIDE), {0: "de"}) as m:
        stop = m.cpu.step(100)
        assert stop.cause is kb.Cause.SHUTDOWN
        assert stop.fault.instruction.text == "ud2"
        assert stop.fault.pc == m.symbols["after"] + 1
        assert [(one.vector, one.label) for one in stop.fault.delivered] == [(0, "start+0xa")]
        assert "0 (#DE) at start+0xa" in repr(stop)


def test_several_vectors_of_one_handler_are_told_apart_only_where_that_is_known(host):
    source = "ud2\nint 0x30\nhlt\nboth: iretq\n"
    with guest(host, source, {6: "both", 13: "both", 0x30: "both"}) as m:
        m.cpu.step()
        stop = m.cpu.step()
        assert stop.rip == m.symbols["both"]
        assert stop.entered_vector is None, "6, 13 or 48"
        m.cpu.regs.rip = m.symbols["start"] + 10
        if host.info.module == "kvm_pvm":
            return  # its instruction emulator has no INT n in long mode
        assert m.cpu.step().entered_vector == 0x30, "the instruction says so"


def test_a_gate_that_the_guest_writes_is_seen_at_once(host):
    source = """
        lea rax, [rip + ud]
        mov word ptr [0x5000 + 6*16], ax
        mov word ptr [0x5000 + 6*16 + 2], cs
        mov word ptr [0x5000 + 6*16 + 4], 0x8e00
        ud2
        hlt
ud:     add qword ptr [rsp], 2
        iretq
"""
    with guest(host, source, {}) as m:
        rec = m.cpu.record(50)
        assert m.cpu.last_stop.cause is kb.Cause.HALT
        assert rec.entered_vector[rec.entered_vector >= 0].tolist() == [6]


def test_memory_is_as_the_guest_wrote_it_after_every_step(host):
    source = FAULTS.format(**WIDE)
    with guest(host, source, {0: "de", 6: "ud"}) as m:
        before = m.memory.read(0x1000, 0x100)
        for _ in range(12):
            m.cpu.step()
            assert m.memory.read(0x1000, 0x100) == before


def test_a_handler_that_the_guest_overwrites_stays_overwritten(host):
    source = "mov byte ptr [ud], 0x90\nud2\nhlt\nud: cli\nadd qword ptr [rsp], 2\niretq\n"
    with guest(host, source, {6: "ud"}) as m:
        m.cpu.step(2)
        assert m.memory.read(m.symbols["ud"], 1) == b"\x90"
        assert m.cpu.step().rip == m.symbols["ud"]
        assert m.cpu.step().rip == m.symbols["ud"] + 1
        assert m.memory.read(m.symbols["ud"], 1) == b"\x90"


def test_a_guest_s_own_out_to_the_same_port_reaches_the_bus(host):
    with guest(host, "mov al, 5\nout 0xe6, al\nout 0xe6, al\nnop\nhlt\nde: hlt", {0: "de"}) as m:
        m.cpu.catches.add("io", port=0xE6)
        m.cpu.step(2)
        assert m.cpu.step().cause is kb.Cause.CATCH
        m.cpu.catches.clear()
        log = m.cpu.log_exits()
        assert steps(m)[-1].cause is kb.Cause.HALT
        assert [one.where for one in log.entries(0) if one.kind == "out"] == [0xE6, 0xE6]


def test_another_vcpu_runs_its_handlers_while_one_steps(host):
    source = (
        FAULTS.format(**WIDE)
        + """
busy:   mov rsp, 0xa000
        lidt [table]
        xor ebp, ebp
again:  ud2
        inc rbp
        cmp rbp, 2000
        jne again
        hlt
"""
    )
    with guest(host, source, {0: "de", 6: "ud"}, vcpus=2) as m:
        first, second = m.cpus
        second.regs.rip = m.symbols["busy"]
        ended = []
        thread = threading.Thread(target=lambda: ended.append(second.run(deadline_s=60)))
        thread.start()
        count = 0
        while thread.is_alive() and count < 20000:
            first.regs.rip = m.symbols["after"]
            first.step()
            count += 1
        thread.join()
        assert ended[0].cause is kb.Cause.HALT
        assert second.regs.rbp == 2000


@pytest.mark.parametrize("mode", ["long", "protected", "pae"])
def test_user_code_faults_into_its_kernel(host, require, mode):
    require("step", 3)
    handler = "ud: inc ebx\nhlt\n"
    source = f"start: nop\nud2\n{handler}{TABLE}"
    with guest(host, source, {}, mode=mode, tables=False, user=True) as m:
        m.cpu.regs.rsp = 0x80000
        bits, kernel = (64, 0x10) if mode == "long" else (32, 0x08)
        entry = encode_gate(m.symbols["ud"], kernel, bits=bits)
        m.memory.write(0x5000 + 6 * len(entry), entry)
        m.cpu.regs.idt = dataclasses.replace(m.cpu.regs.idt, base=0x5000, limit=0x7FF)
        assert (m.cpu.step().rip, m.cpu.mode.cpl) == (m.symbols["ud"] - 2, 3)
        stop = m.cpu.step()
        assert (stop.entered_vector, stop.rip, m.cpu.mode.cpl) == (6, m.symbols["ud"], 0)
        assert not stop.tainted
        assert m.symbols.label(m.cpu.step().rip) == ("ud+0x2" if mode == "long" else "ud+0x1")


def press_ctrl_c(cpu, ended, pressed_at):
    """Once, while the vcpu is in a step; notes when."""
    while not ended.wait(0.05):
        if cpu.running:
            pressed_at.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)
            return


def test_ctrl_c_is_heard_while_a_step_runs_a_handler_without_end(host):
    with guest(host, "ud2\nhlt\nud: inc r9\njmp ud\n", {6: "ud"}) as m:
        cpu = m.cpu
        cpu.step()
        cpu.handlers = "over"
        start = cpu.regs.rip
        # One in four came between two KVM_RUNs, which it did not end.
        for _ in range(12):
            ended, pressed_at = threading.Event(), []
            thread = threading.Thread(target=press_ctrl_c, args=(cpu, ended, pressed_at))
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                cpu.step(deadline_s=20)
            heard_s = time.monotonic() - pressed_at[0]
            ended.set()
            thread.join()
            # In this process within LOCAL_SLICE_S; elsewhere a kick brings it.
            assert heard_s < 5
            cpu.regs.rip = start


def test_what_led_to_a_death_is_of_the_time_since_the_reset(host):
    with guest(host, FAULTS.format(**WIDE), {0: "de"}) as m:
        for _ in range(3):
            stop = m.cpu.step(100)
            assert stop.cause is kb.Cause.SHUTDOWN
            assert "died at" in repr(stop)
            assert [one.vector for one in stop.fault.delivered] == [0]
            m.reset()
            write_gates(m, {0: "de"})
            m.cpu.regs.rsp = STACK


def test_data_behind_a_handler_of_one_byte_is_the_guest_s(host):
    source = """
        mov word ptr cs:[0x30 * 4], offset quiet
        mov ax, cs
        mov ds, ax
        inc byte ptr [counter]
        inc byte ptr [counter]
        int 0x30
        inc byte ptr [counter]
        hlt
quiet:  iret
counter: .byte 0
"""
    found = agree(
        host,
        source,
        {0x30: "quiet"},
        lambda m: m.memory.read(m.symbols["counter"], 1),
        mode="real",
        tables=False,
    )
    assert found == b"\3"


def test_vectors_of_real_mode_that_point_to_data_are_left_alone(host):
    # INT 1Eh points to the diskette's parameters.
    source = "start: lds si, [0x1e * 4]\nlodsb\nmov bl, al\nhlt\n.org 0x100\ntable: .byte 0xdf, 2"
    assert agree(host, source, {0x1E: "table"}, lambda m: m.cpu.regs.bl, mode="real", tables=False) == 0xDF


def test_a_handler_that_begins_with_an_out_makes_it(host):
    source = "ud2\nback: nop\nhlt\nud: out 0xe6, al\nout 0xe6, al\nadd qword ptr [rsp], 2\niretq\n"

    def outs(m):
        return m.cpu.regs.rip

    agree(host, source, {6: "ud"}, outs)
    with guest(host, source, {6: "ud"}) as m:
        log = m.cpu.log_exits()
        steps(m)
        assert log.counts["out", 0xE6] == 2


def test_a_table_whose_gates_lie_across_pages_is_compared_whole(host):
    source = """
        lea rax, [rip + new]
        mov word ptr [0x5f9c + 6*16], ax
        ud2
        hlt
old:    hlt
new:    inc rbx
        add qword ptr [rsp], 2
        iretq
table:  .word 0x7ff
        .quad 0x5f9c
"""
    with guest(host, LOAD + source, {}, tables=False) as m:
        m.memory.write(0x5F9C + 6 * 16, gate(m, m.symbols["old"]))
        rec = m.cpu.record(50)
        assert rec.entered_vector[rec.entered_vector >= 0].tolist() == [6]
        assert m.cpu.regs.rbx == 1


def test_a_halt_that_was_stepped_is_not_told_again(host):
    source = "xor ebx, ebx\nagain: inc ebx\ncmp ebx, 3\njb again\nend: hlt\nbehind: nop"
    with guest(host, source, {}) as m:
        m.cpu.record(100)
        assert m.cpu.last_stop.cause is kb.Cause.HALT
        m.reset()
        stop = m.cpu.run(deadline_s=10)
        assert (stop.cause, stop.rip, m.cpu.regs.ebx) == (kb.Cause.HALT, m.symbols["behind"], 3)


def test_an_error_of_kvm_is_no_death(host):
    # Nothing is there to be fetched.
    with guest(host, "mov eax, 0x10000000\njmp rax", {}, mapped=[(0x10000000, 0x1000)]) as m:
        stop = m.cpu.step(10)
        assert stop.cause is kb.Cause.ERROR
        assert f"at {stop.fault.pc:#x}" in repr(stop)
        assert "died" not in repr(stop)
