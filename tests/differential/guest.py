"""A guest: pieces, the state they start from, and the bytes that come of both.

`generate(seed, number)` gives the same guest for ever as long as FORMAT stays; whoever changes what a draw means
raises FORMAT (test_generator.py notices).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from .draw import Draw
from .effects import SHIFTS, STATUS, shift_bounds
from .encoding import BP, SP, Instruction, plain
from .faulting import FAULTING
from .flow import FLOW
from .ordinary import ORDINARY
from .piece import Builder, Kind, Piece
from .privileged import PRIVILEGED
from .setting import (
    BASE,
    BY_NAME,
    CODE,
    CODE_END,
    DATA_BYTES,
    END_PORT,
    SETTINGS,
    STACK,
    STACK_START,
    WINDOW_BYTES,
    Setting,
)

FORMAT = 1
_KINDS = (*ORDINARY.kinds, *FLOW.kinds, *PRIVILEGED.kinds)
_FAULTING = tuple(FAULTING.kinds)
NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
#: Steps after which a guest is given up.
MOST_STEPS = 400


@dataclass(frozen=True)
class Image:
    """The bytes of a guest.

    Attributes:
        code: from CODE on.
        instructions: by their offset in the code segment.
        resumes: addresses where pieces begin.
    """

    code: bytes
    instructions: dict[int, Instruction]
    resumes: tuple[int, ...]


@dataclass(frozen=True)
class Guest:
    """One guest.

    Attributes:
        name: ``format/seed/number/setting``, with ``+exceptions`` where it may raise some.
        setting: where it runs.
        pieces: in order.
        registers: at the start, by the number of their encoding.
        rflags: at the start.
        data: the first bytes of the window.
        stack: what its stack holds.
    """

    name: str
    setting: Setting
    pieces: tuple[Piece, ...]
    registers: tuple[int, ...]
    rflags: int
    data: bytes
    stack: bytes
    kept: tuple[int, ...] = field(default=())

    def keep(self, kept: tuple[int, ...]) -> Guest:
        """The guest with only some of its pieces, by their numbers in the whole guest."""
        all_kept = self.kept or tuple(range(len(self.pieces)))
        by_number = dict(zip(all_kept, self.pieces, strict=True))
        return replace(self, pieces=tuple(by_number[n] for n in kept), kept=kept)

    @cached_property
    def image(self) -> Image:
        """Its code, with what is needed between the pieces."""
        return lower(self)

    @property
    def window(self) -> bytes:
        """What memory holds from WINDOW on, up to the end of the code."""
        window = (self.data.ljust(DATA_BYTES, b"\0") + self.stack).ljust(WINDOW_BYTES, b"\0")
        return window + self.image.code


def lower(guest: Guest) -> Image:
    """Puts the pieces one after the other, giving flags a value where a piece would look at undefined ones."""
    setting = guest.setting
    draw = Draw(FORMAT, len(guest.pieces))
    # What jumps to a piece brings along, by the piece's number.
    brought: dict[int, int] = {}
    undefined = 0
    parts: list[list[Instruction]] = []
    for number, piece in enumerate(guest.pieces):
        undefined |= brought.get(number, 0)
        part: list[Instruction] = []
        if piece.reads & undefined:
            part.append(plain(bytes([0x3C, draw.below(256)]), "cmp"))
            undefined = 0
        part.extend(piece.instructions)
        undefined = piece.undefined_after(undefined)
        for each in piece.instructions:
            if each.skip is not None:
                target = min(number + 1 + each.skip, len(guest.pieces))
                brought[target] = brought.get(target, 0) | undefined
        parts.append(part)
    end = [plain(bytes([0xE6, END_PORT]), "out")] if setting.cpl else [plain(b"\xf4", "hlt")]
    parts.append(end)
    starts, at = [], CODE
    for part in parts:
        starts.append(at)
        at += sum(_size(each, setting) for each in part)
    code, instructions = bytearray(), {}
    at = CODE
    for number, part in enumerate(parts):
        for each in part:
            instructions[at] = each
            size = _size(each, setting)
            data = each.code
            if each.skip is not None:
                target = starts[min(number + 1 + each.skip, len(guest.pieces))]
                width = size - len(each.code)
                distance = target - at - size
                assert width > 1 or distance < 128, f"{guest.name}: a short jump over {distance} bytes"
                data += distance.to_bytes(width, "little")
            elif each.resume is not None:
                # The address behind the instruction that may fault.
                where, width, pieces_on = each.resume
                target = starts[min(number + 1 + pieces_on, len(guest.pieces))]
                data = data[:where] + target.to_bytes(width, "little") + data[where + width :]
            code += data
            at += size
    assert at <= CODE_END, f"{guest.name}: {at - CODE} bytes of code"
    return Image(bytes(code), instructions, tuple(starts))


def _size(instruction: Instruction, setting: Setting) -> int:
    if instruction.skip is None:
        return len(instruction.code)
    width = 1 if not instruction.near else 2 if setting.bits == 16 else 4
    return len(instruction.code) + width


def _choose(draw: Draw, kinds: list[Kind]) -> Kind:
    at = draw.below(sum(kind.weight for kind in kinds))
    for kind in kinds:
        at -= kind.weight
        if at < 0:
            return kind
    raise AssertionError("weights do not add up")


def generate(seed: int, number: int, setting: Setting, *, exceptions: bool = False) -> Guest:
    """The guest of that name.

    Args:
        exceptions: with pieces that raise exceptions.
    """
    draw = Draw(FORMAT, seed, number, SETTINGS.index(setting), int(exceptions))
    rare = draw.one_in(4)
    kinds = [kind for kind in _KINDS if kind.suits(setting) and (rare or not kind.rare)]
    faulting = [kind for kind in _FAULTING if kind.suits(setting) and (rare or not kind.rare)] if exceptions else []
    pieces = []
    for _ in range(draw.between(6, 24)):
        kind = _choose(draw, faulting if exceptions and draw.one_in(4) else kinds)
        builder = Builder(setting, draw)
        kind.make(builder)
        pieces.append(Piece(kind.name, tuple(builder.out)))
    width = 64 if setting.bits == 64 else 32
    count = 16 if setting.bits == 64 else 8
    registers = [draw.value(width) for _ in range(count)] + [0] * (16 - count)
    registers[SP], registers[BP] = STACK_START, BASE
    rflags = draw.bits(32) & (STATUS | 0x400 | 0x200) | 2 | (0x3000 if setting.cpl else 0)
    return Guest(
        f"{FORMAT}/{seed}/{number}/{setting.name}" + ("+exceptions" if exceptions else ""),
        setting,
        tuple(pieces),
        tuple(registers),
        rflags,
        *_memory(draw),
    )


def _memory(draw: Draw) -> tuple[bytes, bytes]:
    # The data, and a stack that holds something to pop.
    data = draw.data(DATA_BYTES)
    return data, bytes(STACK_START - 0x40 - STACK) + draw.data(0xC0)


#: What memory holds for guests that are written down, and for shrunk ones if that is enough.
PLAIN_MEMORY = _memory(Draw(FORMAT))


def written(setting: str, instructions: Sequence[tuple[str, str]], rflags: int = 2, **registers: int) -> Guest:
    """A guest from its instructions, as a report prints them.

    Args:
        setting: its name.
        instructions: pairs of a name in the tables of effects and the code in hexadecimal; the end is added.
        registers: at the start; the others are 0.
    """
    where = BY_NAME[setting]
    pieces = tuple(Piece(name, (_written(name, bytes.fromhex(code)),)) for name, code in instructions)
    start = {"rsp": STACK_START, "rbp": BASE, **registers}
    values = tuple(start.get(name, 0) for name in NAMES)
    return Guest(f"written/{setting}", where, pieces, values, rflags, *PLAIN_MEMORY)


def _written(name: str, code: bytes) -> Instruction:
    if name in (*SHIFTS, "shld", "shrd"):
        return Instruction(code, name, shift_bounds(name, 8))
    return plain(code, name)


def by_name(name: str) -> Guest:
    """The guest that `Guest.name` names.

    Raises:
        ValueError: not such a name, or one of another format.
    """
    format, seed, number, rest = name.split("/")
    if int(format) != FORMAT:
        raise ValueError(f"{name}: guests of format {format} cannot be made any more; this is format {FORMAT}")
    setting, _, switches = rest.partition("+")
    return generate(int(seed), int(number), BY_NAME[setting], exceptions=switches == "exceptions")
