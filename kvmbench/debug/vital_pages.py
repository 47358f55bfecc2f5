"""Pages that the processor itself reads or writes, and in which a slot watchpoint would end or hang the guest.

Facts, seen on kvm_pvm and kvm_amd (nested and shadow paging); test_vital_pages.py has those that a test shows:
- An access by an instruction to a page without its slot, or to a read-only one that is written, leaves the guest and
  is served. What the processor does on its own cannot be served: KVM loops, fails, or makes it a triple fault.
- Of a page without a slot it fetches code, and reads page tables, IDT, GDT and TSS.
- To a read-only one it writes: accessed and dirty bits in page tables, the accessed and busy bits of descriptors in
  the GDT, the TSS at a task switch (none in long mode). It never writes the IDT.
- The frame of an exception goes to the stack without an instruction. That is a matter of whether one comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmbench.debug.mechanism import Choice, Mechanism, Place, choose
from kvmbench.debug.walk import walk
from kvmbench.errors import UnsupportedError
from kvmbench.kvm.region import PAGE_BYTES

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

_PE, _LMA = 1 << 0, 1 << 10
_GATES = 256
# The frame of an exception in long mode: alignment, SS, RSP, RFLAGS, CS, RIP and an error code.
_FRAME_BYTES = 64


def vital_pages(cpu: Cpu, kind: str) -> dict[int, str]:
    """Page numbers (gpa / 4096) to what is in them, as the vcpu is now.

    Args:
        kind: "w": what the processor writes; "rw": what it reads or writes.
    """
    memory, sregs = cpu.machine.memory, cpu.state.get_sregs()
    rip = cpu.mode.linear(cpu.regs.rip)
    protected, long = int(sregs.cr0) & _PE, int(sregs.efer) & _LMA
    gate_bytes = 16 if long else 8 if protected else 4
    parts: list[tuple[str, str, int, int]] = [  # the kind that ends the guest, what, where, bytes
        ("rw", "the code that runs", rip, 1),
        ("", "", _stack(cpu), 1),  # for the tables that lead there
    ]
    if sregs.idt.limit >= gate_bytes - 1:
        parts.append(("rw", "the IDT", int(sregs.idt.base), min(int(sregs.idt.limit) + 1, gate_bytes * _GATES)))
    if protected:
        parts.append(("w", "the GDT", int(sregs.gdt.base), int(sregs.gdt.limit) + 1))
        parts.append(("rw" if long else "w", "the TSS", int(sregs.tr.base), min(int(sregs.tr.limit) + 1, PAGE_BYTES)))
    found: dict[int, str] = {}
    for least, what, linear, length_bytes in parts:
        for gva in _pages(linear, length_bytes):
            walked = walk(memory, sregs, gva)
            if walked is None:
                continue
            for table in walked.tables:
                found.setdefault(table // PAGE_BYTES, "page tables")
            if what and (kind == "rw" or least == "w"):
                found.setdefault(walked.gpa // PAGE_BYTES, what)
    return found


def stack_pages(cpu: Cpu) -> set[int]:
    """Page numbers to which the frame of an exception would go, or come from, as the vcpu is now."""
    top = _stack(cpu)
    walked = (walk(cpu.machine.memory, cpu.state.get_sregs(), max(at, 0)) for at in (top - _FRAME_BYTES, top - 1, top))
    return {one.gpa // PAGE_BYTES for one in walked if one is not None}


def keep_off(cpu: Cpu, choice: Choice, place: Place, gpa: int, *, asked: bool) -> Choice:
    """A choice that leaves the vital pages alone, and says what its page may do to the guest all the same.

    Args:
        asked: the mechanism is the caller's.

    Raises:
        UnsupportedError: there is none.
    """
    pages = range(gpa // PAGE_BYTES, (gpa + place.size_bytes - 1) // PAGE_BYTES + 1)
    vital = vital_pages(cpu, "w" if choice.mechanism is Mechanism.READONLY_SLOT else "rw")
    inside = next((what for page, what in vital.items() if page in pages), "")
    if inside:
        why = f"{choice.mechanism}: its page has {inside}, and the guest would hang or die"
        if asked or place.kind == "rw":
            raise UnsupportedError(f"cannot watch {place.address:#x} with {why}")
        instead = choose(place, cpu.machine.host.mechanisms, wanted=Mechanism.STEPPING)
        return dataclasses.replace(instead, why=f"{choice.why}; {why}")
    if stack_pages(cpu).isdisjoint(pages):
        return choice
    hazard = "in the page of the stack: an exception or interrupt there ends the guest"
    if place.kind == "w":
        hazard += "; mechanism='stepping loop' does not"
    return dataclasses.replace(choice, hazard=hazard)


def _stack(cpu: Cpu) -> int:
    """The linear address of the top of the stack."""
    sregs, bits = cpu.state.get_sregs(), cpu.mode.bits
    rsp = int(cpu.regs.rsp)
    if bits == 64:
        return rsp
    return (int(sregs.ss.base) + (rsp & (0xFFFF_FFFF if sregs.ss.db else 0xFFFF))) & 0xFFFF_FFFF


def _pages(linear: int, length_bytes: int) -> Iterator[int]:
    """An address in each page of a range."""
    yield linear
    yield from range((linear // PAGE_BYTES + 1) * PAGE_BYTES, linear + length_bytes, PAGE_BYTES)
