"""Compares what a guest did on two hosts, step by step, and tells the first divergence.

Masked, and nothing else: status flags while they are undefined (`effects`), the upper halves of registers outside
64-bit code, TF, which belongs to whoever steps, and what `quirks` explains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from kvmbench.debug.register_table import INTEGER
from kvmbench.debug.step_rows import Rows, exit_name
from kvmbench.uapi import ExitReason

from .effects import STATUS
from .encoding import Instruction
from .guest import Guest
from .quirks import REPEATS_AT_ONCE, STRINGS, TAKES_ALONG, Met, along, halt_as_step, meets
from .runner import Outcome
from .setting import WINDOW

_TF = 1 << 8
_REGISTERS = tuple(name for name in INTEGER if name != "rflags")
# MOV SS, STI and PAUSE in a row.
_MOST_ALONG = 3


@dataclass(frozen=True)
class Divergence:
    """Where two recordings part.

    Attributes:
        guest: the guest.
        one, other: what it did on either host.
        step: number of the step, or None: after the last.
        what: names of the registers, or ``memory``, ``devices``, ``end`` and so on, with both values.
        instruction: that the step ran, where it is known.
        offset: its address in the code segment.
    """

    guest: Guest
    one: Outcome
    other: Outcome
    step: int | None
    what: tuple[tuple[str, object, object], ...]
    instruction: Instruction | None
    offset: int

    @property
    def names(self) -> tuple[str, ...]:
        """What differs, without values."""
        return tuple(name for name, _, _ in self.what)

    @property
    def signature(self) -> tuple[str, tuple[str, ...]]:
        """By which divergences are sorted, and which shrinking keeps."""
        return (self.instruction.name if self.instruction else "", self.names)


@dataclass(frozen=True)
class _Step:
    """One row, with what ran, which flags count, and the exit."""

    row: Rows
    offset: int
    instruction: Instruction | None
    defined: int
    exit: int


def compare(guest: Guest, one: Outcome, other: Outcome, kinds: tuple[str, str]) -> tuple[Divergence | None, list[Met]]:
    """The first divergence that no quirk explains, and the quirks that were met.

    Args:
        kinds: of the two hosts, as `runner.kind_of` tells them.
    """
    met: list[Met] = []
    steps = [list(_steps(guest, each, kind, met)) for each, kind in zip((one, other), kinds, strict=True)]
    at = [0, 0]
    # The host that tells what ran: the other may have made several instructions one step.
    teller = 0
    while at[0] < len(steps[0]) and at[1] < len(steps[1]):
        first, second = steps[0][at[0]], steps[1][at[1]]
        differs = _differs(guest, first, second)
        if differs:
            ran = (first, second)[teller]
            found = Divergence(guest, one, other, at[0], differs, ran.instruction, ran.offset)
            quirk = meets(found, kinds)
            if quirk is None:
                longer = _taken_along(found, steps, at, met, kinds)
                if longer is not None:
                    teller = longer
                    continue
                if _repeated(steps, at, met, kinds):
                    continue
                return found, met
            met.append(quirk)
            if quirk.ends:
                return None, met
        at[0] += 1
        at[1] += 1
        teller = 0
    for a, b in ((0, 1), (1, 0)):
        # The last step has none behind it where the guest ended with an exit that a device was asked about.
        quirks = [along(each.instruction, kinds[b]) for each in steps[a][at[a] :]]
        if quirks and None not in quirks:
            at[a] = len(steps[a])
            met.extend(Met(name, kinds[b]) for name in quirks if name is not None)
    return _compare_ends(guest, one, other, steps, at, kinds, met)


def _taken_along(
    found: Divergence, steps: list[list[_Step]], at: list[int], met: list[Met], kinds: tuple[str, str]
) -> int | None:
    """Whether one host made one step of what were several on the other, and which that other is.

    If so, the rows that the one has not are passed over.
    """
    for a, b in ((0, 1), (1, 0)):
        for more in range(1, _MOST_ALONG + 1):
            quirks = [along(each.instruction, kinds[b]) for each in steps[a][at[a] : at[a] + more]]
            if at[a] + more > len(steps[a]) or None in quirks:
                break
            if at[a] + more == len(steps[a]):
                # Or its guest ended there, explained, while the other's step had that instruction too.
                outcome = (found.one, found.other)[a]
                offset = _final_rip(outcome)
                ended = replace(found, what=(("end", found.one.end, found.other.end),), offset=offset)
                ended = replace(ended, instruction=found.guest.image.instructions.get(offset))
                if meets(ended, kinds) is None:
                    break
                at[a] += more
                return a
            last, whole = steps[a][at[a] + more], steps[b][at[b]]
            differs = _differs(found.guest, *((last, whole) if a == 0 else (whole, last)))
            later = replace(found, what=differs, instruction=last.instruction, offset=last.offset)
            if not differs or meets(later, kinds) is not None:
                at[a] += more
                met.extend(Met(name, kinds[b]) for name in quirks if name is not None)
                return a
    return None


def _repeated(steps: list[list[_Step]], at: list[int], met: list[Met], kinds: tuple[str, str]) -> bool:
    """A repeated string instruction has other steps on one host; if so, goes to the last of it on both."""
    if not any(kind.startswith(REPEATS_AT_ONCE) for kind in kinds):
        return False
    moved = False
    for n in (0, 1):
        here = steps[n][at[n]]
        if here.instruction is None or here.instruction.name not in STRINGS:
            return False
        while at[n] + 1 < len(steps[n]) and int(steps[n][at[n]].row["rip"]) == here.offset:
            at[n] += 1
            moved = True
    if moved:
        met.append(Met("a repeated string instruction takes other steps", kinds[kinds[1].startswith(REPEATS_AT_ONCE)]))
    return moved


def _compare_ends(
    guest: Guest,
    one: Outcome,
    other: Outcome,
    steps: list[list[_Step]],
    at: list[int],
    kinds: tuple[str, str],
    met: list[Met],
) -> tuple[Divergence | None, list[Met]]:
    what: list[tuple[str, object, object]] = []
    if one.end != other.end:
        what.append(("end", one.end, other.end))
    left = len(steps[0]) - at[0], len(steps[1]) - at[1]
    if any(left):
        what.append(("steps", len(steps[0]), len(steps[1])))
    if one.log != other.log:
        n = next(
            (n for n, (a, b) in enumerate(zip(one.log, other.log, strict=False)) if a != b),
            min(len(one.log), len(other.log)),
        )
        what.append((f"access {n} to devices", one.log[n : n + 1], other.log[n : n + 1]))
    if one.window != other.window:
        a, b = (np.frombuffer(each.window, np.uint8) for each in (one, other))
        n = int(np.flatnonzero(a != b)[0])
        what.append(("memory", f"[{WINDOW + n:#x}] {one.window[n : n + 8].hex()}", other.window[n : n + 8].hex()))
    if one.special and other.special and one.special != other.special:
        for name in sorted({*one.special, *other.special}):
            if one.special.get(name) != other.special.get(name):
                what.append((name, one.special.get(name), other.special.get(name)))
    if not what:
        return None, met
    # The instruction at which the shorter one ended.
    offset = _final_rip(one if left[1] else other)
    step = at[0] if any(left) else None
    found = Divergence(guest, one, other, step, tuple(what), guest.image.instructions.get(offset), offset)
    quirk = meets(found, kinds)
    if quirk is None:
        return found, met
    return None, [*met, quirk]


def _final_rip(outcome: Outcome) -> int:
    return int(outcome.rows[-1]["rip"] if len(outcome.rows) else outcome.start["rip"])


def _steps(guest: Guest, outcome: Outcome, kind: str, met: list[Met]) -> Iterator[_Step]:
    before, undefined = outcome.start, 0
    instructions = guest.image.instructions
    for row in outcome.rows:
        offset = int(before["rip"])
        instruction = instructions.get(offset)
        after, at = int(row["rip"]), offset
        for _ in range(_MOST_ALONG + 1):
            ran = instructions.get(at)
            if ran is None:
                break
            effect = ran.effect_with(int(before["rcx"]) & 0xFF)
            undefined = undefined & ~effect.defines | effect.undefined
            at += len(ran.code)
            # The next instruction may have run in the same step.
            if ran.name not in TAKES_ALONG or after == at:
                break
        exit = int(row["exit"])
        if exit == ExitReason.DEBUG and ran is not None and ran.name == "hlt" and after == at:
            quirk = halt_as_step(kind)
            if quirk is not None:
                met.append(quirk)
                exit = int(ExitReason.HLT)
        yield _Step(row, offset, instruction, STATUS & ~undefined, exit)
        before = row


def _differs(guest: Guest, one: _Step, other: _Step) -> tuple[tuple[str, object, object], ...]:
    found: list[tuple[str, object, object]] = []
    if one.row.tobytes()[:144] != other.row.tobytes()[:144]:
        mask = (1 << 64) - 1 if guest.setting.bits == 64 else 0xFFFF_FFFF
        for name in _REGISTERS:
            a, b = int(one.row[name]), int(other.row[name])
            if (a ^ b) & (mask if name != "rip" else (1 << 64) - 1):
                found.append((name, hex(a), hex(b)))
        a, b = int(one.row["rflags"]), int(other.row["rflags"])
        ignored = STATUS & ~(one.defined & other.defined) | _TF
        if (a ^ b) & ~ignored:
            found.append(("rflags", hex(a), hex(b)))
    if one.exit != other.exit:
        found.append(("exit", exit_name(one.exit), exit_name(other.exit)))
    return tuple(found)
