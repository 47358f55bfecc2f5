"""The X-ray: KVM's own page tables of one VM, out of the host kernel's memory.

Taken with all vcpus out of the guest, and read only from the VM's `struct kvm` on. What KVM keeps is known by its types
(BTF) and by the masks of its entries, so shadow paging, NPT and EPT are read by the same code.
Source: the kernel's Documentation/virt/kvm/x86/mmu.rst, for the words.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmbench.errors import HostError, MisuseError, UnsupportedError
from kvmbench.host.kernel.program import HostKernel
from kvmbench.mmu.find_vm import find_vm
from kvmbench.mmu.spte import SpteMasks, Sptes
from kvmbench.mmu.xray_text import page_in_words, tree, walk_in_words

_PAGE = "struct kvm_mmu_page"
_MOST_PAGES = 1 << 17
_ENTRIES = 512
_INVALID = (1 << 64) - 1

#: One of KVM's tables: a `struct kvm_mmu_page`.
PAGE = np.dtype(
    [
        ("address", "<u8"),  # of the struct
        ("table", "<u8"),  # of its 512 entries, in the kernel's address space
        ("hpa", "<u8"),  # of the same, host-physical
        ("gfn", "<u8"),
        ("role", "<u4"),  # the whole word
        ("level", "u1"),
        ("direct", "?"),
        ("access", "u1"),  # 1 execute, 2 write, 4 user
        ("invalid", "?"),
        ("quadrant", "u1"),
        ("four_byte_gpte", "?"),
        ("efer_nx", "?"),
        ("cr0_wp", "?"),
        ("guest_mode", "?"),
        ("ad_disabled", "?"),
        ("smm", "u1"),
        ("tdp_mmu", "?"),
        ("unsync", "?"),
        ("unsync_children", "<u4"),
        ("root_count", "<i4"),
        ("obsolete", "?"),
        ("no_large_page", "?"),  # a large page was split because of the processor's iTLB multi-hit fault
    ]
)

#: An entry that is not empty.
SPTE = np.dtype(
    [
        ("page", "<u4"),  # which of the pages it is in
        ("index", "<u2"),
        ("level", "u1"),
        ("kind", "u1"),  # of KINDS
        ("value", "<u8"),
        ("gfn", "<u8"),  # of the first page that it maps
        ("child", "<i4"),  # which of the pages it leads to; -1: none
        ("access", "u1"),  # what the guest's own tables allow: 1 execute, 2 write, 4 user
    ]
)
KINDS = ("not present", "table", "leaf", "MMIO", "removed")
_NOT_PRESENT, _TABLE, _LEAF, _MMIO, _REMOVED = range(5)

# Members of union kvm_mmu_page_role by our names; one that a kernel lacks is 0.
_ROLE = {
    "level": "level", "direct": "direct", "access": "access", "invalid": "invalid", "quadrant": "quadrant",
    "four_byte_gpte": "has_4_byte_gpte", "efer_nx": "efer_nx", "cr0_wp": "cr0_wp", "guest_mode": "guest_mode",
    "ad_disabled": "ad_disabled", "smm": "smm",
}  # fmt: skip


@dataclass(frozen=True)
class Root:
    """What a vcpu's CR3 (or nested CR3, or EPT pointer) is loaded with.

    Attributes:
        vcpu: its index.
        hpa: host-physical address of the table.
        pgd: the guest's CR3 that it belongs to; 0 for second-level tables.
        level: of the table.
        page: which of the pages it is; -1: none of them, as the four entries of a PAE root are.
        current: False: kept for when the guest goes back to it.
        pae: the four entries, where it is a PAE root.
    """

    vcpu: int
    hpa: int
    pgd: int
    level: int
    page: int
    current: bool
    pae: tuple[int, ...] = ()


class Xray:
    """KVM's tables at one moment.

    Attributes:
        pages: one row a table, dtype `PAGE`.
        sptes: one row an entry that is not empty, dtype `SPTE`.
        roots: of each vcpu.
        masks: the kernel's, by which entries are read.
        whole: False: a list led nowhere, or was longer than can be: the VM was running, or the kernel is another.
        notes: what could not be read, in words.
        time_ns: how long it took.
    """

    def __init__(
        self,
        pages: npt.NDArray[Any],
        sptes: npt.NDArray[Any],
        roots: tuple[Root, ...],
        masks: SpteMasks,
        *,
        notes: tuple[str, ...],
        time_ns: int,
    ) -> None:
        self.pages = pages
        self.sptes = sptes
        self.roots = roots
        self.masks = masks
        self.notes = notes
        self.time_ns = time_ns

    @property
    def whole(self) -> bool:
        """Whether all could be read."""
        return not self.notes

    def decoded(self, rows: Any = slice(None)) -> Sptes:
        """The bits of some of the entries."""
        chosen = self.sptes[rows]
        return Sptes(self.masks, chosen["value"], chosen["level"])

    def maps(self, gfn: int) -> npt.NDArray[Any]:
        """The leaves that map a guest page: the reverse map. Rows of `sptes`."""
        leaf = self.sptes["kind"] == _LEAF
        first = self.sptes["gfn"]
        pages = np.uint64(1) << (9 * (self.sptes["level"].astype(np.uint64) - np.uint64(1)))
        wanted = np.uint64(gfn)
        found: npt.NDArray[Any] = self.sptes[leaf & (first <= wanted) & (wanted - first < pages)]
        return found

    def root(self, vcpu: int = 0) -> Root | None:
        """What a vcpu's table register is loaded with; None: it has not run since KVM last took it away."""
        return next((one for one in self.roots if one.vcpu == vcpu and one.current), None)

    def walk(self, address: int, vcpu: int = 0) -> tuple[npt.NDArray[Any], ...]:
        """The entries that the processor would read for an address, from the top; it may end at one that is not there.

        Args:
            address: with shadow paging the guest's linear address, with second-level tables its physical one.

        Returns:
            Rows of dtype `SPTE`, one a level; the last one may be of kind 0 with value 0, which `sptes` does not have.
        """
        root = self.root(vcpu)
        steps: list[Any] = []
        if root is None:
            return ()
        page, level = root.page, root.level
        if root.pae:
            entry = root.pae[address >> 30 & 3]
            page, level = self.page_of(entry & self.masks.address), 2
        while page >= 0:
            index = address >> 12 + 9 * (level - 1) & _ENTRIES - 1
            first = np.searchsorted(self.sptes["page"], page)
            end = np.searchsorted(self.sptes["page"], page + 1)
            mine = self.sptes[first:end]
            found = mine[mine["index"] == index]
            if not len(found):
                empty = np.zeros(1, SPTE)[0]
                empty["page"], empty["index"], empty["level"], empty["child"] = page, index, level, -1
                steps.append(empty)
                break
            steps.append(found[0])
            page, level = int(found[0]["child"]), level - 1
        return tuple(steps)

    def walk_text(self, address: int, vcpu: int = 0) -> str:
        """`walk` in words, a line for each entry."""
        return walk_in_words(self, address, vcpu)

    def page_of(self, hpa: int) -> int:
        """Which of the pages is at a host-physical address; -1: none."""
        found = np.flatnonzero(self.pages["hpa"] == np.uint64(hpa))
        return int(found[0]) if len(found) else -1

    def describe(self, page: int) -> str:
        """What a table is, in words."""
        if not 0 <= page < len(self.pages):
            raise MisuseError(f"no table {page}: there are {len(self.pages):,}")
        return page_in_words(self.pages[page])

    def tree(self, *, most: int = 200) -> str:
        """The tables from their roots down, a line each, with their leaves counted; `most` lines at most."""
        return tree(self, most=most)

    def __repr__(self) -> str:
        kinds = np.bincount(self.sptes["kind"], minlength=len(KINDS))
        sort = "TDP MMU" if self.pages["tdp_mmu"].any() else "shadow MMU"
        text = (
            f"<Xray: {len(self.pages):,} tables of the {sort}, {kinds[_LEAF]:,} leaves, {kinds[_MMIO]:,} MMIO entries; "
            f"{self.time_ns / 1e6:.0f} ms"
        )
        return text + "".join(f"; {note}" for note in self.notes) + ">"


