"""Pieces of ordinary programs: arithmetic, moves, bits, shifts, flags."""

from __future__ import annotations

from .effects import CONDITION_NAMES, CONDITION_READS, Effect
from .encoding import AX, CX, DX, Instruction, Memory, shift
from .piece import Builder, Catalogue
from .setting import DATA, Setting

ORDINARY = Catalogue()
_ALU = ("add", "or", "adc", "sbb", "and", "sub", "xor", "cmp")
_SHIFT_NAMES = ("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar")


def not_64(setting: Setting) -> bool:
    """For instructions that 64-bit code has not got."""
    return setting.bits != 64


def is_64(setting: Setting) -> bool:
    """For instructions that only 64-bit code has."""
    return setting.bits == 64


def _lock(b: Builder, rm: int | Memory) -> bytes:
    return b"\xf0" if isinstance(rm, Memory) and b.draw.one_in(4) else b""


@ORDINARY.kind(10)
def arithmetic(b: Builder) -> None:
    n, size = b.draw.below(8), b.size()
    name, wide = _ALU[n], int(size != 8)
    form = b.draw.below(5)
    reg = b.register()
    if form == 0:
        b.put(b.encoder.op(bytes([n * 8 + 4 + wide]), size, immediate=b.immediate(size)), name)
    elif form == 1:
        rm = b.place(write=False, keep=(reg,))
        b.put(b.encoder.op(bytes([n * 8 + 2 + wide]), size, reg=reg, rm=rm), name)
    elif form == 2:
        rm = b.place(keep=(reg,))
        lock = _lock(b, rm) if n != 7 else b""
        b.put(b.encoder.op(bytes([n * 8 + wide]), size, reg=reg, rm=rm, prefix=lock), name)
    else:
        rm = b.place()
        lock = _lock(b, rm) if n != 7 else b""
        short = form == 4 and size != 8
        opcode = b"\x83" if short else bytes([0x80 + wide])
        immediate = b.immediate(8) if short else b.immediate(size)
        b.put(b.encoder.op(opcode, size, reg=n, rm=rm, immediate=immediate, prefix=lock, low_bytes=False), name)


@ORDINARY.kind(5)
def one_operand(b: Builder) -> None:
    size, rm = b.size(), b.place()
    wide = int(size != 8)
    name = b.draw.of(("inc", "dec", "not", "neg"))
    opcode, extension = {"inc": (0xFE, 0), "dec": (0xFE, 1), "not": (0xF6, 2), "neg": (0xF6, 3)}[name]
    lock = _lock(b, rm)
    b.put(b.encoder.op(bytes([opcode + wide]), size, reg=extension, rm=rm, prefix=lock, low_bytes=False), name)


@ORDINARY.kind(1, not_64)
def short_inc(b: Builder) -> None:
    down = b.draw.below(2)
    b.put(b.encoder.op(bytes([0x40 + 8 * down]), b.wide_size(), reg=b.register()), "dec" if down else "inc")


@ORDINARY.kind(4)
def test(b: Builder) -> None:
    size, form = b.size(), b.draw.below(3)
    wide = int(size != 8)
    if form == 0:
        b.put(b.encoder.op(bytes([0xA8 + wide]), size, immediate=b.immediate(size)), "test")
    elif form == 1:
        reg = b.register()
        b.put(b.encoder.op(bytes([0x84 + wide]), size, reg=reg, rm=b.place(write=False, keep=(reg,))), "test")
    else:
        rm = b.place(write=False)
        op = b.encoder.op(bytes([0xF6 + wide]), size, rm=rm, immediate=b.immediate(size), low_bytes=False)
        b.put(op, "test")


