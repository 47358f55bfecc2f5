"""The trap flag while stepping: the guest sees nothing of ours, and has its own, and its own debug exceptions."""

from __future__ import annotations

import dataclasses

import pytest

import kvmbench as kb

from .interrupt_table import STACK, agree, guest, steps, write_gates


def test_no_image_of_rflags_shows_our_tf(host):
    source = """
        pushfq
        mov r8, [rsp]
        pushfw
        mov r9w, [rsp]
        ud2
        hlt
ud:     mov r10, [rsp + 16]
        pushfq
        pop r11
        add qword ptr [rsp], 2
        iretq
"""
    with guest(host, source, {6: "ud"}) as m:
        stops = steps(m)
        assert stops[-1].cause is kb.Cause.HALT
        assert [m.cpu.regs[name] & 0x100 for name in ("r8", "r9", "r10", "r11")] == [0] * 4
        assert m.memory.read(STACK - 4096, 4096).count(b"\x02\x01") == 0, "nowhere on the stack"
        assert [stop.tainted for stop in stops] == [""] * len(stops)


OWN_TF = """
        pushfq
        or qword ptr [rsp], 0x100
        popfq
        nop
        mov rbx, 1
        pushfq
        and qword ptr [rsp], ~0x100
        popfq
        nop
        hlt
db:     inc rcx
        mov rax, dr6
        mov rdx, [rsp]
        mov [rcx * 8 + 0x3000], rdx
        mov [rcx * 8 + 0x3100], rax
        iretq
"""


def test_a_guest_that_sets_tf_itself_gets_its_debug_exceptions_as_if_nobody_stepped_it(host):
    seen = []
    for way in ("run", "step", "record"):
        with guest(host, OWN_TF, {1: "db"}) as m:
            if way == "run":
                m.cpu.run(deadline_s=10)
            elif way == "step":
                stops = steps(m)
                assert [stop.entered_vector for stop in stops].count(1) == 5
                after_popf = m.symbols["start"] + 8 + 1 + 8 + 1
                assert next(stop for stop in stops if stop.rip == after_popf).registers.rflags & 0x100
            else:
                m.cpu.record(500)
            assert m.cpu.last_stop.cause is kb.Cause.HALT
            seen.append((m.cpu.regs.rcx, m.memory.read(0x3000, 0x200)))
    assert seen[0][0] == 5
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]


def test_stepping_and_running_in_turn_keep_the_guest_s_own_tf(host):
    with guest(host, OWN_TF, {1: "db"}) as m:
        m.cpu.step(4)
        assert m.cpu.regs.rflags.TF
        m.cpu.run(deadline_s=10)
        assert m.cpu.regs.rcx == 5


def test_a_guest_s_own_tf_reaches_it_while_a_debug_register_of_ours_is_armed(host, require):
    require("hw_execute")
    with guest(host, OWN_TF + "never: nop\n", {1: "db"}) as m:
        m.cpu.breakpoints.add("never", mechanism="debug register")
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.HALT
        assert m.cpu.regs.rcx == 5


def test_a_guest_s_own_int3_reaches_it_while_one_of_ours_is_there(host, require):
    require("int3")
    with guest(host, "int3\nnop\nour: int3\nlast: hlt\nbp: inc rcx\niretq\n", {3: "bp"}) as m:
        m.cpu.breakpoints.add("last", mechanism="INT3")
        stop = m.cpu.run(deadline_s=10)
        assert (stop.cause, stop.rip, m.cpu.regs.rcx) == (kb.Cause.BREAKPOINT, m.symbols["last"], 2)


def test_an_int1_of_the_guest_s_own_is_a_step_into_its_handler(host):
    if host.info.module != "kvm_intel":
        pytest.skip("KVM's instruction emulator has no INT1, and QEMU's SVM ends the guest (docs/support.md)")
    with guest(host, "int1\nnext: nop\nhlt\ndb: inc rcx\niretq\n", {1: "db"}) as m:
        stops = steps(m)
        assert [stop.entered_vector for stop in stops].count(1) == 1
        assert stops[3].rip == m.symbols["next"]
        assert m.cpu.regs.rcx == 1


