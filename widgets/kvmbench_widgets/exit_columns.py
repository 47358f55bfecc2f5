"""Exits as columns that a page can draw from: 31 bytes an exit, and a small picture of all of them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.traces.exits import NOT_TOLD, ExitTable
from kvmbench.traces.spans import lengths_of

#: Of each row, in the order they are sent: when the guest was left (ns since the trace's zero); ns in the guest before
#: that, in KVM until KVM_RUN returned, in user space, standing, in KVM again; place in `Reasons.names`; of the vcpu.
COLUMNS = (
    ("time", "<f8"),
    ("guest", "<f4"),
    ("before", "<f4"),
    ("user", "<f4"),
    ("outside", "<f4"),
    ("after", "<f4"),
    ("reason", "u1"),
    ("lane", "<u2"),
)
#: `after` of an exit of which nothing tells when the guest ran again.
UNTOLD = -1.0
_MOST_REASONS = 255
_OTHERS = "others"
# Kinds of time that a picture tells apart; then two for each reason: in KVM, in user space.
GUEST, TOGETHER, OUTSIDE, FIRST_REASON = 0, 1, 2, 3
_PICTURE_LANES = 16

Columns = dict[str, NDArray[Any]]


@dataclass
class Reasons:
    """Numbers for reasons that stay while a trace grows; a table numbers its own anew each time.

    Attributes:
        names: what they are called.
        together: which are of KVM_RUNs, whose time in the guest has KVM's in it.
    """

    names: list[str] = field(default_factory=list)
    together: list[bool] = field(default_factory=list)
    _codes: dict[tuple[str, bool], int] = field(default_factory=dict)

    def number(self, exits: ExitTable) -> NDArray[np.uint8]:
        """The number of each row's reason; those for which there is none left are the last, "others"."""
        key = exits.reason.astype(np.int64) * 2 + (exits.isa == 0)
        codes = np.zeros(2 * max(1, len(exits.names)), np.uint8)
        # The most frequent first: the first ones get the colours that are told apart best.
        counts = np.bincount(key, minlength=len(codes))
        for packed in sorted(np.flatnonzero(counts).tolist(), key=lambda each: -counts[each]):
            codes[packed] = self._code(exits.names[packed >> 1], bool(packed & 1))
        numbers: NDArray[np.uint8] = codes[key]
        return numbers

    def _code(self, name: str, together: bool) -> int:
        found = self._codes.get((name, together))
        if found is not None:
            return found
        if len(self.names) == _MOST_REASONS:
            return _MOST_REASONS - 1
        self.names.append(_OTHERS if len(self.names) == _MOST_REASONS - 1 else name)
        self.together.append(together)
        self._codes[name, together] = len(self.names) - 1
        return len(self.names) - 1


def pack(exits: ExitTable, reasons: Reasons, vcpus: Sequence[int], zero_ns: int) -> Columns:
    """The columns of a table.

    Args:
        exits: of any vcpus, in order of time.
        reasons: numbers reasons; new ones are added.
        vcpus: in the order of the lanes.
        zero_ns: where times begin to count.
    """
    time = exits.time_ns
    lane = np.searchsorted(vcpus, exits.vcpu).astype(np.uint16)
    lengths = np.empty((5, len(exits)), np.int64)
    for n in range(len(vcpus)):
        rows = np.flatnonzero(lane == n)
        lengths[:, rows] = lengths_of(exits, rows)
    after = lengths[4].astype(np.float64)
    after[(exits.kvm_ns == NOT_TOLD) & (exits.isa != 0)] = UNTOLD
    values = (time - zero_ns, *lengths[:4], after, reasons.number(exits), lane)
    return {name: value.astype(kind) for (name, kind), value in zip(COLUMNS, values, strict=True)}


def first_difference(old: Columns, new: Columns) -> int:
    """How many rows both begin with."""
    n = min(len(old["time"]), len(new["time"]))
    same = np.ones(n, np.bool_)
    for name, _ in COLUMNS:
        same &= old[name][:n] == new[name][:n]
    return n if same.all() else int(np.argmin(same))


def extent(columns: Columns) -> tuple[float, float]:
    """When the first thing begins and the last ends, in ns since zero."""
    if not len(columns["time"]):
        return 0.0, 1.0
    segments = [(begin, length) for _, begin, length in _segments(columns)]
    low = min(float(begin.min()) for begin, _ in segments)
    return low, max(low + 1, max(float((begin + length).max()) for begin, length in segments))


def _segments(columns: Columns) -> list[tuple[NDArray[np.int64] | int, NDArray[np.float64], NDArray[np.float64]]]:
    # (kind, begin, length) of the stretches of time of all rows.
    time, reason = columns["time"], columns["reason"].astype(np.int64)
    begin = time
    made: list[tuple[Any, Any, Any]] = [(GUEST, time - columns["guest"], columns["guest"].astype(np.float64))]
    kinds = (FIRST_REASON + 2 * reason, FIRST_REASON + 1 + 2 * reason, OUTSIDE, FIRST_REASON + 2 * reason)
    for kind, name in zip(kinds, ("before", "user", "outside", "after"), strict=True):
        length = np.maximum(columns[name], 0).astype(np.float64)
        made.append((kind, begin, length))
        begin = begin + length
    return made


def picture(columns: Columns, lanes: int, together: Sequence[bool], buckets: int) -> dict[str, Any]:
    """How each lane's time was spent, in buckets, for a page that has no more than that.

    Returns:
        start, end; lanes: of each kind that occurs, its share of each bucket, 0 to 255, as base64. More than 16 lanes
        are not drawn one by one.
    """
    start, end = extent(columns)
    drawn = min(lanes, _PICTURE_LANES)
    kinds = FIRST_REASON + 2 * len(together)
    width = (end - start) / buckets
    spent = np.zeros((drawn, kinds, buckets))
    is_together = np.array([*together, False], np.bool_)[columns["reason"]]
    lane = columns["lane"].astype(np.int64)
    for kind, begin, length in _segments(columns):
        kind = np.where(is_together, TOGETHER, GUEST) if isinstance(kind, int) and kind == GUEST else kind
        kind = np.broadcast_to(kind, lane.shape)
        there = (length > 0) & (lane < drawn)
        # No more can be longer than a bucket than there are buckets: those are laid out one by one.
        long = there & (length > width)
        short = there & ~long
        bucket = np.clip(((begin + length / 2 - start) / width).astype(np.int64), 0, buckets - 1)
        place = (lane[short] * kinds + kind[short]) * buckets + bucket[short]
        spent += np.bincount(place, weights=length[short], minlength=spent.size).reshape(spent.shape)
        edges = start + width * np.arange(buckets + 1)
        for n in np.flatnonzero(long).tolist():
            inside = np.minimum(edges[1:], begin[n] + length[n]) - np.maximum(edges[:-1], begin[n])
            spent[lane[n], kind[n]] += np.maximum(inside, 0)
    shares = np.ceil(np.clip(spent / width, 0, 1) * 255).astype(np.uint8)
    made = [
        {
            str(kind): base64.b64encode(shares[n, kind].tobytes()).decode()
            for kind in range(kinds)
            if shares[n, kind].any()
        }
        for n in range(drawn)
    ]
    return {"start": start, "end": end, "buckets": buckets, "lanes": made}
