"""Breakpoints that are picky: address spaces, counts, and what cannot be right."""

from __future__ import annotations

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.debug.mechanism import Mechanism
from kvmbench.errors import AddressError, MisuseError, UnsupportedError

from .mechanisms import LOOP

# Two top tables that map the same: the guest goes from one to the other and back.
SPACES = """
again:  mov cr3, rbx
        inc eax
here:   nop
        mov cr3, rdx
        inc eax
        call visit
        mov cr3, rbx
        call visit
        jmp again
visit:  nop
        ret
"""


@pytest.fixture
def spaces(machine):
    """A machine whose guest switches between two address spaces, and their CR3 values."""
    cpu = machine.cpu
    one = int(cpu.vcpu.get_sregs().cr3)
    other = 0x100000
    machine.memory.write(other, machine.memory.read(one, 4096))
    machine.load_asm(SPACES, at=0x1000)
    cpu.regs.rbx, cpu.regs.rdx = one, other
    return machine, one, other


def test_a_breakpoint_stops_in_its_address_space_only(spaces, mechanism):
    machine, one, other = spaces
    cpu = machine.cpu
    mine = cpu.breakpoints.add("visit", cr3=other, mechanism=mechanism)
    for turn in range(1, 4):
        stop = cpu.run(deadline_s=30)
        assert (stop.cause, stop.breakpoint, int(cpu.regs.cr3)) == (kb.Cause.BREAKPOINT, mine, other)
        assert (mine.hits, mine.passes, mine.elsewhere) == (turn, 0, turn - 1)
    assert f"in the address space of cr3 {other:#x} only, 2 times reached elsewhere" in repr(mine)
    cpu.breakpoints.clear()
    theirs = cpu.breakpoints.add("visit", cr3=one, mechanism=mechanism)
    assert (cpu.run(deadline_s=30).breakpoint, int(cpu.regs.cr3)) == (theirs, one)


@pytest.mark.parametrize("bits", [0x7, 0xFFF, 1 << 63, 1 << 63 | 0x18])
def test_process_context_and_flush_bits_of_cr3_do_not_count(spaces, bits):
    machine, _, other = spaces
    mine = machine.cpu.breakpoints.add("visit", cr3=other | bits)
    stop = machine.cpu.run(deadline_s=30)
    assert (stop.breakpoint, int(machine.cpu.regs.cr3)) == (mine, other)


def test_both_tables_of_page_table_isolation_count_as_one_if_asked(spaces):
    machine, _, other = spaces
    cpu = machine.cpu
    machine.memory.write(other + 0x1000, machine.memory.read(other, 4096))
    strict = cpu.breakpoints.add("visit", cr3=other + 0x1000)
    both = cpu.breakpoints.add("visit", cr3=other + 0x1000, page_table_isolation=True)
    stop = cpu.run(deadline_s=30)
    assert (stop.breakpoint, int(cpu.regs.cr3)) == (both, other)
    assert (strict.hits, strict.elsewhere) == (0, 1)


def test_a_watchpoint_may_belong_to_an_address_space(spaces):
    machine, one, other = spaces
    machine.load_asm("mov cr3, rbx\nmov [0x3000], eax\nmov cr3, rdx\nmov [0x3000], ecx\nnop\nhlt", at=0x1000)
    cpu = machine.cpu
    cpu.regs.rbx, cpu.regs.rdx = one, other
    mine = cpu.watch(0x3000, 4, cr3=other)
    stop = cpu.run(deadline_s=30)
    assert (stop.cause, stop.instruction.mnemonic, mine.elsewhere) == (kb.Cause.WATCHPOINT, "nop", 1)
    assert cpu.run(deadline_s=30).cause is kb.Cause.HALT