def take(kernel: HostKernel, vm: int, vcpus: list[int]) -> Xray:
    """Reads KVM's tables of a VM whose vcpus are out of the guest.

    Args:
        kernel: of the host.
        vm: its handle in the core.
        vcpus: those of its vcpus.

    Raises:
        UnsupportedError: the tables are laid out otherwise than this library knows.
        HostError: the VM was not found.
    """
    start = time.monotonic_ns()
    found = find_vm(kernel, vm, vcpus)
    masks = SpteMasks.read(kernel)
    notes: list[str] = []
    base = kernel.u64(kernel.symbol("page_offset_base"))
    pages, translations = _pages(kernel, found.kvm, base, notes)
    sptes = _sptes(kernel, pages, translations, masks, notes)
    roots = tuple(root for n, vcpu in enumerate(found.vcpus) for root in _roots(kernel, n, vcpu, pages))
    return Xray(pages, sptes, roots, masks, notes=tuple(notes), time_ns=time.monotonic_ns() - start)


def _pages(
    kernel: HostKernel, kvm: int, base: int, notes: list[str]
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint64]]:
    """The tables, and for each where KVM keeps the gfn of every entry; 0: they follow from the table's own."""
    found = []
    for head in ("arch.active_mmu_pages", "arch.tdp_mmu_pages", "arch.tdp_mmu_roots"):
        if not kernel.has("struct kvm", head):
            continue
        address = kvm + kernel.offset("struct kvm", head)
        if not kernel.u64(address):
            continue  # never initialised: no TDP MMU here
        objects = kernel.reader.list_objects(address, kernel.size(_PAGE), kernel.offset(_PAGE, "link"), _MOST_PAGES)
        if not objects.whole:
            notes.append(f"the list {head} {'leads nowhere' if objects.broken else 'does not end'}")
        found.append(objects)
    if not found:
        raise UnsupportedError(
            "struct kvm of this host's kernel has neither arch.active_mmu_pages nor arch.tdp_mmu_pages"
        )
    addresses = np.concatenate([each.addresses for each in found])
    data = np.concatenate([each.data for each in found])

    def column(member: str, dtype: str) -> Any:
        return kernel.column(data, _PAGE, member, dtype) if kernel.has(_PAGE, member) else 0

    pages = np.zeros(len(addresses), PAGE)
    pages["address"] = addresses
    pages["table"] = column("spt", "<u8")
    pages["hpa"] = pages["table"] - np.uint64(base)
    pages["gfn"] = column("gfn", "<u8")
    pages["role"] = column("role", "<u4")
    bits = kernel.bit_fields("union kvm_mmu_page_role")
    for name, member in _ROLE.items():
        if member in bits:
            at, width = bits[member]
            pages[name] = pages["role"] >> at & (1 << width) - 1
    pages["tdp_mmu"] = column("tdp_mmu_page", "?")
    pages["unsync"] = column("unsync", "?")
    pages["unsync_children"] = column("unsync_children", "<u4")
    pages["root_count"] = column("root_count", "<i4")
    no_large = "lpage_disallowed" if kernel.has(_PAGE, "lpage_disallowed") else "nx_huge_page_disallowed"
    pages["no_large_page"] = column(no_large, "?")
    generation = kernel.reader.read(kvm + kernel.offset("struct kvm", "arch.mmu_valid_gen"), 1)
    if generation is not None:
        old = column("mmu_valid_gen", "u1") != generation[0]
        pages["obsolete"] = old & ~pages["tdp_mmu"]
    where = "shadowed_translation" if kernel.has(_PAGE, "shadowed_translation") else "gfns"
    return pages, np.asarray(column(where, "<u8"), np.uint64)


