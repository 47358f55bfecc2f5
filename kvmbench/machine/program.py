"""What a loader makes of a source or a file: bytes with their places, and names for the addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kvmbench.errors import MisuseError


@dataclass(frozen=True, slots=True)
class Program:
    """Bytes to place in guest memory, and what is known of them.

    Attributes:
        name: of the file, or what the caller called the source.
        segments: pairs of (gpa, bytes), by ascending gpa, none overlapping another.
        entry: address of the first instruction (rip).
        bits: width of the code at the entry: 16, 32 or 64.
        symbols: label to address, as the program was linked (the gpa, where memory is identity mapped).
        lines: address of an instruction to (line number, text of that source line).
        blank: pairs of (gpa, length in bytes) that must read as zeros, such as a ``.bss``.
        warnings: what the assembler or loader remarked, one sentence each.
    """

    name: str
    segments: tuple[tuple[int, bytes], ...]
    entry: int
    bits: int = 64
    symbols: Mapping[str, int] = field(default_factory=dict)
    lines: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    blank: tuple[tuple[int, int], ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bits not in (16, 32, 64):
            raise MisuseError(f"bits={self.bits!r}: code is 16, 32 or 64 bits wide")
        # Programs are cached and shared, so nobody may change one.
        object.__setattr__(self, "symbols", MappingProxyType(dict(self.symbols)))
        object.__setattr__(self, "lines", MappingProxyType(dict(self.lines)))

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Pairs of (gpa, length in bytes) of all that the program occupies, by ascending gpa."""
        return tuple(sorted([(gpa, len(data)) for gpa, data in self.segments] + list(self.blank)))

    @property
    def address(self) -> int:
        """The lowest gpa it occupies."""
        return min((gpa for gpa, _ in self.ranges), default=self.entry)

    @property
    def end(self) -> int:
        """The first gpa after all that it occupies."""
        return max((gpa + length for gpa, length in self.ranges), default=self.entry)

    @property
    def size_bytes(self) -> int:
        """From the first to the last byte, holes included."""
        return self.end - self.address

    def __repr__(self) -> str:
        loaded = sum(length for _, length in self.ranges)
        return (
            f"Program({self.name!r}, {loaded} bytes at {self.address:#x}, entry {self.entry:#x}, "
            f"{self.bits}-bit, {len(self.symbols)} symbols)"
        )