@ORDINARY.kind(8)
def move(b: Builder) -> None:
    size, form, reg = b.size(), b.draw.below(6), b.register()
    wide = int(size != 8)
    if form == 0:
        b.put(b.encoder.op(bytes([0x88 + wide]), size, reg=reg, rm=b.place(keep=(reg,))), "mov")
    elif form == 1:
        b.put(b.encoder.op(bytes([0x8A + wide]), size, reg=reg, rm=b.place(write=False)), "mov")
    elif form == 2:
        rm = b.place()
        op = b.encoder.op(bytes([0xC6 + wide]), size, rm=rm, immediate=b.immediate(size), low_bytes=False)
        b.put(op, "mov")
    elif form == 3:
        b.set(reg, b.draw.value(64 if b.setting.bits == 64 else 32))
    elif form == 4:
        address = (DATA + b.draw.below(0x1F0)).to_bytes(b.setting.bits // 8, "little")
        opcode = bytes([0xA0 + 2 * b.draw.below(2) + wide])
        b.put(b.encoder.op(opcode, size, immediate=address), "mov")
    else:
        b.put(b.encoder.op(b"\x8d", b.wide_size(), reg=reg, rm=b.memory()), "lea")


@ORDINARY.kind(4)
def extend(b: Builder) -> None:
    size, form = b.wide_size(), b.draw.below(3)
    if form == 0:
        half = b.draw.below(2)
        b.put(b.encoder.op(bytes([0x98 + half]), size), "cwd" if half else "cbw")
        return
    if form == 1 and b.setting.bits == 64:
        b.put(b.encoder.op(b"\x63", 64, reg=b.register(), rm=b.place(write=False)), "movsxd")
        return
    name, opcode = b.draw.of((("movzx", 0xB6), ("movzx", 0xB7), ("movsx", 0xBE), ("movsx", 0xBF)))
    byte_rm = opcode in (0xB6, 0xBE)
    rm = b.place(write=False)
    b.put(b.encoder.op(bytes([0x0F, opcode]), size, reg=b.register(), rm=rm, byte_rm=byte_rm), name)


@ORDINARY.kind(4)
def exchange(b: Builder) -> None:
    size, reg = b.size(), b.register()
    wide = int(size != 8)
    name = b.draw.of(("xchg", "xadd", "cmpxchg"))
    opcode = {"xchg": b"\x86", "xadd": b"\x0f\xc0", "cmpxchg": b"\x0f\xb0"}[name]
    rm = b.place(keep=(reg,))
    op = opcode[:-1] + bytes([opcode[-1] + wide])
    b.put(b.encoder.op(op, size, reg=reg, rm=rm, prefix=_lock(b, rm)), name)


@ORDINARY.kind(1)
def compare_double(b: Builder) -> None:
    pairs = b.setting.bits == 64 and b.draw.one_in(4)
    rm = b.memory(aligned=16 if pairs else 1)
    name = "cmpxchg16b" if pairs else "cmpxchg8b"
    size = 64 if pairs else 32
    code = b.encoder.op(b"\x0f\xc7", size, reg=1, rm=rm, prefix=_lock(b, rm))
    if b.setting.bits == 16:
        code = b.encoder.op(b"\x0f\xc7", 16, reg=1, rm=rm, prefix=_lock(b, rm))
    b.put(code, name)


@ORDINARY.kind(2)
def swap_bytes(b: Builder) -> None:
    size = b.draw.of([size for size in b.encoder.sizes if size >= 32])
    b.put(b.encoder.op(b"\x0f\xc8", size, reg=b.register()), "bswap")


@ORDINARY.kind(9)
def shifts(b: Builder) -> None:
    n, size, form = b.draw.below(8), b.size(), b.draw.below(3)
    wide = int(size != 8)
    rm = b.place(keep=(CX,))
    if form == 0:
        b.add(shift(b.encoder.op(bytes([0xD0 + wide]), size, reg=n, rm=rm, low_bytes=False), _SHIFT_NAMES[n], size, 1))
    elif form == 1:
        if b.draw.one_in(2):
            code = b.encoder.op(
                b"\xb0", 8, reg=CX, immediate=bytes([b.draw.of((0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65))])
            )
            b.put(code, "mov")
        code = b.encoder.op(bytes([0xD2 + wide]), size, reg=n, rm=rm, low_bytes=False)
        b.add(shift(code, _SHIFT_NAMES[n], size, None))
    else:
        count = b.draw.of((0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, b.draw.below(256)))
        code = b.encoder.op(bytes([0xC0 + wide]), size, reg=n, rm=rm, immediate=bytes([count]), low_bytes=False)
        b.add(shift(code, _SHIFT_NAMES[n], size, count))


@ORDINARY.kind(3)
def double_shifts(b: Builder) -> None:
    size, reg = b.wide_size(), b.register()
    name, opcode = b.draw.of((("shld", 0xA4), ("shrd", 0xAC)))
    # Above the operand's size the result itself is undefined (SDM volume 2, "SHLD"): 16 bits have counts to 15.
    if b.draw.one_in(2):
        rm = b.place(keep=(reg,))
        count = b.draw.below(16) if size == 16 else b.draw.below(256)
        code = b.encoder.op(bytes([0x0F, opcode]), size, reg=reg, rm=rm, immediate=bytes([count]))
        b.add(shift(code, name, size, count))
    else:
        rm = b.place(keep=(reg, CX))
        if size == 16:
            b.put(b"\x80\xe1\x0f", "and")  # AND CL, 15
        b.add(shift(b.encoder.op(bytes([0x0F, opcode + 1]), size, reg=reg, rm=rm), name, size, None))


@ORDINARY.kind(3)
def multiply(b: Builder) -> None:
    size, form = b.size(), b.draw.below(3)
    wide = int(size != 8)
    if form == 0:
        name = b.draw.of(("mul", "imul"))
        extension = {"mul": 4, "imul": 5}[name]
        rm = b.place(write=False)
        b.put(b.encoder.op(bytes([0xF6 + wide]), size, reg=extension, rm=rm, low_bytes=False), name)
        return
    size = b.wide_size()
    reg = b.register()
    if form == 1:
        b.put(b.encoder.op(b"\x0f\xaf", size, reg=reg, rm=b.place(write=False, keep=(reg,))), "imul")
    else:
        short = b.draw.below(2)
        rm = b.place(write=False)
        immediate = b.immediate(8 if short else size)
        b.put(b.encoder.op(b"\x6b" if short else b"\x69", size, reg=reg, rm=rm, immediate=immediate), "imul")


@ORDINARY.kind(3)
def divide(b: Builder) -> None:
    """The operands are chosen so that the quotient fits."""
    size, signed = b.size(), b.draw.one_in(2)
    if signed:
        divisor = max(1, b.draw.value(size - 1)) * b.draw.of((1, -1))
        quotient = b.draw.value(size - 1) * b.draw.of((1, -1))
        rest = b.draw.below(min(abs(divisor), 1 << 31))
        product = quotient * divisor
        dividend = product + (rest if product >= 0 else -rest)
    else:
        divisor = max(1, b.draw.value(size))
        quotient = b.draw.value(size)
        dividend = quotient * divisor + b.draw.below(min(divisor, 1 << 32))
    dividend &= (1 << 2 * size) - 1
    low, high = dividend & (1 << size) - 1, dividend >> size
    other = b.draw.of([reg for reg in b.encoder.registers if reg not in (AX, DX) and (size > 8 or reg < 4)])
    if size == 8:
        b.set(AX, dividend & 0xFFFF, 16)
        b.put(b.encoder.op(b"\xb0", 8, reg=other, immediate=bytes([divisor & 0xFF])), "mov")
    else:
        b.set(AX, low, size)
        b.set(DX, high, size)
        b.set(other, divisor & (1 << size) - 1, size)
    name, extension = ("idiv", 7) if signed else ("div", 6)
    b.put(b.encoder.op(bytes([0xF6 + int(size != 8)]), size, reg=extension, rm=other, low_bytes=False), name)


@ORDINARY.kind(4)
def bits(b: Builder) -> None:
    size, reg = b.wide_size(), b.register()
    n = b.draw.below(4)
    name = ("bt", "bts", "btr", "btc")[n]
    rm = b.place(keep=(reg,))
    lock = _lock(b, rm) if n else b""
    if b.draw.one_in(2):
        immediate = bytes([b.draw.below(256)])
        b.put(b.encoder.op(b"\x0f\xba", size, reg=4 + n, rm=rm, immediate=immediate, prefix=lock), name)
        return
    if isinstance(rm, Memory):
        # The offset reaches beyond the operand: within the data, to both sides.
        b.set(reg, b.draw.between(-128, 127) & (1 << size) - 1, size)
    b.put(b.encoder.op(bytes([0x0F, 0xA3 + 8 * n]), size, reg=reg, rm=rm, prefix=lock), name)


@ORDINARY.kind(2)
def scan(b: Builder) -> None:
    """With a source that is not 0, as the result would be undefined."""
    size, source = b.wide_size(), b.register()
    b.set(source, max(1, b.draw.value(size)), size)
    name, opcode = b.draw.of((("bsf", 0xBC), ("bsr", 0xBD)))
    b.put(b.encoder.op(bytes([0x0F, opcode]), size, reg=b.register(), rm=source), name)


@ORDINARY.kind(3)
def flag_bits(b: Builder) -> None:
    name, code = b.draw.of(
        (("clc", 0xF8), ("stc", 0xF9), ("cmc", 0xF5), ("cld", 0xFC), ("std", 0xFD), ("lahf", 0x9F), ("sahf", 0x9E))
    )
    b.put(bytes([code]), name)


@ORDINARY.kind(4)
def set_condition(b: Builder) -> None:
    n = b.draw.below(16)
    code = b.encoder.op(bytes([0x0F, 0x90 + n]), 8, rm=b.place(), low_bytes=False)
    b.add(Instruction(code, f"set{CONDITION_NAMES[n]}", Effect(reads=CONDITION_READS[n])))


@ORDINARY.kind(3)
def move_condition(b: Builder) -> None:
    n = b.draw.below(16)
    code = b.encoder.op(bytes([0x0F, 0x40 + n]), b.wide_size(), reg=b.register(), rm=b.place(write=False))
    b.add(Instruction(code, f"cmov{CONDITION_NAMES[n]}", Effect(reads=CONDITION_READS[n])))


@ORDINARY.kind(2, not_64)
def decimal(b: Builder) -> None:
    name, code = b.draw.of((("das", 0x2F), ("aam", 0xD4), ("aad", 0xD5), ("salc", 0xD6)))
    base = bytes([b.draw.of((10, 16, b.draw.between(1, 255)))]) if name in ("aam", "aad") else b""
    b.put(bytes([code]) + base, name)


@ORDINARY.kind(4, not_64, rare=True)
def rare_decimal(b: Builder) -> None:
    name, code = b.draw.of((("daa", 0x27), ("aaa", 0x37), ("aas", 0x3F)))
    b.put(bytes([code]), name)


@ORDINARY.kind(1)
def translate(b: Builder) -> None:
    b.set(3, DATA)
    b.put(b"\xd7", "xlat")


@ORDINARY.kind(2)
def nothing(b: Builder) -> None:
    name, code = b.draw.of(
        (
            ("nop", b"\x90"), ("nop", b"\x66\x90"), ("nop", b"\x0f\x1f\x00"), ("nop", b"\x0f\x1f\xc0"),
            ("pause", b"\xf3\x90"),
        )
    )  # fmt: skip
    b.put(code, name)
