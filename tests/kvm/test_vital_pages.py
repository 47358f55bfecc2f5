"""Watchpoints by memory slots keep off the pages that the processor itself reads or writes."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench.debug.vital_pages import stack_pages, vital_pages
from kvmbench.errors import UnsupportedError

from .interrupt_table import LOAD, TABLE, write_gates

STACK = 0x9000
SOURCE = """
        mov eax, [0x100000]
        xor ecx, ecx
        div ecx
        hlt
de:     add qword ptr [rsp], 2
        iretq
"""


@pytest.fixture
def divides(host):
    """A guest that divides by zero and goes on; its IDT is loaded."""
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(LOAD + SOURCE + TABLE, at=0x1000)
        write_gates(m, {0: "de"})
        m.cpu.regs.rsp = STACK
        assert m.cpu.step().cause is kb.Cause.STEP
        yield m


def tables(m):
    """The three page tables of 2 MiB pages, from the top."""
    found = [m.cpu.regs.cr3.table_gpa]
    while len(found) < 3:
        found.append(m.memory.read_u64(found[-1]) & 0x000F_FFFF_FFFF_F000)
    return found


def test_the_vital_pages_are_what_the_registers_lead_to(divides):
    cpu = divides.cpu
    pages = {at // 4096: "page tables" for at in tables(divides)}
    gdt = int(cpu.regs.gdt.base) // 4096
    assert vital_pages(cpu, "w") == {**pages, gdt: "the GDT"}
    assert vital_pages(cpu, "rw") == {**pages, gdt: "the GDT", 5: "the IDT", 1: "the code that runs"}
    assert stack_pages(cpu) == {8, 9}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_write_watchpoint_in_a_page_table_leaves_the_guest_alive(divides, level):
    where = tables(divides)[level] + 0x800
    # Four take the debug registers, where there are any.
    for n in range(4):
        divides.cpu.watch(0x20000 + 0x1000 * n, 8)
    one = divides.cpu.watch(where, 8)
    assert one.mechanism == "stepping loop"
    assert "its page has page tables" in one.why
    assert divides.cpu.run(deadline_s=10).cause is kb.Cause.HALT


@pytest.mark.parametrize(
    ("kind", "mechanism", "what"),
    [
        ("w", "read-only slot", "page tables"),
        ("rw", "absent slot", "page tables"),
        ("rw", "absent slot", "the GDT"),
        ("rw", "absent slot", "the IDT"),
        ("rw", "absent slot", "the code that runs"),
    ],
)
def test_a_slot_that_would_end_the_guest_is_refused(divides, kind, mechanism, what):
    page = next(page for page, name in vital_pages(divides.cpu, kind).items() if name == what)
    with pytest.raises(UnsupportedError, match=f"its page has {what}, and the guest would hang or die"):
        divides.cpu.watch(page * 4096 + 0xFF0, 8, kind, mechanism=mechanism)
    assert not len(divides.cpu.breakpoints)
    assert divides.cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_a_write_watchpoint_in_the_idt_s_page_is_harmless(divides):
    divides.cpu.watch(0x5FF0, 8, "w", mechanism="read-only slot")
    assert divides.cpu.run(deadline_s=10).cause is kb.Cause.HALT


def test_a_slot_in_the_page_of_the_stack_says_what_it_does_there(divides):
    one = divides.cpu.watch(STACK - 0x800, 8, "w", mechanism="read-only slot")
    assert any("an exception or interrupt there ends the guest" in said for said in one.drawbacks)
    assert "mechanism='stepping loop' does not" in repr(one)
    divides.cpu.breakpoints.clear()
    other = divides.cpu.watch(STACK - 0x800, 8, "w", mechanism="stepping loop")
    assert not other.hazard
    assert divides.cpu.run(deadline_s=10).cause is kb.Cause.HALT
    assert not divides.cpu.watch(0x20000, 8, "w", mechanism="read-only slot").hazard
