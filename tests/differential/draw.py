"""Random numbers that name a guest for ever.

Python promises a stable sequence for `random.random` alone, so this is SplitMix64
(Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014) in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_MASK = (1 << 64) - 1
_GAMMA = 0x9E37_79B9_7F4A_7C15
# Values at which carries, signs and widths change.
_CORNERS = (
    0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000,
    0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x1_0000_0000, 0x7FFF_FFFF_FFFF_FFFF, 0x8000_0000_0000_0000, _MASK,
)  # fmt: skip


class Draw:
    """A sequence of draws that depends on nothing but its keys."""

    def __init__(self, *keys: int) -> None:
        self._state = 0
        for key in keys:
            self._state = (self.bits(64) ^ key) & _MASK

    def bits(self, count: int) -> int:
        """A number of so many bits, 64 at most."""
        self._state = (self._state + _GAMMA) & _MASK
        z = self._state
        z = (z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9 & _MASK
        z = (z ^ z >> 27) * 0x94D0_49BB_1331_11EB & _MASK
        return (z ^ z >> 31) >> (64 - count)

    def below(self, end: int) -> int:
        """A number from 0 to `end` - 1."""
        return self.bits(32) * end >> 32

    def between(self, first: int, last: int) -> int:
        """A number from `first` to `last`, both included."""
        return first + self.below(last - first + 1)

    def one_in(self, count: int) -> bool:
        """True once in `count` times."""
        return self.below(count) == 0

    def of(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def value(self, size: int) -> int:
        """A value of `size` bits: a corner half of the time, or one beside it."""
        mask = (1 << size) - 1
        if self.one_in(2):
            return self.bits(64) & mask
        return (self.of(_CORNERS) + self.of((0, 0, -1, 1))) & mask

    def data(self, length: int) -> bytes:
        """So many bytes."""
        return b"".join(self.bits(64).to_bytes(8, "little") for _ in range(-(-length // 8)))[:length]
