"""Breakpoints that write a byte over the instruction (INT3, HLT): hidden from everybody but the guest, and kept."""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
import time

import pytest

import kvmbench as kb
from kvmbench.core.wire import KB_EXECUTE
from kvmbench.errors import MisuseError, UnsupportedError
from kvmbench.host.stream import StreamChannel

from .interrupt_table import LOAD, TABLE, write_gates
from .mechanisms import LOOP, WRITTEN


def test_a_halt_of_the_guest_s_own_at_a_breakpoint_is_the_breakpoint_and_then_the_halt(machine, written):
    machine.load_asm("nop\nend: hlt\nnop\nhlt", at=0x1000)
    cpu = machine.cpu
    cpu.breakpoints.add("end", mechanism=written)
    stop = cpu.run(deadline_s=10)
    assert (stop.cause, stop.rip, stop.instruction.mnemonic) == (kb.Cause.BREAKPOINT, 0x1001, "hlt")
    stop = cpu.run(deadline_s=10)
    assert (stop.cause, stop.rip) == (kb.Cause.HALT, 0x1002)


@pytest.mark.parametrize("how", [{"condition": lambda cpu: False}, {"ignore": 1}], ids=["condition", "ignore"])
def test_a_halt_of_the_guest_s_own_at_a_breakpoint_that_lets_it_go_on_is_a_halt(machine, written, how):
    machine.load_asm("nop\nend: hlt\nnop\nhlt", at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("end", mechanism=written, **how)
    stop = cpu.run(deadline_s=10)
    assert (stop.cause, stop.rip) == (kb.Cause.HALT, 0x1002)
    assert (one.hits, one.passes) == ((1, 0) if "ignore" in how else (0, 1))


@pytest.mark.parametrize("how", [{"condition": lambda cpu: False}, {"ignore": 2}], ids=["condition", "ignore"])
def test_a_halt_at_a_shared_breakpoint_that_lets_all_go_on_is_a_halt(host, require, how):
    require("hlt")
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("nop\nend: hlt\nnop\nhlt", at=0x1000)
        shared = m.breakpoints.add("end", mechanism="HLT", **how)
        for cpu in m.cpus:
            stop = cpu.run(deadline_s=10)
            assert (stop.cause, stop.rip) == (kb.Cause.HALT, 0x1002)
        assert [one.hits + one.passes for one in shared.each] == [1, 1]


def test_an_int3_of_the_guest_s_own_at_a_breakpoint_that_lets_it_go_on_enters_its_handler(machine, require):
    require("int3")
    machine.load_asm(f"{LOAD}here: int3\nback: hlt\ntrap: inc r9\niretq\n{TABLE}", at=0x1000)
    write_gates(machine, {3: "trap"})
    cpu = machine.cpu
    cpu.regs.rsp = 0x9000
    one = cpu.breakpoints.add("here", mechanism="INT3", condition=lambda cpu: False)
    stop = cpu.run(deadline_s=10)
    assert (stop.cause, stop.rip) == (kb.Cause.HALT, machine.symbols["back"] + 1)
    assert (cpu.regs.r9, one.passes) == (1, 1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", ["_put", "_raw", "_publish"])
def test_ctrl_c_at_any_moment_is_no_overwritten_byte(machine, written, monkeypatch, at, when):
    # A Ctrl-C comes between two lines: made sure of here by raising where a call begins or ends.
    machine.load_asm("again: inc rax\nnop\njmp again", at=0x1000)
    cpu = machine.cpu
    code = machine.memory.as_array("u1", 0x1000, 16).tobytes()
    one = cpu.breakpoints.add("again", mechanism=written, condition=lambda cpu: cpu.regs.rax >= 3)
    call, calls, last = getattr(machine.written, at), 0, 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == last and when == "before":
            raise KeyboardInterrupt
        result = call(*args)
        if calls == last:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(machine.written, at, interrupted)
    for last in range(1, 10):
        calls = 0
        cpu.regs.rax, cpu.regs.rip = 0, 0x1000
        with contextlib.suppress(KeyboardInterrupt):
            cpu.run(deadline_s=10)
        assert (one.overwritten, one.remarks, str(one.mechanism)) == (0, [], written)
        last = 0
        cpu.regs.rax, cpu.regs.rip = 0, 0x1000
        stop = cpu.run(deadline_s=10)
        assert (stop.cause, stop.rip, cpu.regs.rax) == (kb.Cause.BREAKPOINT, 0x1000, 3)
        assert (one.overwritten, one.remarks, str(one.mechanism)) == (0, [], written)
        assert machine.memory.as_array("u1", 0x1000, 16).tobytes() == code
    assert at == "_publish" or one.hits > 9


def test_ctrl_c_just_behind_a_reply_leaves_the_vcpu_on_its_instruction(machine, written):
    if machine.host.name == "local":
        pytest.skip("the core is in this process")
    machine.load_asm("again: mov eax, 0x0b0f0b0f\ninc rcx\njmp again", at=0x1000)
    cpu = machine.cpu
    cpu.breakpoints.add("again", mechanism=written, condition=lambda cpu: False)
    left = 0

    def trace_calls(frame, event, _):
        return trace_return if frame.f_code is StreamChannel.call.__code__ else None

    def trace_return(frame, event, _):
        nonlocal left
        if event == "return" and frame.f_locals["request"][8:12] == KB_EXECUTE.to_bytes(4, "little"):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace_return

    for calls in range(1, 6):
        left = calls
        before = sys.gettrace()
        sys.settrace(trace_calls)
        try:
            with pytest.raises(KeyboardInterrupt):
                cpu.run(deadline_s=30)
        finally:
            sys.settrace(before)
        assert int(cpu.regs.rip) == cpu.vcpu.get_regs().rip
        assert int(cpu.regs.rip) in (0x1000, 0x1005, 0x1008)


def test_ctrl_c_leaves_the_vcpu_on_its_instruction(machine, written):
    # Two thirds of the instruction are UD2, and most of the time goes by in Python.
    machine.load_asm("again: mov eax, 0x0b0f0b0f\ninc rcx\njmp again", at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("again", mechanism=written, condition=lambda cpu: False)
    code = machine.memory.as_array("u1", 0x1000, 16).tobytes()
    chance = random.Random(1)
    armed = False

    def interrupt(*_):
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(200):
            armed = True
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0005, 0.004))
                cpu.run(deadline_s=30)
            assert not armed
            assert cpu.regs.rip == cpu.vcpu.get_regs().rip
            assert int(cpu.regs.rip) in (0x1000, 0x1005, 0x1008)
            assert machine.memory.as_array("u1", 0x1000, 16).tobytes() == code
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (one.overwritten, one.remarks, str(one.mechanism)) == (0, [], written)


def test_a_halt_beside_a_breakpoint_is_a_halt(machine, written):
    machine.load_asm("nop\nhlt\nhere: nop\nhlt", at=0x1000)
    cpu = machine.cpu
    cpu.breakpoints.add("here", mechanism=written)
    stop = cpu.run(deadline_s=10)
    assert (stop.cause, stop.rip) == (kb.Cause.HALT, 0x1002)
    # On the breakpoint by the halt, so this run does not hit it.
    assert cpu.run(deadline_s=10).rip == 0x1004


def test_the_instruction_after_sti_is_a_breakpoint_like_any_other(machine, written):
    machine.load_asm("cli\nsti\nend: hlt", at=0x1000)
    cpu = machine.cpu
    cpu.breakpoints.add("end", mechanism=written)
    assert cpu.run(deadline_s=10).rip == 0x1002
    assert cpu.regs.rflags & 1 << 9
    assert cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_two_breakpoints_at_one_place_are_both_weighed(machine, written):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    first = cpu.breakpoints.add("again", mechanism=written, condition=lambda cpu: cpu.regs.ecx == 2)
    second = cpu.breakpoints.add("again", mechanism=written, condition=lambda cpu: cpu.regs.ecx == 4)
    stops = [cpu.run(deadline_s=10) for _ in range(3)]
    assert [stop.breakpoint for stop in stops] == [second, first, None]
    assert (first.hits, first.passes, second.hits, second.passes) == (1, 4, 1, 4)


def test_a_stop_next_to_a_breakpoint_shows_the_guest_s_own_bytes(machine, written):
    machine.load_asm("mov dx, 0x80\nout dx, al\nnext: inc eax\ninc ecx\nhlt", at=0x1000)
    cpu = machine.cpu
    code = machine.memory.read(0x1000, 12)
    cpu.breakpoints.add("next", mechanism=written)
    cpu.breakpoints.add("next+2", mechanism=written)
    stop = cpu.run(deadline_s=10)
    assert stop.state.code[:4] == code[5:9]
    assert [str(one.text).split()[0] for one in cpu.disassemble(count=3)] == ["inc", "inc", "hlt"]
    # An exit with the byte behind it, in the window that the stop brings along.
    cpu.regs.rip = 0x1000
    cpu.catches.add("io")
    stop = cpu.run(deadline_s=10)
    assert stop.cause is kb.Cause.CATCH
    assert machine.memory.read(0x1000, 12) == code


def test_reads_of_another_thread_never_see_the_byte(machine, written):
    machine.load_asm("again: inc rax\nnop\nthere: jmp again", at=0x1000)
    cpu, memory = machine.cpu, machine.memory
    code = memory.read(0x1000, 8)
    cpu.breakpoints.add("there", mechanism=written, condition=lambda cpu: False)
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            seen.add(memory.read(0x1000, 8))
            seen.add(memory[0x1000:0x1008])
            seen.add(memory.read_u64(0x1000).to_bytes(8, "little"))
            seen.add(bytes(memory.snapshot(0x1000, 4096).pieces[0][1][:8]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert cpu.run(deadline_s=1).cause is kb.Cause.DEADLINE
    finally:
        done.set()
        thread.join()
    assert seen == {code}
    assert cpu.breakpoints[1].passes > 3


def test_a_write_of_another_thread_changes_the_instruction_and_keeps_the_breakpoint(machine, written):
    machine.load_asm("again: inc rax\nthere: nop\njmp again", at=0x1000)
    cpu, memory = machine.cpu, machine.memory
    one = cpu.breakpoints.add("there", mechanism=written, condition=lambda cpu: cpu.regs.rbx == 1)
    wrote = threading.Event()

    def write():
        while not one.passes:
            time.sleep(0.001)
        memory.write(0x1003, b"\xf9")  # STC for the NOP
        memory.fill(0x1100, 16, 0x90)
        wrote.set()

    thread = threading.Thread(target=write)
    thread.start()
    one.condition = lambda cpu: wrote.is_set() and cpu.regs.rflags & 1
    stop = cpu.run(deadline_s=20)
    thread.join()
    assert (stop.cause, stop.rip, one.overwritten) == (kb.Cause.BREAKPOINT, 0x1003, 0)
    assert memory.read(0x1003, 1) == b"\xf9"


def test_recorded_code_has_no_byte_of_ours(machine, written):
    machine.load_asm(LOOP, at=0x1000)
    machine.cpu.breakpoints.add("again", mechanism=written)
    machine.cpu.run(deadline_s=10)
    rec = machine.cpu.record(3)
    assert [rec.instruction(n).mnemonic for n in range(len(rec))] == ["inc", "dec", "jne"]


def test_the_running_guest_can_read_the_byte_and_the_repr_says_so(machine, written):
    machine.load_asm("mov al, [there]\nthere: nop\nhlt", at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("there", mechanism=written)
    cpu.run(deadline_s=10)
    assert cpu.regs.al == {"INT3": 0xCC, "HLT": 0xF4}[written]
    assert "the running guest can read its byte" in repr(one)


@pytest.mark.parametrize("mechanism", ["debug register", "stepping loop"])
def test_a_guest_that_reads_its_code_sees_nothing_of_these(machine, require, mechanism):
    require({"debug register": "hw_execute", "stepping loop": "step"}[mechanism])
    machine.load_asm("mov al, [there]\nthere: nop\nhlt", at=0x1000)
    machine.cpu.breakpoints.add("there", mechanism=mechanism)
    assert machine.cpu.run(deadline_s=10).rip == machine.symbols["there"]
    assert machine.cpu.regs.al == 0x90


LOADER = """
        mov esi, offset image
        mov edi, 0x2000
        mov ecx, 8
        cld
        rep movsb
        mov eax, 0x2000
        jmp rax
image:  inc ebx
        inc ebx
        inc ebx
        hlt
        nop
"""


def test_a_breakpoint_set_before_the_guest_loads_its_code_there_stops_it(machine):
    machine.load_asm(LOADER, at=0x1000)
    one = machine.cpu.breakpoints.add(0x2002)
    assert str(one.mechanism) not in WRITTEN
    if machine.host.mechanisms.int3 or machine.host.mechanisms.hlt:
        assert "nothing is loaded there yet" in one.why or one.mechanism == "debug register"
    stop = machine.cpu.run(deadline_s=30)
    assert (stop.cause, stop.rip, machine.cpu.regs.ebx) == (kb.Cause.BREAKPOINT, 0x2002, 1)


def test_a_breakpoint_on_code_that_will_be_overwritten_takes_what_survives(machine):
    machine.load_asm(LOADER, at=0x1000)
    machine.memory.write(0x2000, b"\x90" * 16)
    one = machine.cpu.breakpoints.add(0x2002, overwritten=True)
    assert str(one.mechanism) not in WRITTEN
    stop = machine.cpu.run(deadline_s=30)
    assert (stop.cause, stop.rip, machine.cpu.regs.ebx) == (kb.Cause.BREAKPOINT, 0x2002, 1)


def test_a_breakpoint_at_an_unmapped_address_stops_the_guest_once_it_is_mapped(host):
    with kb.Machine(host, memory="4M", page_bytes=4096) as m:
        # The page at 0x2000 is taken away, and the guest puts it back.
        tables = m.cpu.vcpu.get_sregs().cr3
        pml4 = m.memory.read_u64(tables) & ~0xFFF
        pdpt = m.memory.read_u64(pml4) & ~0xFFF
        entry = (m.memory.read_u64(pdpt) & ~0xFFF) + 2 * 8
        kept = m.memory.read_u64(entry)
        m.load_asm("inc ebx\nhere: inc ebx\nhlt", at=0x2000, start=False)
        m.memory.write_u64(entry, 0)
        m.load_asm(f"mov rax, {kept}\nmov rcx, {entry}\nmov [rcx], rax\nmov eax, 0x2000\njmp rax", at=0x1000)
        with pytest.raises(kb.errors.AddressError, match="unmapped=True"):
            m.cpu.breakpoints.add("here")
        one = m.cpu.breakpoints.add("here", unmapped=True)
        assert str(one.mechanism) not in WRITTEN
        stop = m.cpu.run(deadline_s=30)
        assert (stop.cause, stop.rip, m.cpu.regs.ebx) == (kb.Cause.BREAKPOINT, 0x2002, 1)


SELF_MODIFYING = """
start:  mov byte ptr [there], 0xf9
        mov rcx, 20000000
spin:   dec rcx
        jnz spin
there:  nop
        jmp start
"""


def test_a_byte_that_the_guest_overwrites_is_written_again_or_moved_and_that_is_said(machine, written):
    spins = 3000 if machine.host.info.emulated else 2_000_000
    machine.load_asm(SELF_MODIFYING.replace("20000000", str(spins)), at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("there", mechanism=written)
    stop = cpu.run(deadline_s=60)  # it is looked at a few times a second
    assert (stop.cause, stop.rip) == (kb.Cause.BREAKPOINT, machine.symbols["there"])
    assert one.overwritten >= 1
    assert "overwrote its byte" in repr(one)
    assert machine.memory.read(stop.rip, 1) == b"\xf9", "what the guest wrote stays"
    assert stop.instruction.mnemonic == "stc"


def test_what_breaks_into_a_kernel_s_irqchip_is_no_hlt(host, require):
    require("hlt")
    with kb.Machine(host, memory="2M", irqchip=True) as m:
        m.load_asm(LOOP, at=0x1000)
        with pytest.raises(UnsupportedError, match="the interrupt controllers are in the kernel"):
            m.cpu.breakpoints.add("again", mechanism="HLT")
        one = m.cpu.breakpoints.add("again")
        assert str(one.mechanism) != "HLT"
        assert m.cpu.run(deadline_s=30).rip == 0x1005


def test_hlt_is_not_chosen_where_cpl_3_may_come(host, require):
    require("hlt")
    with kb.Machine(host, memory="2M", user=True, cpl=0) as m:
        m.load_asm(LOOP, at=0x1000)
        m.cpu.breakpoints.clear()
        for _ in range(6):  # more than debug registers
            one = m.cpu.breakpoints.add("again")
            assert str(one.mechanism) != "HLT"
        m.cpu.breakpoints.clear()
        assert m.cpu.breakpoints.add("again", mechanism="HLT").levels == {0}
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(LOOP, at=0x1000)
        m.cpu.breakpoints.add("again", mechanism="HLT")
        assert m.cpu.run(deadline_s=10).rip == 0x1005


def test_user_code_stops_at_cpl_3_by_what_works_there(host, require):
    require("step", 3)
    with kb.Machine(host, memory="2M", user=True) as m:
        m.load_asm("again: inc eax\nout 0x80, al\njmp again", at=0x1000)
        one = m.cpu.breakpoints.add("again")
        assert 3 in one.levels
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.BREAKPOINT or m.cpu.run(deadline_s=10).rip == 0x1000
        assert m.cpu.run(deadline_s=10).rip == 0x1000


@pytest.mark.parametrize("mode", ["real", "protected"])
def test_other_modes_stop_too(host, require, mode):
    require("hlt")
    with kb.Machine(host, memory="2M", mode=mode) as m:
        m.load_asm(LOOP, at=0x1000)
        for mechanism in ("HLT", None):
            m.cpu.breakpoints.clear()
            m.reset()
            m.cpu.breakpoints.add("again", mechanism=mechanism)
            seen = []
            while (stop := m.cpu.run(deadline_s=10)).cause is kb.Cause.BREAKPOINT:
                seen.append(m.cpu.regs.ecx)
            assert seen == [5, 4, 3, 2, 1]
            assert stop.cause is kb.Cause.HALT


def test_code_in_a_segment_is_found_by_its_linear_address(host, require):
    require("hlt")
    with kb.Machine(host, memory="2M", mode="real") as m:
        m.load_asm("nop\nhere: inc ax\nhlt", at=0x2000)
        sregs = m.cpu.vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = 0x1000, 0x100
        m.cpu.state.set_sregs(sregs)
        m.cpu.regs.rip = 0x1000
        m.cpu.breakpoints.add(0x2001, mechanism="HLT")
        stop = m.cpu.run(deadline_s=10)
        assert (stop.cause, stop.rip, stop.instruction.mnemonic) == (kb.Cause.BREAKPOINT, 0x1001, "inc")


def test_many_breakpoints_all_stop_and_too_many_are_refused(machine, written):
    count = 300
    machine.load_asm("nop\n" * count + "hlt", at=0x1000)
    cpu = machine.cpu
    for n in range(count):
        cpu.breakpoints.add(0x1000 + n, mechanism=written)
    cpu.regs.rip = 0x1000
    seen = [cpu.run(deadline_s=30).rip for _ in range(5)]
    assert seen == [0x1001, 0x1002, 0x1003, 0x1004, 0x1005]
    for one in list(cpu.breakpoints)[:-1]:
        one.enabled = False
    assert cpu.run(deadline_s=30).rip == 0x1000 + count - 1
    for n in range(1024 - count):
        cpu.breakpoints.add(0x1000 + n, mechanism=written)
    with pytest.raises(MisuseError, match="there are 1024 breakpoints, the most"):
        cpu.breakpoints.add(0x1000, mechanism=written)


def test_one_byte_stands_at_a_place_whatever_was_chosen(machine, require):
    require("int3")
    require("hlt")
    machine.load_asm(LOOP, at=0x1000)
    add = machine.cpu.breakpoints.add
    add("again", mechanism="HLT")
    with pytest.raises(MisuseError, match="another breakpoint at gpa 0x1005 uses HLT"):
        add("again", mechanism="INT3")
    assert add("again").mechanism == "HLT"


def test_a_condition_that_steps_the_vcpu_leaves_the_bytes_in_order(machine, written):
    machine.load_asm(LOOP, at=0x1000)
    code = machine.memory.read(0x1000, 16)
    cpu = machine.cpu
    cpu.breakpoints.add("again", mechanism=written, condition=lambda cpu: cpu.step() and False)
    assert cpu.run(deadline_s=20).cause is kb.Cause.HALT
    assert cpu.regs.eax == 5
    assert machine.memory.read(0x1000, 16) == code


def test_bytes_are_gone_after_a_condition_failed_or_a_device_did(machine, written):
    machine.load_asm(LOOP, at=0x1000)
    code = machine.memory.as_array("u1", 0x1000, 16).tobytes()
    machine.cpu.breakpoints.add("again", mechanism=written, condition=lambda cpu: 1 / 0)
    with pytest.raises(MisuseError, match="ZeroDivisionError"):
        machine.cpu.run(deadline_s=10)
    assert machine.memory.as_array("u1", 0x1000, 16).tobytes() == code
    assert not machine.written
