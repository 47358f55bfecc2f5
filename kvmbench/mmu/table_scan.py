"""Whole page tables with numpy: each table is read once, however often and at whatever level it is used.

1. Downwards, level by level: the tables that there are, and the entries in them that lead on. At the lowest level
   neighbours that map neighbouring pages alike become runs at once.
2. Upwards: which tables lead to a page at all.
3. Downwards again, now by linear address: every use of a table, with the rights on the way to it.

So recursive tables, loops and a table that is used 512 times cost what they map, not more; and step 3 can be cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvmbench.machine.memory import Memory
from kvmbench.mmu import paging as p
from kvmbench.mmu.paging import PAGE_BYTES, Level, Paging

_U64 = np.uint64
# Bits of `attributes`. Those of the way are joined with those of the entry: the first two by and, the third by or.
WRITABLE, USER, NO_EXECUTE, GLOBAL = 1 << 0, 1 << 1, 1 << 2, 1 << 3
PAT_SHIFT, KEY_SHIFT = 4, 8
_WAY = WRITABLE | USER | NO_EXECUTE
# Tables read at once: their temporaries stay within a processor's cache.
_BATCH = 128
#: Tables of a level that are read at most: a gigabyte.
MOST_TABLES = 1 << 18
#: Entries of a level, or runs of such, that are kept at most.
MOST_ITEMS = 1 << 23

Words = NDArray[np.uint64]
Places = NDArray[np.int64]
Attributes = NDArray[np.uint16]


@dataclass
class Found:
    """What maps something, by linear address.

    Attributes:
        gva, gpa, size_bytes, attributes, level: a row a range; `level` counts from the top of `Paging.levels`.
        tables: how many were read, all levels.
        entries: present entries in them.
        cut_at: linear address from which on nothing is told, or None.
        warnings: sentences about what is missing.
    """

    gva: Words
    gpa: Words
    size_bytes: Words
    attributes: Attributes
    level: NDArray[np.uint8]
    tables: int = 0
    entries: int = 0
    cut_at: int | None = None
    warnings: list[str] = field(default_factory=list)


# The entries of all tables of one level that are present and sound, by table and place.
# `pages` counts neighbours that were joined; `child` is a table of the level below, or -1: a page, or nothing behind.
@dataclass
class _Items:
    first: Places
    count: Places
    slot: NDArray[np.uint16]
    entry: Words
    pages: NDArray[np.uint32]
    is_leaf: NDArray[np.bool_]
    child: Places


def scan(memory: Memory, paging: Paging, *, limit: int) -> Found:
    """Reads all tables from the root on.

    Args:
        limit: ranges that are told at most.
    """
    scanner = _Scanner(memory, paging)
    levels = scanner.read()
    return scanner.unfold(levels, limit)


class _Scanner:
    def __init__(self, memory: Memory, paging: Paging) -> None:
        self._memory = memory
        self._paging = paging
        self._warnings: list[str] = []
        self._tables = self._entries = 0

    # --- steps 1 and 2

    def read(self) -> list[_Items]:
        """The items of each level, top first, without those that lead to no page."""
        levels = self._paging.levels
        tables: Words = np.array([self._paging.root], _U64)
        found: list[_Items] = []
        for level, below in zip(levels, (*levels[1:], None), strict=True):
            items = self._items(tables, level, top=not found)
            found.append(items)
            if below is not None:
                targets, leads_on = self._paging.table(items.entry), ~items.is_leaf
                tables = self._in_memory(np.unique(targets[leads_on]), below)
                at = np.searchsorted(tables, targets)
                leads_on &= at < len(tables)
                leads_on[leads_on] = tables[at[leads_on]] == targets[leads_on]
                items.child = np.where(leads_on, at, -1)
        self._prune(found)
        return found

    def _in_memory(self, tables: Words, level: Level) -> Words:
        inside = np.zeros(len(tables), np.bool_)
        for region in self._memory.regions:
            inside |= (tables >= region.gpa) & (tables + PAGE_BYTES <= region.end)
        kept = tables[inside]
        if len(kept) < len(tables):
            first = int(tables[~inside][0])
            self._warnings.append(
                f"{len(tables) - len(kept)} tables of {level.name}s are not guest memory, the first at gpa {first:#x}"
            )
        if len(kept) > MOST_TABLES:
            self._warnings.append(f"of {len(kept):,} tables of {level.name}s the first {MOST_TABLES:,} were read")
            kept = kept[:MOST_TABLES]
        return kept

    def _items(self, tables: Words, level: Level, *, top: bool) -> _Items:
        last = level.shift == 12
        parts: list[tuple[Places, NDArray[np.uint16], Words, NDArray[np.uint32], NDArray[np.bool_]]] = []
        for start, words in self._batches(tables, level, top=top):
            parts.append(self._runs(words, start, level) if last else self._single(words, start, level))
            count = sum(len(part[0]) for part in parts)
            if count > MOST_ITEMS and start + _BATCH < len(tables):
                self._warnings.append(
                    f"of {len(tables):,} tables of {level.name}s the first {start + _BATCH:,} were read"
                )
                break
        table = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0, np.int64)
        counts = np.bincount(table, minlength=len(tables)).astype(np.int64)
        columns = [np.concatenate([part[n] for part in parts]) for n in range(1, 5)] if parts else []
        if not columns:
            columns = [np.zeros(0, kind) for kind in (np.uint16, _U64, np.uint32, np.bool_)]
        slot, entry, pages, is_leaf = columns
        return _Items(np.cumsum(counts) - counts, counts, slot, entry, pages, is_leaf, np.full(len(slot), -1))

    def _batches(self, tables: Words, level: Level, *, top: bool) -> Iterator[tuple[int, Words]]:
        # Pairs of (place of the first table, its and the following tables' entries as an array of (tables, entries)).
        entries, kind = 1 << level.bits, "<u4" if self._paging.entry_bytes == 4 else "<u8"
        self._tables += len(tables)
        if top and self._paging.mode == "PAE":
            if self._paging.pdptes:
                yield 0, np.array([self._paging.pdptes], _U64)
            else:
                self._warnings.append(f"the PDPTEs at gpa {self._paging.root:#x} are not guest memory")
            return
        if top and not self._memory.holds(self._paging.root, PAGE_BYTES):
            self._warnings.append(f"the table at gpa {self._paging.root:#x}, where CR3 points, is not guest memory")
            return
        for start in range(0, len(tables), _BATCH):
            batch = tables[start : start + _BATCH]
            breaks = np.flatnonzero(np.diff(batch) != PAGE_BYTES) + 1
            ends = [*breaks.tolist(), len(batch)]
            pieces, at = [], 0
            for end in ends:
                # Not `as_array`, which on local shows the bytes of breakpoints.
                pieces.append(self._memory.read(int(batch[at]), (end - at) * PAGE_BYTES))
                at = end
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            words = np.frombuffer(data, kind).reshape(len(batch), entries)
            yield start, words if kind == "<u8" else words.astype(_U64)

    def _single(
        self, words: Words, start: int, level: Level
    ) -> tuple[Places, NDArray[np.uint16], Words, NDArray[np.uint32], NDArray[np.bool_]]:
        table, slot = np.nonzero(words & p.PRESENT)
        self._entries += len(table)
        entry = words[table, slot]
        large = self._paging.may_be_large(level)
        is_leaf = (entry & p.LARGE).astype(np.bool_) if large else np.zeros(len(entry), np.bool_)
        bad = np.where(is_leaf, self._paging.reserved(level, leaf=True), self._paging.reserved(level, leaf=False))
        sound = (entry & bad.astype(_U64)) == 0
        self._count_unsound(len(sound) - int(np.count_nonzero(sound)), level)
        table, slot, entry, is_leaf = table[sound], slot[sound], entry[sound], is_leaf[sound]
        return table + start, slot.astype(np.uint16), entry, np.ones(len(entry), np.uint32), is_leaf

    def _runs(
        self, words: Words, start: int, level: Level
    ) -> tuple[Places, NDArray[np.uint16], Words, NDArray[np.uint32], NDArray[np.bool_]]:
        # Of PTEs. Neighbours are joined where only the address differs, by a page. Accessed and dirty flags and the
        # bits that mean nothing are taken out first: a guest that runs would have thousands of ranges else.
        reserved = self._paging.reserved(level, leaf=True)
        kept = self._paging.table((1 << 64) - 1) | p.PRESENT | _kept_bits(self._paging)
        flat = words.reshape(-1)
        normal = flat & (kept | reserved)
        sound = (normal & (reserved | p.PRESENT)) == p.PRESENT
        present = int(np.count_nonzero(flat & p.PRESENT))
        self._entries += present
        self._count_unsound(present - int(np.count_nonzero(sound)), level)
        begins = sound.copy()
        goes_on = (normal[1:] - normal[:-1]) == PAGE_BYTES
        goes_on &= sound[:-1]
        goes_on[words.shape[1] - 1 :: words.shape[1]] = False
        begins[1:] &= ~goes_on
        at = np.flatnonzero(begins)
        # What is sound lies in runs, so the sound ones between two beginnings are the run.
        pages = np.add.reduceat(sound, at, dtype=np.uint32) if len(at) else np.zeros(0, np.uint32)
        bits = level.bits
        return (
            (at >> bits) + start,
            (at & (1 << bits) - 1).astype(np.uint16),
            flat[at],
            pages,
            np.ones(len(at), np.bool_),
        )

    def _count_unsound(self, count: int, level: Level) -> None:
        if count:
            self._warnings.append(f"{count} {level.name}s have reserved bits set: what they map faults")

    @staticmethod
    def _prune(levels: list[_Items]) -> None:
        # From below: an entry counts if it is a page, or its table has an entry that counts.
        alive: NDArray[np.bool_] | None = None
        for items in reversed(levels):
            counts = items.is_leaf
            if alive is not None:
                counts = counts | (items.child >= 0) & (alive[items.child] if len(alive) else np.False_)
            alive = items.count > 0
            if counts.all():
                continue
            table = np.repeat(np.arange(len(items.count)), items.count)
            items.count = np.bincount(table[counts], minlength=len(items.count)).astype(np.int64)
            items.first = np.cumsum(items.count) - items.count
            for name in ("slot", "entry", "pages", "is_leaf", "child"):
                setattr(items, name, getattr(items, name)[counts])
            alive = items.count > 0

    # --- step 3

    def unfold(self, levels: list[_Items], limit: int) -> Found:
        """Every use of every table, by linear address."""
        paging = self._paging
        base, attributes = np.zeros(1, _U64), np.array([WRITABLE | USER], np.uint16)
        table = np.zeros(1 if len(levels[0].count) else 0, np.int64)
        base, attributes = base[: len(table)], attributes[: len(table)]
        rows: list[tuple[Words, Words, Words, Attributes, int]] = []
        cut_at: int | None = None
        for depth, (level, items) in enumerate(zip(paging.levels, levels, strict=True)):
            counts = items.count[table]
            ends = np.cumsum(counts)
            if len(ends) and int(ends[-1]) > limit:
                uses = max(int(np.searchsorted(ends, limit, side="right")), 1)
                if uses < len(table):
                    cut = int(base[uses])
                    cut_at = cut if cut_at is None else min(cut_at, cut)
                    table, base, attributes, counts = table[:uses], base[:uses], attributes[:uses], counts[:uses]
                    ends = ends[:uses]
            total = int(ends[-1]) if len(ends) else 0
            at = np.repeat(items.first[table] - (ends - counts), counts) + np.arange(total)
            entry, is_leaf = items.entry[at], items.is_leaf[at]
            gva = np.repeat(base, counts) | items.slot[at].astype(_U64) << _U64(level.shift)
            own = self._attributes(level, entry, is_leaf)
            way = np.repeat(attributes, counts)
            if paging.mode == "PAE" and level.name == "PDPTE":
                own = own | np.uint16(WRITABLE | USER)
            joined = (way & own & np.uint16(WRITABLE | USER)) | ((way | own) & np.uint16(NO_EXECUTE))
            joined |= own & np.uint16(0xFFFF & ~_WAY)
            size = items.pages[at].astype(_U64) << _U64(level.shift)
            if is_leaf.all():
                rows.append((gva, paging.page(level, entry), size, joined, depth))
                break
            rows.append((gva[is_leaf], paging.page(level, entry[is_leaf]), size[is_leaf], joined[is_leaf], depth))
            on = ~is_leaf
            table, base, attributes = items.child[at][on], gva[on], joined[on]
        found = self._join(rows, cut_at, limit)
        found.tables, found.entries, found.warnings = self._tables, self._entries, self._warnings
        return found

    def _attributes(self, level: Level, entry: Words, is_leaf: NDArray[np.bool_]) -> Attributes:
        paging = self._paging
        own = (entry >> _U64(1) & _U64(3)).astype(np.uint16)
        if paging.nxe:
            own |= (entry >> _U64(63)).astype(np.uint16) << 2
        leaf = np.zeros(len(entry), np.uint16)
        if paging.pge:
            leaf |= (entry >> _U64(8) & _U64(1)).astype(np.uint16) << 3
        leaf |= paging.pat_index(level, entry).astype(np.uint16) << PAT_SHIFT
        if paging.has_keys:
            leaf |= (entry >> _U64(p.KEY_SHIFT) & _U64(0xF)).astype(np.uint16) << KEY_SHIFT
        return own | np.where(is_leaf, leaf, np.uint16(0))

    def _join(self, rows: list[tuple[Words, Words, Words, Attributes, int]], cut_at: int | None, limit: int) -> Found:
        gva, gpa, size, attributes = (np.concatenate([row[n] for row in rows]) for n in range(4))
        depth = np.concatenate([np.full(len(row[0]), row[4], np.uint8) for row in rows])
        if cut_at is not None:
            kept = gva < cut_at
            gva, gpa, size, attributes, depth = (each[kept] for each in (gva, gpa, size, attributes, depth))
        if len([row for row in rows if len(row[0])]) > 1:
            order = np.argsort(gva, kind="stable")
            gva, gpa, size, attributes, depth = (each[order] for each in (gva, gpa, size, attributes, depth))
        gva = self._signed(gva)
        if cut_at is not None:
            cut_at = int(self._signed(np.array([cut_at], _U64))[0])
        if len(gva):
            begins = np.ones(len(gva), np.bool_)
            before = slice(None, -1)
            begins[1:] = (
                (gva[before] + size[before] != gva[1:])
                | (gpa[before] + size[before] != gpa[1:])
                | (attributes[before] != attributes[1:])
                | (depth[before] != depth[1:])
            )
            at = np.flatnonzero(begins)
            size = np.add.reduceat(size, at)
            gva, gpa, attributes, depth = gva[at], gpa[at], attributes[at], depth[at]
        if len(gva) > limit:
            cut_at = int(gva[limit])
            gva, gpa, size, attributes, depth = (each[:limit] for each in (gva, gpa, size, attributes, depth))
        return Found(gva, gpa, size, attributes, depth, cut_at=cut_at)

    def _signed(self, gva: Words) -> Words:
        bits = self._paging.linear_bits
        if bits == 32:
            return gva
        high = (gva >> _U64(bits - 1)).astype(np.bool_)
        return np.where(high, gva | _U64((1 << 64) - (1 << bits)), gva)


def _kept_bits(paging: Paging) -> int:
    # Bits of a PTE that make a difference for what is told.
    bits = p.WRITABLE | p.USER | p.PWT | p.PCD | p.PAT_SMALL
    bits |= p.NO_EXECUTE if paging.nxe else 0
    bits |= p.GLOBAL if paging.pge else 0
    return bits | (0xF << p.KEY_SHIFT if paging.has_keys else 0)