def _sptes(
    kernel: HostKernel,
    pages: npt.NDArray[Any],
    translations: npt.NDArray[np.uint64],
    masks: SpteMasks,
    notes: list[str],
) -> npt.NDArray[Any]:
    tables, there = kernel.reader.read_words(pages["table"], _ENTRIES)
    if not there.all():
        notes.append(f"{int((~there).sum()):,} tables could not be read")
    rows, indices = np.nonzero(tables)
    sptes = np.zeros(len(rows), SPTE)
    sptes["page"], sptes["index"], sptes["value"] = rows, indices, tables[rows, indices]
    sptes["level"] = pages["level"][rows]
    bits = Sptes(masks, sptes["value"], sptes["level"])
    present, leaf = bits.present, bits.leaf
    sptes["kind"] = np.select([leaf, present, bits.mmio, bits.removed], [_LEAF, _TABLE, _MMIO, _REMOVED], _NOT_PRESENT)
    shift = 9 * (sptes["level"].astype(np.uint64) - np.uint64(1))
    sptes["gfn"] = pages["gfn"][rows] + (indices.astype(np.uint64) << shift)
    sptes["access"] = pages["access"][rows]
    _gfns_of_shadows(kernel, pages, translations, sptes)
    order = np.argsort(pages["hpa"], kind="stable")
    sorted_hpa = pages["hpa"][order]
    hpa = bits.hpa
    place = np.minimum(np.searchsorted(sorted_hpa, hpa), max(len(order) - 1, 0))
    is_child = (sptes["kind"] == _TABLE) & (sorted_hpa[place] == hpa) if len(order) else np.zeros(len(rows), bool)
    sptes["child"] = np.where(is_child, order[place] if len(order) else -1, -1)
    lost = int(((sptes["kind"] == _TABLE) & ~is_child).sum())
    if lost:
        notes.append(f"{lost:,} entries lead to tables that are in no list")
    # Of a table's entry, what it leads to says where the guest has it.
    table = is_child & ~pages["direct"][rows]
    sptes["gfn"][table] = pages["gfn"][sptes["child"][table]]
    return sptes


