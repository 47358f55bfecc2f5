"""What led to a guest's death: the instruction that could not be stepped, and the handlers entered before.

A triple fault says nothing of the exceptions that made it, and kvm_amd resets
the vcpu, so its registers do not either.  While it steps, the core keeps what
it saw last (``struct kb_history`` of wire.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvmbench.core import wire
from kvmbench.debug.instruction import DECODER, Instruction
from kvmbench.debug.symbols import Symbols
from kvmbench.uapi.vectors import vector_name

_WIDTHS = {wire.KB_WIDTH_BITS16: 16, wire.KB_WIDTH_BITS32: 32, wire.KB_WIDTH_BITS64: 64}


@dataclass(frozen=True, slots=True)
class Delivery:
    """An exception or interrupt that reached its handler while the guest was stepped.

    Attributes:
        vector: 0 to 255; the lowest, where `shared`.
        pc: linear address of the instruction that was interrupted, or had run last.
        label: the same as a symbol, or in hex.
        shared: several vectors lead to that handler.
    """

    vector: int
    pc: int
    label: str
    shared: bool

    def __str__(self) -> str:
        return f"{vector_name(self.vector)}{' or another' if self.shared else ''} at {self.label}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Where a guest died, or KVM gave up on it, as far as stepping saw it.

    Attributes:
        pc: linear address of the instruction that was to be stepped.
        instruction: that instruction, or None if it could not be read.
        delivered: the last exceptions and interrupts whose handlers were entered, oldest first; at most 8,
            since the machine was reset (or its special registers were last written).
    """

    pc: int
    instruction: Instruction | None
    delivered: tuple[Delivery, ...]

    def __str__(self) -> str:
        text = self.instruction.text if self.instruction is not None else "(not readable)"
        where = self.instruction.label if self.instruction is not None else ""
        before = ", ".join(map(str, self.delivered)) or "none"
        return f"at {self.pc:#x} {where}".rstrip() + f": {text}; delivered before: {before}"


def fault_of(history: Any, symbols: Symbols) -> Fault:
    """From ``struct kb_history *``."""
    code = bytes(history.code)[: history.code_bytes]
    instruction = None
    if code and history.width in _WIDTHS:
        instruction = DECODER.decode(
            code,
            bits=_WIDTHS[history.width],
            address=int(history.rip),
            symbols=symbols,
            code_base=int(history.pc) - int(history.rip),
        )
    delivered = tuple(
        Delivery(
            int(one.vector), int(one.from_pc), symbols.label(int(one.from_pc)) or f"{one.from_pc:#x}", bool(one.shared)
        )
        for one in list(history.entry)[: history.entries]
    )
    return Fault(int(history.pc), instruction, delivered)
