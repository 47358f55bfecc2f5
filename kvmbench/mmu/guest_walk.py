"""The walk of the guest's page tables for one linear address, entry by entry, as the processor makes it.

It only reads: accessed and dirty flags stay as they are. KVM_TRANSLATE tells where an address leads and nothing of the
way, and its rights are not so (KVM API: writeable is always 1).
Source: SDM volume 3, "Paging".
"""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from kvmbench.arguments import integer
from kvmbench.errors import AddressError, MisuseError
from kvmbench.machine.memory import Memory
from kvmbench.machine.size import show_size
from kvmbench.mmu import paging as p
from kvmbench.mmu.access import ERROR_BITS, Verdict, check_access, judge, not_canonical, page_fault
from kvmbench.mmu.entry import Entry
from kvmbench.mmu.paging import Paging
from kvmbench.mmu.vcpu_paging import paging_of

#: Memory types by their encoding in IA32_PAT.
MEMORY_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB", 7: "UC-"}


class End(StrEnum):
    """Where a walk ended."""

    PAGE = "page"
    NOT_PRESENT = "not present"
    RESERVED = "reserved"
    NOT_CANONICAL = "not canonical"
    #: A table is no memory of the machine. What the guest finds there is up to KVM and to devices.
    OUTSIDE = "outside"


@dataclass(frozen=True)
class GuestWalk:
    """The way of one linear address through the tables.

    Attributes:
        gva: the address.
        paging: the state of the vcpu that decided.
        entries: what was read, top first; none with paging off.
        end: where it ended.
        gpa: where the address leads, or None.
        page_bytes: size of its page; None without one, and with paging off.
        why: if it leads nowhere, the reason in words; else "".
        access: the verdict on the access that was asked for, or None.
    """

    gva: int
    paging: Paging
    entries: tuple[Entry, ...]
    end: End
    gpa: int | None
    page_bytes: int | None
    why: str = ""
    access: Verdict | None = None

    def can(self, access: str, *, user: bool | None = None, implicit: bool = False, stack: bool = False) -> Verdict:
        """Whether an access goes through, and what is raised if not: ``walk.can("write", user=True)``.

        Args:
            access: "read", "write" or "execute".
            user: made at CPL 3; None: as the vcpu is now.
            implicit: made by the processor on its own, always as a supervisor: of descriptors, or an exception's frame.
            stack: through SS or by a push, which makes #GP #SS.

        Raises:
            MisuseError: another word, or an implicit access of a user.
        """
        check_access(access)
        if implicit and user:
            raise MisuseError("implicit=True, user=True: what the processor does on its own, it does as a supervisor")
        user = not implicit and self.paging.cpl == 3 if user is None else user
        match self.end:
            case End.NOT_CANONICAL:
                return not_canonical(self.paging, self.gva, access, user=user, stack=stack)
            case End.OUTSIDE:
                return Verdict(access, user, False, self.why)
            case End.NOT_PRESENT:
                return page_fault(self.paging, access, user=user, bits=0, why=self.why)
            case End.RESERVED if not self.entries[-1].has_rights and self.paging.pdptes_kept:
                # The processor looks when CR3 is loaded.
                return Verdict(access, user, False, f"{self.why}; a MOV to CR3 with it raises #GP")
            case End.RESERVED:
                bits = ERROR_BITS["P"] | ERROR_BITS["RSVD"]
                return page_fault(self.paging, access, user=user, bits=bits, why=self.why)
        return judge(self.paging, self.entries, access, user=user, implicit=implicit)

    def rights(self, *, user: bool) -> str:
        """What goes through: some of "rwx", with "-" for what does not."""
        letters = zip("rwx", ("read", "write", "execute"), strict=True)
        return "".join(letter if self.can(access, user=user) else "-" for letter, access in letters)

    @property
    def leaf(self) -> Entry | None:
        """The entry that maps the page, or None."""
        return self.entries[-1] if self.end is End.PAGE and self.entries else None

    @property
    def accessed(self) -> bool:
        """The accessed flag is set in every entry that has one."""
        return self.leaf is not None and all(one.raw & p.ACCESSED for one in self.entries if one.has_rights)

    @property
    def dirty(self) -> bool:
        """The dirty flag of the page."""
        return self.leaf is not None and bool(self.leaf.raw & p.DIRTY)

    @property
    def is_global(self) -> bool:
        """MOV to CR3 leaves its translation in the TLB: G and CR4.PGE are set."""
        return self.leaf is not None and self.paging.pge and bool(self.leaf.raw & p.GLOBAL)

    @property
    def key(self) -> int | None:
        """The protection key, or None where there are none."""
        return None if self.leaf is None or not self.paging.has_keys else self.leaf.raw >> p.KEY_SHIFT & 0xF

    @property
    def pat_index(self) -> int | None:
        """Which byte of IA32_PAT says the memory type, 0 to 7."""
        if self.leaf is None:
            return None
        level = next(one for one in self.paging.levels if one.name == self.leaf.level)
        return int(self.paging.pat_index(level, self.leaf.raw))

    @property
    def memory_type(self) -> str:
        """ "WB", "UC", ... by IA32_PAT; MTRRs may make it weaker. "" where that is not known."""
        if self.pat_index is None or self.paging.pat is None:
            return ""
        return MEMORY_TYPES.get(self.paging.pat >> 8 * self.pat_index & 7, "reserved")

    @property
    def summary(self) -> str:
        """One line: where it leads, or why nowhere."""
        if self.gpa is None:
            return f"gva {self.gva:#x} leads nowhere: {self.why}"
        page = "paging is off" if self.page_bytes is None else f"a page of {show_size(self.page_bytes)}"
        return f"gva {self.gva:#x} -> gpa {self.gpa:#x}, {page}"

    def _facts(self) -> list[str]:
        # Lines under the table of entries.
        lines = [f"supervisor {self.rights(user=False)}, user {self.rights(user=True)}"] if self.gpa is not None else []
        if self.leaf is not None:
            words = ["accessed" if self.accessed else "not accessed", "dirty" if self.dirty else "clean"]
            words += ["global"] if self.is_global else []
            words += [f"key {self.key}"] if self.key is not None else []
            kind = f" ({self.memory_type})" if self.memory_type else ""
            lines.append(", ".join([*words, f"PAT index {self.pat_index}{kind}"]))
        return [*lines, str(self.paging), *([str(self.access)] if self.access is not None else [])]

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        digits = 2 * self.paging.entry_bytes
        return [
            (
                f"{one.level} {one.index}",
                one.register or f"{one.gpa:#x}",
                f"{one.raw:0{digits}x}",
                f"{one.target:#x}",
                " ".join(one.words)
                + (f"; reserved bits set: {', '.join(map(str, one.reserved_bits))}" if one.reserved else ""),
            )
            for one in self.entries
        ]

    def __repr__(self) -> str:
        rows = self._rows()
        wide = [max((len(row[n]) for row in rows), default=0) for n in range(4)]
        lines = [
            f"  {a:<{wide[0]}}  at {b:>{wide[1]}}  {c}  -> {d:>{wide[3]}}  {words}".rstrip()
            for a, b, c, d, words in rows
        ]
        return "\n".join([self.summary, *lines, *(f"  {fact}" for fact in self._facts())])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("entry", "at", "value", "leads to", "bits"))
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows())
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if body else ""
        facts = "<br>".join(map(html.escape, self._facts()))
        return f"<p><b>{html.escape(self.summary)}</b></p>{table}<p>{facts}</p>"