def test_a_place_is_looked_up_in_the_address_space_that_was_named(host):
    with kb.Machine(host, memory="4M", page_bytes=4096) as m:
        one, other = int(m.cpu.vcpu.get_sregs().cr3), 0x300000
        read = m.memory.read_u64
        tables = [one]
        for _ in range(3):
            tables.append(read(tables[-1]) & ~0xFFF)
        # Four tables of its own, in which 0x5000 leads to 0x6000.
        for n, table in enumerate(tables):
            m.memory.write(other + 0x1000 * n, m.memory.read(table, 4096))
            if n < 3:
                m.memory.write_u64(other + 0x1000 * n, other + 0x1000 * (n + 1) | read(table) & 0xFFF)
        m.memory.write_u64(other + 0x3000 + 5 * 8, 0x6000 | read(tables[3] + 5 * 8) & 0xFFF)
        m.memory.write_u64(tables[3] + 5 * 8, 0)
        m.load_asm("inc ebx\nhlt", at=0x6000, start=False)
        m.load_asm(f"mov rax, {other}\nmov cr3, rax\nmov eax, 0x5000\njmp rax", at=0x1000)
        with pytest.raises(AddressError, match="nothing is mapped at 0x5000"):
            m.cpu.breakpoints.add(0x5000)
        mine = m.cpu.breakpoints.add(0x5000, cr3=other)
        assert mine.gpa == 0x6000
        stop = m.cpu.run(deadline_s=30)
        assert (stop.breakpoint, stop.rip, m.cpu.regs.ebx) == (mine, 0x5000, 0)