def test_an_exit_caught_under_the_guest_s_own_tf_keeps_it(host):
    source = OWN_TF.replace("mov rbx, 1", "in al, 0x77")
    counts = {}
    for way in ("run", "catch then run", "catch, write, run"):
        with guest(host, source, {1: "db"}) as m:
            if way != "run":
                m.cpu.catches.add("io", port=0x77)
                assert any(m.cpu.step().cause is kb.Cause.CATCH for _ in range(100))
                m.cpu.catches.clear()
                if "write" in way:
                    m.cpu.regs.r15 = 1
            assert m.cpu.run(deadline_s=10).cause is kb.Cause.HALT
            counts[way] = m.cpu.regs.rcx
    assert len(set(counts.values())) == 1, counts


def test_pushf_across_a_page_and_behind_sti_shows_no_tf(host):
    source = """
        sti
        pushfq
        pop r8
        jmp across
        .org 0xfff
across: pushfw
        pop r9w
        hlt
"""
    flags = agree(host, source, {}, lambda m: (m.cpu.regs.r8, m.cpu.regs.r9w))
    assert not (flags[0] | flags[1]) & 0x100


def test_syscall_and_sysret_are_steps_and_r11_shows_no_tf(host, require):
    require("step", 3)
    source = """
        mov ecx, 0xc0000080
        rdmsr
        or eax, 1
        wrmsr
        mov ecx, 0xc0000082
        lea rax, [rip + entry]
        xor edx, edx
        wrmsr
        mov ecx, 0xc0000084
        mov eax, 0x100
        xor edx, edx
        wrmsr
        mov ecx, 0xc0000081
        xor eax, eax
        mov edx, 0x00200010
        wrmsr
        lea rcx, [rip + user]
        mov r11, 2
        sysretq
user:   nop
        syscall
last:   ud2
entry:  mov rbx, r11
        sysretq
ud:     hlt
"""
    # Pages that user code may run in, but the start is the kernel's.
    with guest(host, source, {}, user=True) as m:
        for name, selector, kind in (("cs", 0x10, 0xB), ("ss", 0x18, 0x3)):
            segment = dataclasses.replace(getattr(m.cpu.regs, name), selector=selector, dpl=0, type=kind)
            setattr(m.cpu.regs, name, segment)
        write_gates(m, {6: "ud"})
        names = [m.symbols.label(stop.rip).partition("+")[0] for stop in steps(m)]
        there = names.index("user")
        # NOP, SYSCALL into the kernel, MOV, SYSRET back, UD2 into its handler, HLT.
        assert names[there:] == ["user", "user", "entry", "entry", "last", "ud", "ud"]
        assert m.cpu.regs.rbx == 2, "the guest's RFLAGS"


def test_pushf_behind_a_load_of_ss_from_memory_shows_no_tf(host):
    """MOV SS and LSS take the next instruction along, on hardware: its image of RFLAGS is made in the same step."""
    source = """
        mov [0x3000], ss
        mov ss, word ptr [0x3000]
        pushfq
        pop rbx
        lea rsi, [0x3000 - 0x40]
        mov ss, word ptr [rsi + 0x40]
        pushfq
        pop rdx
        mov [0x3010], rsp
        mov [0x3018], ss
        .byte 0x48, 0x0f, 0xb2, 0x24, 0x25 # lss rsp, [0x3010]
        .long 0x3010
        pushfq
        pop rcx
        hlt
"""
    flags = agree(host, source, {}, lambda m: (m.cpu.regs.rbx, m.cpu.regs.rdx, m.cpu.regs.rcx))
    assert [one & 0x100 for one in flags] == [0, 0, 0]


def test_a_debug_register_met_by_the_frame_of_an_exception_ends_the_step_in_the_handler(host, require):
    require("hw_write")
    source = "xor ecx, ecx\ndiv ecx\nafter: hlt\nde: add qword ptr [rsp], 2\niretq\n"
    with guest(host, source, {0: "de"}) as m:
        m.cpu.step(2)
        m.cpu.watch(STACK - 0x18, 8, "w", mechanism="debug register")
        stop = m.cpu.step()
        assert (stop.cause, stop.rip, stop.entered_vector) == (kb.Cause.WATCHPOINT, m.symbols["de"], 0)
        assert not m.memory.read_u64(STACK - 0x18) & 0x100, "the image of RFLAGS shows our TF"
        assert [m.symbols.label(m.cpu.step().rip) for _ in range(2)] == ["de+0x5", "after"]
