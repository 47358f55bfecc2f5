"""What the bits of KVM's page-table entries mean, by the masks of the kernel that wrote them.

KVM keeps the masks in variables of its own, set when it learns whether the tables are read by the processor as page
tables, NPT or EPT; reading them is better than any table of vendors. The few bits that are the same everywhere are from
arch/x86/kvm/mmu/spte.h of Linux 6.1; `SPTE_MMU_PRESENT` came with 5.13.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmbench.host.kernel.program import HostKernel

U64 = npt.NDArray[np.uint64]
# An array of booleans, npt.NDArray[np.bool_]; mypy takes what numpy's operators give for Any.
Mask = Any

_MMU_PRESENT = np.uint64(1 << 11)
_WRITABLE = np.uint64(1 << 1)
_LARGE = np.uint64(1 << 7)
_AD_SHIFT = np.uint64(52)
_ADDRESS = 0x000F_FFFF_FFFF_F000
# What the TDP MMU puts where it is taking an entry away.
_REMOVED = np.uint64(0x5A0)
_AD_WORDS = (
    "accessed and dirty bits used",
    "accessed and dirty bits not used",
    "write-protected for dirty logging only",
)


@dataclass(frozen=True)
class SpteMasks:
    """KVM's ``shadow_*`` variables; 0 where the kernel has none of that name."""

    present: int
    user: int
    accessed: int
    dirty: int
    x: int
    nx: int
    mmio_value: int
    mmio_mask: int
    mmio_access: int
    acc_track: int
    host_writable: int
    mmu_writable: int
    me_mask: int
    memtype: int

    @property
    def is_ept(self) -> bool:
        """Whether entries are EPT's, which has a bit to execute instead of one not to."""
        return self.x != 0

    @property
    def address(self) -> int:
        """Bits of the host-physical address."""
        return _ADDRESS & ~self.me_mask

    @classmethod
    def read(cls, kernel: HostKernel) -> SpteMasks:
        """Reads them from a kernel."""
        symbols = {
            one.name: f"shadow_{one.name}" if one.name.endswith(("value", "_mask")) else f"shadow_{one.name}_mask"
            for one in fields(cls)
        }
        places = {name: kernel.symbol(symbol, None) for name, symbol in symbols.items()}
        there = [name for name, place in places.items() if place is not None]
        words = kernel.reader.read_many([places[name] for name in there], 8)
        values = {name: int.from_bytes(word or b"", "little") for name, word in zip(there, words, strict=True)}
        return cls(**{name: values.get(name, 0) for name in symbols})


class Sptes:
    """Decodes arrays of entries.

    Args:
        masks: of the kernel that wrote them.
        values: the entries, any shape.
        levels: of the tables they are in, of a shape that broadcasts to it.
    """

    def __init__(self, masks: SpteMasks, values: U64, levels: Any) -> None:
        self.masks = masks
        self.values = values
        self.levels = levels

    def _has(self, mask: int) -> Mask:
        return (self.values & np.uint64(mask)) != 0

    @property
    def present(self) -> Mask:
        """Leads to a table or a page."""
        return (self.values & _MMU_PRESENT) != 0

    @property
    def mmio(self) -> Mask:
        """Marks an address that no memory is behind, so that the next access needs no look-up."""
        mask, value = np.uint64(self.masks.mmio_mask), np.uint64(self.masks.mmio_value)
        return ~self.present & ((self.values & mask) == value) & (self.values != 0) & (value != 0)

    @property
    def removed(self) -> Mask:
        """Being taken away at this moment."""
        return self.values == _REMOVED

    @property
    def leaf(self) -> Mask:
        """Maps memory: of the last level, or large."""
        return self.present & ((self.levels == 1) | ((self.values & _LARGE) != 0))

    @property
    def writable(self) -> Mask:
        """The guest may write without a fault."""
        return self.present & ((self.values & _WRITABLE) != 0)

    @property
    def executable(self) -> Mask:
        """The guest may fetch instructions."""
        both = np.uint64(self.masks.x | self.masks.nx)
        return self.present & ((self.values & both) == np.uint64(self.masks.x))

    @property
    def user(self) -> Mask:
        """Not for the supervisor only; always so in second-level tables."""
        return self.present & self._has(self.masks.user)

    @property
    def ad_bits(self) -> npt.NDArray[np.uint8]:
        """0: the processor keeps accessed and dirty bits; 1: it does not; 2: likewise, but writes are logged."""
        return ((self.values >> _AD_SHIFT) & np.uint64(3)).astype(np.uint8)

    @property
    def accessed(self) -> Mask:
        """The processor has used it; without such bits, KVM has not yet taken the rights away to see it used again."""
        tracked = (self.values & np.uint64(self.masks.acc_track)) != 0 if self.masks.acc_track else True
        return self.present & np.where(self.ad_bits == 1, tracked, self._has(self.masks.accessed))

    @property
    def dirty(self) -> Mask:
        """The page was written; without such bits: may be."""
        return self.present & np.where(self.ad_bits == 1, self.writable, self._has(self.masks.dirty))

    @property
    def host_writable(self) -> Mask:
        """The host's own mapping lets the guest write."""
        return self.present & self._has(self.masks.host_writable)

    @property
    def mmu_writable(self) -> Mask:
        """KVM may make it writable without its lock: it is not write-protected as a guest's page table."""
        return self.present & self._has(self.masks.mmu_writable)

    @property
    def hpa(self) -> U64:
        """Host-physical address of the page or table."""
        return self.values & np.uint64(self.masks.address)


def in_words(masks: SpteMasks, value: int, level: int, access: int = 7) -> str:
    """One entry, such as ``page 0x5b59000 rwx- accessed dirty``, and why it is not writable.

    Args:
        access: what the guest's own tables allow: 1 execute, 2 write, 4 user.
    """
    one = Sptes(masks, np.array([value], np.uint64), np.array([level]))
    if one.mmio[0]:
        return f"MMIO: no memory is behind it ({value:#x})"
    if one.removed[0]:
        return "being taken away"
    if not one.present[0]:
        return "not present" if not value else f"not present ({value:#x})"
    rights = "r" + "".join(
        letter if on else "-" for letter, on in (("w", one.writable[0]), ("x", one.executable[0]), ("u", one.user[0]))
    )
    if not one.leaf[0]:
        return f"table {int(one.hpa[0]):#x} {rights}" + (" accessed" if one.accessed[0] else "")
    words = [f"page {int(one.hpa[0]):#x} {rights}"]
    if level > 1:
        words.append({2: "2 MiB", 3: "1 GiB"}.get(level, f"level {level}"))
    words += [word for word, on in (("accessed", one.accessed[0]), ("dirty", one.dirty[0])) if on]
    if one.ad_bits[0]:
        words.append(f"({_AD_WORDS[min(int(one.ad_bits[0]), 2)]})")
    if not one.writable[0]:
        words.append(f"- {_why_not_writable(one, access)}")
    return " ".join(words)


def _why_not_writable(one: Sptes, access: int) -> str:
    if not access & 2:
        return "the guest's tables do not allow writing, or no dirty bit is set yet"
    if not one.host_writable[0]:
        return "the host maps it read-only, as it does memory that was never written"
    if not one.mmu_writable[0]:
        return "write-protected as a page table of the guest"
    return "write-protected to see the next write"
