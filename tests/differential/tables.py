"""The GDT, the IDT and the handlers of a setting: placed once a machine, the same for all guests.

A handler counts its vector, notes the error code and the address of the instruction, puts the address at RESUME
in the frame, and returns there. In the frame's flags it clears TF, which may be ours, and RF: a fault pushes it
set (SDM volume 3, "Instruction-Breakpoint Exception Condition"), but QEMU does not.
"""

from __future__ import annotations

from functools import cache

from kvmbench.kvm.segment import Segment
from kvmbench.machine import segment as seg
from kvmbench.machine.assembly import assemble

from .setting import COUNTS, FIXED, FS_BASE, GS_BASE, RESUME, Setting

GDT, IDT, HANDLERS = FIXED, FIXED + 0x100, FIXED + 0x600
VECTORS = 64
_WITH_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))
# What the descriptors of kvmbench.machine.boot are, and behind them ours.
_OWN_DESCRIPTORS = 0x58

# On the stack: {b}, {a}, the vector, the error code (0 where there is none), IP, CS, FLAGS, and in 64 bits RSP, SS.
_COMMON = """
common:
    push {a}
    push {b}
    mov {b}, [{sp} + {w} * 2]
    inc byte ptr [{b} + {counts}]
    mov {a}, [{sp} + {w} * 3]
    mov [{resume} + 8], {a}
    mov {a}, [{sp} + {w} * 4]
    mov [{resume} + 16], {a}
    mov {a}, [{resume}]
    mov [{sp} + {w} * 4], {a}
    and {flags} ptr [{sp} + {w} * 6], {kept_flags}
"""
_BY_IRET = """
    pop {b}
    pop {a}
    lea {sp}, [{sp} + {w} * 2]
    {iret}
"""
# KVM's instruction emulator has no IRET outside real mode, so at CPL 0 the return is made of POPF and RETF.
_BY_RETF = {
    32: """
    push [esp + 24]
    popf
    pop ebx
    pop eax
    lea esp, [esp + 8]
    retf 4
""",
    # The stack pointer is that of the frame, which the processor has aligned.
    64: """
    push [rsp + 48]
    popf
    mov rbx, [rsp + 56]
    mov rax, [rsp + 40]
    mov [rbx - 8], rax
    mov rax, [rsp + 32]
    mov [rbx - 16], rax
    mov rax, [rsp]
    mov [rbx - 24], rax
    mov rax, [rsp + 8]
    lea rsp, [rbx - 24]
    pop rbx
    retfq
""",
}


@cache
def fixed_block(setting: Setting, boot_gdt: bytes) -> bytes:
    """What lies from FIXED on."""
    block = bytearray(0x900)
    gdt = gdt_bytes(boot_gdt)
    block[: len(gdt)] = gdt
    code, stubs = handlers(setting)
    block[HANDLERS - FIXED : HANDLERS - FIXED + len(code)] = code
    if setting.mode != "real":
        bits, selector = (64, 0x10) if setting.mode == "long" else (32, 0x08)
        idt = b"".join(seg.encode_gate(address, selector, bits=bits, dpl=3) for address in stubs)
        block[IDT - FIXED : IDT - FIXED + len(idt)] = idt
    return bytes(block)


def real_vectors(setting: Setting) -> bytes:
    """The interrupt vectors of real mode, for gpa 0."""
    return b"".join(address.to_bytes(4, "little") for address in handlers(setting)[1])


def gdt_bytes(boot_gdt: bytes) -> bytes:
    """The boot GDT and six descriptors more."""
    assert len(boot_gdt) == _OWN_DESCRIPTORS
    own = (
        Segment(0x58, FS_BASE, 0xFFFF_FFFF, seg.TYPE_DATA, 3, db=1, g=1),
        Segment(0x60, GS_BASE, 0xFFFF_FFFF, seg.TYPE_DATA, 3, db=1, g=1),
        Segment(0x68, 0, 0xFFFF_FFFF, 0xF, 0, db=1, g=1),  # conforming code
        Segment(0x70, 0, 0xFFFF, 0x1, 3, db=1),  # read-only data
        Segment(0x78, 0, 0xFFFF_FFFF, seg.TYPE_DATA, 3, present=0, db=1, g=1),
        Segment(0x80, 0, 0xFFF, 0x9, 0, db=1, g=1),  # code that cannot be read
    )
    return boot_gdt + b"".join(seg.encode_descriptor(each) for each in own)


@cache
def handlers(setting: Setting) -> tuple[bytes, tuple[int, ...]]:
    """Code of all handlers, and where each begins."""
    width = 16 if setting.mode == "real" else 64 if setting.mode == "long" else 32
    a, b, sp, iret = {
        16: ("ax", "bx", "esp", "iret"),
        32: ("eax", "ebx", "esp", "iretd"),
        64: ("rax", "rbx", "rsp", "iretq"),
    }[width]
    stubs = []
    for vector in range(VECTORS):
        error = "" if vector in _WITH_ERROR_CODE and setting.mode != "real" else "push 0\n"
        stubs.append(f"v{vector}:\n{error}push {vector}\njmp common\n")
    by_retf = setting.cpl == 0 and setting.mode != "real"
    common = _COMMON + (_BY_RETF[width] if by_retf else _BY_IRET)
    common = common.format(
        a=a,
        b=b,
        sp=sp,
        iret=iret,
        w=width // 8,
        counts=hex(COUNTS),
        resume=hex(RESUME),
        flags="word" if width == 16 else "dword",
        kept_flags="0xfeff" if width == 16 else "0xfffefeff",
    )
    program = assemble(common + "".join(stubs), HANDLERS, width)
    code = program.segments[0][1]
    assert len(code) <= 0x300
    return code, tuple(program.symbols[f"v{vector}"] for vector in range(VECTORS))
