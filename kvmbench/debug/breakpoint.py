"""One breakpoint or watchpoint: where, by which mechanism, on which conditions, and what happened to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kvmbench.debug.mechanism import BOTH, OPCODES, SLOTS, Mechanism

#: CR3 without PCID or flags (bits 0 to 11) and the no-flush bit 63: the address of the top table.
TABLE = 0x000F_FFFF_FFFF_F000
#: The bit in which the two tables of a process differ under Linux' page-table isolation.
ISOLATION = 1 << 12


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
        why: why this mechanism and none that is quicker, in one line.
        condition: called with the `Cpu` at each hit; the guest goes on while it returns false.
        cr3: only in the address space of this top table; None: in all. PCID and no-flush bits do not count.
        page_table_isolation: bit 12 of CR3 does not count either.
        ignore: how many of the next hits let the guest go on; counts down. May be assigned.
        enabled: a disabled breakpoint stops nothing. May be assigned.
        temporary: removed at its first stop.
        hits: how often it was reached with its condition true, ignored ones included.
        passes: how often it was reached with its condition false.
        elsewhere: how often it was reached in another address space than `cr3`.
        overwritten: how often the guest was seen to have overwritten its byte (INT3, HLT).
        remarks: what happened to it since, a phrase each, such as a move to another mechanism.
        conflict: what it takes from the guest, such as debug registers of its own, or "".
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

    changed: Callable[[], None] | None = None
    #: The breakpoint of `Machine.breakpoints` that it belongs to, or None.
    shared: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name == "enabled" and getattr(self, "changed", None) is not None:
            self.changed()  # type: ignore[misc]

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