def test_the_first_hits_are_ignored_and_counted(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("again", ignore=2, mechanism=mechanism)
    assert "ignores the next 2" in repr(one)
    assert cpu.run(deadline_s=30).breakpoint is one
    assert (cpu.regs.ecx, one.hits, one.ignore) == (3, 3, 0)
    one.ignore = 1
    assert cpu.run(deadline_s=30).breakpoint is one
    assert (cpu.regs.ecx, one.hits) == (1, 5)


def test_an_ignored_hit_does_not_use_up_a_temporary_breakpoint(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    one = machine.cpu.breakpoints.add("again", ignore=3, temporary=True, mechanism=mechanism)
    assert machine.cpu.run(deadline_s=30).breakpoint is one
    assert (machine.cpu.regs.ecx, len(machine.cpu.breakpoints)) == (2, 0)
    assert machine.cpu.run(deadline_s=30).cause is kb.Cause.HALT


def test_only_hits_with_a_true_condition_are_ignored(machine, mechanism):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("again", ignore=1, condition=lambda cpu: cpu.regs.ecx % 2, mechanism=mechanism)
    assert cpu.run(deadline_s=30).breakpoint is one
    assert (cpu.regs.ecx, one.hits, one.passes) == (3, 2, 1)


def test_watchpoints_ignore_hits_too(machine):
    machine.load_asm("\n".join(f"mov dword ptr [0x3000], {n}" for n in range(1, 5)) + "\nhlt", at=0x1000)
    one = machine.cpu.watch(0x3000, 4, ignore=2)
    assert machine.cpu.run(deadline_s=30).breakpoint is one
    assert (machine.memory.read_u32(0x3000), one.hits) == (3, 3)


def test_why_is_one_line_and_names_what_is_quicker(machine):
    machine.load_asm(LOOP, at=0x1000)
    for n in range(6):
        one = machine.cpu.breakpoints.add("again")
        assert one.why
        assert "\n" not in one.why
        assert one.why in repr(one)
        if n >= 4 and machine.host.mechanisms.hw_execute and not machine.host.mechanisms.int3:
            assert "debug register: all four are taken" in one.why
    for n in range(6):
        assert "\n" not in machine.cpu.watch(0x3000 + 8 * n, 8).why
    assert machine.cpu.breakpoints.add("again", mechanism="stepping loop").why == "asked for"


def test_the_conflict_with_a_guest_s_own_debug_registers_is_shown(machine, require):
    require("hw_execute")
    machine.load_asm("mov rax, 0x1234\nmov dr0, rax\nmov eax, 0x403\nmov dr7, rax\nhere: nop\nhlt", at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("here", mechanism="debug register")
    assert one.conflict == ""
    stop = cpu.run(deadline_s=30)
    assert stop.breakpoint is one
    assert "the guest has debug registers in use (dr7 0x403)" in repr(one)
    again = cpu.breakpoints.add("here", mechanism="debug register")
    assert again.conflict == one.conflict
    assert int(cpu.vcpu.get_debugregs().db[0]) == 0x1234, "the guest's own are not lost"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda b: b.add("again", cr3="0x1000"), MisuseError, r"cr3='0x1000': give an integer"),
        (lambda b: b.add("again", cr3=1.5), MisuseError, r"cr3=1.5: give an integer"),
        (lambda b: b.add("again", cr3=True), MisuseError, r"cr3=True: give an integer"),
        (lambda b: b.add("again", cr3=-1), MisuseError, r"cr3=-1: give at least 0"),
        (lambda b: b.add("again", cr3=1 << 64), MisuseError, r"cr3=\d+: give at least 0 and at most 0xf{16}"),
        (lambda b: b.add("again", page_table_isolation=True), MisuseError, "give cr3, too"),
        (lambda b: b.add("again", ignore=-1), MisuseError, r"ignore=-1: give at least 0"),
        (lambda b: b.add("again", ignore="2"), MisuseError, r"ignore='2': give an integer"),
        (lambda b: b.add("again", condition=5), MisuseError, "a condition is a function of the cpu, not 5"),
        (lambda b: b.add("again", mechanism="hlt"), MisuseError, "did you mean 'HLT'"),
        (lambda b: b.add("again", mechanism="read-only slot"), MisuseError, "cannot stop on 'x'"),
        (lambda b: b.watch("again", 4, mechanism="HLT"), MisuseError, "cannot stop on 'w'"),
        (lambda b: b.watch("again", 4, cr3=[]), MisuseError, "give an integer"),
        (lambda b: b.add(1 << 64), MisuseError, "does not fit 64 bits"),
        (lambda b: b.add(-1), MisuseError, "does not fit 64 bits"),
        (lambda b: b.add(0x8000_0000_0000), AddressError, "nothing is mapped"),
        (lambda b: b.add("again", cr3=0xDEAD_F000), AddressError, "nothing is mapped at 0x1005"),
        (lambda b: b.add("again", cr3=0xF_FFFF_FFFF_F000), AddressError, "nothing is mapped at 0x1005"),
        (lambda b: b.add("again", ignored=2), MisuseError, "did you mean 'ignore'"),
    ],
)
def test_what_cannot_be_right_is_refused_in_words(machine, call, error, said):
    machine.load_asm(LOOP, at=0x1000)
    with pytest.raises(error, match=said):
        call(machine.cpu.breakpoints)
    assert len(machine.cpu.breakpoints) == 0
    assert machine.cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_watchpoints_beyond_debug_registers_say_that_they_are_slower(machine):
    source = "\n".join(f"mov dword ptr [{0x3000 + 0x100 * n}], 1" for n in range(8)) + "\nhlt"
    machine.load_asm(source, at=0x1000)
    watches = [machine.cpu.watch(0x3000 + 0x100 * n, 4) for n in range(8)]
    assert all("debug register" in one.why or one.mechanism == "debug register" for one in watches)
    slow = [one for one in watches if one.mechanism != "debug register"]
    assert len(slow) >= 4
    assert all("slower: every write to its page leaves the guest" in repr(one) for one in slow)
    stops = [machine.cpu.run(deadline_s=30) for _ in range(8)]
    assert [stop.breakpoint for stop in stops] == watches
    assert machine.cpu.run(deadline_s=30).cause is kb.Cause.HALT


def test_all_ranges_that_one_instruction_changes_are_weighed(machine):
    machine.load_asm("mov qword ptr [0x3000], -1\nnop\nhlt", at=0x1000)
    watch = machine.cpu.breakpoints.watch
    watch(0x3000, 4, mechanism="stepping loop", condition=lambda cpu: False)
    other = watch(0x3004, 4, mechanism="stepping loop")
    assert machine.cpu.run(deadline_s=30).breakpoint is other


