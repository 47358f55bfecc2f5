"""Which exception or interrupt a handler is for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmbench.core import wire

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu
    from kvmbench.debug.state import Stopped


def entered_vector(cpu: Cpu, state: Stopped, reply: Any) -> int | None:
    """The vector whose handler the last step has entered, or None if it entered none, or one that several share.

    Args:
        state: where it ended.
        reply: the ``struct kb_stop`` of that step.
    """
    tainted = reply.tainted
    if not tainted & (wire.KB_TAINT_ENTERED | wire.KB_TAINT_JUMPED):
        return None
    if tainted & wire.KB_TAINT_ENTERED and not tainted & wire.KB_TAINT_SHARED:
        return int(reply.vector)
    vectors = handler_vectors(cpu, state)
    return vectors[0] if len(vectors) == 1 else None


def handler_vectors(cpu: Cpu, state: Stopped) -> tuple[int, ...]:
    """The vectors whose IDT gates lead to rip; empty also where the IDT cannot be read.

    Source: SDM volume 3, "Interrupt Descriptor Table"; in real mode the table of far pointers.
    """
    sregs, rip = state.sregs, int(state.regs.rip)
    protected, long_mode = bool(sregs.cr0 & 1), bool(sregs.efer & 1 << 10)
    gate_bytes = 16 if long_mode else 8 if protected else 4
    table = cpu.read(int(sregs.idt.base), min(int(sregs.idt.limit) + 1, 256 * gate_bytes))
    found = []
    for vector in range(len(table) // gate_bytes):
        gate = table[vector * gate_bytes : (vector + 1) * gate_bytes]
        if not protected:
            leads = int.from_bytes(gate[:2], "little") == rip and gate[2:4] == sregs.cs.selector.to_bytes(2, "little")
        else:
            offset = int.from_bytes(gate[0:2], "little") | int.from_bytes(gate[6:8], "little") << 16
            if long_mode:
                offset |= int.from_bytes(gate[8:12], "little") << 32
            leads = offset == rip and bool(gate[5] & 0x80)
        if leads:
            found.append(vector)
    return tuple(found)
