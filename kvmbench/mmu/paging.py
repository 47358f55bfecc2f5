"""How a vcpu translates linear addresses: its paging mode, the bits that decide rights, where its tables begin.

Everything is read off control registers, MSRs and CPUID, once; walks and maps then work on this copy.
Sources: SDM volume 3, "Paging" (modes, reserved bits), "Determination of Access Rights"; APM volume 2, "Page
Translation and Protection" (bit 8 of PML4Es is reserved on AMD processors).

Not looked at: shadow-stack pages (CR4.CET), linear-address masking (LAM, UAI), HLAT, SGX, memory encryption.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvmbench.errors import MisuseError

PAGE_BYTES = 4096
#: Bits of an entry of any mode.
PRESENT, WRITABLE, USER, PWT, PCD = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4
ACCESSED, DIRTY, LARGE, GLOBAL, NO_EXECUTE = 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 63
#: Where the PAT bit is: in PTEs, and in entries of larger pages.
PAT_SMALL, PAT_LARGE = 1 << 7, 1 << 12
KEY_SHIFT = 59

_PG, _WP = 1 << 31, 1 << 16
_PSE, _PAE, _PGE, _LA57, _SMEP, _SMAP, _PKE, _PKS = 1 << 4, 1 << 5, 1 << 7, 1 << 12, 1 << 20, 1 << 21, 1 << 22, 1 << 24
_LMA, _NXE, _AC = 1 << 10, 1 << 11, 1 << 18
_ADDRESS = 0x000F_FFFF_FFFF_F000
_XSTATE_PKRU = 9
_AMD = ("AuthenticAMD", "HygonGenuine")


@dataclass(frozen=True, slots=True)
class Level:
    """One level of tables.

    Attributes:
        name: of its entries, as in the manual: "PML4E".
        shift: the lowest bit of a linear address that chooses an entry; a page mapped here has ``1 << shift`` bytes.
        bits: how many bits do.
    """

    name: str
    shift: int
    bits: int


_PTE, _PDE, _PDPTE, _PML4E, _PML5E = (
    Level(name, shift, 9) for name, shift in (("PTE", 12), ("PDE", 21), ("PDPTE", 30), ("PML4E", 39), ("PML5E", 48))
)
#: The levels of each mode, top first.
LEVELS: dict[str, tuple[Level, ...]] = {
    "off": (),
    "32-bit": (Level("PDE", 22, 10), Level("PTE", 12, 10)),
    "PAE": (Level("PDPTE", 30, 2), _PDE, _PTE),
    "4-level": (_PML4E, _PDPTE, _PDE, _PTE),
    "5-level": (_PML5E, _PML4E, _PDPTE, _PDE, _PTE),
}


@dataclass(frozen=True, slots=True)
class Processor:
    """What CPUID tells the guest of paging.

    Attributes:
        physical_bits: MAXPHYADDR.
        gib_pages: there are pages of 1 GiB.
        pse36: pages of 4 MiB may lie above 4 GiB.
        amd: its vendor is AMD (or Hygon).
        pkru_offset: where PKRU is in the XSAVE area, or None.
    """

    physical_bits: int = 36
    gib_pages: bool = True
    pse36: bool = True
    amd: bool = False
    pkru_offset: int | None = None

    @classmethod
    def from_cpuid(cls, entries: Iterable[Any]) -> Processor:
        """Reads ``struct kvm_cpuid_entry2`` values."""
        by_leaf = {(int(one.function), int(one.index)): one for one in entries}

        def answer(leaf: int, register: str, index: int = 0) -> int:
            found = by_leaf.get((leaf, index))
            return 0 if found is None else int(getattr(found, register))

        vendor = b"".join(answer(0, register).to_bytes(4, "little") for register in ("ebx", "edx", "ecx"))
        features = answer(1, "edx")
        # SDM volume 3, "Enumeration of Paging Features by CPUID": without the leaf 36, or 32 without PAE.
        bits = answer(0x8000_0008, "eax") & 0xFF or (36 if features >> 6 & 1 else 32)
        return cls(
            physical_bits=min(bits, 52),
            gib_pages=bool(answer(0x8000_0001, "edx") >> 26 & 1),
            pse36=bool(features >> 17 & 1),
            amd=vendor.decode("latin-1") in _AMD,
            pkru_offset=answer(0xD, "ebx", _XSTATE_PKRU) or None,
        )


@dataclass(frozen=True, slots=True)
class Paging:
    """The state that decides where linear addresses lead and who may go there.

    Attributes:
        mode: "off", "32-bit", "PAE", "4-level" or "5-level".
        cr3: as it is; `root` is the address in it.
        processor: what CPUID tells the guest.
        wp, pse, smep, smap, pke, pks, pge, nxe: control bits that are on and mean something in this mode.
        ac: RFLAGS.AC.
        cpl: current privilege level, 0 to 3.
        fetch_told: the processor says in error codes that an access was a fetch (NXE with PAE, or SMEP).
        pkru, pkrs: rights of the protection keys of user and of supervisor pages.
        pat: IA32_PAT, or None where KVM does not tell.
        pdptes: of PAE, the four entries that the processor uses; else empty.
        pdptes_from: where those were read: "registers" (KVM_GET_SREGS2), where the processor keeps them from
            MOV to CR3 on, or "memory"; else "".
        pdptes_kept: the processor has them in registers; if not, it reads and checks them at each walk.
    """

    mode: str
    cr3: int
    processor: Processor
    wp: bool = False
    pse: bool = False
    smep: bool = False
    smap: bool = False
    pke: bool = False
    pks: bool = False
    pge: bool = False
    nxe: bool = False
    ac: bool = False
    cpl: int = 0
    fetch_told: bool = False
    pkru: int = 0
    pkrs: int = 0
    pat: int | None = None
    pdptes: tuple[int, ...] = ()
    pdptes_from: str = ""
    pdptes_kept: bool = True

    @classmethod
    def from_kvm(cls, sregs: Any, processor: Processor, *, rflags: int = 2, cpl: int | None = None) -> Paging:
        """Decodes ``struct kvm_sregs``, which holds no PKRU, MSRs and PDPTEs.

        Args:
            cpl: SS.DPL unless given.
        """
        cr0, cr4, efer = int(sregs.cr0), int(sregs.cr4), int(sregs.efer)
        long = bool(efer & _LMA)
        if not cr0 & _PG:
            mode = "off"
        elif long:
            mode = "5-level" if cr4 & _LA57 else "4-level"
        else:
            mode = "PAE" if cr4 & _PAE else "32-bit"
        nxe = bool(efer & _NXE and cr4 & _PAE)
        return cls(
            mode,
            int(sregs.cr3),
            processor,
            wp=bool(cr0 & _WP),
            pse=bool(cr4 & _PSE) and mode == "32-bit",
            smep=bool(cr4 & _SMEP),
            smap=bool(cr4 & _SMAP),
            pke=bool(cr4 & _PKE) and long,
            pks=bool(cr4 & _PKS) and long,
            pge=bool(cr4 & _PGE),
            nxe=nxe,
            ac=bool(rflags & _AC),
            cpl=int(sregs.ss.dpl) if cpl is None else cpl,
            fetch_told=nxe or bool(cr4 & _SMEP),
        )

    @property
    def levels(self) -> tuple[Level, ...]:
        """Top first; none with paging off."""
        return LEVELS[self.mode]

    @property
    def entry_bytes(self) -> int:
        """4 or 8."""
        return 4 if self.mode == "32-bit" else 8

    @property
    def linear_bits(self) -> int:
        """How many bits of a linear address count."""
        return {"4-level": 48, "5-level": 57}.get(self.mode, 32)

    @property
    def root(self) -> int:
        """gpa of the top table."""
        return root_of(self.mode, self.cr3)

    @property
    def has_keys(self) -> bool:
        """Whether pages have protection keys."""
        return self.pke or self.pks

    def is_canonical(self, gva: int) -> bool:
        """Whether the bits above those that count repeat the highest that does; always so outside long mode."""
        if self.linear_bits == 32:
            return gva < 1 << 32
        high = gva >> (self.linear_bits - 1)
        return high in (0, (1 << (65 - self.linear_bits)) - 1)

    def check_linear(self, gva: int) -> None:
        """Raises MisuseError for an address that this mode does not have; one that is not canonical is fine."""
        if self.linear_bits == 32 and gva >> 32:
            raise MisuseError(f"gva={gva:#x}: linear addresses have 32 bits with {self.mode} paging; mask it")

    def may_be_large(self, level: Level) -> bool:
        """Whether bit 7 of an entry of this level makes it a page; elsewhere it is reserved, ignored or PAT."""
        if level.name == "PDE":
            return self.mode != "32-bit" or self.pse
        return level.name == "PDPTE" and self.mode != "PAE" and self.processor.gib_pages

    def reserved(self, level: Level, *, leaf: bool) -> int:
        """The bits that must be 0 in a present entry.

        Args:
            leaf: the entry maps a page.
        """
        physical, large = self.processor.physical_bits, leaf and level.name != "PTE"
        if self.mode == "32-bit":
            if not large:
                return 0
            if not self.processor.pse36:
                return _span(13, 21)
            return _span(min(physical, 40) - 19, 21)
        if self.mode == "PAE" and level.name == "PDPTE":
            # QEMU sets bit 5 where it reads them at each walk, as if they had an accessed flag.
            return _span(1, 2) | _span(5 if self.pdptes_kept else 6, 8) | _span(physical, 63)
        bits = _span(physical, 62 if self.mode == "PAE" else 51)
        if not self.nxe:
            bits |= NO_EXECUTE
        if large:
            return bits | _span(13, level.shift - 1)
        if not leaf:
            if level.name in ("PML5E", "PML4E") or (level.name == "PDPTE" and not self.processor.gib_pages):
                bits |= LARGE
            # Not in PDPTEs (Linux commit 5ecad245de2a, "KVM: x86: only reserve bit 8 of ... PML4Es").
            if level.name in ("PML5E", "PML4E") and self.processor.amd:
                bits |= GLOBAL
        return bits

    def table(self, entry: Any) -> Any:
        """gpa of the table that an entry leads to; takes arrays too."""
        return entry & (0xFFFF_F000 if self.mode == "32-bit" else _ADDRESS)

    def page(self, level: Level, entry: Any) -> Any:
        """gpa of the page that an entry maps; takes arrays too."""
        if self.mode == "32-bit" and level.name == "PDE":
            # PSE-36: bits 13 to 20 are address bits 32 to 39.
            return entry & 0xFFC0_0000 | (entry & 0x1F_E000) << 19
        return self.table(entry) & (_ADDRESS >> level.shift << level.shift)

    def pat_index(self, level: Level, entry: Any) -> Any:
        """Which byte of IA32_PAT a page uses; takes arrays too."""
        shift = 7 if level.name == "PTE" else 12
        return (entry >> shift & 1) << 2 | entry >> 3 & 3

    def __str__(self) -> str:
        if self.mode == "off":
            return "paging off"
        names = ("wp", "pse", "smep", "smap", "pke", "pks", "pge", "nxe", "ac")
        on = " ".join(name.upper() for name in names if getattr(self, name)) or "no control bits"
        read = f", PDPTEs from {self.pdptes_from}" if self.pdptes_from else ""
        return f"{self.mode} paging, CR3 {self.cr3:#x}{read}, {on}, CPL {self.cpl}"


def _span(low: int, high: int) -> int:
    # Bits `low` to `high`, both of them; none if they cross.
    return (1 << (high + 1)) - (1 << low) if low <= high else 0


def root_of(mode: str, cr3: int) -> int:
    """gpa of the top table that CR3 names."""
    if mode == "PAE":
        return cr3 & 0xFFFF_FFE0
    return cr3 & (0xFFFF_F000 if mode == "32-bit" else _ADDRESS)