def walk_tables(memory: Memory, paging: Paging, gva: int) -> GuestWalk:
    """Follows the tables for one address.

    Raises:
        MisuseError: the address has more bits than the mode.
    """
    paging.check_linear(gva)
    if paging.mode == "off":
        return GuestWalk(gva, paging, (), End.PAGE, gva, None)
    if not paging.is_canonical(gva):
        why = f"it is not canonical: bits 63 to {paging.linear_bits - 1} differ"
        return GuestWalk(gva, paging, (), End.NOT_CANONICAL, None, None, why)
    read = memory.read_u32 if paging.entry_bytes == 4 else memory.read_u64
    entries: list[Entry] = []
    table = paging.root
    for level in paging.levels:
        index = gva >> level.shift & (1 << level.bits) - 1
        at = table + index * paging.entry_bytes
        register = ""
        if level.name == "PDPTE" and paging.pdptes:
            raw = paging.pdptes[index]
            register = f"PDPTE{index}" if paging.pdptes_from == "registers" else ""
        else:
            try:
                raw = read(at)
            except AddressError:
                lead = f"the {entries[-1].where}" if entries else "CR3"
                why = f"the {level.name} would be at gpa {at:#x}, which is not guest memory ({lead} leads there)"
                return GuestWalk(gva, paging, tuple(entries), End.OUTSIDE, None, None, why)
        entry = Entry.decode(paging, level, index, at, raw, register=register)
        entries.append(entry)
        if not entry.present:
            return _nowhere(gva, paging, entries, End.NOT_PRESENT, f"P is clear in the {entry.where}")
        if entry.reserved:
            bits = ", ".join(map(str, entry.reserved_bits))
            return _nowhere(gva, paging, entries, End.RESERVED, f"reserved bits of the {entry.where} are set: {bits}")
        if entry.is_leaf:
            size = 1 << level.shift
            return GuestWalk(gva, paging, tuple(entries), End.PAGE, entry.target | gva & size - 1, size)
        table = entry.target
    raise AssertionError("the last level has leaves only")


def _nowhere(gva: int, paging: Paging, entries: list[Entry], end: End, why: str) -> GuestWalk:
    return GuestWalk(gva, paging, tuple(entries), end, None, None, why)


def walk_of(
    cpu: Any, gva: int, access: str | None = None, *, user: bool | None = None, cr3: int | None = None
) -> GuestWalk:
    """`walk_tables` for a `kvmbench.debug.cpu.Cpu` as it is now; `Cpu.walk` has the arguments."""
    gva = integer(gva, "gva", 0, (1 << 64) - 1)
    if access is not None:
        check_access(access)
    walked = walk_tables(cpu.machine.memory, paging_of(cpu, cr3), gva)
    return walked if access is None else replace(walked, access=walked.can(access, user=user))
