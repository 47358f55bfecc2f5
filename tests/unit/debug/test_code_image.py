"""Captured code: few reads, and the same bytes as memory had."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmbench.debug.code_image import CodeImage

MEMORY = bytes(range(256)) * 64


def read(gva: int, length_bytes: int) -> bytes:
    return MEMORY[gva : gva + length_bytes]


def test_neighbouring_addresses_are_fetched_together() -> None:
    asked = []

    def reader(gva: int, length_bytes: int) -> bytes:
        asked.append((gva, length_bytes))
        return read(gva, length_bytes)

    image = CodeImage.capture(reader, [0x120, 0x100, 0x110, 0x900])
    assert asked == [(0x100, 0x20 + 15), (0x900, 15)]
    assert len(image) == 0x20 + 30


@given(st.sets(st.integers(0, len(MEMORY) - 16), min_size=1, max_size=40))
def test_every_captured_address_gives_the_bytes_memory_had(addresses: set[int]) -> None:
    image = CodeImage.capture(read, addresses)
    assert all(image(address, 15) == read(address, 15) for address in addresses)


def test_addresses_that_were_not_captured_give_nothing() -> None:
    image = CodeImage.capture(read, [0x100])
    assert image(0xFF, 15) == b""
    assert image(0x10F, 15) == b""
    assert image(0x10E, 15) == MEMORY[0x10E:0x10F]


def test_unreadable_memory_is_left_out() -> None:
    assert len(CodeImage.capture(lambda gva, length: b"", [0x100, 0x5000])) == 0
