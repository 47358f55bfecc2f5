"""Which of the processor's modes a vcpu is in, read off its control state.

The rules are those of the SDM, volume 3, "Modes of Operation": CR0.PE,
EFER.LMA, RFLAGS.VM and the L and D bits of CS decide, and nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_PE, _PG, _PAE, _LMA, _VM, _LA57 = 1 << 0, 1 << 31, 1 << 5, 1 << 10, 1 << 17, 1 << 12


@dataclass(frozen=True, slots=True)
class CodeMode:
    """How the instruction at rip would be decoded, and with what rights.

    Attributes:
        name: ``real``, ``virtual-8086``, ``protected``, ``compatibility`` or ``long``.
        bits: default width of code: 16, 32 or 64.
        cpl: current privilege level, 0 to 3.
        paging: ``off``, ``32-bit``, ``PAE``, ``4-level`` or ``5-level``.
        code_base: linear address of offset 0 in CS; 0 in long mode, where the base is ignored.
    """

    name: str
    bits: int
    cpl: int
    paging: str
    code_base: int

    @classmethod
    def from_kvm(cls, sregs: Any, rflags: int) -> CodeMode:
        """Decodes ``struct kvm_sregs`` and RFLAGS."""
        cr0, cr4, efer, code = int(sregs.cr0), int(sregs.cr4), int(sregs.efer), sregs.cs
        if not cr0 & _PE:
            return cls("real", 32 if code.db else 16, 0, "off", int(code.base))
        if not cr0 & _PG:
            paging = "off"
        elif efer & _LMA:
            paging = "5-level" if cr4 & _LA57 else "4-level"
        else:
            paging = "PAE" if cr4 & _PAE else "32-bit"
        # The CPL is SS.DPL: CS.DPL is lower than the CPL in conforming segments.
        cpl = int(sregs.ss.dpl)
        if efer & _LMA:
            if code.l:
                return cls("long", 64, cpl, paging, 0)
            return cls("compatibility", 32 if code.db else 16, cpl, paging, int(code.base))
        if rflags & _VM:
            return cls("virtual-8086", 16, 3, paging, int(code.base))
        return cls("protected", 32 if code.db else 16, cpl, paging, int(code.base))

    def linear(self, rip: int) -> int:
        """The linear address (gva) of offset `rip` in the code segment."""
        if self.bits == 64:
            return rip
        return (self.code_base + rip) & 0xFFFF_FFFF

    def __str__(self) -> str:
        if self.name in ("protected", "compatibility") and self.bits == 16:
            return f"{self.name} 16-bit, CPL {self.cpl}"
        return self.name if self.name == "real" else f"{self.name}, CPL {self.cpl}"
