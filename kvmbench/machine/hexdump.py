"""Bytes as text, the way a debugger's memory window shows them."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass

ROW_BYTES = 16


@dataclass(frozen=True, slots=True)
class HexDump:
    """A copy of some guest memory that shows itself as a hex dump.

    Attributes:
        gpa: address of the first byte.
        data: the bytes, as they were when the dump was made.
    """

    gpa: int
    data: bytes

    def rows(self) -> Iterator[tuple[int, str, str]]:
        """Tuples of (gpa, hex digits, printable text) for each 16 bytes."""
        for first in range(0, len(self.data), ROW_BYTES):
            piece = self.data[first : first + ROW_BYTES]
            low, high = piece[:8].hex(" "), piece[8:].hex(" ")
            text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in piece)
            yield self.gpa + first, f"{low:<23}  {high}".ljust(48), text

    def __str__(self) -> str:
        lines: list[str] = []
        before: str | None = None
        last = self.gpa + (len(self.data) - 1) // ROW_BYTES * ROW_BYTES
        width = max(8, len(f"{self.gpa + len(self.data):x}"))
        for gpa, digits, text in self.rows():
            # Rows that repeat are folded into one star, as hexdump -C does; the last row always shows.
            if digits == before and gpa != last:
                if lines[-1] != "*":
                    lines.append("*")
                continue
            before = digits
            lines.append(f"{gpa:0{width}x}  {digits}  {text}")
        return "\n".join(lines) or f"{self.gpa:08x}  (no bytes)"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"
