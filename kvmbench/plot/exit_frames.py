"""Frames of a flame chart of exits: what lies below what, and how wide it is.

The outermost frame is the guest or the reason of an exit; below a reason is where the time went (KVM, user space),
below that the instruction. Where the guest is a hypervisor, an exit of its own guest (L2) is open until that guest
runs again: all that the hypervisor (L1) does meanwhile, and every exit this makes, lies below it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvmbench.debug.step_rows import exit_name
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.exits import NO_USER_EXIT, ExitTable
from kvmbench.traces.spans import PLACE_WORDS, Place, spans_of

#: What a frame stands for, which its colour says.
GUEST, TOGETHER, REASON, KVM, USER, ADDRESS = range(6)
# Addresses with a frame of their own; the others are one.
_MOST_ADDRESSES = 60

#: The label of all addresses that have no frame of their own.
OTHERS = "other addresses"

#: label, kind, and whose: frames side by side are one where all three are the same.
Step = tuple[str, int, int]
#: Names an address.
Name = Callable[[int], str]


@dataclass
class Frame:
    """One frame: where it begins and how wide it is, in nanoseconds, and what lies below it."""

    label: str
    kind: int
    depth: int
    begin_ns: float = 0.0
    width_ns: float = 0.0
    below: dict[Step, Frame] = field(default_factory=dict)


@dataclass(frozen=True)
class Levels:
    """Which exits are those of a guest's guest.

    Attributes:
        nested: whether the whole table has any.
        number: of each exit, in the whole table, shape (n,).
        from_l2: whether the exit is one of L2, bool, shape (n,).
        under: the exit of L2 below which a row of L1 lies, its number in the whole table; -1: none, shape (n,).
        under_reason: the reason of that one, a place in ``exits.names``; 0 where there is none, shape (n,).
    """

    nested: bool
    number: npt.NDArray[np.int64]
    from_l2: npt.NDArray[np.bool_]
    under: npt.NDArray[np.int64]
    under_reason: npt.NDArray[np.int64]

    def take(self, at: npt.NDArray[np.int64]) -> Levels:
        """Those rows."""
        return Levels(self.nested, self.number[at], self.from_l2[at], self.under[at], self.under_reason[at])


def levels_of(exits: ExitTable, events: EventTable) -> Levels:
    """Finds the exits of nested guests by kvm:kvm_nested_vmexit, which KVM tells right behind kvm:kvm_exit."""
    from_l2 = np.zeros(len(exits), np.bool_)
    under = np.full(len(exits), -1, np.int64)
    nested = events.get("kvm_nested_vmexit")
    number = np.arange(len(exits))
    if nested is None or not len(nested):
        return Levels(False, number, from_l2, under, np.zeros(len(exits), np.int64))
    for vcpu in np.unique(exits.vcpu):
        rows = np.flatnonzero(exits.vcpu == vcpu)
        at = np.searchsorted(exits.time_ns[rows], nested.time_ns[nested.vcpu == vcpu], side="right") - 1
        mine = np.zeros(len(rows), np.bool_)
        mine[at[at >= 0]] = True
        from_l2[rows] = mine
        open_since = np.maximum.accumulate(np.where(mine, np.arange(len(rows)), -1))
        below = (open_since >= 0) & ~mine
        under[rows[below]] = rows[open_since[below]]
    reason = np.where(under >= 0, exits.reason[np.maximum(under, 0)], 0).astype(np.int64)
    return Levels(bool(from_l2.any()), number, from_l2, under, reason)


def by_share(exits: ExitTable, levels: Levels, name: Name) -> list[Frame]:
    """Frames of all exits with the same path as one, the widest first."""
    user, kvm, guest = exits.user_ns, np.maximum(exits.kvm_ns, 0), np.maximum(exits.guest_ns, 0)
    rip, whose = np.unique(exits.rip, return_inverse=True)
    weight = np.bincount(whose, weights=kvm + user, minlength=len(rip))
    kept = np.sort(np.argsort(-weight, kind="stable")[:_MOST_ADDRESSES])
    # 0 stands for all other addresses.
    address = np.zeros(len(rip), np.int64)
    address[kept] = np.arange(1, len(kept) + 1)
    outer = np.where(levels.under >= 0, levels.under_reason + 1, 0)
    together = exits.isa == 0
    columns = (address[whose], exits.reason, exits.user_exit.astype(np.int64) + 1, outer, levels.from_l2, together)
    key, first, group = _combine(columns)
    sums = [np.bincount(group, weights=column, minlength=len(key)) for column in (guest, kvm, user)]
    root = Frame("", GUEST, -1)
    for n, row in enumerate(first.tolist()):
        place = int(columns[0][row])
        where = name(int(rip[kept[place - 1]])) if place else OTHERS
        paths = _paths(exits, row, levels, where, merged=True)
        for path, column in zip(paths, sums, strict=True):
            _add(root, path, float(column[n]))
    return _arrange(root)


def _combine(
    columns: tuple[npt.NDArray[np.generic], ...],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    # Distinct rows of some columns of small numbers: (keys, first row of each, which of them each row is).
    key = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        numbers = column.astype(np.int64)
        key = key * (int(numbers.max(initial=0)) + 1) + numbers
    distinct, first, group = np.unique(key, return_index=True, return_inverse=True)
    return distinct, first, group.reshape(-1)


def _paths(
    exits: ExitTable, row: int, levels: Levels, where: str, *, merged: bool
) -> tuple[list[Step], list[Step], list[Step]]:
    # What lies above a row's time in the guest, in KVM, in user space. Merged: frames of different exits are one.
    def whose(of: int) -> int:
        return 0 if merged else of

    from_l2, under, number = bool(levels.from_l2[row]), int(levels.under[row]), int(levels.number[row])
    level = "" if not levels.nested else "L2 " if from_l2 else "L1 "
    outer: list[Step] = []
    if under >= 0:
        outer.append((f"L2 {exits.names[levels.under_reason[row]]}", REASON, whose(under)))
    reason = (level + exits.names[exits.reason[row]], REASON, whose(number))
    if exits.isa[row] == 0:
        guest: list[Step] = [(PLACE_WORDS[Place.TOGETHER], TOGETHER, whose(number))]
    else:
        guest = [*outer, (f"{level}guest", GUEST, whose(number))]
    returned = int(exits.user_exit[row])
    answers = f"user space: {exit_name(returned)}" if returned != NO_USER_EXIT else "user space"
    address = (where, ADDRESS, 0)
    kvm = [*outer, reason, ("KVM", KVM, 0), address]
    user = [*outer, reason, (answers, USER, 0), address]
    return guest, kvm, user


def _add(root: Frame, path: list[Step], width: float) -> None:
    if width <= 0:
        return
    frame = root
    frame.width_ns += width
    for step in path:
        frame = frame.below.setdefault(step, Frame(step[0], step[1], frame.depth + 1))
        frame.width_ns += width


def _arrange(root: Frame) -> list[Frame]:
    # Gives frames their places: the guest first, then the widest; returns them from the outermost on.
    placed: list[Frame] = []
    waiting = [root]
    while waiting:
        frame = waiting.pop()
        begin = frame.begin_ns
        for each in sorted(frame.below.values(), key=lambda f: (f.kind > TOGETHER, f.label == OTHERS, -f.width_ns)):
            each.begin_ns = begin
            begin += each.width_ns
            placed.append(each)
            waiting.append(each)
    return placed


def in_order(exits: ExitTable, levels: Levels, vcpu: int, name: Name) -> list[Frame]:
    """Frames of one vcpu where they were in time, by the trace's clock."""
    return list(_in_order(exits, levels, vcpu, name))


