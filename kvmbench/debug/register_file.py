"""All registers of a vcpu at one moment, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kvmbench.debug.control import CONTROL_CLASSES, ApicBase, Cr0, Cr2, Cr3, Cr4, Cr8, Efer
from kvmbench.debug.flags import Flags
from kvmbench.debug.mode import CodeMode
from kvmbench.debug.register_table import INTEGER, SEGMENTS, TABLES
from kvmbench.kvm.segment import DescriptorTable, Segment


@dataclass(frozen=True, slots=True)
class RegisterFile:
    """A copy of ``struct kvm_regs`` and ``struct kvm_sregs``; asks the guest for nothing.

    The interrupt bitmap of ``kvm_sregs`` is left out: it is an event in
    flight, not a register.
    """

    rax: int
    rbx: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    rsp: int
    rbp: int
    r8: int
    r9: int
    r10: int
    r11: int
    r12: int
    r13: int
    r14: int
    r15: int
    rip: int
    rflags: Flags
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable
    idt: DescriptorTable
    cr0: Cr0
    cr2: Cr2
    cr3: Cr3
    cr4: Cr4
    cr8: Cr8
    efer: Efer
    apic_base: ApicBase

    @classmethod
    def from_kvm(cls, regs: Any, sregs: Any) -> RegisterFile:
        """Copies ``struct kvm_regs`` and ``struct kvm_sregs`` (any objects with their fields)."""
        values: dict[str, Any] = {name: int(getattr(regs, name)) for name in INTEGER}
        values["rflags"] = Flags(values["rflags"])
        for name in SEGMENTS:
            values[name] = Segment.from_kvm(getattr(sregs, name))
        for name in TABLES:
            values[name] = DescriptorTable.from_kvm(getattr(sregs, name))
        for name, control in CONTROL_CLASSES.items():
            values[name] = control(int(getattr(sregs, name)))
        return cls(**values)

    @property
    def mode(self) -> CodeMode:
        """The processor mode these registers describe."""
        return CodeMode.from_kvm(self, int(self.rflags))

    def diff(self, other: RegisterFile) -> dict[str, tuple[Any, Any]]:
        """The registers that differ: name to (value here, value in `other`), in the table's order."""
        return {
            field.name: (mine, theirs)
            for field in fields(self)
            if (mine := getattr(self, field.name)) != (theirs := getattr(other, field.name))
        }

    def __repr__(self) -> str:
        from kvmbench.debug.register_view import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from kvmbench.debug.register_view import as_html

        return as_html(self)
