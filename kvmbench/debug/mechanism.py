"""Which way to stop a guest, and why that one.

Six ways exist, and which of them work is found out by the host's self-check
(`kvmbench.host.selfcheck`), never read off a version:

- INT3, or HLT, over the first byte of the instruction. The byte is in memory only while the guest runs; a guest that
  reads its code sees it, one that writes its code overwrites it. HLT leaves the guest from CPL 0 only, and only where
  no interrupt controller in the kernel would wait with it.
- The debug registers: four, by linear address, unseen and not to be overwritten. While they are in use the guest's own
  are not in force.
- A stepping loop in the core that compares rip, or memory, after every instruction: slow, and otherwise like them.
- Memory slots that are read-only or absent: each access to the page leaves the guest, and is served; one to the watched
  bytes stops it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvmbench.errors import MisuseError, UnsupportedError
from kvmbench.host.selfcheck import Mechanisms


class Mechanism(StrEnum):
    """What makes the guest stop."""

    INT3 = "INT3"
    HLT = "HLT"
    DEBUG_REGISTER = "debug register"
    STEPPING = "stepping loop"
    READONLY_SLOT = "read-only slot"
    NO_SLOT = "absent slot"


#: What `watch` takes, and the R/W field of DR7 for each (SDM volume 3, "Debug Control Register").
KINDS = {"x": 0, "w": 1, "rw": 3}
#: The byte that stands over an instruction's first while the guest runs.
OPCODES = {Mechanism.INT3: 0xCC, Mechanism.HLT: 0xF4}
SLOTS = frozenset({Mechanism.READONLY_SLOT, Mechanism.NO_SLOT})
BOTH = frozenset({0, 3})

# Attribute of Mechanisms for each way, by kind, quickest first.
_CANDIDATES: dict[str, tuple[tuple[Mechanism, str], ...]] = {
    "x": (
        (Mechanism.INT3, "int3"),
        (Mechanism.DEBUG_REGISTER, "hw_execute"),
        (Mechanism.HLT, "hlt"),
        (Mechanism.STEPPING, "step"),
    ),
    "w": (
        (Mechanism.DEBUG_REGISTER, "hw_write"),
        (Mechanism.READONLY_SLOT, "readonly_slot"),
        (Mechanism.STEPPING, "step"),
    ),
    "rw": (
        (Mechanism.DEBUG_REGISTER, "hw_read"),
        (Mechanism.NO_SLOT, "no_slot"),
    ),
}


@dataclass(frozen=True)
class Place:
    """What the choice depends on beside the host.

    Attributes:
        kind: "x" execute, "w" write, "rw" read or write.
        address: linear address (gva).
        size_bytes: bytes watched; 1 for kind "x".
        mapped: something is mapped there.
        levels: privilege levels at which the guest may get there.
        overwritten: why a byte written there may not stay ("nothing is loaded there yet"), or "".
        irqchip: the interrupt controllers are in the kernel.
        free_debug_registers: of the vcpu's four.
    """

    kind: str
    address: int = 0
    size_bytes: int = 1
    mapped: bool = True
    levels: frozenset[int] = BOTH
    overwritten: str = ""
    irqchip: bool = False
    free_debug_registers: int = 4


@dataclass(frozen=True)
class Choice:
    """The way to stop the guest.

    Attributes:
        mechanism: which.
        levels: privilege levels at which it works on this host.
        why: in one line, why this one and none that is quicker.
        hazard: what it may do to the guest there, or "".
    """

    mechanism: Mechanism
    levels: frozenset[int]
    why: str
    hazard: str = ""


def choose(place: Place, mechanisms: Mechanisms, *, wanted: Mechanism | None = None) -> Choice:
    """Picks the way to stop the guest.

    The first candidate that works at every level at which the guest may get there is
    taken; failing that, the one that works at most of them.

    Args:
        wanted: this one, or none.

    Raises:
        UnsupportedError: none works on this host for this place.
        MisuseError: `wanted` is no way for this kind.
    """
    candidates = _CANDIDATES[place.kind]
    if wanted is not None:
        names = ", ".join(repr(str(one)) for one, _ in candidates)
        candidates = tuple(pair for pair in candidates if pair[0] is wanted)
        if not candidates:
            raise MisuseError(f"{str(wanted)!r} cannot stop on {place.kind!r}; {names} can")
    partly: Choice | None = None
    reasons: list[str] = []
    for mechanism, name in candidates:
        levels: frozenset[int] = getattr(mechanisms, name)
        if not levels:
            reasons.append(f"{mechanism} does not work on this host")
            continue
        obstacle = _obstacle(mechanism, place)
        if obstacle:
            reasons.append(f"{mechanism}: {obstacle}")
            continue
        choice = Choice(mechanism, levels, "asked for" if wanted else "; ".join(reasons) or "the quickest")
        if levels >= place.levels or wanted:
            return choice
        missing = ", ".join(map(str, sorted(place.levels - levels)))
        if mechanism is Mechanism.HLT:
            reasons.append(f"HLT: the address may be reached at CPL {missing}, where HLT is #GP")
        else:
            reasons.append(f"{mechanism} does not work on this host at CPL {missing}")
            if partly is None or len(levels & place.levels) > len(partly.levels & place.levels):
                partly = choice
    if partly is None:
        raise UnsupportedError(f"no way to stop on {place.kind!r} at {place.address:#x}: {'; '.join(reasons)}")
    return partly


def _obstacle(mechanism: Mechanism, place: Place) -> str:
    size, address = place.size_bytes, place.address
    if mechanism is Mechanism.DEBUG_REGISTER:
        if place.free_debug_registers == 0:
            return "all four are taken"
        if place.kind != "x" and (size not in (1, 2, 4, 8) or address % size):
            return f"takes 1, 2, 4 or 8 aligned bytes, not {size} at {address:#x}"
        return ""
    if not place.mapped and not (mechanism is Mechanism.STEPPING and place.kind == "x"):
        return "the address is not mapped"
    if mechanism in OPCODES and place.overwritten:
        return place.overwritten
    if mechanism is Mechanism.HLT and place.irqchip:
        return "the interrupt controllers are in the kernel, where a HLT waits"
    return ""
