"""The one table of x86 registers: names, order, widths and sub-registers.

Everything that lists registers reads it from here: `Registers`, the recorded
rows, the figures and the widgets. The order is that of ``struct kvm_regs`` in
``<linux/kvm.h>`` (and so of ``struct kb_row`` in wire.h), which is *not* the
order of the register numbers in an instruction's encoding.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The 16 general registers, in the order of ``struct kvm_regs``.
GENERAL: tuple[str, ...] = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip

#: All of ``struct kvm_regs``: the general registers, then rip and rflags.
INTEGER: tuple[str, ...] = (*GENERAL, "rip", "rflags")

#: The segment registers of ``struct kvm_sregs``, in its order.
SEGMENTS: tuple[str, ...] = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")

#: The descriptor-table registers of ``struct kvm_sregs``.
TABLES: tuple[str, ...] = ("gdt", "idt")

#: The control registers of ``struct kvm_sregs``, EFER and the APIC base among them, in its order.
CONTROL: tuple[str, ...] = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


@dataclass(frozen=True, slots=True)
class SubRegister:
    """A name for some of the bits of a 64-bit register.

    Attributes:
        name: as in assembly, such as ``ah``.
        parent: the 64-bit register that holds it, such as ``rax``.
        shift_bits: where its lowest bit lies in the parent.
        width_bits: 8, 16 or 32.
        clears_upper: writing it sets bits 32 to 63 of the parent to zero, as an
            instruction that writes a 32-bit register in 64-bit mode does
            (SDM volume 1, "General-Purpose Registers in 64-Bit Mode").
    """

    name: str
    parent: str
    shift_bits: int
    width_bits: int
    clears_upper: bool = False


def _legacy(letters: str) -> list[SubRegister]:
    # rax, rbx, rcx, rdx: the four with a high byte of their own.
    parent, stem = f"r{letters}x", letters
    return [
        SubRegister(f"e{stem}x", parent, 0, 32, clears_upper=True),
        SubRegister(f"{stem}x", parent, 0, 16),
        SubRegister(f"{stem}h", parent, 8, 8),
        SubRegister(f"{stem}l", parent, 0, 8),
    ]


def _pointer(stem: str) -> list[SubRegister]:
    return [
        SubRegister(f"e{stem}", f"r{stem}", 0, 32, clears_upper=True),
        SubRegister(stem, f"r{stem}", 0, 16),
        SubRegister(f"{stem}l", f"r{stem}", 0, 8),
    ]


def _numbered(number: int) -> list[SubRegister]:
    parent = f"r{number}"
    return [
        SubRegister(f"{parent}d", parent, 0, 32, clears_upper=True),
        SubRegister(f"{parent}w", parent, 0, 16),
        SubRegister(f"{parent}b", parent, 0, 8),
    ]


def _all_subregisters() -> dict[str, SubRegister]:
    found = [sub for stem in "abcd" for sub in _legacy(stem)]
    found += [sub for stem in ("si", "di", "sp", "bp") for sub in _pointer(stem)]
    found += [sub for number in range(8, 16) for sub in _numbered(number)]
    # No 8-bit name for the instruction pointer and the flags.
    found += [SubRegister("eip", "rip", 0, 32, clears_upper=True), SubRegister("ip", "rip", 0, 16)]
    found += [SubRegister("eflags", "rflags", 0, 32, clears_upper=True)]
    found += [SubRegister("flags", "rflags", 0, 16)]
    return {sub.name: sub for sub in found}


#: Sub-register name to its place: ``SUBREGISTERS["ah"]``.
SUBREGISTERS: dict[str, SubRegister] = _all_subregisters()


def short_name(name: str, bits: int) -> str:
    """The name a register goes by in code of this width: ``rax`` is ``eax`` in 32-bit code.

    Args:
        name: one of `INTEGER`.
        bits: 16, 32 or 64. 16-bit code gets the 32-bit names, since it can use them.
    """
    if bits == 64:
        return name
    for sub in SUBREGISTERS.values():
        if sub.parent == name and sub.width_bits == 32:
            return sub.name
    return name
