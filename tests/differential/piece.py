"""Pieces: the few instructions that a guest is put together from, and that shrinking takes out whole.

A piece stands for itself: it sets up the registers that its memory accesses need, and leaves the stack and base
pointers where the next expects them. Whatever else it does to registers and flags is the next one's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .draw import Draw
from .encoding import BP, DI, SI, Encoder, Instruction, Memory, plain
from .setting import BASE, DATA, DATA_BYTES, Setting

_SEGMENTS = (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65)
_WRITABLE_SEGMENTS = (0x26, 0x36, 0x3E, 0x64, 0x65)


@dataclass(frozen=True, slots=True)
class Piece:
    """Instructions that belong together.

    Attributes:
        kind: what made it.
        instructions: in order; branches within the piece are complete.
    """

    kind: str
    instructions: tuple[Instruction, ...]

    @property
    def reads(self) -> int:
        """Status flags it looks at before it has given them a value."""
        seen = fresh = 0
        for each in self.instructions:
            seen |= each.effect.reads & ~fresh
            fresh |= each.effect.defines
        return seen

    def undefined_after(self, before: int) -> int:
        """Status flags that may be undefined after it."""
        for each in self.instructions:
            before = before & ~each.effect.defines | each.effect.undefined
        return before

    @property
    def is_sound(self) -> bool:
        """Whether no instruction looks at a flag that one before it left undefined."""
        undefined = 0
        for each in self.instructions:
            if each.effect.reads & undefined:
                return False
            undefined = undefined & ~each.effect.defines | each.effect.undefined
        return True


class Builder:
    """Collects the instructions of one piece."""

    def __init__(self, setting: Setting, draw: Draw) -> None:
        self.setting = setting
        self.draw = draw
        self.encoder = Encoder(setting.bits)
        self.out: list[Instruction] = []

    def put(self, code: bytes, name: str, *, faults: bool = False) -> None:
        """Adds an instruction with the effect of the table."""
        self.out.append(plain(code, name, faults=faults))

    def add(self, instruction: Instruction) -> None:
        """Adds an instruction."""
        self.out.append(instruction)

    def set(self, reg: int, value: int, size: int | None = None) -> None:
        """Adds a MOV of an immediate."""
        self.put(self.encoder.set_register(reg, value, size), "mov")

    def register(self) -> int:
        """One of the registers that are free."""
        return self.draw.of(self.encoder.registers)

    def size(self) -> int:
        """An operand size."""
        return self.draw.of(self.encoder.sizes)

    def wide_size(self) -> int:
        """An operand size other than 8."""
        return self.draw.of(self.encoder.sizes[1:])

    def immediate(self, size: int) -> bytes:
        """An immediate for an operand size: at most 32 bits."""
        size = min(size, 32)
        return self.draw.value(size).to_bytes(size // 8, "little")

    def memory(self, *, write: bool = True, aligned: int = 1, keep: Sequence[int] = ()) -> Memory:
        """An operand in the guest's data; its index register, if any, is set first.

        Args:
            write: no segment that cannot be written.
            aligned: the address is a multiple of this.
            keep: registers that must not become the index.
        """
        draw = self.draw
        other = draw.one_in(6)
        width = {16: 32, 32: 16, 64: 32}[self.setting.bits] if other else self.setting.bits
        segments = _WRITABLE_SEGMENTS if write else _SEGMENTS
        segment = draw.of(segments) if draw.one_in(6) and aligned == 1 else None
        form = draw.below(4)
        offset = draw.below((DATA_BYTES - 16) // aligned) * aligned
        if form == 0:
            return Memory(DATA + offset, base=False, other_width=other, segment=segment)
        if form == 1 and aligned == 1:
            indices = (SI, DI) if width == 16 else tuple(r for r in self.encoder.registers if r != BP)
            indices = tuple(r for r in indices if r not in keep)
            if indices:
                index = draw.of(indices)
                self.set(index, draw.below(8))
                scale = 0 if width == 16 else draw.below(4)
                return Memory(offset // 2 - 0x80, True, index, scale, other, segment)
        if form == 2:
            offset = (offset - 0x100) // 2 // aligned * aligned
            return Memory(offset, other_width=other, segment=segment)
        return Memory(DATA + offset - BASE, other_width=other, segment=segment)

    def place(self, *, write: bool = True, keep: Sequence[int] = ()) -> int | Memory:
        """A register or an operand in memory."""
        return self.register() if self.draw.one_in(2) else self.memory(write=write, keep=keep)

    def define_flags(self) -> None:
        """Gives all status flags a value."""
        self.put(bytes([0x3C, self.draw.below(256)]), "cmp")

    def stack_prefix(self, size: int) -> bytes:
        """Prefix that makes a push or pop of `size` bits."""
        return b"" if size == self.encoder.stack_size else b"\x66"

    def stack_sizes(self) -> tuple[int, ...]:
        """Sizes that pushes can have."""
        return {16: (16, 32), 32: (32, 16), 64: (64, 16)}[self.setting.bits]

    def clear_image_tf(self, size: int, offset: int = 0) -> None:
        """Clears TF and RF in a flags image on the stack, which may be ours: see docs/differential.md."""
        address = b"\x67" if self.setting.bits == 16 else b""
        # AND word [esp + offset], ~TF; for 16 bits in 16-bit code the operand size is the code's own.
        operand = b"" if self.setting.bits == 16 else b"\x66"
        modrm = b"\x64\x24" + bytes([offset])
        self.put(address + operand + b"\x81" + modrm + (0xFEFF).to_bytes(2, "little"), "and")

    def push_segment(self, code: bytes) -> None:
        """Adds a push of a segment register, and clears the half that a 32-bit push need not write.

        SDM volume 2, "PUSH": with 32 bits "the upper 16 bits of the stack location are left unmodified" or zero.
        """
        self.put(code, "push_seg")
        if self.setting.bits == 32:
            self.put(b"\x81\x24\x24\xff\xff\x00\x00", "and")

    def relative(self, distance: int) -> bytes:
        """The displacement of a near branch."""
        width = 2 if self.setting.bits == 16 else 4
        return (distance & (1 << 8 * width) - 1).to_bytes(width, "little")


Maker = Callable[[Builder], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of piece.

    Attributes:
        name: of the maker.
        weight: how often it comes, relative to the others.
        make: fills a `Builder`.
        suits: whether a setting can have it.
        rare: KVM's instruction emulator does not know it, so a host that runs on that ends there.
    """

    name: str
    weight: int
    make: Maker
    suits: Callable[[Setting], bool]
    rare: bool = False


def anywhere(setting: Setting) -> bool:
    """For kinds that every setting can have."""
    return True


class Catalogue:
    """Kinds of pieces, in the order of their definition, which is part of the format."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = []

    def kind(
        self, weight: int, suits: Callable[[Setting], bool] = anywhere, *, rare: bool = False
    ) -> Callable[[Maker], Maker]:
        """Decorates a maker."""

        def register(make: Maker) -> Maker:
            self.kinds.append(Kind(make.__name__, weight, make, suits, rare))
            return make

        return register
