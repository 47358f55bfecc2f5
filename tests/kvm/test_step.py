"""Single steps: every instruction once, in order, with the exits it makes."""

from __future__ import annotations

import pytest

import kvmbench as kb

LOOP = """
        mov ecx, 3
again:  add eax, ecx
        dec ecx
        jnz again
        hlt
"""
# mov is 5 bytes, add 2, dec 2, jnz 2
LOOP_RIPS = [0x1005, 0x1007, 0x1009, 0x1005, 0x1007, 0x1009, 0x1005, 0x1007, 0x1009, 0x100B]


def test_steps_through_a_loop_visit_every_instruction_in_order(machine):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    stops = [cpu.step() for _ in LOOP_RIPS]
    assert [stop.rip for stop in stops] == LOOP_RIPS
    assert {stop.cause for stop in stops} == {kb.Cause.STEP}
    assert cpu.regs.rax == 3 + 2 + 1
    assert cpu.regs.ecx == 0


def test_many_steps_in_one_call_end_where_single_ones_do(machine):
    machine.load_asm(LOOP, at=0x1000)
    stop = machine.cpu.step(len(LOOP_RIPS))
    assert (stop.cause, stop.steps, stop.rip) == (kb.Cause.STEP, len(LOOP_RIPS), LOOP_RIPS[-1])


def test_a_stop_shows_the_next_instruction_and_what_changed(machine):
    machine.load_asm(LOOP, at=0x1000)
    machine.cpu.step()
    stop = machine.cpu.step()
    assert stop.instruction.text == "dec ecx"
    assert stop.changes["rax"] == (0, 3)
    assert not stop.instruction_is_late
    assert "again+0x2" in repr(stop)
    machine.cpu.step()
    assert stop.instruction.text == "dec ecx", "a stop keeps what it showed"


def test_a_register_written_between_steps_is_used_by_the_next(machine):
    machine.load_asm("mov rbx, rax\nmov rcx, rax\nhlt", at=0x1000)
    cpu = machine.cpu
    cpu.regs.rax = 0x1234_5678_9ABC_DEF0
    cpu.step()
    assert cpu.regs.rbx == 0x1234_5678_9ABC_DEF0
    cpu.regs.rax = 7
    stop = cpu.step()
    assert (cpu.regs.rcx, stop.rip) == (7, 0x1006)


def test_stepping_goes_on_from_a_rip_that_was_written(machine):
    machine.load_asm("start: mov eax, 1\nmov eax, 2\ntarget: mov eax, 3\nmov eax, 4\nhlt", at=0x1000)
    cpu = machine.cpu
    cpu.step()
    cpu.regs.rip = machine.symbols["target"]
    stop = cpu.step()
    assert (cpu.regs.rax, stop.rip) == (3, machine.symbols["target"] + 5)
    assert cpu.step().rip == machine.symbols["target"] + 10


def test_an_out_is_one_step_and_its_byte_arrives_once(machine):
    machine.load_asm("mov dx, 0x3f8\nmov al, 'A'\nout dx, al\nmov al, 'B'\nout dx, al\nnop\nhlt", at=0x1000)
    cpu = machine.cpu
    rips = [cpu.step().rip for _ in range(6)]
    assert rips == [0x1004, 0x1006, 0x1007, 0x1009, 0x100A, 0x100B]
    assert machine.serial.text == "AB"


def test_an_in_is_one_step_and_gets_the_device_s_answer(machine):
    machine.load_asm("mov dx, 0x3fd\nin al, dx\nnop\nhlt", at=0x1000)
    cpu = machine.cpu
    rips = [cpu.step().rip for _ in range(3)]
    assert rips == [0x1004, 0x1005, 0x1006]
    assert cpu.regs.al & 0x20, "the transmitter is empty"


def test_an_access_outside_memory_is_one_step(machine):
    source = "mov rbx, 0x40000000\nmov [rbx], eax\nmov ecx, [rbx]\nnop\nhlt"
    with kb.Machine(machine.host, memory="2M") as m:
        m.load_asm(source, at=0x1000)
        m.cpu.step()
        if m.cpu.translate(0x4000_0000) is None:
            pytest.skip("the boot mode maps only memory")
        rips = [m.cpu.step().rip for _ in range(3)]
    assert rips == [rips[0], rips[0] + 2, rips[0] + 3]


def test_steps_go_on_after_popf_takes_the_trap_flag_away(machine):
    machine.load_asm("pushf\npopf\nnop\npushf\npopf\nnop\nhlt", at=0x1000)
    cpu = machine.cpu
    stops = [cpu.step() for _ in range(6)]
    assert [stop.rip for stop in stops] == [0x1001, 0x1002, 0x1003, 0x1004, 0x1005, 0x1006]
    assert not any(stop.tainted for stop in stops), "the image was mended: see test_handlers.py"


def test_recorded_steps_go_on_after_popf_too(machine):
    machine.load_asm("again: pushf\npopf\njmp again", at=0x1000)
    rec = machine.cpu.record(300)
    assert rec.rip.tolist() == [0x1001, 0x1002, 0x1000] * 100


