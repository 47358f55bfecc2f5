"""A stretch of guest memory as rows of code: where each instruction begins, and where labels stand.

x86 code cannot be read backwards, so a stretch is swept from its start once and
the addresses of its instructions are kept. What is known to begin an instruction
(a source line, a symbol, rip) always begins a row: what runs into it is cut.
When some bytes change, only the rows around them are swept anew.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Sequence

from kvmbench.debug.instruction import MAX_BYTES, boundaries

# Swept at a time; what is cut by an anchor is swept again from there, so pieces are small.
_PIECE_BYTES = 1024


class Listing:
    """The rows of ``start`` to ``end``.

    Attributes:
        start: linear address of the first byte.
        end: of the first byte after the last row.
        bits: width of code it was swept for.
        cut_before: whether memory goes on before it.
        cut_after: whether memory goes on after it.
        starts: linear addresses of the rows of code, ascending.
    """

    def __init__(
        self,
        start: int,
        data: bytes,
        *,
        bits: int,
        symbols: Sequence[int] = (),
        lines: Collection[int] = (),
        cut_before: bool = False,
        cut_after: bool = False,
        trim: bool = False,
    ) -> None:
        self.start, self.end, self.bits = start, start + len(data), bits
        self.cut_before, self.cut_after = cut_before, cut_after
        self._data = bytearray(data)
        self._lines = frozenset(lines)
        self._anchors = sorted(self._lines.union(symbols))
        self.starts, _ = self._sweep(start, None, ())
        if trim:
            # The last instruction is likely cut short: it is left to the stretch that follows.
            keep = bisect_right(self.starts, self.end - MAX_BYTES)
            if 0 < keep < len(self.starts):
                self.end = self.starts[keep]
                del self.starts[keep:]

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end

    def bytes_of(self, starts: Sequence[int], index: int) -> bytes:
        """The bytes of one of the rows `starts`."""
        end = starts[index + 1] if index + 1 < len(starts) else self.end
        return bytes(self._data[starts[index] - self.start : end - self.start])

    def with_rows_at(self, addresses: Iterable[int]) -> list[int]:
        """`starts`, changed so that each of the addresses begins a row; those outside are left out."""
        starts = self.starts
        for address in addresses:
            if address not in self:
                continue
            index = bisect_right(starts, address) - 1
            if starts[index] == address:
                continue
            rows, joined = self._sweep(address, address, starts)
            cut = self._cut(starts[index], address)
            starts = [*starts[:index], *cut, *rows, *starts[bisect_left(starts, joined) :]]
        return starts

    def patch(self, address: int, data: bytes) -> bool:
        """Takes in what memory holds now; True if that changed something."""
        at = address - self.start
        before = self._data[at : at + len(data)]
        if before == data:
            return False
        differ = [n for n, (old, new) in enumerate(zip(before, data, strict=True)) if old != new]
        self._data[at : at + len(data)] = data
        first, last = address + differ[0], address + differ[-1]
        # Also what begins before may end elsewhere now: bytes that were no instruction may have become one.
        index = max(0, bisect_right(self.starts, first - MAX_BYTES) - 1)
        rows, joined = self._sweep(self.starts[index], last + 1, self.starts)
        self.starts = [*self.starts[:index], *rows, *self.starts[bisect_left(self.starts, joined) :]]
        return True

    def _cut(self, address: int, end: int) -> list[int]:
        return [address + each for each in boundaries(self._slice(address, end), bits=self.bits)]

    def _slice(self, address: int, end: int) -> bytes:
        return bytes(self._data[address - self.start : end - self.start])

    # Rows from `place` on, to the end or to where, at `join` or later, they meet one of the rows `known`; and where.
    def _sweep(self, place: int, join: int | None, known: Sequence[int]) -> tuple[list[int], int]:
        found: list[int] = []
        while place < self.end:
            piece_end = min(place + _PIECE_BYTES, self.end)
            offsets = boundaries(self._slice(place, piece_end), bits=self.bits)
            # What begins close to the end of the piece may go on beyond it: again from there with the next.
            limit = piece_end if piece_end == self.end else piece_end - MAX_BYTES
            number = bisect_right(self._anchors, place)
            base, place = place, piece_end
            for index, offset in enumerate(offsets):
                address = base + offset
                if join is not None and address >= join and found and _has(known, address):
                    return found, address
                if address >= limit:
                    place = address
                    break
                following = base + offsets[index + 1] if index + 1 < len(offsets) else piece_end
                while number < len(self._anchors) and self._anchors[number] <= address:
                    number += 1
                if number < len(self._anchors) and self._anchors[number] < following:
                    anchor = self._anchors[number]
                    # The assembler knows better than a name that points into an instruction.
                    if not (address in self._lines and anchor not in self._lines):
                        found += self._cut(address, anchor)
                        place = anchor
                        break
                found.append(address)
        return found, self.end


class Rows:
    """Rows of code and of labels under one numbering, with one row more at an end where there is something to say.

    Attributes:
        total: how many.
    """

    def __init__(self, starts: Sequence[int], labels: Iterable[int], *, before: bool, after: bool) -> None:
        # Twice the address, plus one for code: a label's row comes before that of its instruction.
        keys = [2 * address + 1 for address in starts]
        shown = [2 * address for address in labels if _has(starts, address)]
        self._keys = sorted([*keys, *shown]) if shown else keys
        self.before, self.after = before, after
        self.total = len(self._keys) + before + after

    def of(self, address: int) -> int | None:
        """Number of the row of code that begins at an address."""
        index = bisect_left(self._keys, 2 * address + 1)
        found = index < len(self._keys) and self._keys[index] == 2 * address + 1
        return index + self.before if found else None

    def __getitem__(self, number: int) -> tuple[str, int]:
        """("code" or "label", address), or ("before", 0), ("after", 0)."""
        index = number - self.before
        if index < 0:
            return "before", 0
        if index >= len(self._keys):
            return "after", 0
        return ("code" if self._keys[index] & 1 else "label"), self._keys[index] >> 1


def _has(addresses: Sequence[int], address: int) -> bool:
    index = bisect_left(addresses, address)
    return index < len(addresses) and addresses[index] == address
