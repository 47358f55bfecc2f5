"""Pages of the kernel's ring buffer into rows: walked in the C core where there is one, else with numpy (`lanes`)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.errors import LoadError
from kvmbench.traces.format import EventFormat, PageLayout
from kvmbench.traces.lanes import Walk, walk_pages

# No event is shorter: its head, and the number of its kind with the common fields.
_LEAST_EVENT_BYTES = 8
# Of text behind an event's fixed part so much is kept; and a shorter event is filled up only to so much.
_MOST_TAIL_BYTES = 1024
# So much at once: the columns of a piece take about as much again as its pages.
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Rows:
    """Events of one kind, in the order of their processor.

    Attributes:
        time_ns: int64.
        data: a structured array, as `EventFormat.dtype`.
    """

    time_ns: NDArray[np.int64]
    data: NDArray[np.void]


@dataclass(frozen=True)
class Decoded:
    """What some pages of one processor hold.

    Attributes:
        rows: by the event's number.
        gaps: (time, events lost or 0 where nobody knows how many).
        bad: pages that made no sense from some point on.
        unknown: events of a kind that has no description.
    """

    rows: Mapping[int, Rows]
    gaps: list[tuple[int, int]]
    bad: int
    unknown: int


def native() -> Any:
    """The C core's functions, or None where it was not built."""
    try:
        return importlib.import_module("kvmbench.core._core")
    except ImportError:
        return None


def decode(
    pages: bytes | memoryview,
    formats: Mapping[int, EventFormat],
    *,
    page_bytes: int = 4096,
    layout: PageLayout = PageLayout(),  # noqa: B008 - frozen
    use_core: bool = True,
) -> Iterator[Decoded]:
    """Decodes pages of one processor, a piece of some megabytes after the other.

    Args:
        pages: whole pages, as ``trace_pipe_raw`` gives them; what is behind the last whole one is left out.
        formats: descriptions by number.
        page_bytes: of one page.
        layout: of one page.
        use_core: take the C core if it is there.

    Raises:
        LoadError: the layout cannot be.
    """
    fits = 16 <= layout.data_offset <= page_bytes and layout.size_offset <= layout.data_offset - 8
    if page_bytes < 32 or page_bytes % 8 or layout.data_offset % 4 or not fits:
        raise LoadError(f"a page of {page_bytes} bytes whose events begin at {layout.data_offset} cannot be")
    core = native() if use_core else None
    view = memoryview(pages)
    piece = max(1, _PIECE_BYTES // page_bytes) * page_bytes
    whole = len(view) // page_bytes * page_bytes
    for start in range(0, whole, piece):
        data = np.frombuffer(view[start : min(start + piece, whole)], dtype=np.uint8)
        walk = _walk(core, data, page_bytes, layout) if core else walk_pages(data, page_bytes, layout)
        yield _take(data, walk, formats)


def _take(data: NDArray[np.uint8], walk: Walk, formats: Mapping[int, EventFormat]) -> Decoded:
    rows: dict[int, Rows] = {}
    unknown = 0
    for number in np.flatnonzero(np.bincount(walk.id)):
        at = np.flatnonzero(walk.id == number)
        described = formats.get(int(number))
        if described is None:
            unknown += len(at)
            continue
        length = walk.length[at]
        stride = described.size_bytes
        if stride > _MOST_TAIL_BYTES:
            # Kernels have short events (kernel_stack), but none so long: a thousand such of 8 bytes would be megabytes.
            fits = length >= stride
            unknown += len(at) - int(fits.sum())
            at, length = at[fits], length[fits]
            if not len(at):
                continue
        if described.has_tail:
            stride = max(stride, min(int(length.max()), stride + _MOST_TAIL_BYTES))
        packed = gather(data, walk.offset[at], length, stride)
        rows[int(number)] = Rows(
            walk.time_ns[at].view(np.int64), packed.view(described.dtype_of(stride)).reshape(len(at))
        )
    gaps = [(int(t), int(n)) for t, n in zip(walk.gap_time_ns.view(np.int64), walk.gap_lost, strict=True)]
    return Decoded(rows, gaps, walk.bad, unknown)


def _walk(core: Any, data: NDArray[np.uint8], page_bytes: int, layout: PageLayout) -> Walk:
    ffi = core.ffi
    room = len(data) // _LEAST_EVENT_BYTES
    gaps = len(data) // page_bytes
    time, offset = np.empty(room, np.uint64), np.empty(room, np.uint64)
    length, number = np.empty(room, np.uint32), np.empty(room, np.uint16)
    gap_time, gap_lost = np.empty(gaps, np.uint64), np.empty(gaps, np.uint64)
    walk = ffi.new("struct core_walk *")
    walk.pages = ffi.from_buffer("uint8_t[]", data)
    walk.bytes, walk.page_bytes = len(data), page_bytes
    walk.size_offset, walk.data_offset = layout.size_offset, layout.data_offset
    walk.room, walk.gap_room = room, gaps
    walk.time, walk.offset = ffi.from_buffer("uint64_t[]", time), ffi.from_buffer("uint64_t[]", offset)
    walk.length, walk.id = ffi.from_buffer("uint32_t[]", length), ffi.from_buffer("uint16_t[]", number)
    walk.gap_time = ffi.from_buffer("uint64_t[]", gap_time)
    walk.gap_lost = ffi.from_buffer("uint64_t[]", gap_lost)
    core.lib.core_walk_pages(walk)
    n, lost = int(walk.count), int(walk.gaps)
    return Walk(time[:n], offset[:n], length[:n], number[:n], gap_time[:lost], gap_lost[:lost], int(walk.bad))


def gather(
    data: NDArray[np.uint8], offset: NDArray[np.uint64], length: NDArray[np.uint32], stride: int
) -> NDArray[np.uint8]:
    """Payloads as rows of `stride` bytes, shape (n, stride), cut or filled up with zeros.

    Args:
        data: the pages.
        offset: of each payload, a multiple of 4.
        length: of each, in bytes.
    """
    rows = np.empty((len(offset), stride), np.uint8)
    at = (offset // 4).astype(np.int64)
    # All rows that there could be, one every 4 bytes: numpy copies those that are.
    possible = max(0, (len(data) - stride) // 4 + 1)
    windows = np.ndarray((possible,), np.dtype((np.void, stride)), data, strides=(4,))
    inside = at < possible
    rows[inside] = windows[at[inside]].view(np.uint8).reshape(-1, stride)
    for n in np.flatnonzero(~inside):
        last = data[int(offset[n]) :]
        rows[n, : len(last)] = last
    short = np.flatnonzero(length < stride)
    if len(short):
        rows[short] *= np.arange(stride) < length[short][:, None]
    return rows
