"""Pieces that move the stack pointer or the instruction pointer, repeat, or talk to devices."""

from __future__ import annotations

from .effects import CONDITION_NAMES, CONDITION_READS, STATUS, Effect, effect_of
from .encoding import BP, CX, DI, DX, SI, Instruction, Memory
from .ordinary import is_64, not_64
from .piece import Builder, Catalogue
from .setting import BASE, DATA, PORTS, SHORT_PORTS

FLOW = Catalogue()
_STRINGS = (("movs", 0xA4), ("cmps", 0xA6), ("stos", 0xAA), ("lods", 0xAC), ("scas", 0xAE))


@FLOW.kind(7)
def push(b: Builder) -> None:
    size, form = b.draw.of(b.stack_sizes()), b.draw.below(4)
    prefix = b.stack_prefix(size)
    if form == 0:
        b.put(prefix + b"\x6a" + b.immediate(8), "push")
    elif form == 1:
        b.put(prefix + b"\x68" + b.immediate(size), "push")
    elif form == 2:
        b.put(b.encoder.op(b"\x50", size, reg=b.register(), wide=False), "push")
    else:
        b.put(b.encoder.op(b"\xff", size, reg=6, rm=b.place(write=False), wide=False), "push")


@FLOW.kind(5)
def pop(b: Builder) -> None:
    size = b.draw.of(b.stack_sizes())
    if b.draw.one_in(3):
        b.put(b.encoder.op(b"\x8f", size, rm=b.place(), wide=False), "pop")
    else:
        b.put(b.encoder.op(b"\x58", size, reg=b.register(), wide=False), "pop")


@FLOW.kind(1, not_64)
def push_all(b: Builder) -> None:
    b.put(b.stack_prefix(b.draw.of(b.stack_sizes())) + b"\x60", "pusha")


@FLOW.kind(1, not_64)
def pop_all(b: Builder) -> None:
    b.put(b.stack_prefix(b.draw.of(b.stack_sizes())) + b"\x61", "popa")
    b.set(BP, BASE)


@FLOW.kind(3)
def push_flags(b: Builder) -> None:
    size = b.draw.of(b.stack_sizes())
    b.put(b.stack_prefix(size) + b"\x9c", "pushf")
    b.clear_image_tf(size)


@FLOW.kind(3)
def pop_flags(b: Builder) -> None:
    """Status flags, DF, IF, AC and ID; TF and NT stay clear."""
    size = b.draw.of(b.stack_sizes())
    value = b.draw.bits(32) & (STATUS | 0x400 | (0x24_0200 if size != 16 else 0x200)) | 2
    if b.setting.cpl:
        value |= 0x3000
    b.put(b.stack_prefix(size) + b"\x68" + value.to_bytes(2 if size == 16 else 4, "little"), "push")
    b.put(b.stack_prefix(size) + b"\x9d", "popf")


@FLOW.kind(1)
def frame(b: Builder) -> None:
    b.put(b"\xc8" + (b.draw.below(4) * 16).to_bytes(2, "little") + b"\0", "enter")
    b.put(b"\xc9", "leave")


@FLOW.kind(3, rare=True)
def nested_frame(b: Builder) -> None:
    """ENTER with a nesting level reads further frame pointers from the data."""
    b.put(b"\xc8" + (b.draw.below(4) * 16).to_bytes(2, "little") + bytes([b.draw.between(1, 3)]), "enter")
    b.put(b"\xc9", "leave")


@FLOW.kind(8)
def string(b: Builder) -> None:
    """Up to seven times, in either direction."""
    name, opcode = b.draw.of(_STRINGS)
    size = b.size()
    for reg in (SI, DI):
        b.set(reg, DATA + 0x40 + b.draw.below(0x160))
    _string_op(b, name, opcode, size, b.draw.of((0xA6, 0xAE)) == 0xA6)