def _in_order(exits: ExitTable, levels: Levels, vcpu: int, name: Name) -> Iterator[Frame]:
    spans = spans_of(exits, vcpu)
    which = {Place.GUEST: 0, Place.TOGETHER: 0, Place.KVM: 1, Place.USER: 2}
    open_frames: list[tuple[Step, Frame]] = []
    paths: tuple[int, tuple[list[Step], list[Step], list[Step]]] | None = None
    for begin, end, place, row in zip(
        spans.begin_ns.tolist(), spans.end_ns.tolist(), spans.place.tolist(), spans.row.tolist(), strict=True
    ):
        if place == Place.OUTSIDE:
            continue
        if paths is None or paths[0] != row:
            made = _paths(exits, row, levels, name(int(exits.rip[row])), merged=False)
            paths = row, made
        path = paths[1][which[Place(place)]]
        same = 0
        for (step, _), wanted in zip(open_frames, path, strict=False):
            if step != wanted:
                break
            same += 1
        for _, frame in open_frames[:same]:
            frame.width_ns = end - frame.begin_ns
        yield from (frame for _, frame in open_frames[same:])
        del open_frames[same:]
        for depth in range(same, len(path)):
            step = path[depth]
            open_frames.append((step, Frame(step[0], step[1], depth, float(begin), float(end - begin))))
    yield from (frame for _, frame in open_frames)