def test_a_breakpoint_behind_a_write_is_not_hidden_by_a_watchpoint_that_lets_go(machine):
    machine.load_asm("mov dword ptr [0x3000], 7\nhere: nop\nhlt", at=0x1000)
    machine.cpu.watch(0x3000, 4, condition=lambda cpu: False)
    one = machine.cpu.breakpoints.add("here")
    stop = machine.cpu.run(deadline_s=30)
    assert (stop.cause, stop.breakpoint) == (kb.Cause.BREAKPOINT, one)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("ignore", "a"),
        ("ignore", -1),
        ("ignore", True),
        ("cr3", "a"),
        ("cr3", -1),
        ("condition", 5),
        ("enabled", "no"),
        ("temporary", 1),
        ("hits", "none"),
        ("passes", None),
        ("address", 0x1000),
        ("mechanism", "INT3"),
        ("kind", "w"),
        ("size_bytes", 8),
    ],
)
def test_what_is_assigned_to_a_breakpoint_is_checked(machine, name, bad):
    machine.load_asm(LOOP, at=0x1000)
    one = machine.cpu.breakpoints.add("again")
    before = getattr(one, name)
    with pytest.raises(MisuseError, match=name):
        setattr(one, name, bad)
    assert getattr(one, name) == before
    assert machine.cpu.run(deadline_s=30).breakpoint is one


def test_what_may_be_assigned_holds_from_then_on(machine):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    one = cpu.breakpoints.add("again")
    one.condition = lambda cpu: cpu.regs.ecx < 5
    one.ignore = 1
    one.cr3 = int(cpu.regs.cr3)
    one.temporary = True
    assert cpu.run(deadline_s=30).breakpoint is one
    assert (cpu.regs.ecx, one.passes, one.hits, len(cpu.breakpoints)) == (3, 1, 2, 0)


@pytest.mark.parametrize("option", ["temporary", "unmapped", "overwritten", "page_table_isolation"])
def test_an_option_that_is_neither_true_nor_false_is_refused(machine, option):
    with pytest.raises(MisuseError, match=f"{option}='x': give True or False"):
        machine.cpu.breakpoints.add(0x1000, **{option: "x"})


def test_an_address_error_says_what_would_help(machine):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu
    with pytest.raises(AddressError, match="unmapped=True"):
        cpu.breakpoints.add(0x5000_0000)
    with pytest.raises(AddressError, match=r"nothing is mapped at 0x50000000 to 0x50000007 now; map it first$"):
        cpu.watch(0x5000_0000, 8)
    for add in (lambda cr3: cpu.breakpoints.add("again", cr3=cr3), lambda cr3: cpu.watch("again", 8, cr3=cr3)):
        with pytest.raises(
            AddressError, match=r"is not in that address space: nothing is mapped at 0x1005.* by cr3 0x99999000"
        ) as error:
            add(0x9999_9000)
        assert "unmapped" not in str(error.value)


def test_what_would_be_missed_at_cpl_3_is_refused_there(host):
    works = host.mechanisms
    if any(3 in levels for levels in (works.int3, works.hw_execute, works.step)):
        pytest.skip(f"{host} stops execution at CPL 3")
    with kb.Machine(host, memory="2M", user=True) as m:
        m.load_asm("again: inc eax\njmp again", at=0x1000)
        with pytest.raises(UnsupportedError, match="at CPL 3, where the guest is now") as error:
            m.cpu.breakpoints.add("again")
        assert not len(m.cpu.breakpoints)
        named = next(str(one) for one in Mechanism if repr(str(one)) in str(error.value))
        assert m.cpu.breakpoints.add("again", mechanism=named).levels == {0}
    with kb.Machine(host, memory="2M", user=True, cpl=0) as m:
        m.load_asm("again: inc eax\njmp again", at=0x1000)
        m.cpu.breakpoints.add("again")
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.BREAKPOINT


