"""Where a conditional jump will go, from the flags; and the lanes in which arrows between rows are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmbench.debug.flags import Flags
from kvmbench.debug.instruction import Instruction

# SDM volume 2, "Jcc: Jump if Condition Is Met", under the names capstone gives.
_CONDITIONS: dict[str, Callable[[Flags], bool]] = {
    "jo": lambda f: f.OF, "jno": lambda f: not f.OF,
    "jb": lambda f: f.CF, "jae": lambda f: not f.CF,
    "je": lambda f: f.ZF, "jne": lambda f: not f.ZF,
    "jbe": lambda f: f.CF or f.ZF, "ja": lambda f: not (f.CF or f.ZF),
    "js": lambda f: f.SF, "jns": lambda f: not f.SF,
    "jp": lambda f: f.PF, "jnp": lambda f: not f.PF,
    "jl": lambda f: f.SF != f.OF, "jge": lambda f: f.SF == f.OF,
    "jle": lambda f: f.ZF or f.SF != f.OF, "jg": lambda f: not f.ZF and f.SF == f.OF,
}  # fmt: skip
_LANES = 8


def is_jump(one: Instruction) -> bool:
    """A jump or loop, direct or not; no call."""
    return one.operation.startswith(("j", "loop"))


def will_jump(one: Instruction, flags: Flags, rcx: int) -> bool | None:
    """Whether the jump would be taken with these flags and this counter; None if it is no jump."""
    name = one.operation
    if name == "jmp":
        return True
    condition = _CONDITIONS.get(name)
    if condition is not None:
        return bool(condition(flags))
    if name in ("jcxz", "jecxz", "jrcxz"):
        return rcx & {"jcxz": 0xFFFF, "jecxz": 0xFFFF_FFFF, "jrcxz": (1 << 64) - 1}[name] == 0
    if name in ("loop", "loope", "loopne"):
        # Counts down first, in a register as wide as addresses are (SDM volume 2, "LOOP/LOOPcc").
        swapped = 0x67 in one.bytes[:-2]
        width = {64: 32 if swapped else 64, 32: 16 if swapped else 32, 16: 32 if swapped else 16}[one.bits]
        left = (rcx - 1) & (1 << width) - 1
        return left != 0 and (name == "loop" or (name == "loope") == flags.ZF)
    return None


def lanes(arrows: Sequence[tuple[int, int]]) -> list[int]:
    """A lane for each arrow (from row, to row), 0 next to the text: short ones inside, none over another.

    What does not fit into eight lanes shares the outermost.
    """
    taken: list[list[tuple[int, int]]] = [[] for _ in range(_LANES)]
    found = [_LANES - 1] * len(arrows)
    for index in sorted(range(len(arrows)), key=lambda each: abs(arrows[each][0] - arrows[each][1])):
        low, high = sorted(arrows[index])
        for lane, spans in enumerate(taken):
            if all(high < first or last < low for first, last in spans):
                spans.append((low, high))
                found[index] = lane
                break
    return found
