"""An X-ray in words: what a table is, and the tables as a tree, in the terms of KVM's description of its MMU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmbench.mmu.spte import in_words

if TYPE_CHECKING:
    from kvmbench.mmu.xray import Xray

_SIZES = {1: "4 KiB", 2: "2 MiB", 3: "1 GiB", 4: "512 GiB", 5: "256 TiB"}
_TABLE, _LEAF = 1, 2


def page_in_words(page: Any) -> str:
    """What a table of KVM's is.

    Args:
        page: a row of `Xray.pages`.
    """
    level, gfn = int(page["level"]), int(page["gfn"])
    rights = "".join(letter for bit, letter in ((2, "w"), (1, "x"), (4, "u")) if int(page["access"]) & bit)
    if page["tdp_mmu"]:
        what = f"maps guest-physical {gfn << 12:#x} on"
    elif not page["direct"]:
        entries = "4-byte entries, " if page["four_byte_gpte"] else ""
        quadrant = f"quadrant {int(page['quadrant'])} of " if page["four_byte_gpte"] else ""
        what = f"shadows {quadrant}the guest's table at gfn {gfn:#x} ({entries}indirect)"
    elif level == 1:
        what = f"direct: splits what the guest maps large, from gfn {gfn:#x} on"
    else:
        what = f"direct: maps gfn {gfn:#x} on, as the guest has paging off or one large entry for it"
    facts = [f"level {level}", what, f"rights r{rights}"]
    if page["root_count"] and not page["tdp_mmu"]:
        facts.append(f"a root, {int(page['root_count'])} times")
    facts += [
        word
        for name, word in (
            ("invalid", "invalid: to be freed"),
            ("obsolete", "obsolete: zapped with all others"),
            ("unsync", "unsync: the guest may write its table unseen"),
            ("guest_mode", "of a nested guest"),
            ("ad_disabled", "without accessed and dirty bits"),
            ("no_large_page", "split because of iTLB multi-hit"),
        )
        if page[name]
    ]
    if page["unsync_children"]:
        facts.append(f"{int(page['unsync_children'])} unsync below")
    if page["smm"]:
        facts.append("of system management mode")
    return ", ".join(facts)


def entry_in_words(x: Xray, entry: Any) -> str:
    """An entry of KVM's.

    Args:
        entry: a row of `Xray.sptes`.
    """
    return in_words(x.masks, int(entry["value"]), int(entry["level"]), int(entry["access"]))


def tree(x: Xray, *, most: int = 200) -> str:
    """The tables from their roots down; leaves are counted.

    Args:
        most: lines at most.
    """
    lines: list[str] = []
    below: dict[int, list[Any]] = {}
    for entry in x.sptes[x.sptes["kind"] == _TABLE]:
        below.setdefault(int(entry["page"]), []).append(entry)
    leaves = np.bincount(x.sptes["page"][x.sptes["kind"] == _LEAF], minlength=len(x.pages))
    has_parent = np.zeros(len(x.pages), bool)
    has_parent[x.sptes["child"][x.sptes["child"] >= 0]] = True
    seen: set[int] = set()

    def unfold(page: int, indent: int, where: str) -> None:
        again = " (above)" if page in seen else ""
        counted = f", {leaves[page]:,} leaves" if leaves[page] else ""
        lines.append(f"{'  ' * indent}{where}{page_in_words(x.pages[page])}{counted}{again}")
        if again:
            return
        seen.add(page)
        for entry in below.get(page, ()):
            if int(entry["child"]) >= 0:
                unfold(int(entry["child"]), indent + 1, f"[{int(entry['index'])}] ")

    for page in np.flatnonzero(~has_parent):
        unfold(int(page), 0, "")
    if len(lines) > most:
        lines = [*lines[:most], f"... and {len(lines) - most:,} more tables"]
    return "\n".join(lines)


def walk_in_words(x: Xray, address: int, vcpu: int = 0) -> str:
    """The entries that the processor reads for an address, a line each; see `Xray.walk`."""
    steps = x.walk(address, vcpu)
    if not steps:
        return f"vcpu {vcpu} has no root: it has not run since KVM took its tables away"
    lines = [f"level {int(one['level'])} [{int(one['index'])}] {entry_in_words(x, one)}" for one in steps]
    last = steps[-1]
    if int(last["kind"]) == _LEAF:
        lines.append(f"maps {_SIZES[int(last['level'])]} of guest-physical memory from gfn {int(last['gfn']):#x} on")
    return "\n".join(lines)
