"""Pieces of system software: segments, control and debug registers, MSRs, interrupt flag, far transfers."""

from __future__ import annotations

from .encoding import AX, CX, DX, Memory
from .ordinary import not_64
from .piece import Builder, Catalogue
from .setting import Setting, leaf_entry

PRIVILEGED = Catalogue()
# Descriptors of the setting's GDT (tables.py): flat data, flat data with another base, the null selector.
LOADABLE = (0x18, 0x28 | 3, 0x58, 0x60)
_MSRS = (0x174, 0x175, 0x176)  # SYSENTER_CS, _ESP, _EIP
_LONG_MSRS = (0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102)
_SEGMENTS = {0: "es", 2: "ss", 3: "ds", 4: "fs", 5: "gs"}


def kernel(setting: Setting) -> bool:
    """At CPL 0."""
    return setting.cpl == 0


def _protected(setting: Setting) -> bool:
    return setting.mode != "real"


def _selector(b: Builder) -> int:
    if b.setting.mode == "real":
        return b.draw.of((0, 1, 4, 8))
    return b.draw.of((0x28 | 3, 0x58 | 3, 0x60 | 3) if b.setting.cpl else LOADABLE)


@PRIVILEGED.kind(4)
def load_segment(b: Builder) -> None:
    """FS or GS, with another base each time."""
    n = b.draw.of((4, 5))
    form, selector = b.draw.below(3), _selector(b)
    if form == 0:
        b.set(AX, selector, 32)
        b.put(b.encoder.op(b"\x8e", 16 if b.setting.bits == 16 else 32, reg=n, rm=AX), "mov_seg")
    elif form == 1:
        b.put(b"\x68" + selector.to_bytes(2 if b.setting.bits == 16 else 4, "little"), "push")
        b.put(bytes([0x0F, 0xA1 if n == 4 else 0xA9]), "pop_seg")
    else:
        b.push_segment(bytes([0x0F, 0xA0 if n == 4 else 0xA8]))


@PRIVILEGED.kind(2)
def store_segment(b: Builder) -> None:
    n = b.draw.of((0, 1, 2, 3, 4, 5))
    b.put(b.encoder.op(b"\x8c", b.wide_size(), reg=n, rm=b.register()), "mov_seg")


@PRIVILEGED.kind(2, not_64)
def same_segment(b: Builder) -> None:
    """ES or DS, saved and loaded again."""
    first, second = b.draw.of(((0x06, 0x07), (0x1E, 0x1F)))
    b.push_segment(bytes([first]))
    b.put(bytes([second]), "pop_seg")


@PRIVILEGED.kind(2)
def stack_segment(b: Builder) -> None:
    """SS loaded with itself: the instruction after it runs under the shadow."""
    b.put(b.encoder.op(b"\x8c", 16 if b.setting.bits == 16 else 32, reg=2, rm=AX), "mov_seg")
    if b.draw.one_in(2) and b.setting.bits != 64:
        b.put(b"\x50", "push")
        b.put(b"\x17", "pop_ss")
    else:
        b.put(b"\x8e\xd0", "mov_ss")
    b.put(b.encoder.set_register(b.register(), b.draw.value(32)), "mov")


@PRIVILEGED.kind(2, not_64)
def load_far_pointer(b: Builder) -> None:
    """LFS or LGS from a pointer on the stack."""
    selector, n = _selector(b), b.draw.below(2)
    size = b.encoder.stack_size
    width = size // 8
    b.put(b"\x68" + selector.to_bytes(width, "little"), "push")
    b.put(b"\x68" + b.draw.value(size).to_bytes(width, "little"), "push")
    address = b"\x67" if b.setting.bits == 16 else b""
    # [esp]: the offset, and behind it the selector.
    b.put(address + bytes([0x0F, 0xB4 + n, 0x04 | b.draw.of((0, 3, 6, 7)) << 3, 0x24]), "load_far")


@PRIVILEGED.kind(2)
def far_return(b: Builder) -> None:
    """CS and an address pushed, and RETF to it."""
    if b.setting.bits == 64:
        b.put(b"\x8c\xc8", "mov_seg")
        b.put(b"\x50", "push")
        ret = b"\x48\xcb"
    else:
        b.push_segment(b"\x0e")
        ret = b"\xcb"
    b.put(b"\xe8" + b.relative(2), "call")
    b.put(b"\xeb" + bytes([len(ret)]), "jmp")
    b.put(ret, "retf")


