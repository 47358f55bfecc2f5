"""An IDT, or real mode's vectors, for guests that raise exceptions."""

from __future__ import annotations

import kvmbench as kb

IDT = 0x5000
# Loads the table; at the start of a program. Long and protected mode take the same source.
LOAD = "start: lidt [table]\n"
TABLE = """
        .balign 8
table:  .word 0x7ff
        .quad 0x5000
"""


def gate(machine: kb.Machine, handler: int, *, trap: bool = False) -> bytes:
    """An interrupt or trap gate of the machine's width, to its own code segment."""
    kind = 0x8F if trap else 0x8E
    selector = int(machine.cpu.regs.cs.selector)
    if machine.cpu.mode.bits == 16:
        return handler.to_bytes(2, "little") + selector.to_bytes(2, "little")
    low = (handler & 0xFFFF).to_bytes(2, "little") + selector.to_bytes(2, "little") + bytes([0, kind])
    middle = low + (handler >> 16 & 0xFFFF).to_bytes(2, "little")
    return middle if machine.cpu.mode.bits == 32 else middle + (handler >> 32).to_bytes(4, "little") + bytes(4)


def write_gates(machine: kb.Machine, handlers: dict[int, str | int]) -> None:
    """Puts a gate for each vector into the table; a handler is a symbol or an offset."""
    table = 0 if machine.cpu.mode.bits == 16 else IDT
    size = {16: 4, 32: 8, 64: 16}[machine.cpu.mode.bits]
    for vector, handler in handlers.items():
        at = machine.symbols[handler] if isinstance(handler, str) else handler
        machine.memory.write(table + vector * size, gate(machine, at))
