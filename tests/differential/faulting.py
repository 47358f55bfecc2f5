"""Pieces that raise exceptions. Each first says where its handler is to return to: the next piece.

The handlers (tables.py) count, note the error code and where it happened, and return there.
"""

from __future__ import annotations

from .effects import Effect
from .encoding import AX, CX, DX, Instruction
from .ordinary import is_64, not_64
from .piece import Builder, Catalogue
from .setting import RESUME, Setting

FAULTING = Catalogue()


def _kernel(setting: Setting) -> bool:
    return setting.cpl == 0


def _user(setting: Setting) -> bool:
    return setting.cpl == 3


def _paged(setting: Setting) -> bool:
    return setting.paged


def _protected(setting: Setting) -> bool:
    return setting.mode != "real"


def _resume_next(b: Builder) -> None:
    # MOV [RESUME], the address of the next piece. The operand size is the code's; 64 bits extend 32.
    width = 2 if b.setting.bits == 16 else 4
    if b.setting.bits == 64:
        code = b"\x48\xc7\x04\x25" + RESUME.to_bytes(4, "little") + bytes(4)
    elif b.setting.bits == 32:
        code = b"\xc7\x05" + RESUME.to_bytes(4, "little") + bytes(4)
    else:
        code = b"\xc7\x06" + RESUME.to_bytes(2, "little") + bytes(2)
    b.add(Instruction(code, "mov", Effect(), resume=(len(code) - width, width, 0)))
    b.define_flags()


@FAULTING.kind(4)
def undefined(b: Builder) -> None:
    """#UD by UD2."""
    _resume_next(b)
    b.put(b"\x0f\x0b", "ud2", faults=True)


@FAULTING.kind(2)
def bad_lock(b: Builder) -> None:
    """#UD: LOCK where it must not be."""
    _resume_next(b)
    name, code = b.draw.of(
        (("lock_mov", b"\xf0\x89\xc0"), ("lock_nop", b"\xf0\x90"), ("lock_cmp", b"\xf0\x39\x45\x10"))
    )
    b.put(code, name, faults=True)


@FAULTING.kind(4, rare=True)
def undefined_else(b: Builder) -> None:
    """#UD by UD1 and by an opcode that nothing has."""
    _resume_next(b)
    name, code = b.draw.of((("ud1", b"\x0f\xb9\xc0"), ("fe_7", b"\xfe\xf8")))
    b.put(code, name, faults=True)


@FAULTING.kind(4)
def divide_error(b: Builder) -> None:
    """#DE: by zero, or with a quotient that does not fit."""
    _resume_next(b)
    size = b.size()
    other = b.draw.of((1, 3))
    if b.draw.one_in(2):
        b.set(other, 0)
    else:
        b.set(other, 1)
        b.set(AX, 0x8000, 32)
        b.set(DX, 0x7FFF_FFFF, 32)
    extension = b.draw.of((6, 7))
    b.define_flags()
    code = b.encoder.op(bytes([0xF6 + int(size != 8)]), size, reg=extension, rm=other, low_bytes=False)
    b.put(code, "div", faults=True)


def _interrupt(b: Builder) -> None:
    _resume_next(b)
    if b.setting.bits != 64 and b.draw.one_in(3):
        b.put(b"\xce", "into", faults=True)
    elif b.draw.one_in(3):
        b.put(b"\xcc", "int3", faults=True)
    else:
        b.put(bytes([0xCD, b.draw.between(0x20, 0x3F)]), "int", faults=True)


@FAULTING.kind(4, lambda setting: setting.mode == "real")
def real_interrupt(b: Builder) -> None:
    """INT n, INT3, INTO."""
    _interrupt(b)


@FAULTING.kind(8, _protected, rare=True)
def software_interrupt(b: Builder) -> None:
    """INT n, INT3, INTO."""
    _interrupt(b)


@FAULTING.kind(6, not_64, rare=True)
def bound(b: Builder) -> None:
    """#BR, or not."""
    _resume_next(b)
    b.put(b.encoder.op(b"\x62", b.wide_size(), reg=b.register(), rm=b.memory()), "bound", faults=True)