def _string_op(b: Builder, name: str, opcode: int, size: int, segment: bool) -> None:
    prefix = b.draw.of((b"", b"\xf3", b"\xf2"))
    if prefix:
        b.set(CX, b.draw.below(8))
    if b.draw.one_in(6):
        prefix = b"\x67" + prefix
    if segment and b.draw.one_in(5):
        prefix = bytes([b.draw.of((0x2E, 0x36, 0x3E, 0x64, 0x65))]) + prefix
    code = b.encoder.op(bytes([opcode + int(size != 8)]), size, prefix=prefix)
    effect = effect_of(name)
    if b"\xf2" in prefix or b"\xf3" in prefix:
        # With a count of 0 the flags stay.
        effect = Effect(effect.reads, 0, effect.undefined)
    b.add(Instruction(code, name, effect))


@FLOW.kind(7)
def branch(b: Builder) -> None:
    """Over the next pieces."""
    form, skip = b.draw.below(6), b.draw.between(1, 3)
    if form == 0:
        near = b.draw.one_in(2)
        b.add(Instruction(b"\xe9" if near else b"\xeb", "jmp", Effect(), skip=skip if near else 1, near=near))
    elif form == 1:
        b.set(CX, b.draw.below(2))
        b.add(Instruction(b"\xe3", "jcxz", Effect(), skip=1))
    else:
        n = b.draw.below(16)
        effect = Effect(reads=CONDITION_READS[n])
        near = b.draw.one_in(2)
        code = bytes([0x0F, 0x80 + n]) if near else bytes([0x70 + n])
        b.add(Instruction(code, f"j{CONDITION_NAMES[n]}", effect, skip=skip if near else 1, near=near))


@FLOW.kind(3)
def loop(b: Builder) -> None:
    """LOOP around an addition, two to four times."""
    b.set(CX, b.draw.between(1, 4))
    reg = b.draw.of([reg for reg in b.encoder.registers if reg != CX])
    body = b.encoder.op(b"\x83", 32, rm=reg, reg=b.draw.of((0, 2, 3, 5)), immediate=b.immediate(8))
    name = ("add", "", "adc", "sbb", "", "sub")[body[-2] >> 3 & 7]
    b.define_flags()
    b.put(body, name)
    kind, opcode = b.draw.of((("loop", 0xE2), ("loop", 0xE2), ("loopz", 0xE1), ("loopnz", 0xE0)))
    b.put(bytes([opcode, (-len(body) - 2) & 0xFF]), kind)


@FLOW.kind(3)
def call(b: Builder) -> None:
    """CALL, an addition, RET, with or without taking bytes off the stack."""
    body = b.encoder.op(b"\x83", 32, rm=b.register(), immediate=b.immediate(8))
    release = b.draw.one_in(3)
    ret = b"\xc2\x08\x00" if release else b"\xc3"
    jump = b"\xeb" + bytes([len(body) + len(ret)])
    if b.draw.one_in(2):
        b.put(b"\xe8" + b.relative(len(jump)), "call")
        b.put(jump, "jmp")
        b.put(body, "add")
        b.put(ret, "ret")
        return
    # Through a register, from the address that another CALL pushes.
    reg = b.draw.of([reg for reg in b.encoder.registers if reg < 8])
    size = b.encoder.stack_size
    popped = b.encoder.op(b"\x58", size, reg=reg, wide=False)
    through = b.encoder.op(b"\xff", size, reg=2, rm=reg, wide=False)
    add_bytes = len(b.encoder.op(b"\x83", size, rm=reg, immediate=b"\0"))
    distance = len(popped) + add_bytes + len(through) + len(jump)
    b.put(b"\xe8" + b.relative(0), "call")
    b.put(popped, "pop")
    b.put(b.encoder.op(b"\x83", size, rm=reg, immediate=bytes([distance])), "add")
    b.put(through, "call")
    b.put(jump, "jmp")
    b.put(body, "add")
    b.put(ret, "ret")


@FLOW.kind(1)
def jump_register(b: Builder) -> None:
    reg = b.draw.of([reg for reg in b.encoder.registers if reg < 8])
    size = b.encoder.stack_size
    popped = b.encoder.op(b"\x58", size, reg=reg, wide=False)
    through = b.encoder.op(b"\xff", size, reg=4, rm=reg, wide=False)
    add_bytes = len(b.encoder.op(b"\x83", size, rm=reg, immediate=b"\0"))
    b.put(b"\xe8" + b.relative(0), "call")
    b.put(popped, "pop")
    distance = len(popped) + add_bytes + len(through)
    b.put(b.encoder.op(b"\x83", size, rm=reg, immediate=bytes([distance])), "add")
    b.put(through, "jmp")


