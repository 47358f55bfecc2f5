"""Divergences that are explained: on which hosts, by which instruction, and whose doing it is.

Each names its source. What is not here fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .effects import PF
from .setting import leaf_entry

if TYPE_CHECKING:
    from .compare import Divergence
    from .encoding import Instruction


@dataclass(frozen=True)
class Met:
    """A quirk that a comparison met.

    Attributes:
        name: of the quirk.
        kind: of the host whose it is.
        ends: the comparison cannot go on behind it.
    """

    name: str
    kind: str
    ends: bool = False


@dataclass(frozen=True)
class Quirk:
    """One explained divergence.

    Attributes:
        name: in words.
        hosts: how the kinds of the hosts whose it is begin.
        source: whose doing it is, and where that is written.
        explains: whether it accounts for a divergence, of which that host is the first or second (0 or 1).
        ends: the guests' ways part there, and the comparison ends.
    """

    name: str
    hosts: tuple[str, ...]
    source: str
    explains: Callable[[Divergence, int], bool]
    ends: bool = True


_AC, _IOPL = 1 << 18, 3 << 12
_WRITE = 1 << 1  # in the error code of a page fault
_EMULATOR = "Linux, arch/x86/kvm/emulate.c"

#: Instructions whose single-step trap comes one instruction late, so that a step has two: by name, words of the kinds
#: of hosts, and the source.
TAKES_ALONG: dict[str, tuple[tuple[str, ...], str]] = {
    **dict.fromkeys(
        ("mov_ss", "pop_ss"),
        (
            ("kvm_amd", "kvm_intel"),
            'SDM volume 3, "Masking Exceptions and Interrupts When Switching Stacks": debug traps are held off too.',
        ),
    ),
    "sti": (
        ("QEMU",),
        "QEMU, target/i386/tcg/translate.c, gen_eob: no single-step trap at the end of an instruction that inhibits "
        'interrupts. SDM volume 2, "STI": interrupts are held off, nothing else.',
    ),
    "pause": (
        ("QEMU",),
        "QEMU before 9.1, target/i386/tcg/misc_helper.c, helper_pause: leaves to the main loop without what ends an "
        'instruction, the #DB of single-step among it; mended upstream by "target/i386: fix processing of PAUSE".',
    ),
    "swapgs": (("kvm_pvm",), "Seen: kvm_pvm makes no debug exit after SWAPGS at CPL 0."),
}

#: Hosts whose single steps are KVM's instruction emulator's: it makes all rounds of a repeated string instruction
#: in one go (emulate.c, x86_emulate_insn: EMULATION_RESTART), and then leaves RIP on it for one step more, with RF
#: set meanwhile.
REPEATS_AT_ONCE = "kvm_pvm"
STRINGS = frozenset(("movs", "cmps", "stos", "lods", "scas", "ins", "outs"))


def along(instruction: Instruction | None, kind: str) -> str | None:
    """The quirk by which an instruction and its successor are one step on a kind of host; None: they are not."""
    if instruction is None or instruction.name not in TAKES_ALONG:
        return None
    hosts = TAKES_ALONG[instruction.name][0]
    return f"{instruction.name} and the next are one step" if any(word in kind for word in hosts) else None


_UNKNOWN_TO_EMULATOR = frozenset(
    (
        "iret",
        "arpl",
        "daa",
        "aaa",
        "aas",
        "enter",
        "lar",
        "lsl",
        "verr",
        "verw",
        "cmpxchg16b",
        "int",
        "int3",
        "into",
        "bound",
        "ud1",
        "fe_7",
    )
)


def _name(divergence: Divergence) -> str:
    return divergence.instruction.name if divergence.instruction else ""


def _emulator_gives_up(divergence: Divergence, side: int) -> bool:
    outcome = (divergence.one, divergence.other)[side]
    return "suberror=1" in outcome.end and _name(divergence) in _UNKNOWN_TO_EMULATOR


def halt_as_step(kind: str) -> Met | None:
    """The quirk of a host that tells a stepped HLT as a step (docs/facts.md): the emulator overwrites the exit."""
    emulated = kind.startswith(("kvm_pvm", "kvm_intel ept=0"))
    return Met("the exit of a stepped HLT is told as a step", kind) if emulated else None


def _wide_adjust(divergence: Divergence, side: int) -> bool:
    return _name(divergence) in ("aam", "aad") and divergence.names == ("rflags",)


def _cleared_destination(divergence: Divergence, side: int) -> bool:
    # On that host the upper half is 0, on the other it is not; everything else agrees.
    if _name(divergence) != "cmpxchg" or len(divergence.what) != 1:
        return False
    values = divergence.what[0][1:]
    here, there = (int(str(value), 16) for value in (values[side], values[1 - side]))
    return divergence.what[0][0].startswith("r") and here == there & 0xFFFF_FFFF


def _undefined_rights(divergence: Divergence, side: int) -> bool:
    if _name(divergence) != "lar" or len(divergence.what) != 1:
        return False
    one, other = (int(str(value), 16) for value in divergence.what[0][1:])
    return (one ^ other) & ~0xF_0000 == 0


def _read_before_write(divergence: Divergence, side: int) -> bool:
    # The handler's MOV of the error code into RAX.
    if divergence.instruction is not None or divergence.names != ("rax",):
        return False
    one, other = (int(str(value), 16) for value in divergence.what[0][1:])
    return one ^ other == _WRITE


def _read_before_dirty(divergence: Divergence, side: int) -> bool:
    instruction, setting = divergence.instruction, divergence.guest.setting
    if instruction is None or instruction.name != "xor" or divergence.names != ("rflags",) or not setting.paged:
        return False
    one, other = (int(str(value), 16) for value in divergence.what[0][1:])
    return one ^ other == PF and leaf_entry(setting)[0].to_bytes(4, "little") in instruction.code


def _locked(divergence: Divergence, side: int) -> bool:
    return _name(divergence).startswith("lock_")


def _alignment_check_cleared(divergence: Divergence, side: int) -> bool:
    outcomes = (divergence.one, divergence.other)
    if divergence.names != ("rflags",) or divergence.step is None:
        return False
    here, there = (int(str(value), 16) for value in (divergence.what[0][1 + side], divergence.what[0][2 - side]))
    return here == there & ~_AC and len(outcomes[side].rows) > divergence.step


def _narrow_sysenter(divergence: Divergence, side: int) -> bool:
    return _name(divergence) == "rdmsr" and divergence.names == ("rax",)


def _image_with_iopl(divergence: Divergence, side: int) -> bool:
    if divergence.guest.setting.mode != "real" or len(divergence.what) != 1:
        return False
    if divergence.names == ("memory",):
        one, other = (int.from_bytes(each.window, "big") for each in (divergence.one, divergence.other))
        return set((one ^ other).to_bytes(len(divergence.one.window), "big")) == {0, _IOPL >> 8}
    values = [str(value) for value in divergence.what[0][1:]]
    # In the upper half of a register, or in its upper byte only, where it was popped with something else.
    shown = (_IOPL, _IOPL << 16, _IOPL >> 8)
    return values[0].startswith("0x") and (int(values[0], 16) ^ int(values[1], 16)) in shown


def _into_itself(divergence: Divergence, side: int) -> bool:
    # The handler reads the address in its frame.
    guest = divergence.guest
    if guest.setting.mode != "real" or divergence.instruction is not None or divergence.names != ("rax",):
        return False
    here, there = (int(str(divergence.what[0][1 + n]), 16) for n in (side, 1 - side))
    ran = guest.image.instructions.get(here & 0xFFFF)
    return ran is not None and ran.name == "into" and there == here + 1


def _after_native_return(divergence: Divergence, side: int) -> bool:
    # Whether that host has run one of them: nothing behind it is compared then.
    if divergence.guest.setting.mode != "long":
        return False
    instructions = divergence.guest.image.instructions
    outcome = (divergence.one, divergence.other)[side]
    ran = [divergence.offset, *(int(row["rip"]) for row in outcome.rows)]
    return any(at in instructions and instructions[at].name in ("iret", "swapgs") for at in ran)


QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "KVM's instruction emulator does not know the instruction",
        ("kvm_pvm",),
        f"{_EMULATOR}: the opcode tables; em_iret outside real mode and em_enter with a nesting level return "
        "X86EMUL_UNHANDLEABLE. The vcpu stops with KVM_INTERNAL_ERROR_EMULATION.",
        _emulator_gives_up,
    ),
    Quirk(
        "AAM and AAD take SF and ZF from more than AL",
        ("kvm_pvm",),
        f"{_EMULATOR}, em_aam and em_aad: OR with 0 at the operand's size, which is not a byte. SDM volume 2, "
        '"AAM": SF, ZF and PF are set according to AL.',
        _wide_adjust,
    ),
    Quirk(
        "CMPXCHG of 32 bits clears the upper half of a register that it does not change",
        ("kvm_pvm",),
        f"{_EMULATOR}, em_cmpxchg: writes the destination back, and a 32-bit write clears the upper half. QEMU, "
        '"target/i386: fix cmpxchg with 32-bit register destination": processors leave it alone.',
        _cleared_destination,
    ),
    Quirk(
        "SYSENTER_CS keeps 16 bits",
        ("kvm_amd",),
        "QEMU, target/i386/tcg/sysemu/misc_helper.c, helper_wrmsr: the value & 0xffff.",
        _narrow_sysenter,
    ),
    Quirk(
        "LAR fills bits 16 to 19",
        ("kvm_intel",),
        'SDM volume 2, "LAR": bits 19:16 are undefined. Bochs gives bits of the limit, QEMU zeros; the guest clears '
        "them in its next instruction.",
        _undefined_rights,
        ends=False,
    ),
    Quirk(
        "AC is clear in the handler of an exception",
        ("kvm_pvm",),
        'Seen: kvm_pvm clears AC where it delivers an exception; SDM volume 3, "Flag Usage By '
        'Exception- or Interrupt-Handler Procedure": TF, NT, RF, VM, and IF in interrupt gates.',
        _alignment_check_cleared,
    ),
    Quirk(
        "the page fault of a read and write is told as one of a read",
        ("kvm_amd",),
        "QEMU, target/i386/tcg: an instruction that reads and writes memory reads first, and that faults. SDM "
        'volume 3, "Page-Fault Exceptions": W/R tells the access that caused the fault, which is a write.',
        _read_before_write,
    ),
    Quirk(
        "an entry that maps itself is read before its dirty bit is set",
        ("kvm_amd npt=0", "kvm_intel ept=0"),
        f"{_EMULATOR}, which makes writes to shadowed tables: the operand is read, then written, and only the "
        'write\'s walk sets D. SDM volume 3, "Accessed and Dirty Flags": with the walk, before the access. PF tells. '
        "Seen once in 1,500 guests; inferred, the walk was not traced.",
        _read_before_dirty,
    ),
    Quirk(
        "LOCK is taken where it must not be",
        ("kvm_amd",),
        "QEMU 7.2, target/i386/tcg/translate.c: many instructions do not look for LOCK. SDM volume 2, "
        '"LOCK": #UD except with the instructions listed there.',
        _locked,
    ),
    Quirk(
        "PUSHF shows IOPL 3 in real mode",
        ("kvm_intel ept=0",),
        "Linux, arch/x86/kvm/vmx/vmx.c, vmx_set_rflags: without unrestricted guests real mode is virtual-8086 mode "
        "with IOPL 3, which PUSHF does not hide.",
        _image_with_iopl,
    ),
    Quirk(
        "the frame of INTO in real mode points to INTO",
        ("kvm_intel ept=0",),
        "Seen, and not separated: KVM's kvm_inject_realmode_interrupt (arch/x86/kvm/x86.c) adds the length that the "
        'processor, here Bochs, told of the instruction. SDM volume 3, "Interrupt 4": a trap, behind INTO.',
        _into_itself,
    ),
    Quirk(
        "what follows IRET and SWAPGS at CPL 0 in long mode",
        ("kvm_pvm",),
        "Seen: kvm_pvm makes both itself. From compatibility mode IRET is #GP; after SWAPGS there is no debug exit, or "
        "code runs on without one; a halt_request left over from an earlier stepped HLT (arch/x86/kvm/x86.c) becomes "
        "their exit. The comparison with other hosts ends at the first difference behind them.",
        _after_native_return,
    ),
)


def meets(divergence: Divergence, kinds: tuple[str, str]) -> Met | None:
    """The quirk that explains a divergence, if one does."""
    for quirk in QUIRKS:
        for side, kind in enumerate(kinds):
            if kind.startswith(quirk.hosts) and quirk.explains(divergence, side):
                return Met(quirk.name, kind, quirk.ends)
    return None
