"""Copies of guest memory, and where two differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

# Larger ones save nothing more and smaller ones cost (16 MiB equal: 240 us a MiB by 16 KiB, 69 by 1 MiB).
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """The contents of some guest memory at one moment.

    Attributes:
        pieces: pairs of (gpa, read-only uint8 array), by ascending gpa.
    """

    pieces: tuple[tuple[int, Bytes], ...]

    @property
    def size_bytes(self) -> int:
        """How much memory it holds."""
        return sum(len(data) for _, data in self.pieces)

    def __repr__(self) -> str:
        shown = ", ".join(f"{gpa:#x} to {gpa + len(data) - 1:#x}" for gpa, data in self.pieces)
        return f"Snapshot({shown})"


def differences(before: Bytes, now: Bytes) -> list[tuple[int, int]]:
    """Pairs of (offset, length in bytes) where two arrays of one length differ, each as short as can be."""
    size = len(before)
    whole = size // 8 * 8
    words_before, words_now = before[:whole].view(np.uint64), now[:whole].view(np.uint64)
    step = _CHUNK_BYTES // 8
    ranges: list[tuple[int, int]] = []
    unlike = np.empty(step, dtype=np.bool_)
    for first in range(0, len(words_before), step):
        a, b = words_before[first : first + step], words_now[first : first + step]
        found = np.not_equal(a, b, out=unlike[: len(a)])
        if found.any():
            # Bytes one by one, but only of the words that differ.
            words = np.flatnonzero(found)
            byte_differs = (a[words].view(np.uint8) != b[words].view(np.uint8)).reshape(-1, 8)
            row, column = np.nonzero(byte_differs)
            _extend(ranges, (first + words[row]) * 8 + column)
    if whole < size:
        _extend(ranges, whole + np.flatnonzero(before[whole:] != now[whole:]))
    return ranges


def _extend(ranges: list[tuple[int, int]], offsets: npt.NDArray[Any]) -> None:
    # Appends ascending offsets as ranges, and joins the first to the last one there if they touch.
    if not len(offsets):
        return
    breaks = np.flatnonzero(np.diff(offsets) != 1) + 1
    starts = offsets[np.concatenate(([0], breaks))]
    ends = offsets[np.concatenate((breaks - 1, [len(offsets) - 1]))] + 1
    append(ranges, zip(starts.tolist(), (ends - starts).tolist(), strict=True))


def append(ranges: list[tuple[int, int]], more: Iterable[tuple[int, int]]) -> None:
    """Appends (start, length) pairs, all behind the last of the list; what touches it is joined to it."""
    for start, length in more:
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + length)
        else:
            ranges.append((start, length))