@FLOW.kind(4)
def port(b: Builder) -> None:
    size = b.draw.of((8, 16, 32))
    wide, out = int(size != 8), b.draw.below(2)
    name = "out" if out else "in"
    if b.draw.one_in(2):
        number = SHORT_PORTS.start + b.draw.below(8)
        b.put(b.encoder.op(bytes([0xE4 + 2 * out + wide]), size, immediate=bytes([number])), name)
    else:
        b.set(DX, PORTS.start + b.draw.below(0x3C))
        b.put(b.encoder.op(bytes([0xEC + 2 * out + wide]), size), name)


@FLOW.kind(2)
def port_string(b: Builder) -> None:
    name, opcode = b.draw.of((("ins", 0x6C), ("outs", 0x6E)))
    b.set(DX, PORTS.start + b.draw.below(0x3C))
    for reg in (SI, DI):
        b.set(reg, DATA + 0x40 + b.draw.below(0x160))
    _string_op(b, name, opcode, b.draw.of((8, 16, 32)), name == "outs")


def _hole(b: Builder) -> Memory:
    address = b.setting.hole + b.draw.below(0x100) * 8 + b.draw.of((0, 0, 0, 1, 4))
    if b.setting.mode == "real":
        return Memory(address - b.setting.hole, base=False, segment=0x26)
    return Memory(address, base=False, other_width=b.setting.bits == 16)


@FLOW.kind(4)
def hole(b: Builder) -> None:
    """Accesses to a page without memory: KVM's instruction emulator makes them on every host."""
    real = b.setting.mode == "real"
    if real:
        # push es; push 0x9000; pop es
        b.put(b"\x06", "push_seg")
        b.put(b"\x68" + (b.setting.hole >> 4).to_bytes(2, "little"), "push")
        b.put(b"\x07", "pop_seg")
    size, reg, rm = b.size(), b.register(), _hole(b)
    wide = int(size != 8)
    form = b.draw.below(6)
    if form == 0:
        b.put(b.encoder.op(bytes([0x88 + wide]), size, reg=reg, rm=rm), "mov")
    elif form == 1:
        b.put(b.encoder.op(bytes([0x8A + wide]), size, reg=reg, rm=rm), "mov")
    elif form == 2:
        op = b.encoder.op(bytes([0xC6 + wide]), size, rm=rm, immediate=b.immediate(size), low_bytes=False)
        b.put(op, "mov")
    elif form == 3:
        opcode = b.draw.of((0xB6, 0xB7, 0xBE, 0xBF))
        name = "movzx" if opcode < 0xB8 else "movsx"
        b.put(b.encoder.op(bytes([0x0F, opcode]), b.wide_size(), reg=reg, rm=rm, byte_rm=True), name)
    elif form == 4:
        n = b.draw.of((0, 1, 4, 5, 6, 7))
        name = ("add", "or", "", "", "and", "sub", "xor", "cmp")[n]
        b.put(b.encoder.op(bytes([n * 8 + wide + 2 * b.draw.below(2)]), size, reg=reg, rm=rm), name)
    else:
        name, opcode = b.draw.of((("movs", 0xA4), ("stos", 0xAA)))
        if real or b.setting.bits == 16:
            b.put(b"\x90", "nop")
        else:
            b.set(SI, DATA + 0x40 + b.draw.below(0x160))
            b.set(DI, b.setting.hole + 0x100 + b.draw.below(0x100))
            b.set(CX, b.draw.below(5))
            b.put(b.encoder.op(bytes([opcode + wide]), size, prefix=b.draw.of((b"", b"\xf3"))), name)
    if real:
        b.put(b"\x07", "pop_seg")


@FLOW.kind(1, is_64)
def relative_address(b: Builder) -> None:
    """LEA of an address relative to RIP: the only operand that depends on where the code lies."""
    b.put(
        b.encoder.op(b"\x8d", b.draw.of((32, 64)), reg=b.register(), rm=5)[:-1] + bytes([0x05]) + b.immediate(32), "lea"
    )
