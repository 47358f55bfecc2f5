"""Breakpoints and watchpoints: what they are, and which mechanism stops the guest.

Four ways to stop a guest exist, and which of them work is found out by the
host's self-check (`kvmbench.host.selfcheck`), never read off a version:
INT3, the debug registers, a stepping loop in the core that compares rip or
memory after every instruction, and memory slots that are read-only or absent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from kvmbench.errors import MisuseError, UnsupportedError
from kvmbench.host.selfcheck import Mechanisms


class Mechanism(StrEnum):
    """What makes the guest stop."""

    INT3 = "INT3"
    DEBUG_REGISTER = "debug register"
    STEPPING = "stepping loop"
    READONLY_SLOT = "read-only slot"
    NO_SLOT = "absent slot"


#: What `watch` takes, and the R/W field of DR7 for each (SDM volume 3, "Debug Control Register").
KINDS = {"x": 0, "w": 1, "rw": 3}

# Attribute of Mechanisms for each way, by kind, quickest first.
_CANDIDATES: dict[str, tuple[tuple[Mechanism, str], ...]] = {
    "x": (
        (Mechanism.INT3, "int3"),
        (Mechanism.DEBUG_REGISTER, "hw_execute"),
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


@dataclasses.dataclass(eq=False)
class Breakpoint:
    """One place, or range of memory, at which the guest stops.

    Attributes:
        number: its name in the list, from 1.
        address: linear address (gva).
        kind: "x" execute, "w" write, "rw" read or write.
        size_bytes: bytes watched; 1 for kind "x".
        mechanism: what makes the guest stop.
        levels: privilege levels at which that was seen to work on this host.
        label: symbol, or the address in hex.
        gpa: guest physical address at the time it was set, or None if it was unmapped.
        condition: called with the `Cpu` at each hit; the guest goes on while it returns false.
        enabled: a disabled breakpoint stops nothing.
        temporary: removed at its first hit.
        hits: how often it was reached with its condition true.
        passes: how often it was reached with its condition false.
        changed: called when `enabled` is assigned.
    """

    number: int
    address: int
    kind: str
    size_bytes: int
    mechanism: Mechanism
    levels: frozenset[int]
    label: str
    gpa: int | None
    condition: Callable[[Any], Any] | None = None
    enabled: bool = True
    temporary: bool = False
    hits: int = 0
    passes: int = 0

    changed: Callable[[], None] | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "enabled" and getattr(self, "changed", None) is not None:
            self.changed()  # type: ignore[misc]

    @property
    def is_watchpoint(self) -> bool:
        """Whether it watches memory rather than execution."""
        return self.kind != "x"

    def __str__(self) -> str:
        noun = "watchpoint" if self.is_watchpoint else "breakpoint"
        what = f" ({self.kind}, {self.size_bytes} bytes)" if self.is_watchpoint else ""
        return f"{noun} {self.number} at {self.label}{what}"

    def __repr__(self) -> str:
        parts = [f"{self} by {self.mechanism}"]
        if self.levels != frozenset({0, 3}):
            parts.append(f"works only at CPL {', '.join(map(str, sorted(self.levels)))} on this host")
        if self.mechanism is Mechanism.STEPPING:
            parts.append("slow: every instruction is stepped")
        if self.condition is not None:
            parts.append(f"condition false {self.passes} times")
        if not self.enabled:
            parts.append("disabled")
        parts.append(f"{self.hits} hits")
        return f"<{'; '.join(parts)}>"


def choose(
    kind: str,
    mechanisms: Mechanisms,
    *,
    wanted: Mechanism | None = None,
    size_bytes: int = 1,
    address: int = 0,
    mapped: bool = True,
    free_debug_registers: int = 4,
) -> tuple[Mechanism, frozenset[int]]:
    """Picks the way to stop the guest, and says at which privilege levels it works.

    The first candidate that works at CPL 0 and CPL 3 is taken; failing that, the
    first that works at one of them.

    Raises:
        UnsupportedError: none works on this host for this kind.
        MisuseError: `wanted` is no way for this kind, or cannot do this size.
    """
    candidates = _CANDIDATES[kind]
    if wanted is not None:
        names = ", ".join(repr(str(one)) for one, _ in candidates)
        candidates = tuple(pair for pair in candidates if pair[0] is wanted)
        if not candidates:
            raise MisuseError(f"{str(wanted)!r} cannot stop on {kind!r}; {names} can")
    partly: tuple[Mechanism, frozenset[int]] | None = None
    refused: list[str] = []
    for mechanism, name in candidates:
        levels: frozenset[int] = getattr(mechanisms, name)
        if not levels:
            refused.append(f"{mechanism} does not work on this host")
            continue
        obstacle = _obstacle(mechanism, kind, size_bytes, address, mapped, free_debug_registers)
        if obstacle:
            refused.append(f"{mechanism}: {obstacle}")
        elif levels >= {0, 3}:
            return mechanism, levels
        elif partly is None or len(levels) > len(partly[1]):
            partly = (mechanism, levels)
    if partly is None:
        raise UnsupportedError(f"no way to stop on {kind!r} at {address:#x}: {'; '.join(refused)}")
    return partly


def _obstacle(mechanism: Mechanism, kind: str, size_bytes: int, address: int, mapped: bool, free: int) -> str:
    if mechanism is Mechanism.DEBUG_REGISTER:
        if free == 0:
            return "all four are taken"
        if kind != "x" and (size_bytes not in (1, 2, 4, 8) or address % size_bytes):
            return f"takes 1, 2, 4 or 8 aligned bytes, not {size_bytes} at {address:#x}"
    elif not mapped and not (mechanism is Mechanism.STEPPING and kind == "x"):
        return "the address is not mapped"
    return ""
