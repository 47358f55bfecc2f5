"""Which exception or interrupt a handler is for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu
    from kvmbench.debug.state import Stopped


def entered_vector(cpu: Cpu, state: Stopped) -> int | None:
    """The vector whose IDT gate leads to rip, or None if none does or the IDT cannot be read.

    Source: SDM volume 3, "Interrupt Descriptor Table"; in real mode the table of far pointers.
    """
    sregs, rip = state.sregs, int(state.regs.rip)
    protected, long_mode = bool(sregs.cr0 & 1), bool(sregs.efer & 1 << 10)
    gate_bytes = 16 if long_mode else 8 if protected else 4
    table = cpu.read(int(sregs.idt.base), min(int(sregs.idt.limit) + 1, 256 * gate_bytes))
    for vector in range(len(table) // gate_bytes):
        gate = table[vector * gate_bytes : (vector + 1) * gate_bytes]
        if not protected:
            offset = int.from_bytes(gate[:2], "little")
            found = offset == rip and int.from_bytes(gate[2:4], "little") == sregs.cs.selector
        else:
            offset = int.from_bytes(gate[0:2], "little") | int.from_bytes(gate[6:8], "little") << 16
            if long_mode:
                offset |= int.from_bytes(gate[8:12], "little") << 32
            found = offset == rip and bool(gate[5] & 0x80)
        if found:
            return vector
    return None