def test_an_out_in_the_shadow_of_mov_ss_ends_the_step(machine):
    machine.load_asm("mov ax, ss\nmov ss, ax\nout 0x80, al\nnop\nhlt", at=0x1000)
    stops = [machine.cpu.step() for _ in range(4)]
    # By the processor's rule MOV SS and OUT are one step; KVM's instruction emulator stops after each.
    both = machine.host.info.module != "kvm_pvm"
    rips = [0x1003, 0x1007, 0x1008, 0x1009] if both else [0x1003, 0x1005, 0x1007, 0x1008]
    assert [stop.rip for stop in stops] == rips
    assert {stop.cause for stop in stops[:3]} == {kb.Cause.STEP}


def test_hlt_stops_with_its_cause_however_it_is_reached(machine):
    machine.load_asm("nop\nhlt\nnop\nhlt", at=0x1000)
    stop = machine.cpu.run(deadline_s=10)
    assert stop.cause is kb.Cause.HALT
    assert machine.cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_step_over_runs_a_call_to_its_end(machine):
    machine.load_asm(
        """
        start:  call square
                nop
                hlt
        square: mov ebx, 5
                imul ebx, ebx
                ret
        """,
        at=0x1000,
    )
    stop = machine.cpu.step_over()
    assert (stop.cause, stop.rip, machine.cpu.regs.rbx) == (kb.Cause.STEP, 0x1005, 25)


def test_step_over_a_recursive_call_returns_to_the_same_frame(machine):
    machine.load_asm(
        """
        start:  mov edi, 4
        first:  call count
        after:  hlt
        count:  inc eax
                dec edi
                jz done
        again:  call count
        done:   ret
        """,
        at=0x1000,
    )
    cpu = machine.cpu
    cpu.run_until("again")
    stack = cpu.regs.rsp
    stop = cpu.step_over()
    assert (stop.rip, cpu.regs.rsp, cpu.regs.rax) == (machine.symbols["done"], stack, 4)


def test_step_out_ends_behind_the_call(machine):
    machine.load_asm("start: call f\nafter: hlt\nf: nop\ncall g\nnop\nret\ng: nop\nret", at=0x1000)
    cpu = machine.cpu
    cpu.run_until("f")
    stop = cpu.step_out()
    assert stop.rip == machine.symbols["after"]


def test_rep_movs_takes_a_step_an_iteration_and_step_over_takes_all(machine, require):
    source = "cld\nmov esi, 0x3000\nmov edi, 0x4000\nmov ecx, 5\nhere: rep movsb\nnop\nhlt"
    machine.load_asm(source, at=0x1000)
    machine.memory.write(0x3000, b"hello")
    cpu = machine.cpu
    cpu.run_until("here")
    stop = cpu.step_over()
    assert (stop.instruction.mnemonic, machine.memory.read(0x4000, 5)) == ("nop", b"hello")


def test_a_deadline_that_makes_no_sense_is_refused(machine):
    machine.load_asm(LOOP, at=0x1000)
    with pytest.raises(ValueError, match="positive number of seconds"):
        machine.cpu.step(deadline_s=0)
    with pytest.raises(ValueError, match="cannot step 0"):
        machine.cpu.step(0)
    assert machine.cpu.step().rip == 0x1005


def test_completion_offers_what_a_person_types_and_nothing_else(machine):
    names = set(dir(machine.cpu))
    assert {"step", "run", "regs", "breakpoints", "watch", "record", "disassemble"} <= names
    assert not {name for name in names if name.startswith("_")} | names & {"engine", "execution", "state"}


def test_registers_read_while_another_thread_steps_do_not_replace_the_newer_ones(machine, monkeypatch):
    machine.load_asm("inc bx\n" * 4 + "hlt", at=0x1000)
    cpu = machine.cpu
    cpu.step()
    cpu.state.current = None
    real = cpu.vcpu.get_sregs

    def late():
        found = real()
        monkeypatch.undo()
        cpu.step()  # of the other thread, between the read and the end of `VcpuState.read`
        return found

    monkeypatch.setattr(cpu.vcpu, "get_sregs", late)
    cpu.state.read()
    assert cpu.regs.rip == cpu.last_stop.rip
    assert cpu.regs.bx == 2


@pytest.mark.parametrize("way", ["step", "steps", "run"])
def test_changes_are_known_after_a_special_register_was_written(machine, way):
    machine.load_asm("inc rbx\ninc rbx\nhlt", at=0x1000)
    cpu = machine.cpu
    cpu.regs.rip, cpu.regs.rbx = 0x1000, 0
    cpu.step()
    cpu.regs.cr2 = 0x5000
    stop = {"step": cpu.step, "steps": lambda: cpu.step(2), "run": cpu.run}[way]()
    assert stop.changes["rbx"] == (1, 2)
    assert "cr2" not in stop.changes
    assert cpu.state.get_previous() is not None