@FAULTING.kind(4, _protected)
def bad_selector(b: Builder) -> None:
    """#GP, #NP and #SS: selectors beyond the table, of a wrong type, or not present."""
    _resume_next(b)
    b.set(AX, b.draw.of((0xFFF8, 0x08, 0x38, 0x70, 0x78, 0x80, 0x04)), 32)
    n = b.draw.of((0, 3, 4, 5))
    b.put(b.encoder.op(b"\x8e", 32 if b.setting.bits != 16 else 16, reg=n, rm=AX), "mov_seg", faults=True)
    # What follows wants ES and DS flat; and QEMU looks at no limit and no right when data is accessed, so that FS and
    # GS must be as before too.
    flat = (0x28 | 3) if b.setting.cpl else 0x18
    for each, selector in ((0, flat), (3, flat), (4, 0x58 | 3), (5, 0x60 | 3)):
        if b.setting.bits != 64 or each > 3:
            b.set(AX, selector, 32)
            b.put(b.encoder.op(b"\x8e", 32 if b.setting.bits != 16 else 16, reg=each, rm=AX), "mov_seg")


@FAULTING.kind(4, _paged)
def page_fault(b: Builder) -> None:
    """#PF: reads and writes where nothing is mapped."""
    _resume_next(b)
    reg = b.draw.of((1, 3, 6, 7))
    b.set(reg, 0x4000_0000 + b.draw.bits(24))
    opcode = b.draw.of((0x88, 0x89, 0x8A, 0x8B, 0x03, 0x01 if b.draw.one_in(4) else 0x89))
    size = 8 if opcode in (0x88, 0x8A) else b.wide_size()
    b.define_flags()
    code = b.encoder.op(bytes([opcode]), size, reg=AX, rm=0, low_bytes=False)
    b.put(code[:-1] + bytes([reg]), "mov", faults=True)


@FAULTING.kind(3, _user)
def privileged(b: Builder) -> None:
    """#GP: what CPL 3 may not do."""
    _resume_next(b)
    name, code = b.draw.of(
        (
            ("hlt", b"\xf4"), ("clts", b"\x0f\x06"), ("mov_cr", b"\x0f\x20\xc0"), ("mov_cr", b"\x0f\x22\xd8"),
            ("wrmsr", b"\x0f\x30"), ("rdmsr", b"\x0f\x32"), ("wbinvd", b"\x0f\x09"),
        )
    )  # fmt: skip
    b.put(code, name, faults=True)


@FAULTING.kind(3, _kernel)
def bad_control(b: Builder) -> None:
    """#GP: reserved bits of control registers, and MSRs that do not exist."""
    _resume_next(b)
    form = b.draw.below(3)
    if form == 0 and b.setting.mode != "real":
        b.set(AX, 0x8000_0000, 32)  # PG without PE
        b.define_flags()
        b.put(b"\x0f\x22\xc0", "mov_cr", faults=True)
    elif form == 1:
        b.set(AX, 1 << 31, 32)  # reserved in CR4 (SDM volume 3, "Control Registers")
        b.define_flags()
        b.put(b"\x0f\x22\xe0", "mov_cr", faults=True)
    else:
        b.set(CX, 0x4000_1234, 32)
        b.define_flags()
        b.put(b"\x0f\x32", "rdmsr", faults=True)


@FAULTING.kind(2, is_64)
def not_canonical(b: Builder) -> None:
    """#GP and, through the stack, #SS."""
    _resume_next(b)
    b.set(1, 0x8000_0000_0000_0000 | b.draw.bits(32), 64)
    b.put(b"\x8b\x01", "mov", faults=True)


@FAULTING.kind(3)
def trap_flag(b: Builder) -> None:
    """#DB by the guest's own TF, after the instruction behind POPF."""
    _resume_next(b)
    size = b.encoder.stack_size
    value = (0x3000 if b.setting.cpl else 0) | 0x102
    b.put(b"\x68" + value.to_bytes(2 if size == 16 else 4, "little"), "push")
    b.put(b"\x9d", "popf")
    b.put(b.draw.of((b"\x90", b"\x89\xc0", b"\x87\xdb")), "nop", faults=True)
