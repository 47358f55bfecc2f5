"""Walking pages of the kernel's ring buffer with numpy alone: all pages at once, an event of each at a time.

A page begins with its time, so pages do not depend on one another, and what is done to one event is done to those of a
thousand pages by the same few calls: ten times as quick as a loop over events (`python benchmarks/trace_decoding.py`).
It does what ``core/walk.c`` does, and is used where that was not built.

The layout is that of events/header_page and of the comments on ``struct ring_buffer_event`` in the kernel's
<linux/ring_buffer.h>: 5 bits of type or length, 27 bits of time since the event before. Nothing about the bytes is
believed: a page whose events run past its end is left there and counted as bad.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kvmbench.traces.format import PageLayout

_TYPE_MASK, _TYPE_BITS = np.uint32(31), np.uint32(5)
_DATA_KINDS = np.uint32(28)
_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_TIME_SHIFT = np.uint64(27)
_TIME_STAMP_TOP = np.uint64(0xF800_0000_0000_0000)
_LOST, _LOST_COUNTED, _SIZE_MASK = 1 << 31, 1 << 30, 0xFFFFF
_WORD_BYTES = 4


@dataclass(frozen=True)
class Walk:
    """Where the events of some pages lie.

    Attributes:
        time_ns: of each event, by the trace's clock.
        offset: of its payload in the pages.
        length: of its payload, in bytes.
        id: its number.
        gap_time_ns: of pages before which events were lost,
        gap_lost: and how many; 0 where the kernel did not count them.
        bad: pages that made no sense from some point on.
    """

    time_ns: NDArray[np.uint64]
    offset: NDArray[np.uint64]
    length: NDArray[np.uint32]
    id: NDArray[np.uint16]
    gap_time_ns: NDArray[np.uint64]
    gap_lost: NDArray[np.uint64]
    bad: int


@dataclass
class _Lanes:
    """The pages that still have events, an element each; places count words of 4 bytes."""

    page: NDArray[np.int64]
    at: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    size_bytes: NDArray[np.int64]
    time: NDArray[np.uint64]

    def keep(self, which: NDArray[np.bool_]) -> None:
        if not which.all():
            for each in fields(self):
                setattr(self, each.name, getattr(self, each.name)[which])


class _Found:
    """Events in the order they were met: one of each page, then the next of each."""

    def __init__(self, pages: int) -> None:
        self.count = np.zeros(pages, np.int64)
        self.rounds: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]] = []
        self.lengths: list[NDArray[np.uint32]] = []

    def add(
        self,
        page: NDArray[np.int64],
        time: NDArray[np.uint64],
        payload: NDArray[np.int64],
        length: NDArray[np.uint32],
    ) -> None:
        self.rounds.append((page, self.count[page], time, payload))
        self.lengths.append(length)
        self.count[page] += 1

    def in_order(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.uint32]]:
        total = int(self.count.sum())
        first = np.cumsum(self.count) - self.count
        time, payload, length = np.empty(total, np.uint64), np.empty(total, np.int64), np.empty(total, np.uint32)
        for (page, number, times, payloads), lengths in zip(self.rounds, self.lengths, strict=True):
            at = first[page] + number
            time[at], payload[at], length[at] = times, payloads, lengths
        return time, payload, length


def walk_pages(data: NDArray[np.uint8], page_bytes: int, layout: PageLayout) -> Walk:
    """Finds the events.

    Args:
        data: whole pages of one processor.
        page_bytes: of one page, a multiple of 8.
        layout: of one page; the events begin at a multiple of 4.
    """
    pages = data.reshape(-1, page_bytes)
    stamp, size = _numbers(pages, 0), _numbers(pages, layout.size_offset)
    used = (size & np.uint64(_SIZE_MASK)).astype(np.int64)
    room = page_bytes - layout.data_offset
    page = np.flatnonzero((used <= room) & (used >= _WORD_BYTES))
    start = (page * page_bytes + layout.data_offset) // _WORD_BYTES
    lanes = _Lanes(page, start, start, start + used[page] // _WORD_BYTES, used[page], stamp[page])
    words = data.view("<u4")
    found = _Found(len(pages))
    bad = int(np.count_nonzero(used > room))
    while len(lanes.page):
        header = words[lanes.at]
        kind, delta = header & _TYPE_MASK, (header >> _TYPE_BITS).astype(np.uint64)
        plain = kind - np.uint32(1) < _DATA_KINDS
        bad += _plain(lanes, kind, delta, found) if plain.all() else _mixed(lanes, words, kind, delta, plain, found)
    time, payload, length = found.in_order()
    gap_time, gap_lost = _gaps(pages, stamp, size, used, layout)
    number = words[payload].astype(np.uint16)
    return Walk(time, (payload * _WORD_BYTES).astype(np.uint64), length, number, gap_time, gap_lost, bad)


def _numbers(pages: NDArray[np.uint8], offset: int) -> NDArray[np.uint64]:
    return pages[:, offset : offset + 8].copy().view("<u8")[:, 0]


def _plain(lanes: _Lanes, kind: NDArray[np.uint32], delta: NDArray[np.uint64], found: _Found) -> int:
    # Most rounds: an event with its data on each page.
    following = lanes.at + 1 + kind
    good = following <= lanes.end
    found.add(lanes.page[good], (lanes.time + delta)[good], lanes.at[good] + 1, kind[good] * np.uint32(_WORD_BYTES))
    lanes.time = lanes.time + delta
    lanes.at = following
    lanes.keep(following < lanes.end)
    return int(len(good) - np.count_nonzero(good))


def _mixed(
    lanes: _Lanes,
    words: NDArray[np.uint32],
    kind: NDArray[np.uint32],
    delta: NDArray[np.uint64],
    plain: NDArray[np.bool_],
    found: _Found,
) -> int:
    at, end, time = lanes.at, lanes.end, lanes.time
    over = (kind == _PADDING) & (delta == 0)  # nothing more on this page
    first = words[np.minimum(at + 1, len(words) - 1)].astype(np.int64)
    sized = (kind == 0) | ((kind == _PADDING) & ~over)  # first is its length, that word with it
    room = lanes.size_bytes - (at - lanes.start) * _WORD_BYTES - _WORD_BYTES
    wrong = ~plain & ~over & (at + 2 > end)
    wrong |= sized & ((first < _WORD_BYTES) | (first > room))
    wrong |= (kind == 0) & (first < _WORD_BYTES + 2)
    wrong |= plain & (at + 1 + kind > end)
    later = time + delta + np.where(kind == _TIME_EXTEND, first.astype(np.uint64) << _TIME_SHIFT, np.uint64(0))
    absolute = (time & _TIME_STAMP_TOP) | ((first.astype(np.uint64) << _TIME_SHIFT) + delta)
    lanes.time = np.where(kind == _TIME_STAMP, absolute, later)
    event = (plain | (kind == 0)) & ~wrong
    length = np.where(plain, kind.astype(np.int64) * _WORD_BYTES, first - _WORD_BYTES).astype(np.uint32)
    found.add(lanes.page[event], lanes.time[event], np.where(plain, at + 1, at + 2)[event], length[event])
    whole = 1 + (first + _WORD_BYTES - 1) // _WORD_BYTES
    lanes.at = at + np.where(plain, 1 + kind.astype(np.int64), np.where(sized, whole, 2))
    wrong |= ~over & (lanes.at > end)
    lanes.keep(~wrong & ~over & (lanes.at < end))
    return int(np.count_nonzero(wrong))


def _gaps(
    pages: NDArray[np.uint8],
    stamp: NDArray[np.uint64],
    size: NDArray[np.uint64],
    used: NDArray[np.int64],
    layout: PageLayout,
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    at = np.flatnonzero(size & np.uint64(_LOST))
    lost = np.zeros(len(at), np.uint64)
    for n, page in enumerate(at.tolist()):
        behind = layout.data_offset + int(used[page])
        if int(size[page]) & _LOST_COUNTED and behind + 8 <= pages.shape[1]:
            lost[n] = int.from_bytes(pages[page, behind : behind + 8].tobytes(), "little")
    return stamp[at], lost
