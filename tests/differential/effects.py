"""What each instruction does to the status flags, and which of them the manuals leave undefined.

A flag is undefined here if either vendor's manual says so: Intel's SDM volume 2 and AMD's APM volume 3,
each under the instruction's own heading, section "Flags Affected" ("rFLAGS Affected" in the APM). Shifts and
rotates depend on their count and have rules instead of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
STATUS = CF | PF | AF | ZF | SF | OF
NAMES = {CF: "CF", PF: "PF", AF: "AF", ZF: "ZF", SF: "SF", OF: "OF"}


@dataclass(frozen=True, slots=True)
class Effect:
    """Masks of status flags: read, given a value, and left undefined."""

    reads: int = 0
    defines: int = 0
    undefined: int = 0


_NOTHING = Effect()
_ALL = Effect(defines=STATUS)
_LOGIC = Effect(defines=STATUS & ~AF, undefined=AF)
_WITH_CARRY = Effect(reads=CF, defines=STATUS)
_MULTIPLY = Effect(defines=CF | OF, undefined=SF | ZF | AF | PF)
_DIVIDE = Effect(undefined=STATUS)
_BIT_TEST = Effect(defines=CF, undefined=OF | SF | AF | PF | ZF)  # ZF: unaffected in the SDM, undefined in the APM
_BIT_SCAN = Effect(defines=ZF, undefined=STATUS & ~ZF)
_DECIMAL = Effect(reads=CF | AF, defines=STATUS & ~OF, undefined=OF)
_ASCII = Effect(reads=AF, defines=AF | CF, undefined=OF | SF | ZF | PF)
_ASCII_MULTIPLY = Effect(defines=SF | ZF | PF, undefined=OF | AF | CF)
_ZERO_ONLY = Effect(defines=ZF)
_CONTROL = Effect(undefined=STATUS)  # "MOV-Move to/from Control Registers", "... Debug Registers"

TABLE: dict[str, Effect] = {
    **dict.fromkeys(("add", "sub", "cmp", "neg", "xadd", "cmpxchg", "cmps", "scas", "popcnt", "popf", "iret"), _ALL),
    **dict.fromkeys(("adc", "sbb"), _WITH_CARRY),
    **dict.fromkeys(("and", "or", "xor", "test"), _LOGIC),
    **dict.fromkeys(("inc", "dec"), Effect(defines=STATUS & ~CF)),
    **dict.fromkeys(("mul", "imul"), _MULTIPLY),
    **dict.fromkeys(("div", "idiv"), _DIVIDE),
    **dict.fromkeys(("bt", "bts", "btr", "btc"), _BIT_TEST),
    **dict.fromkeys(("bsf", "bsr"), _BIT_SCAN),
    **dict.fromkeys(("lzcnt", "tzcnt"), Effect(defines=CF | ZF, undefined=OF | SF | PF | AF)),
    **dict.fromkeys(("daa", "das"), _DECIMAL),
    **dict.fromkeys(("aaa", "aas"), _ASCII),
    **dict.fromkeys(("aam", "aad"), _ASCII_MULTIPLY),
    **dict.fromkeys(("lar", "lsl", "verr", "verw", "arpl", "cmpxchg8b", "cmpxchg16b"), _ZERO_ONLY),
    **dict.fromkeys(("mov_cr", "mov_dr"), _CONTROL),
    "lahf": Effect(reads=STATUS & ~OF),
    "sahf": Effect(defines=STATUS & ~OF),
    "pushf": Effect(reads=STATUS),
    "clc": Effect(defines=CF),
    "stc": Effect(defines=CF),
    "cmc": Effect(reads=CF, defines=CF),
    "salc": Effect(reads=CF),
    "into": Effect(reads=STATUS),
    "loopz": Effect(reads=ZF),
    "loopnz": Effect(reads=ZF),
}

# Condition codes in the order of their encoding (SDM volume 2, "Jcc"); a pair shares its flags.
CONDITION_READS = tuple(
    flags for flags in (OF, CF, ZF, CF | ZF, SF, PF, SF | OF, ZF | SF | OF) for _ in range(2)
)  # fmt: skip
CONDITION_NAMES = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")

SHIFTS = ("rol", "ror", "rcl", "rcr", "shl", "shr", "sal", "sar")


def effect_of(name: str) -> Effect:
    """The row of an instruction; those not in the table leave the flags alone."""
    return TABLE.get(name, _NOTHING)


def shift_effect(name: str, size: int, count: int) -> Effect:
    """What a shift or rotate of `size` bits by the unmasked `count` does.

    SDM volume 2, "RCL/RCR/ROL/ROR" and "SAL/SAR/SHL/SHR", "SHLD", "SHRD": the count is taken modulo 32 (64 for
    64-bit operands); by 0 nothing changes; OF is defined for 1 only; CF of SHL and SHR is undefined from the
    operand's size on, AF always.
    """
    count &= 0x3F if size == 64 else 0x1F
    if count == 0:
        return _NOTHING
    overflow = 0 if count == 1 else OF
    if name in ("rol", "ror", "rcl", "rcr"):
        reads = CF if name in ("rcl", "rcr") else 0
        return Effect(reads, CF | (OF & ~overflow), overflow)
    carry = CF if name in ("shl", "sal", "shr") and count >= size else 0
    undefined = AF | overflow | carry
    return Effect(0, STATUS & ~undefined, undefined)


def shift_bounds(name: str, size: int) -> Effect:
    """What holds for every count, for a count in CL that is not known beforehand."""
    if name in ("rol", "ror", "rcl", "rcr"):
        return Effect(CF if name in ("rcl", "rcr") else 0, 0, OF)
    carry = CF if name in ("shl", "sal", "shr") and size < 32 else 0
    return Effect(0, 0, AF | OF | carry)