@pytest.mark.parametrize("name", ["conditon", "Condition", "ignored", "enable", "hit", "colour"])
def test_a_misspelt_attribute_of_a_breakpoint_is_refused_and_the_near_one_named(machine, name):
    machine.load_asm(LOOP, at=0x1000)
    near = {"conditon": "condition", "Condition": "condition", "ignored": "ignore", "enable": "enabled", "hit": "hits"}
    own, shared = machine.cpu.breakpoints.add("again"), machine.breakpoints.add("again")
    for one, words in ((own, near), (shared.each[0], near), (shared, {"enable": "enabled", "ignored": "ignore"})):
        said = f"did you mean '{words[name]}'" if name in words else "has no"
        with pytest.raises(AttributeError, match=said):
            setattr(one, name, "regs.rax > 1")
        assert not hasattr(one, name)


@pytest.mark.parametrize("name", ["condition", "cr3", "temporary", "hits", "each", "number", "address"])
def test_what_a_shared_breakpoint_cannot_be_assigned_is_refused(machine, name):
    machine.load_asm(LOOP, at=0x1000)
    shared = machine.breakpoints.add("again")
    with pytest.raises(AttributeError, match=f"'?{name}'?.*cannot be assigned"):
        setattr(shared, name, None)
    assert machine.cpu.run(deadline_s=30).breakpoint is shared.each[0]
    assert (shared.hits, shared.number) == (1, 1)


def test_a_breakpoint_of_another_list_is_not_removed_by_its_number(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m, kb.Machine(host, memory="2M") as other:
        for each in (m, other):
            each.load_asm(LOOP, at=0x1000)
        first, second = (cpu.breakpoints.add("again") for cpu in m.cpus)
        assert first.number == second.number
        with pytest.raises(MisuseError, match="is not one of this vcpu"):
            m.cpus[0].breakpoints.remove(second)
        assert [len(cpu.breakpoints) for cpu in m.cpus] == [1, 1]
        shared, alien = m.breakpoints.add("again"), other.breakpoints.add("again")
        with pytest.raises(MisuseError, match="is not one of this machine"):
            m.breakpoints.remove(alien)
        assert (list(m.breakpoints), list(other.breakpoints)) == ([shared], [alien])


def test_what_a_condition_writes_is_seen_by_the_next_breakpoint_and_after_the_stop(machine):
    machine.load_asm(LOOP, at=0x1000)
    cpu = machine.cpu

    def write(cpu):
        cpu.regs.rdx = 0x77
        return False

    seen = []
    cpu.breakpoints.add("again", condition=write)
    two = cpu.breakpoints.add("again", condition=lambda cpu: seen.append(int(cpu.regs.rdx)) or True)
    assert cpu.run(deadline_s=30).breakpoint is two
    assert (seen, cpu.regs.rdx, int(cpu.vcpu.get_regs().rdx)) == ([0x77], 0x77, 0x77)


def test_all_that_are_reached_at_once_count_their_hits(machine):
    machine.load_asm("start: mov dword ptr [0x3000], 7\nnop\nhere: nop\nhlt", at=0x1000)
    cpu = machine.cpu
    watches = cpu.watch(0x3000, 4), cpu.watch(0x3002, 2)
    assert cpu.run(deadline_s=30).breakpoint is watches[0]
    assert [one.hits for one in watches] == [1, 1]
    first, second = cpu.breakpoints.add("here"), cpu.breakpoints.add("here", ignore=3)
    third = cpu.breakpoints.add("here", condition=lambda cpu: False)
    assert cpu.run(deadline_s=30).breakpoint is first
    assert (first.hits, second.hits, second.ignore, third.passes) == (1, 1, 2, 1)


def test_a_condition_without_a_truth_value_is_told_as_its_failure(machine):
    machine.load_asm(LOOP, at=0x1000)
    one = machine.cpu.breakpoints.add("again", condition=lambda cpu: np.array([1, 2]) > 1)
    with pytest.raises(MisuseError, match="the condition of breakpoint 1 at again failed: ValueError"):
        machine.cpu.run(deadline_s=30)
    assert (one.hits, machine.cpu.running) == (0, False)
