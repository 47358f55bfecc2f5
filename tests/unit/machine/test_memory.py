"""Guest memory: addresses, views and comparisons, over regions kept in plain bytearrays.

What KVM does with regions is tested in tests/kvm; here only the arithmetic of addresses is at stake.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmbench.errors import AddressError, ClosedError, MisuseError
from kvmbench.kvm import VM
from kvmbench.machine.memory import Memory
from kvmbench.machine.snapshot import differences

PAGE = 4096


class PlainStore:
    """In place of a core: regions as bytearrays; `near`: they can be mapped, as on local, and not only copied."""

    def __init__(self, near: bool) -> None:
        self.near = near
        self.closed = False
        self.regions: dict[int, bytearray] = {}
        self.messages = 0

    def add_region(self, vm: int, gpa: int, size_bytes: int, flags: int = 0) -> int:
        handle = len(self.regions) + 2
        self.regions[handle] = bytearray(size_bytes)
        return handle

    def when_closed(self, listener: object) -> None:
        pass

    def set_region(self, handle: int, gpa: int, flags: int) -> None:
        raise AssertionError("memory never moves a region")

    def read_region(self, handle: int, offset: int, length: int) -> bytes:
        self.messages += 1
        data = bytes(self.regions[handle][offset : offset + length])
        assert len(data) == length
        return data

    def write_region(self, handle: int, offset: int, data: bytes) -> None:
        self.messages += 1
        assert offset + len(data) <= len(self.regions[handle])
        self.regions[handle][offset : offset + len(data)] = data

    def fill_region(self, handle: int, offset: int, length: int, byte: int = 0) -> None:
        self.messages += 1
        self.regions[handle][offset : offset + length] = bytes((byte,)) * length

    def dirty_log(self, handle: int) -> bytes:
        bits = np.zeros(len(self.regions[handle]) // PAGE, dtype=np.uint8)
        bits[1::2] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    def map_region(self, handle: int) -> memoryview | None:
        return memoryview(self.regions[handle]) if self.near else None

    def close_handle(self, handle: int) -> None:
        del self.regions[handle]


@pytest.fixture(params=[True, False], ids=["near", "far"])
def memory(request: pytest.FixtureRequest) -> Memory:
    made = Memory(VM(PlainStore(request.param), 1))  # type: ignore[arg-type]
    made.map(0, "64K")
    return made


def test_bytes_and_numbers_are_read_and_written_by_address(memory: Memory) -> None:
    memory[0x2000:0x2004] = b"abcd"
    memory[0x2004] = 0x65
    assert memory[0x2000:0x2005] == b"abcde"
    assert memory[0x2001] == ord("b")
    memory.write_u64(0x3000, 0x1122334455667788)
    assert memory[0x3000:0x3008] == bytes.fromhex("8877665544332211")
    assert memory.read_u32(0x3002) == 0x33445566
    assert memory.read_u16(0x3007) == 0x0011
    memory.write_u32(0x3000, -1)
    memory.write_u16(0x3004, 0x1_2345)
    memory.write_u8(0x3007, 0xAB)
    assert memory.read_u64(0x3000) == 0xAB22_2345_FFFF_FFFF
    assert memory.read_u8(0x3007) == 0xAB


def test_arrays_and_buffers_can_be_written(memory: Memory) -> None:
    memory.write(0x100, np.arange(4, dtype="<u4"))
    assert memory.read_u32(0x108) == 2
    memory.write(0x200, np.arange(8, dtype="u1")[::2])
    assert memory[0x200:0x204] == b"\0\2\4\6"
    memory.write(0x300, np.zeros(0))
    memory.write(0x300, bytearray(b"xy"))
    assert memory[0x300:0x302] == b"xy"


@pytest.mark.parametrize("gpa", [0x10000, 0xFFFF, 0xFFFFFFFFFFFFFFFF, 1 << 70])
def test_an_address_outside_is_named_with_the_memory_there_is(memory: Memory, gpa: int) -> None:
    for access in (
        lambda: memory.read(gpa, 2),
        lambda: memory.write(gpa, b"ab"),
        lambda: memory[gpa : gpa + 2],
        lambda: memory.read_u16(gpa),
        lambda: memory.fill(gpa, 2),
        lambda: memory.dump(gpa, 2),
        lambda: memory.as_array("u1", gpa, 2),
        lambda: memory.snapshot(gpa, 2),
    ):
        with pytest.raises(AddressError, match=rf"gpa {gpa:#x} \+ 0x2 bytes .*0x0 to 0xffff \(64K"):
            access()
    assert memory.read(0, 4) == bytes(4), "the memory is as it was"


def test_nothing_is_written_of_a_range_that_leaves_memory(memory: Memory) -> None:
    with pytest.raises(AddressError):
        memory.write(0xFFFE, b"abcd")
    assert memory[0xFFFE:0x10000] == b"\0\0"


def test_ranges_that_make_no_sense_are_refused(memory: Memory) -> None:
    with pytest.raises(AddressError, match="ends before it begins"):
        memory[0x20:0x10]
    with pytest.raises(AddressError, match="negative"):
        memory[-1]
    with pytest.raises(AddressError, match="negative"):
        memory.read(0x10, -1)
    with pytest.raises(MisuseError, match="no steps"):
        memory[0:16:2]
    with pytest.raises(MisuseError, match="takes 4 bytes, not 3"):
        memory[0:4] = b"abc"
    with pytest.raises(MisuseError, match="a byte is 0 to 255"):
        memory[0] = 256
    with pytest.raises(MisuseError, match="not an address"):
        memory["loop"]  # type: ignore[call-overload]
    with pytest.raises(MisuseError, match="not int"):
        memory.write(0, 5)
    with pytest.raises(MisuseError, match="byte=300"):
        memory.fill(0, 16, 300)


def test_an_open_slice_reaches_to_the_ends_of_memory(memory: Memory) -> None:
    assert len(memory[0xFF00:]) == 0x100
    assert len(memory[:]) == 0x10000 == len(memory)
    assert memory[0x10000:0x10000] == b""


def test_ranges_may_cross_from_one_region_into_the_next(memory: Memory) -> None:
    memory.map(0x10000, PAGE)
    memory.map(0x12000, PAGE)
    memory.write(0xFFFC, b"12345678")
    assert memory.read(0xFFFC, 8) == b"12345678"
    assert memory.read_u16(0xFFFF) == int.from_bytes(b"45", "little")
    before = memory.snapshot()
    memory.fill(0xFFF0, 0x20, 0xEE)
    assert memory.changes(before) == [(0xFFF0, 0x20)]
    memory.restore(before)
    assert memory.changes(before) == []
    assert memory.read(0xFFFC, 8) == b"12345678"
    assert not memory.holds(0x10FFF, 2), "there is a hole behind it"
    assert memory.holds(0x12000, PAGE)


def test_overlapping_and_unaligned_regions_are_refused_in_words(memory: Memory) -> None:
    with pytest.raises(AddressError, match=r"0xf000 \+ 0x2000 bytes overlaps .*0x0 to 0xffff"):
        memory.map(0xF000, 0x2000)
    with pytest.raises(MisuseError, match="does not begin on a 4096-byte page"):
        memory.map(0x10001, PAGE)
    with pytest.raises(MisuseError, match=r"not a multiple of the 4096-byte page; take 0x1000 or 0x2000"):
        memory.map(0x10000, 5000)
    with pytest.raises(MisuseError, match="at least one page"):
        memory.map(0x10000, 0)
    assert len(memory.regions) == 1


def test_an_unmapped_region_is_gone_and_its_place_is_free(memory: Memory) -> None:
    region = memory.map(0x20000, "8K", name="extra")
    memory.read(0x20000, 4)
    memory.unmap(region)
    with pytest.raises(AddressError):
        memory.read(0x20000, 4)
    memory.map(0x20000, PAGE)
    with pytest.raises(MisuseError, match="not a region"):
        memory.unmap(region)


def test_an_array_is_the_memory_itself_where_it_is_near_and_a_copy_elsewhere() -> None:
    for near in (True, False):
        memory = Memory(VM(PlainStore(near), 1))  # type: ignore[arg-type]
        memory.map(0x1000, PAGE)
        memory.write_u64(0x1008, 7)
        words = memory.as_array("u8", 0x1000)
        assert len(words) == 512
        assert words[1] == 7
        assert words.flags.writeable is near
        if near:
            words[2] = 9
            assert memory.read_u64(0x1010) == 9
            memory.write_u64(0x1008, 8)
            assert words[1] == 8


def test_arrays_of_structs_and_counts_are_checked(memory: Memory) -> None:
    pair = np.dtype([("a", "<u2"), ("b", "<u4")])
    memory.write(0x40, bytes(range(12)))
    pairs = memory.as_array(pair, 0x40, 2)
    assert pairs["b"].tolist() == [0x05040302, 0x0B0A0908]
    with pytest.raises(MisuseError, match="count=-1: give at least 0"):
        memory.as_array("u1", 0, -1)
    with pytest.raises(MisuseError, match="cannot stand"):
        memory.as_array(object)
    with pytest.raises(MisuseError, match="none of numpy's"):
        memory.as_array("nonsense")


def test_a_closed_memory_says_so_and_arrays_stay(memory: Memory) -> None:
    memory.write(0, b"keep")
    memory.read(0, 4)
    kept = memory.as_array("u1", 0, 4)
    memory.close()
    assert bytes(kept) == b"keep"
    for access in (
        lambda: memory.read(0, 4),
        lambda: memory[0:4],
        lambda: memory.write(0, b"x"),
        lambda: memory.as_array(),
        lambda: memory.snapshot(),
        lambda: memory.map(0, PAGE),
    ):
        with pytest.raises(ClosedError):
            access()
    assert repr(memory) == "Memory(closed)"


def test_far_memory_costs_one_message_an_access() -> None:
    store = PlainStore(near=False)
    memory = Memory(VM(store, 1))  # type: ignore[arg-type]
    memory.map(0, "16M")
    memory.fill(0, "16M")
    memory.read(0x1234, 5000)
    memory.write(0x1234, bytes(5000))
    assert store.messages == 3


def test_dirty_pages_are_given_by_address(memory: Memory) -> None:
    logged = memory.map(0x100000, 5 * PAGE, log_dirty=True)
    assert memory.dirty_pages() == [0x101000, 0x103000] == memory.dirty_pages(logged)
    with pytest.raises(MisuseError, match="log_dirty=True"):
        memory.dirty_pages(memory.regions[0])


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 300),
    flips=st.sets(st.integers(0, 299), max_size=40),
    data=st.binary(min_size=300, max_size=300),
)
def test_differences_are_exact_to_the_byte_and_joined(size: int, flips: set[int], data: bytes) -> None:
    before = np.frombuffer(data[:size], np.uint8)
    now = before.copy()
    wanted = sorted(offset for offset in flips if offset < size)
    for offset in wanted:
        now[offset] ^= 0x80
    ranges = differences(before, now)
    assert [offset for start, length in ranges for offset in range(start, start + length)] == wanted
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(ranges)), "neighbours are joined"


def test_a_difference_across_chunks_is_one_range() -> None:
    before = np.zeros(3 << 20, np.uint8)
    now = before.copy()
    now[(1 << 20) - 5 : (2 << 20) + 5] = 1
    assert differences(before, now) == [((1 << 20) - 5, (1 << 20) + 10)]


def test_a_snapshot_does_not_change_with_the_guest(memory: Memory) -> None:
    memory.write(0x50, b"old")
    snapshot = memory.snapshot(0x40, 64)
    memory.write(0x51, b"LD!")
    assert memory.changes(snapshot) == [(0x51, 3)]
    assert snapshot.size_bytes == 64
    memory.restore(snapshot)
    assert memory.read(0x50, 4) == b"old\0"


def test_a_dump_shows_digits_text_and_folds_repeated_rows(memory: Memory) -> None:
    memory.write(0x2000, b"Hello, <world>!\x01")
    dump = memory.dump(0x2000, 96)
    lines = str(dump).splitlines()
    assert lines[0] == "00002000  48 65 6c 6c 6f 2c 20 3c  77 6f 72 6c 64 3e 21 01  Hello, <world>!."
    assert lines[2:] == ["*", "00002050" + lines[1][8:]]
    assert "&lt;world&gt;" in dump._repr_html_()
    memory.write(0x2000, b"x" * 16)
    assert "Hello" in str(dump), "a dump is a copy"
    assert str(memory.dump(0x2000, 3)).split("  ")[1].strip() == "78 78 78"
