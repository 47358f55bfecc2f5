"""Multiboot: the header is found, and the information structure says what the specification promises."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmbench.errors import LoadError, MisuseError
from kvmbench.machine.multiboot import MultibootImage, find_header, load_multiboot, multiboot_plan

MAGIC = 0x1BADB002
MEMORY = 16 << 20


def header(flags: int, addresses: tuple[int, ...] = ()) -> bytes:
    return struct.pack(f"<III{len(addresses)}I", MAGIC, flags, -(MAGIC + flags) & 0xFFFF_FFFF, *addresses)


def flat_kernel(
    *, load: int = 0x100000, before: int = 16, code: bytes = b"\xf4" * 64, bss: int = 0x1000, flags: int = 0
) -> bytes:
    """A kernel placed by its header; `before` bytes of other things come first in the file."""
    head_gpa = load
    end = load + 32 + len(code)
    return bytes(before) + header(0x10000 | flags, (head_gpa, load, end, end + bss, load + 32)) + code


class Placed:
    """The memory that an image asks for, to be read by address."""

    def __init__(self, image: MultibootImage) -> None:
        self.image = image

    def read(self, gpa: int, size: int) -> bytes:
        for first, data in self.image.program.segments:
            if first <= gpa and gpa + size <= first + len(data):
                return data[gpa - first : gpa - first + size]
        raise AssertionError(f"nothing is placed at {gpa:#x} + {size}")

    def u32(self, gpa: int) -> int:
        return int(struct.unpack("<I", self.read(gpa, 4))[0])

    def text(self, gpa: int) -> str:
        found = bytearray()
        while (byte := self.read(gpa + len(found), 1)) != b"\0":
            found += byte
        return found.decode()


def test_a_kernel_placed_by_its_header_is_cut_where_the_header_says() -> None:
    image = load_multiboot(flat_kernel(before=48) + b"debug data behind", MEMORY)
    assert image.header.offset == 48
    placed = Placed(image)
    assert placed.read(0x100000, 12) == header(0x10000)
    assert placed.read(0x100020, 64) == b"\xf4" * 64
    assert image.program.entry == 0x100020
    assert image.program.blank == ((0x100060, 0x1000),)


def test_the_vcpu_starts_as_the_specification_says() -> None:
    image = load_multiboot(flat_kernel(), MEMORY)
    state = image.state(multiboot_plan(MEMORY))
    assert state.registers == {"rax": 0x2BADB002, "rbx": image.info_gpa}
    assert state.rip == 0x100020
    assert (state.cr0 & 1, state.cr0 >> 31, state.rflags & 0x20200) == (1, 0, 0)
    for segment in (state.cs, state.ds, state.es, state.fs, state.gs, state.ss):
        assert (segment.base, segment.limit, segment.db, segment.dpl) == (0, 0xFFFF_FFFF, 1, 0)


def test_the_information_tells_command_line_modules_memory_and_loader() -> None:
    modules = [(b"first module", "one arg"), (b"x" * 5000, "two")]
    image = load_multiboot(flat_kernel(), MEMORY, command_line="console=ttyS0 ü", modules=modules)
    placed, at = Placed(image), image.info_gpa
    flags = placed.u32(at)
    assert flags & 0b1001001101 == 0b1001001101
    assert (placed.u32(at + 4), placed.u32(at + 8)) == (640, 15 * 1024)
    assert placed.text(placed.u32(at + 16)) == "console=ttyS0 ü"
    assert placed.text(placed.u32(at + 64)) == "kvmbench"
    assert placed.u32(at + 20) == 2
    table = placed.u32(at + 24)
    for n, (content, words) in enumerate(modules):
        start, end, text, reserved = struct.unpack("<4I", placed.read(table + 16 * n, 16))
        assert placed.read(start, end - start) == content
        assert placed.text(text) == words
        assert start % 4096 == 0
        assert start >= 0x101060, "behind the kernel's bss"
        assert reserved == 0
    length, first = placed.u32(at + 44), placed.u32(at + 48)
    entries, offset = [], 0
    while offset < length:
        size = placed.u32(first + offset)
        entries.append(struct.unpack("<QQI", placed.read(first + offset + 4, 20)))
        offset += 4 + size
    assert entries == [(0, 0xA0000, 1), (0xA0000, 0x60000, 2), (0x100000, 15 << 20, 1)]


def test_a_kernel_that_lies_low_pushes_the_information_aside() -> None:
    image = load_multiboot(flat_kernel(load=0x8000, bss=0x4000), MEMORY)
    ranges = image.program.ranges
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ranges)), ranges
    assert image.info_gpa >= 0xC060


@given(
    load=st.integers(0x1000, 0x400000),
    size=st.integers(1, 0x20000),
    bss=st.integers(0, 0x100000),
    modules=st.lists(st.integers(0, 0x30000), max_size=4),
)
def test_nothing_that_is_placed_overlaps_or_lies_in_the_hole(
    load: int, size: int, bss: int, modules: list[int]
) -> None:
    image = load_multiboot(
        flat_kernel(load=load, code=b"\x90" * size, bss=bss),
        MEMORY,
        modules=[(bytes(n), "") for n in modules],
    )
    ranges = image.program.ranges
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(ranges))
    assert image.program.end <= MEMORY
    assert not 0xA0000 - 116 < image.info_gpa < 0x100000


def test_a_header_may_lie_anywhere_in_the_first_8_kib_on_four_bytes() -> None:
    for offset in (0, 4, 8192 - 12):
        assert find_header(bytes(offset) + header(3) + bytes(100)).offset == offset
    for data in (
        bytes(2) + header(3),
        bytes(8192) + header(3),
        header(3)[:-1],
        b"",
        header(3)[:8] + bytes(4),
    ):
        with pytest.raises(LoadError, match="no Multiboot header"):
            find_header(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header(3), "neither an ELF file nor"),
        (header(0x10), "demands flags 0x0010"),
        (flat_kernel()[:-4], "truncated"),
        (flat_kernel()[:30], "truncated|cut off"),
        (header(0x10000, (0x100000, 0x100004, 0, 0, 0x100004)), "do not agree"),
        (header(0x10000, (0x100000, 0x100000, 0, 0, 0x200000)), "entry_addr 0x200000"),
        (header(0x10000, (0x100000, 0x100000, 0x100020, 0x100010, 0x100000)), "bss_end_addr 0x100010"),
        (flat_kernel(load=0x0FFFFF0), "outside the 0x1000000 bytes"),
        (flat_kernel(bss=MEMORY), "outside the 0x1000000 bytes"),
    ],
)
def test_bad_kernels_are_refused_with_the_value(data: bytes, words: str) -> None:
    with pytest.raises(LoadError, match=words):
        load_multiboot(data, MEMORY)


def test_modules_that_do_not_fit_and_null_characters_are_refused() -> None:
    with pytest.raises(LoadError, match="module of 0x1000000 bytes"):
        load_multiboot(flat_kernel(), MEMORY, modules=[(bytes(MEMORY), "")])
    with pytest.raises(MisuseError, match="null character"):
        load_multiboot(flat_kernel(), MEMORY, command_line="a\0b")


def test_a_wish_for_a_video_mode_is_only_remarked() -> None:
    image = load_multiboot(flat_kernel(flags=4), MEMORY)
    assert any("video mode" in warning for warning in image.program.warnings)