@PRIVILEGED.kind(3, lambda setting: setting.mode == "real")
def real_interrupt_return(b: Builder) -> None:
    """A frame made by hand, and IRET through it."""
    interrupt_return(b)


@PRIVILEGED.kind(6, _protected, rare=True)
def interrupt_return(b: Builder) -> None:
    """A frame made by hand, and IRET through it."""
    if b.setting.bits == 64:
        b.put(b"\x8c\xd0", "mov_seg")  # mov eax, ss
        b.put(b"\x50", "push")
        b.put(b"\x48\x8d\x44\x24\x08", "lea")  # lea rax, [rsp + 8]
        b.put(b"\x50", "push")
        b.put(b"\x9c", "pushf")
        b.clear_image_tf(64)
        b.put(b"\x8c\xc8", "mov_seg")  # mov eax, cs
        b.put(b"\x50", "push")
        ret = b"\x48\xcf"
    else:
        b.put(b"\x9c", "pushf")
        b.clear_image_tf(b.setting.bits)
        b.push_segment(b"\x0e")
        ret = b"\xcf"
    b.put(b"\xe8" + b.relative(2), "call")
    b.put(b"\xeb" + bytes([len(ret)]), "jmp")
    b.put(ret, "iret")


@PRIVILEGED.kind(3, kernel)
def interrupt_flag(b: Builder) -> None:
    name, code = b.draw.of((("cli", 0xFA), ("sti", 0xFB)))
    b.put(bytes([code]), name)


@PRIVILEGED.kind(3, kernel)
def control_register(b: Builder) -> None:
    """CR0 and CR4 read, CR2 and CR3 read and written; CR3 with itself."""
    form = b.draw.below(4)
    reg = b.draw.of([each for each in b.encoder.registers if each < 8])
    if form == 0:
        n = b.draw.of((0, 2, 3, 4))
        b.put(bytes([0x0F, 0x20, 0xC0 | n << 3 | reg]), "mov_cr")
    elif form == 1:
        b.put(bytes([0x0F, 0x22, 0xD0 | reg]), "mov_cr")
    elif form == 2:
        b.put(bytes([0x0F, 0x20, 0xD8 | reg]), "mov_cr")
        b.put(bytes([0x0F, 0x22, 0xD8 | reg]), "mov_cr")
    else:
        b.put(bytes([0x0F, 0x20, 0xC0 | reg]), "mov_cr")
        # CR0.TS: nothing in these guests uses the FPU.
        name, extension = b.draw.of((("or", 1), ("xor", 6)))
        b.put(b.encoder.op(b"\x83", 32, reg=extension, rm=reg, immediate=b"\x08"), name)
        b.put(bytes([0x0F, 0x22, 0xC0 | reg]), "mov_cr")


@PRIVILEGED.kind(1, kernel)
def task_switched(b: Builder) -> None:
    b.put(b"\x0f\x06", "clts")


@PRIVILEGED.kind(2, kernel)
def debug_register(b: Builder) -> None:
    """DR0 to DR3 written and read; they break nothing while DR7 is as at the start."""
    reg = b.draw.of([each for each in b.encoder.registers if each < 8])
    n = b.draw.below(4)
    b.put(bytes([0x0F, 0x23, 0xC0 | n << 3 | reg]), "mov_dr")
    b.put(bytes([0x0F, 0x21, 0xC0 | n << 3 | b.draw.of((0, 1, 2, 3))]), "mov_dr")


@PRIVILEGED.kind(2, kernel)
def machine_register(b: Builder) -> None:
    """WRMSR and RDMSR of SYSENTER's and SYSCALL's registers, with canonical addresses."""
    long = b.setting.mode == "long"
    number = b.draw.of(_MSRS + (_LONG_MSRS if long else ()))
    b.set(CX, number, 32)
    # QEMU keeps 16 bits of SYSENTER_CS, which is what a selector has (quirks.py).
    b.set(AX, b.draw.value(16 if number == 0x174 and not b.draw.one_in(8) else 31), 32)
    b.set(DX, b.draw.of((0, 0x7FFF)) if long and number != 0x174 else 0, 32)
    b.put(b"\x0f\x30", "wrmsr")
    b.put(b"\x0f\x32", "rdmsr")


