"""Where each vcpu was and when, as stretches of time: in the guest, in KVM, in user space, standing.

A row of an `ExitTable` covers the guest's run before the exit and all until the guest ran again. Rows whose KVM_RUN
returned know from the log when it did, so KVM's time splits into what came before user space and what after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from kvmbench.traces.exits import NOT_TOLD, ExitTable


class Place(IntEnum):
    """Where a vcpu is."""

    GUEST = 0
    TOGETHER = 1
    KVM = 2
    USER = 3
    OUTSIDE = 4


#: What figures call them.
PLACE_WORDS = {
    Place.GUEST: "guest",
    Place.TOGETHER: "in KVM_RUN: guest and KVM together",
    Place.KVM: "KVM",
    Place.USER: "user space answers",
    Place.OUTSIDE: "stands",
}


# What follows each other in a row of a table.
_ORDER = (Place.GUEST, Place.KVM, Place.USER, Place.OUTSIDE, Place.KVM)


@dataclass(frozen=True)
class Spans:
    """Stretches of one vcpu's time, in order and without overlap; every column has the shape (n,).

    Attributes:
        begin_ns, end_ns: by the trace's clock, int64.
        place: a `Place`, uint8.
        row: the exit it belongs to, a place in the table that `spans_of` was given, int64.
    """

    begin_ns: npt.NDArray[np.int64]
    end_ns: npt.NDArray[np.int64]
    place: npt.NDArray[np.uint8]
    row: npt.NDArray[np.int64]


def lengths_of(exits: ExitTable, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How long each part of some rows lasted; what is `NOT_TOLD` is 0.

    What numbers claim of their neighbours' time (clocks of two sources, a KVM_RUN without an exit of the processor)
    goes to the neighbour.

    Args:
        exits: the table.
        rows: of one vcpu, in order of time.

    Returns:
        In the guest, in KVM until KVM_RUN returned, in user space, standing, in KVM again; nanoseconds, shape (5, n).
    """
    time = exits.time_ns[rows]
    guest, kvm = np.maximum(exits.guest_ns[rows], 0), np.maximum(exits.kvm_ns[rows], 0)
    # An exit that KVM dealt with alone has no more than the first part of KVM's.
    log_row = exits.log_row[rows]
    returned = log_row >= 0
    first = kvm.copy()
    if returned.any():
        left = exits.log.data["leave_ns"][log_row[returned]]
        first[returned] = np.clip(left - time[returned], 0, kvm[returned])
    lengths = np.stack([guest, first, exits.user_ns[rows], exits.outside_ns[rows], kvm - first])
    if len(rows):
        lengths[0, 1:] = np.minimum(guest[1:], np.diff(time))
        room = np.concatenate([time[1:] - lengths[0, 1:], [np.iinfo(np.int64).max]]) - time
        for length in lengths[1:]:
            np.minimum(length, room, out=length)
            room -= length
    return lengths


def spans_of(exits: ExitTable, vcpu: int) -> Spans:
    """The stretches of time of one vcpu; what is `NOT_TOLD` is in none."""
    rows = np.flatnonzero(exits.vcpu == vcpu)
    lengths = lengths_of(exits, rows).T
    ends = exits.time_ns[rows, None] - lengths[:, :1] + np.cumsum(lengths, axis=1)
    begins = ends - lengths
    place = np.empty(ends.shape, np.uint8)
    place[:] = _ORDER
    place[exits.isa[rows] == 0, 0] = Place.TOGETHER
    kept = (ends > begins).ravel()
    row = np.repeat(rows, len(_ORDER))[kept]
    return Spans(begins.ravel()[kept], ends.ravel()[kept], place.ravel()[kept], row)


def covered(
    begin_ns: npt.NDArray[np.int64], end_ns: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """How much of each bucket is covered by stretches, 0 to 1.

    Args:
        begin_ns, end_ns: of the stretches, in order and without overlap, shape (n,).
        edges: of the buckets, ascending, in the same nanoseconds, shape (m + 1,).

    Returns:
        A share for each bucket, shape (m,).
    """
    widths = np.diff(edges)
    if not len(begin_ns):
        return np.zeros(len(widths))
    points = np.stack([begin_ns, end_ns], axis=1).ravel().astype(np.float64)
    total = np.zeros(len(points))
    total[1::2] = np.cumsum(end_ns - begin_ns)
    total[2::2] = total[1:-1:2]
    at_edges = np.interp(edges, points, total)
    share = np.divide(np.diff(at_edges), widths, out=np.zeros(len(widths)), where=widths > 0)
    return np.clip(share, 0, 1)


def told(exits: ExitTable) -> tuple[bool, bool, int]:
    """What times leave open: has any row guest and KVM together, have all, and how many rows lack times."""
    together = exits.isa == 0
    untimed = int(np.count_nonzero(~together & ((exits.kvm_ns == NOT_TOLD) | (exits.guest_ns == NOT_TOLD))))
    return bool(together.any()), bool(len(exits) and together.all()), untimed
