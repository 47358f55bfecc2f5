"""The rows of a recording: their layout, and how they are gathered as they come in.

The layout is ``struct kb_row`` of wire.h, 152 bytes, field for field
(test_the_rows_have_the_layout_of_wire_h), so the core's rows are used as they
arrive and never converted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvmbench.debug.register_table import INTEGER
from kvmbench.errors import InternalError, MisuseError
from kvmbench.uapi import ExitReason
from kvmbench.uapi.vectors import vector_name

#: One recorded step: the registers after it, the exit it made (``KVM_EXIT_*``), flags.
ROW = np.dtype([*((name, "<u8") for name in INTEGER), ("exit", "<u4"), ("flags", "<u4")])

#: ``KVM_EXIT_DEBUG``: the exit of a step at which nothing else happened.
EXIT_DEBUG = int(ExitReason.DEBUG)

#: Bits 0 and 1 of ``flags`` (enum kb_width): width of the code the next step runs; 0: as at the start.
WIDTH_MASK = 3
WIDTHS: dict[int, int] = {1: 16, 2: 32, 3: 64}

#: Other bits of ``flags`` (enum kb_taint) and what they say of the step.
TAINTS: dict[int, str] = {
    4: "RFLAGS with our TF are in guest memory",
    8: "jumped where no branch leads",
    16: "entered",
    32: "a handler of several vectors",
    64: "ran a handler to its end",
}
ENTERED, SHARED = 16, 32
#: Where ``flags`` have the vector of the handler entered, 8 bits.
VECTOR_SHIFT = 8


def taint_words(flags: int) -> tuple[str, ...]:
    """What a row's flags say of its step, a phrase each."""
    words = {bit: text for bit, text in TAINTS.items() if flags & bit and bit not in (ENTERED, SHARED)}
    if flags & ENTERED:
        shared = " or another" if flags & SHARED else ""
        words[ENTERED] = f"entered vector {vector_name(flags >> VECTOR_SHIFT & 0xFF)}{shared}"
    return tuple(words[bit] for bit in sorted(words))


# Rows added to the room at a time: 40 MB. numpy zeroes what it adds, so asking for too much costs.
_GROW_ROWS = 1 << 18

Rows = npt.NDArray[np.void]


def exit_name(reason: int) -> str:
    """``IO`` for ``KVM_EXIT_IO``; ``exit 99`` for a number this version does not know."""
    try:
        return ExitReason(reason).name
    except ValueError:
        return f"exit {reason}"


def row_of(regs: Any, *, exit: int = 0, flags: int = 0) -> Rows:
    """One row, shape (), dtype `ROW`, from a ``struct kvm_regs`` or anything with its fields."""
    row = np.zeros((), dtype=ROW)
    for name in INTEGER:
        row[name] = int(getattr(regs, name))
    row["exit"] = exit
    row["flags"] = flags
    return row


def distinct(column: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The distinct values of a column, ascending, and for each row the index of its value among them.

    What ``np.unique(column, return_inverse=True)`` gives, which sorts all rows;
    a recording has few distinct values, so looking each up is many times faster.
    """
    values = np.unique(column)
    return values, np.searchsorted(values, column)


class RowBuilder:
    """Gathers rows batch by batch into one array, holding little more than the rows.

    The array grows in place by a quarter (the allocator moves large blocks by
    remapping pages, not by copying) and is cut to size at the end.
    """

    def __init__(self, *, steps: int | None = None) -> None:
        """Starts empty.

        Args:
            steps: how many rows are expected at most, or None; no more room than that is made.
        """
        self._limit = steps
        first = _GROW_ROWS if steps is None else min(steps, _GROW_ROWS)
        self._rows: Rows = np.empty(first, dtype=ROW)
        self._count = 0
        self._finished = False

    def __len__(self) -> int:
        return self._count

    def append(self, data: Any) -> int:
        """Adds the rows in a bytes-like object and returns how many there were.

        Raises:
            InternalError: the length is not a multiple of the row's.
            MisuseError: the builder is finished.
        """
        if self._finished:
            raise MisuseError("this recording is finished; start another")
        view = memoryview(data).cast("B")
        if view.nbytes % ROW.itemsize:
            raise InternalError(f"{view.nbytes} bytes are no whole number of {ROW.itemsize}-byte rows")
        count = view.nbytes // ROW.itemsize
        if count:
            self._make_room(count)
            self._rows[self._count : self._count + count] = np.frombuffer(view, dtype=ROW)
            self._count += count
        return count

    def _make_room(self, count: int) -> None:
        needed, room = self._count + count, len(self._rows)
        if needed <= room:
            return
        wanted = max(needed, room + max(room // 4, _GROW_ROWS))
        if self._limit is not None:
            wanted = max(needed, min(wanted, self._limit))
        self._rows.resize(wanted, refcheck=False)

    def snapshot(self) -> Rows:
        """A copy of the rows so far; recording may go on."""
        return self._rows[: self._count].copy()

    def finish(self) -> Rows:
        """The rows, shape (n,), dtype `ROW`, without the spare room. The builder takes no more."""
        if not self._finished:
            self._finished = True
            self._rows.resize(self._count, refcheck=False)
        return self._rows
