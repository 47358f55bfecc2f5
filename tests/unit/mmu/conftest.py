"""Tables made by hand, in a stand-in for guest memory: the same bytes that `Memory` reads on a host."""

from __future__ import annotations

import struct
from types import SimpleNamespace

import pytest

from kvmbench.errors import AddressError
from kvmbench.mmu.paging import Paging, Processor


class Pages:
    """Memory from 0 to `size`; reads are counted."""

    def __init__(self, size: int = 1 << 20) -> None:
        self._data = bytearray(size)
        self.regions = (SimpleNamespace(gpa=0, end=size),)
        self.reads = 0

    def holds(self, gpa: int, size_bytes: int = 1) -> bool:
        return gpa >= 0 and gpa + size_bytes <= len(self._data)

    def read(self, gpa: int, size_bytes: int) -> bytes:
        if not self.holds(gpa, size_bytes):
            raise AddressError(f"gpa {gpa:#x} + {size_bytes:#x} bytes is not guest memory")
        self.reads += 1
        return bytes(self._data[gpa : gpa + size_bytes])

    def read_u64(self, gpa: int) -> int:
        return int(struct.unpack("<Q", self.read(gpa, 8))[0])

    def read_u32(self, gpa: int) -> int:
        return int(struct.unpack("<I", self.read(gpa, 4))[0])

    def put(self, entries: dict[int, int], width: int = 8) -> Pages:
        for gpa, entry in entries.items():
            self._data[gpa : gpa + width] = entry.to_bytes(width, "little")
        return self


@pytest.fixture
def pages():
    return Pages()


@pytest.fixture
def make_paging():
    def make(mode: str = "4-level", cr3: int = 0x1000, *, processor: Processor | None = None, **options) -> Paging:
        chosen = processor or Processor(physical_bits=40)
        return Paging(mode, cr3, chosen, **options)

    return make
