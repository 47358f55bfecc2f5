"""The disc that the Intel appliance boots: what a BIOS and the loader read off it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable
from kvmbench.host.boot_disc import SECTOR_BYTES, assemble_loader, disc

ENTRY, TEXT_AT, DATA_AT = 0x1000ABC, 0x1000000, 0x1200000
TEXT, DATA = b"text" * 1000, b"data" + bytes(5000)
LOADER = bytes(0x240)


def kernel(note_type: int = 18) -> bytes:
    """An ELF kernel of two segments whose PVH note names ENTRY."""
    note = struct.pack("<III", 4, 8, note_type) + b"Xen\0" + struct.pack("<Q", ENTRY)
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0)
    first = 64 + 3 * 56
    pieces = [(4, 0, note), (1, TEXT_AT, TEXT), (1, DATA_AT, DATA)]
    table, body = b"", b""
    for sort, address, data in pieces:
        table += struct.pack("<IIQQQQQQ", sort, 4, first + len(body), 0, address, len(data), len(data), 4)
        body += data
    return header + table + body


def sector(data: bytes, number: int) -> bytes:
    return data[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES]


def loaded(data: bytes) -> tuple[bytes, dict[int, bytes]]:
    """The loader that the boot catalog leads to, and what its table puts where."""
    (catalog,) = struct.unpack_from("<I", sector(data, 17), 71)
    assert sum(struct.unpack_from("<16H", sector(data, catalog))) & 0xFFFF == 0
    bootable, media, _, _, _, count, first = struct.unpack_from("<BBHBBHI", sector(data, catalog), 32)
    assert (bootable, media) == (0x88, 0)
    loader = data[first * SECTOR_BYTES :][: count * 512]
    memory = {}
    for address, start, sectors in struct.iter_unpack("<3I", loader[0x240 : len(loader) - (len(loader) - 0x240) % 12]):
        if not sectors:
            break
        memory[address] = data[start * SECTOR_BYTES :][: sectors * SECTOR_BYTES]
    return loader, memory


def test_a_bios_finds_the_loader_and_the_loader_all_pieces() -> None:
    data = disc(kernel(), b"initramfs", "quiet one=1", LOADER)
    assert sector(data, 17).startswith(b"\0CD001\x01EL TORITO SPECIFICATION\0")
    loader, memory = loaded(data)
    assert struct.unpack_from("<I", loader, 0x200) == (ENTRY,)
    magic, version, _, modules, list_at, words_at, _, _, _, _ = struct.unpack_from("<4I4Q2I", loader, 0x208)
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    assert memory[TEXT_AT].startswith(TEXT)
    assert memory[DATA_AT].startswith(b"data")
    assert memory[words_at].startswith(b"quiet one=1\0")
    where, size, _, _ = struct.unpack_from("<4Q", memory[list_at])
    assert where >= DATA_AT + len(DATA)
    assert memory[where][:size] == b"initramfs"


def test_zeros_at_the_end_of_a_segment_are_not_on_the_disc() -> None:
    _, memory = loaded(disc(kernel(), b"i", "", LOADER))
    assert len(memory[DATA_AT]) == SECTOR_BYTES < len(DATA)


@pytest.mark.parametrize("image", [b"", b"MZ" * 4000, kernel(note_type=1)])
def test_a_kernel_without_the_entry_is_refused(image: bytes) -> None:
    with pytest.raises(HostUnavailable, match="kernel"):
        disc(image, b"", "", LOADER)


def test_a_command_line_too_long_is_refused() -> None:
    with pytest.raises(HostUnavailable, match="command line"):
        disc(kernel(), b"", "x" * 2048, LOADER)


def test_the_loader_assembles_and_without_binutils_the_package_is_named(tmp_path: Path) -> None:
    assert len(assemble_loader()) == 0x240
    with pytest.raises(HostUnavailable, match="binutils"):
        assemble_loader(search_path=str(tmp_path))
