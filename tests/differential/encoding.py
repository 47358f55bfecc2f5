"""Encodes instructions for 16, 32 and 64 bits: prefixes, ModRM, SIB, displacements.

Only what the generator needs (SDM volume 2, "Instruction Format"); capstone checks it in test_generator.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .effects import SHIFTS, STATUS, Effect, effect_of, shift_bounds, shift_effect

AX, CX, DX, BX, SP, BP, SI, DI = range(8)


@dataclass(frozen=True, slots=True)
class Memory:
    """An operand in memory.

    Attributes:
        displacement: signed; the whole address where there is no base.
        base: whether the base pointer is added.
        index: register that is added, or None.
        scale: 0 to 3, as a power of two.
        other_width: use the address size that is not the code's own (prefix 67).
        segment: override prefix, or None.
    """

    displacement: int
    base: bool = True
    index: int | None = None
    scale: int = 0
    other_width: bool = False
    segment: int | None = None


Operand = int | Memory


@dataclass(frozen=True, slots=True)
class Instruction:
    """Bytes, and what the comparison must know of them.

    Attributes:
        code: the encoding; a branch to another piece lacks its displacement.
        name: key into the table of effects, and what quirks go by.
        effect: on the status flags, as far as it is known without running.
        shift: (name, size in bits, count or None for CL), where the effect depends on the count.
        skip: for a branch to another piece: how many pieces it leaves out; else None.
        near: such a branch has a displacement of the code's width instead of a byte.
        resume: (where, width, pieces): bytes of the code that take the address where the piece so many pieces
            on begins; 0 is the next.
    """

    code: bytes
    name: str
    effect: Effect
    shift: tuple[str, int, int | None] | None = None
    skip: int | None = None
    near: bool = False
    resume: tuple[int, int, int] | None = None

    def effect_with(self, cl: int) -> Effect:
        """The effect, where CL was known before it ran."""
        if self.shift is None:
            return self.effect
        name, size, count = self.shift
        return shift_effect(name, size, cl if count is None else count)


def plain(code: bytes, name: str, *, faults: bool = False) -> Instruction:
    """An instruction with the effect in the table; one that may fault shows all flags to a handler."""
    effect = effect_of(name)
    return Instruction(code, name, replace(effect, reads=STATUS) if faults else effect)


def shift(code: bytes, name: str, size: int, count: int | None) -> Instruction:
    """A shift or rotate; count None is CL."""
    assert name in (*SHIFTS, "shld", "shrd")
    effect = shift_bounds(name, size) if count is None else shift_effect(name, size, count)
    return Instruction(code, name, effect, (name, size, count))


class Encoder:
    """Encodes for one width of code."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    @property
    def registers(self) -> tuple[int, ...]:
        """General registers that guests use freely: all but the stack and the base pointer."""
        return (*(0, 1, 2, 3, 6, 7), *(range(8, 16) if self.bits == 64 else ()))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Operand sizes in bits."""
        return (8, 16, 32, 64) if self.bits == 64 else (8, 16, 32)

    @property
    def stack_size(self) -> int:
        """Bits of a push without prefixes."""
        return self.bits

    def op(
        self,
        opcode: bytes,
        size: int,
        *,
        reg: int = 0,
        rm: Operand | None = None,
        immediate: bytes = b"",
        prefix: bytes = b"",
        wide: bool = True,
        low_bytes: bool = True,
        byte_rm: bool = False,
    ) -> bytes:
        """One instruction.

        Args:
            opcode: without prefixes.
            size: of the operands, in bits.
            reg: middle field of ModRM, or the register in the opcode's low bits where `rm` is None.
            rm: register or memory; None: no ModRM.
            prefix: mandatory or LOCK or REP; comes before REX.
            wide: whether 64 bits want REX.W; False for those that have that size by themselves.
            low_bytes: with byte operands, whether `reg` is a byte register too.
            byte_rm: `rm` is a byte register whatever the size.
        """
        legacy, rex = bytearray(), 0
        if (size == 16 and self.bits != 16) or (size == 32 and self.bits == 16):
            legacy.append(0x66)
        if size == 64 and wide:
            rex |= 0x48
        if isinstance(rm, Memory):
            if rm.segment is not None:
                legacy.append(rm.segment)
            if rm.other_width:
                legacy.append(0x67)
            if rm.index is not None and rm.index >= 8:
                rex |= 0x42
        elif rm is not None:
            if rm >= 8:
                rex |= 0x41
            if (size == 8 or byte_rm) and 4 <= rm < 8 and self.bits == 64:
                rex |= 0x40
        if rm is not None:
            if reg >= 8:
                rex |= 0x44
            if size == 8 and low_bytes and 4 <= reg < 8 and self.bits == 64:
                rex |= 0x40
            tail = self._modrm(reg & 7, rm)
        else:
            if reg >= 8:
                rex |= 0x41
            tail = b""
            opcode = opcode[:-1] + bytes([opcode[-1] | reg & 7]) if reg else opcode
        assert self.bits == 64 or not rex
        return bytes(legacy) + prefix + (bytes([rex]) if rex else b"") + opcode + tail + immediate

    def _modrm(self, reg: int, rm: Operand) -> bytes:
        if isinstance(rm, int):
            return bytes([0xC0 | reg << 3 | rm & 7])
        width = self.bits
        if rm.other_width:
            width = {16: 32, 32: 16, 64: 32}[self.bits]
        if width == 16:
            return self._modrm16(reg, rm)
        short = -128 <= rm.displacement < 128
        four = (rm.displacement & 0xFFFF_FFFF).to_bytes(4, "little")
        moved = bytes([rm.displacement & 0xFF]) if short else four
        mod = 0x40 if short else 0x80
        if rm.index is not None:
            sib = rm.scale << 6 | (rm.index & 7) << 3 | 5
            if not rm.base:
                return bytes([reg << 3 | 4, sib]) + four
            return bytes([mod | reg << 3 | 4, sib]) + moved
        if rm.base:
            return bytes([mod | reg << 3 | 5]) + moved
        if self.bits == 64:
            return bytes([reg << 3 | 4, 0x25]) + four
        return bytes([reg << 3 | 5]) + four

    @staticmethod
    def _modrm16(reg: int, rm: Memory) -> bytes:
        two = (rm.displacement & 0xFFFF).to_bytes(2, "little")
        if not rm.base:
            assert rm.index is None
            return bytes([reg << 3 | 6]) + two
        field = {None: 6, SI: 2, DI: 3}[rm.index]
        if -128 <= rm.displacement < 128:
            return bytes([0x40 | reg << 3 | field, rm.displacement & 0xFF])
        return bytes([0x80 | reg << 3 | field]) + two

    def set_register(self, reg: int, value: int, size: int | None = None) -> bytes:
        """MOV of an immediate; 32 bits in 64-bit code too, unless the value needs more."""
        if size is None:
            size = 64 if value >> 32 and self.bits == 64 else 32
        return self.op(b"\xb8", size, reg=reg, immediate=(value & (1 << size) - 1).to_bytes(size // 8, "little"))
