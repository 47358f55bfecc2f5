"""One entry of a page table, as a walk read it."""

from __future__ import annotations

from dataclasses import dataclass

from kvmbench.mmu import paging as p
from kvmbench.mmu.paging import Level, Paging


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that the processor reads on its way.

    Attributes:
        level: of its table.
        index: its place in the table.
        gpa: where it is. Of a PDPTE that was read from a register: where that was loaded from.
        raw: its value.
        is_leaf: it maps a page, or would if it were present and sound.
        target: gpa of the page or table that it leads to; of one that is not present, what these bits are.
        reserved: the bits that are set and must not be.
        register: "PDPTE0" and so on, where the processor has it in a register, else "".
        has_rights: it has R/W and U/S bits, which PDPTEs of PAE have not.
        words: what its bits say: "present", "writable", "user", ...
    """

    level: str
    index: int
    gpa: int
    raw: int
    is_leaf: bool
    target: int
    reserved: int
    register: str
    has_rights: bool
    words: tuple[str, ...]

    @classmethod
    def decode(cls, paging: Paging, level: Level, index: int, gpa: int, raw: int, *, register: str = "") -> Entry:
        """Reads an entry's bits as they count in a mode."""
        is_leaf = level.name == "PTE" or bool(raw & p.LARGE and paging.may_be_large(level))
        has_rights = not (paging.mode == "PAE" and level.name == "PDPTE")
        return cls(
            level.name,
            index,
            gpa,
            raw,
            is_leaf,
            paging.page(level, raw) if is_leaf else paging.table(raw),
            paging.reserved(level, leaf=is_leaf) & raw if raw & p.PRESENT else 0,
            register,
            has_rights,
            _words(paging, level, raw, is_leaf, has_rights),
        )

    @property
    def present(self) -> bool:
        """Bit 0; without it the other bits mean nothing."""
        return bool(self.raw & p.PRESENT)

    @property
    def where(self) -> str:
        """The entry named: "PTE at gpa 0x3008"."""
        return f"{self.level} in register {self.register}" if self.register else f"{self.level} at gpa {self.gpa:#x}"

    @property
    def reserved_bits(self) -> tuple[int, ...]:
        """Numbers of the bits in `reserved`."""
        return tuple(bit for bit in range(64) if self.reserved >> bit & 1)

    def __str__(self) -> str:
        said = " ".join(self.words)
        if self.reserved:
            said += f"; reserved bits set: {', '.join(map(str, self.reserved_bits))}"
        return f"{self.where} {self.raw:#x} -> {self.target:#x}: {said}"


def _words(paging: Paging, level: Level, raw: int, is_leaf: bool, has_rights: bool) -> tuple[str, ...]:
    if not raw & p.PRESENT:
        return ("not present",)
    if not has_rights:
        return ("present",)
    words = ["present", "writable" if raw & p.WRITABLE else "read-only", "user" if raw & p.USER else "supervisor"]
    if raw & p.NO_EXECUTE and paging.nxe:
        words.append("no-execute")
    words.append("accessed" if raw & p.ACCESSED else "not accessed")
    if is_leaf:
        words.append("dirty" if raw & p.DIRTY else "clean")
        if level.name != "PTE":
            words.append("large")
        if raw & p.GLOBAL and paging.pge:
            words.append("global")
        if index := int(paging.pat_index(level, raw)):
            words.append(f"PAT {index}")
        if paging.has_keys and (key := raw >> p.KEY_SHIFT & 0xF):
            words.append(f"key {key}")
    else:
        words += [name for name, bit in (("PWT", p.PWT), ("PCD", p.PCD)) if raw & bit]
    return tuple(words)
