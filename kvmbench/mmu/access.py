"""Whether an access goes through, and what the processor raises if not.

Sources: SDM volume 3, "Determination of Access Rights", "Protection Keys", "Page-Fault Exceptions" and "Accessed and
Dirty Flags".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvmbench.arguments import instead
from kvmbench.errors import MisuseError
from kvmbench.mmu import paging as p
from kvmbench.mmu.entry import Entry
from kvmbench.mmu.paging import Paging

#: What an instruction may do with an address.
ACCESSES = ("read", "write", "execute")
#: Bits of the error code of #PF, by name.
ERROR_BITS = {"P": 1 << 0, "W": 1 << 1, "U": 1 << 2, "RSVD": 1 << 3, "I": 1 << 4, "PK": 1 << 5}
GP, PF, SS = 13, 14, 12
_VECTORS = {GP: "#GP", PF: "#PF", SS: "#SS"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one access; true if it goes through.

    Attributes:
        access: "read", "write" or "execute".
        user: it is made at CPL 3.
        allowed: the tables let it through.
        why: if not, what is in the way: bit, entry and control register.
        vector: of the exception: 14 for #PF, 13 for #GP, 12 for #SS; None: none, or not told.
        error_code: what the processor pushes with it; None: nothing is raised, or it is not told.
        sets: entries and the flag that the access sets in them, "accessed" or "dirty".
    """

    access: str
    user: bool
    allowed: bool
    why: str = ""
    vector: int | None = None
    error_code: int | None = None
    sets: tuple[tuple[Entry, str], ...] = ()

    @property
    def exception(self) -> str:
        """ "#PF(P W U)", "#GP(0)", or "" for none."""
        if self.vector is None or self.error_code is None:
            return ""
        bits = " ".join(name for name, bit in ERROR_BITS.items() if self.error_code & bit)
        return f"{_VECTORS[self.vector]}({bits if self.vector == PF and bits else 0})"

    def __bool__(self) -> bool:
        return self.allowed

    def __str__(self) -> str:
        who = "user" if self.user else "supervisor"
        if not self.allowed:
            return f"{who} {self.access}: {self.exception or 'not told'}: {self.why}"
        sets = ", ".join(f"{flag} in {entry.where}" for entry, flag in self.sets)
        return f"{who} {self.access}: goes through{f'; sets {sets}' if sets else ''}"


def check_access(access: Any) -> str:
    """The word, if it is one.

    Raises:
        MisuseError: it is none.
    """
    if not isinstance(access, str) or access not in ACCESSES:
        raise MisuseError(f"access={access!r}: {instead(access, ACCESSES)}")
    return access


def not_canonical(paging: Paging, gva: int, access: str, *, user: bool, stack: bool) -> Verdict:
    """The verdict on an address that long mode does not have."""
    bits = paging.linear_bits
    name = "through SS or a push" if stack else "other than by the stack"
    why = f"gva {gva:#x} is not canonical: bits 63 to {bits - 1} differ with {paging.mode} paging ({name})"
    return Verdict(access, user, False, why, SS if stack else GP, 0)


def page_fault(paging: Paging, access: str, *, user: bool, bits: int, why: str) -> Verdict:
    """The verdict on an access that raises #PF; `bits` are those that tell of the tables: P, RSVD and PK."""
    code = bits | (ERROR_BITS["U"] if user else 0) | (ERROR_BITS["W"] if access == "write" else 0)
    if access == "execute" and paging.fetch_told:
        code |= ERROR_BITS["I"]
    return Verdict(access, user, False, why, PF, code)


def judge(paging: Paging, entries: Sequence[Entry], access: str, *, user: bool, implicit: bool) -> Verdict:
    """The verdict on an access to a page that was found.

    Args:
        entries: all that lead to it; none with paging off.
        implicit: the processor makes it on its own, as a supervisor: for a descriptor, or the frame of an exception.
    """
    if not entries:
        return Verdict(access, user, True)
    user_page = all(one.raw & p.USER for one in entries if one.has_rights)
    reasons = list(_denied(paging, entries, access, user=user, implicit=implicit, user_page=user_page))
    by_key = "" if access == "execute" else _denied_by_key(paging, entries[-1], access, user=user, user_page=user_page)
    if by_key:
        reasons.append(by_key)
    if reasons:
        bits = ERROR_BITS["P"] | (ERROR_BITS["PK"] if by_key else 0)
        return page_fault(paging, access, user=user, bits=bits, why="; ".join(reasons))
    sets = [(one, "accessed") for one in entries if one.has_rights and not one.raw & p.ACCESSED]
    if access == "write" and not entries[-1].raw & p.DIRTY:
        sets.append((entries[-1], "dirty"))
    return Verdict(access, user, True, sets=tuple(sets))


def _denied(
    paging: Paging, entries: Sequence[Entry], access: str, *, user: bool, implicit: bool, user_page: bool
) -> Iterator[str]:
    if user and not user_page:
        lacking = next(one for one in entries if one.has_rights and not one.raw & p.USER)
        yield f"U/S is clear in the {lacking.where}"
    if not user and user_page:
        if access == "execute":
            if paging.smep:
                yield "CR4.SMEP is set, and U/S is set in all entries"
        elif paging.smap and (implicit or not paging.ac):
            off = "the access is implicit" if implicit else "RFLAGS.AC is clear"
            yield f"CR4.SMAP is set, {off}, and U/S is set in all entries"
    if access == "write" and (user or paging.wp):
        lacking_write = next((one for one in entries if one.has_rights and not one.raw & p.WRITABLE), None)
        if lacking_write is not None:
            yield f"R/W is clear in the {lacking_write.where}{'' if user else ', and CR0.WP is set'}"
    if access == "execute" and paging.nxe:
        forbidding = next((one for one in entries if one.raw & p.NO_EXECUTE), None)
        if forbidding is not None:
            yield f"XD is set in the {forbidding.where}, and EFER.NXE is set"


def _denied_by_key(paging: Paging, leaf: Entry, access: str, *, user: bool, user_page: bool) -> str:
    if not (paging.pke if user_page else paging.pks):
        return ""
    name, rights, switch = ("PKRU", paging.pkru, "PKE") if user_page else ("IA32_PKRS", paging.pkrs, "PKS")
    key = leaf.raw >> p.KEY_SHIFT & 0xF
    if rights >> 2 * key & 1:
        return f"{name}.AD{key} is set, CR4.{switch} is set, and the {leaf.where} has protection key {key}"
    if access == "write" and rights >> 2 * key & 2 and (user or paging.wp):
        wp = "" if user else ", CR0.WP is set"
        return f"{name}.WD{key} is set, CR4.{switch} is set{wp}, and the {leaf.where} has protection key {key}"
    return ""