@PRIVILEGED.kind(2)
def store_tables(b: Builder) -> None:
    """SGDT, SIDT."""
    n = b.draw.below(2)
    b.put(b.encoder.op(b"\x0f\x01", b.encoder.bits, reg=n, rm=b.memory(), wide=False), "sgdt")


@PRIVILEGED.kind(2, _protected)
def store_selectors(b: Builder) -> None:
    """SLDT, STR."""
    b.put(b.encoder.op(b"\x0f\x00", b.wide_size(), reg=b.draw.below(2), rm=b.register()), "sldt")


@PRIVILEGED.kind(1)
def machine_status(b: Builder) -> None:
    # The upper half of a 32-bit destination is undefined (SDM volume 2, "SMSW").
    b.put(b.encoder.op(b"\x0f\x01", 16, reg=4, rm=b.register()), "smsw")


@PRIVILEGED.kind(6, _protected, rare=True)
def ask_selector(b: Builder) -> None:
    """LAR, LSL, VERR and VERW of selectors that exist and others."""
    reg = b.register()
    b.set(reg, b.draw.of((0, 0x08, 0x10, 0x18, 0x23, 0x2B, 0x33, 0x38, 0x58, 0x60, 0x68, 0x70, 0xFFF8)), 32)
    name = b.draw.of(("lar", "lsl", "verr", "verw"))
    if name in ("verr", "verw"):
        b.put(
            b.encoder.op(b"\x0f\x00", 16 if b.setting.bits == 16 else 32, reg=4 if name == "verr" else 5, rm=reg), name
        )
    else:
        opcode = b"\x0f\x02" if name == "lar" else b"\x0f\x03"
        to = b.register()
        b.put(b.encoder.op(opcode, b.wide_size(), reg=to, rm=reg), name)
        if name == "lar":
            # Bits 16 to 19 are undefined (SDM volume 2, "LAR").
            b.put(b.encoder.op(b"\x81", 32, reg=4, rm=to, immediate=b"\xff\xff\xf0\xff"), "and")


@PRIVILEGED.kind(3, lambda setting: setting.mode != "real" and setting.bits != 64, rare=True)
def adjust_privilege(b: Builder) -> None:
    b.put(b.encoder.op(b"\x63", 16, reg=b.register(), rm=b.place()).removeprefix(b"\x66"), "arpl")


@PRIVILEGED.kind(1, kernel)
def invalidate_page(b: Builder) -> None:
    b.put(b.encoder.op(b"\x0f\x01", b.encoder.bits, reg=7, rm=b.memory(), wide=False), "invlpg")


@PRIVILEGED.kind(3, lambda setting: setting.mode == "long" and setting.bits == 64 and setting.cpl == 0, rare=True)
def swap_gs(b: Builder) -> None:
    """Twice: the base in between is that of KERNEL_GS_BASE."""
    b.put(b"\x0f\x01\xf8", "swapgs")
    b.put(b"\x0f\x01\xf8", "swapgs")


@PRIVILEGED.kind(3, lambda setting: setting.paged and setting.cpl == 0)
def page_entry(b: Builder) -> None:
    """The entry that maps all of this is changed where that changes nothing, and its accessed and dirty bits are read.

    With shadow paging KVM's instruction emulator makes these writes.
    """
    entry, value = leaf_entry(b.setting)
    there = Memory(entry, base=False)
    own = b.memory()
    reg = b.register()
    # Bits 9 to 11 are the system's own; 5 and 6 are accessed and dirty.
    change = b.draw.below(8) << 9
    b.put(b.encoder.op(b"\x81", 32, reg=6, rm=there, immediate=change.to_bytes(4, "little")), "xor")
    if b.draw.one_in(2):
        b.put(b.encoder.op(b"\x81", 32, reg=4, rm=there, immediate=(0xFFFF_FF9F).to_bytes(4, "little")), "and")
    b.put(b.encoder.op(b"\x0f\x01", b.encoder.bits, reg=7, rm=own, wide=False), "invlpg")
    b.put(b.encoder.op(b"\x89", 32, reg=reg, rm=own), "mov")
    b.put(b.encoder.op(b"\x8b", 32, reg=reg, rm=there), "mov")
    b.put(b.encoder.op(b"\xc7", 32, rm=there, immediate=(value | 0x60).to_bytes(4, "little")), "mov")
    b.put(b.encoder.op(b"\x0f\x01", b.encoder.bits, reg=7, rm=own, wide=False), "invlpg")
