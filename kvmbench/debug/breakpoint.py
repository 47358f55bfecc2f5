"""One breakpoint or watchpoint: where, by which mechanism, on which conditions, and what happened to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from kvmbench.arguments import instead, integer
from kvmbench.debug.mechanism import BOTH, OPCODES, SLOTS, Choice, Mechanism
from kvmbench.errors import MisuseError

#: CR3 without PCID or flags (bits 0 to 11) and the no-flush bit 63: the address of the top table.
TABLE = 0x000F_FFFF_FFFF_F000
#: The bit in which the two tables of a process differ under Linux' page-table isolation.
ISOLATION = 1 << 12
_MOST_NUMBER = (1 << 64) - 1
# What `Breakpoints` arms for; another place or mechanism is another breakpoint.
_FIXED = frozenset(
    {"number", "address", "kind", "size_bytes", "mechanism", "levels", "label", "gpa", "page_table_isolation"}
)


def check_ignore(value: Any) -> int:
    """A number of hits, from 0."""
    return integer(value, "ignore", 0)


def check_cr3(value: Any) -> int | None:
    """A value of CR3, or None."""
    return None if value is None else integer(value, "cr3", 0, _MOST_NUMBER)


def check_condition(value: Any) -> Callable[[Any], Any] | None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise MisuseError(f"a condition is a function of the cpu, not {value!r}")
    return value  # type: ignore[no-any-return]


def check_flag(value: Any, what: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise MisuseError(f"{what}={value!r}: give True or False")
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "ignore": check_ignore,
    "cr3": check_cr3,
    "condition": check_condition,
    "enabled": lambda value: check_flag(value, "enabled"),
    "temporary": lambda value: check_flag(value, "temporary"),
    "hits": lambda value: integer(value, "hits", 0),
    "passes": lambda value: integer(value, "passes", 0),
    "elsewhere": lambda value: integer(value, "elsewhere", 0),
}


def not_assignable(one: Any, name: str, known: Iterable[str]) -> AttributeError:
    """What to raise when `name` is assigned to a breakpoint that does not keep it: silence would lose a condition."""
    if hasattr(type(one), name) or name in _CHECKS:
        return AttributeError(f"{name!r} of {one} cannot be assigned; remove it and add another")
    return AttributeError(f"{one} has no {name!r}; {instead(name, known)}")


@dataclasses.dataclass(eq=False)
class Breakpoint:
    """One place, or range of memory, at which the guest stops.

    `condition`, `cr3`, `ignore`, `enabled` and `temporary` may be assigned (MisuseError for what cannot be right,
    AttributeError for a name that is none); for another place or mechanism add another one.

    Attributes:
        number: its name in the list, from 1.
        address: linear address (gva).
        kind: "x" execute, "w" write, "rw" read or write.
        size_bytes: bytes watched; 1 for kind "x".
        mechanism: what makes the guest stop.
        levels: privilege levels at which that was seen to work on this host.
        label: symbol, or the address in hex.
        gpa: guest physical address at the time it was set, or None if it was unmapped.
        why: why this mechanism and none that is quicker, in one line.
        condition: called with the `Cpu` at each hit; the guest goes on while it returns false.
        cr3: only in the address space of this top table; None: in all. PCID and no-flush bits do not count.
        page_table_isolation: bit 12 of CR3 does not count either.
        ignore: how many of the next hits let the guest go on; counts down.
        enabled: a disabled breakpoint stops nothing.
        temporary: removed at its first stop.
        hits: how often it was reached with its condition true, ignored ones included.
        passes: how often it was reached with its condition false.
        elsewhere: how often it was reached in another address space than `cr3`.
        overwritten: how often the guest was seen to have overwritten its byte (INT3, HLT).
        remarks: what happened to it since, a phrase each, such as a move to another mechanism.
        conflict: what it takes from the guest, such as debug registers of its own, or "".
        hazard: what it may do to the guest where it is, or "".
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
    why: str = ""
    condition: Callable[[Any], Any] | None = None
    cr3: int | None = None
    page_table_isolation: bool = False
    ignore: int = 0
    enabled: bool = True
    temporary: bool = False
    hits: int = 0
    passes: int = 0
    elsewhere: int = 0
    overwritten: int = 0
    remarks: list[str] = dataclasses.field(default_factory=list)
    conflict: str = ""
    hazard: str = ""

    changed: Callable[[], None] | None = None
    #: The breakpoint of `Machine.breakpoints` that it belongs to, or None.
    shared: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            value = _CHECKS[name](value)
        elif name in _FIXED and name in self.__dict__:
            raise MisuseError(f"{name} of {self} cannot be assigned; remove it and add another")
        elif name not in self.__dataclass_fields__:
            raise not_assignable(self, name, (*_CHECKS, *self.__dataclass_fields__))
        object.__setattr__(self, name, value)
        if name == "enabled" and getattr(self, "changed", None) is not None:
            self.changed()  # type: ignore[misc]

    def move(self, choice: Choice, remark: str) -> None:
        """Goes over to another mechanism."""
        for name, value in (("mechanism", choice.mechanism), ("levels", choice.levels)):
            object.__setattr__(self, name, value)
        self.why, self.remarks = choice.why, [remark]

    @property
    def is_watchpoint(self) -> bool:
        """Whether it watches memory rather than execution."""
        return self.kind != "x"

    def is_in(self, cr3: int) -> bool:
        """Whether it is meant in the address space of that CR3.

        The address of a PAE table begins at bit 5; below bit 12 it is not compared.
        """
        if self.cr3 is None:
            return True
        mask = TABLE & ~ISOLATION if self.page_table_isolation else TABLE
        return (self.cr3 ^ cr3) & mask == 0

    @property
    def drawbacks(self) -> list[str]:
        """What its mechanism costs or does not cover, a phrase each."""
        found = []
        if self.levels != BOTH:
            found.append(f"works only at CPL {', '.join(map(str, sorted(self.levels)))} on this host")
        if self.mechanism is Mechanism.STEPPING:
            found.append("slow: every instruction is stepped")
        elif self.mechanism in SLOTS:
            accesses = "write" if self.mechanism is Mechanism.READONLY_SLOT else "access"
            found.append(f"slower: every {accesses} to its page leaves the guest")
            if self.hazard:
                found.append(self.hazard)
        elif self.mechanism in OPCODES:
            found.append("the running guest can read its byte")
        return found

    def __str__(self) -> str:
        noun = "watchpoint" if self.is_watchpoint else "breakpoint"
        what = f" ({self.kind}, {self.size_bytes} bytes)" if self.is_watchpoint else ""
        return f"{noun} {self.number} at {self.label}{what}"

    def __repr__(self) -> str:
        parts = [f"{self} by {self.mechanism}"]
        if self.why:
            parts[0] += f" ({self.why})"
        parts += self.drawbacks
        parts += self.remarks
        if self.conflict:
            parts.append(self.conflict)
        if self.cr3 is not None:
            parts.append(f"in the address space of cr3 {self.cr3:#x} only, {self.elsewhere} times reached elsewhere")
        if self.condition is not None:
            parts.append(f"condition false {self.passes} times")
        if self.ignore:
            parts.append(f"ignores the next {self.ignore}")
        if self.temporary:
            parts.append("temporary")
        if not self.enabled:
            parts.append("disabled")
        parts.append(f"{self.hits} hits")
        return f"<{'; '.join(parts)}>"