def _gfns_of_shadows(
    kernel: HostKernel, pages: npt.NDArray[Any], translations: npt.NDArray[np.uint64], sptes: npt.NDArray[Any]
) -> None:
    """Entries of a shadowed page table map whatever the guest's entry says, which KVM keeps beside them."""
    if not translations.any():
        return
    shadows = np.flatnonzero((translations != 0) & ~pages["direct"])
    kept, _ = kernel.reader.read_words(translations[shadows], _ENTRIES)
    place = np.full(len(pages), -1)
    place[shadows] = np.arange(len(shadows))
    mine = (place[sptes["page"]] >= 0) & (sptes["kind"] != _TABLE)
    of_mine = kept[place[sptes["page"][mine]], sptes["index"][mine]]
    if kernel.has(_PAGE, "shadowed_translation"):  # Linux 5.19: the address, and below it the rights
        sptes["gfn"][mine], sptes["access"][mine] = of_mine >> np.uint64(12), of_mine & np.uint64(7)
    else:
        sptes["gfn"][mine] = of_mine


def _roots(kernel: HostKernel, index: int, vcpu: int, pages: npt.NDArray[Any]) -> list[Root]:
    mmu = kernel.u64(vcpu + kernel.offset("struct kvm_vcpu", "arch.mmu"))
    bits = kernel.bit_fields("union kvm_mmu_page_role")
    role = kernel.reader.read(mmu + kernel.offset("struct kvm_mmu", "root_role"), 4)
    if role is None:
        raise HostError(f"vcpu {index}'s struct kvm_mmu cannot be read at {mmu:#x}")
    at, width = bits["level"]
    level = int.from_bytes(role, "little") >> at & (1 << width) - 1
    size, previous = kernel.size("struct kvm_mmu_root_info"), kernel.offset("struct kvm_mmu", "prev_roots")
    pae_root = kernel.u64(mmu + kernel.offset("struct kvm_mmu", "pae_root"))
    pgd_at, hpa_at = (kernel.offset("struct kvm_mmu_root_info", name) for name in ("pgd", "hpa"))
    found = []
    for n in range(4):
        place = mmu + (kernel.offset("struct kvm_mmu", "root") if n == 0 else previous + (n - 1) * size)
        hpa, pgd = kernel.u64(place + hpa_at), kernel.u64(place + pgd_at)
        if hpa == _INVALID:
            continue
        which = np.flatnonzero(pages["hpa"] == np.uint64(hpa))
        page = int(which[0]) if len(which) else -1
        entries: tuple[int, ...] = ()
        if page < 0 and n == 0 and level == 3 and pae_root:
            entries = tuple(kernel.u64(pae_root + 8 * each) for each in range(4))
        found.append(Root(index, hpa, pgd if pgd != _INVALID else 0, level, page, n == 0, entries))
    return found
