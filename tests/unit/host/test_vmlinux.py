"""Kernels unpacked beforehand: what is recognised, what is unpacked, and that anything else is left as it is."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvmbench.host.vmlinux import has_pvh_entry, payload_of, unpack, unpack_lz4, unpacked

_XEN, _PHYS32_ENTRY = b"Xen\0", 18


def elf(note_type: int = _PHYS32_ENTRY) -> bytes:
    """A 64-bit ELF file that has nothing but one note."""
    note = struct.pack("<III", len(_XEN), 4, note_type) + _XEN + bytes(4)
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return header + segment + note + bytes(range(256)) * 40


def lz4(data: bytes) -> bytes:
    """A legacy LZ4 frame of literals only, in blocks, with the kernel's size behind it."""
    frame = struct.pack("<I", 0x184C2102)
    for start in range(0, len(data), 4096):
        piece = data[start : start + 4096]
        more, rest = divmod(len(piece) - 15, 255)
        block = b"\xf0" + b"\xff" * more + bytes([rest]) + piece
        frame += struct.pack("<I", len(block)) + block
    return frame + struct.pack("<I", len(data))


def bzimage(payload: bytes) -> bytes:
    """A kernel file as far as `payload_of` looks at it."""
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<II", head, 0x248, 0x40, len(payload))
    return bytes(head) + bytes(0x40) + payload


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "lz4": lz4,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
}


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
def test_what_kernels_are_packed_with_is_unpacked(packer: Callable[[bytes], bytes]) -> None:
    payload = payload_of(bzimage(packer(elf())))
    assert payload is not None
    assert unpack(payload) == elf()


def test_matches_of_lz4_that_overlap_themselves_repeat() -> None:
    # "abc", then 10 bytes from 3 back; "d", then 4 bytes from 4 back; "e".
    block = b"\x36abc\x03\x00" + b"\x10d\x04\x00" + b"\x10e"
    frame = struct.pack("<II", 0x184C2102, len(block)) + block + bytes(4)
    assert unpack_lz4(frame) == b"abc" + b"abcabcabca" + b"d" + b"bcad" + b"e"


@pytest.mark.parametrize(
    "block", [b"\x10a\x09\x00", b"\x10a\x00\x00", b"\x10a\x01", b"\xf0\xff", b"\x1fa\x01\x00" + b"\xff" * 40000]
)
def test_a_damaged_block_of_lz4_is_no_kernel(block: bytes) -> None:
    frame = struct.pack("<II", 0x184C2102, len(block)) + block + bytes(4)
    assert unpack(frame) is None
    assert unpack(frame[:-6]) is None


def test_a_kernel_that_cannot_be_started_directly_is_none() -> None:
    assert has_pvh_entry(elf())
    assert not has_pvh_entry(elf(note_type=1))
    assert not has_pvh_entry(b"\x7fELF and no more")
    assert unpack(gzip.compress(elf(note_type=1))) is None


def test_files_that_are_no_bzimage_have_no_payload() -> None:
    assert payload_of(b"") is None
    assert payload_of(elf()) is None
    assert payload_of(bzimage(b"x" * 100)[:-1]) is None


def test_the_unpacked_kernel_is_made_once_and_lies_beside(tmp_path: Path) -> None:
    kernel, said = tmp_path / "kernel", list[str]()
    kernel.write_bytes(bzimage(lz4(elf())))
    assert unpacked(kernel, progress=said.append) == tmp_path / "vmlinux"
    assert (tmp_path / "vmlinux").read_bytes() == elf()
    unpacked(kernel, progress=said.append)
    assert said == ["unpacking the kernel (once)"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel", "vmlinux"]


@pytest.mark.parametrize(
    "data", [b"no kernel", bzimage(b"\x28\xb5\x2f\xfd packed with zstd"), bzimage(gzip.compress(b"no ELF"))]
)
def test_a_kernel_that_is_not_unpacked_is_used_as_it_is(tmp_path: Path, data: bytes) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(data)
    assert unpacked(kernel) == kernel
    assert [path.name for path in tmp_path.iterdir()] == ["kernel"]


def test_a_full_disk_is_no_error(tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bzimage(lz4(elf())))
    with full_disk():
        assert unpacked(kernel) == kernel
    assert [path.name for path in tmp_path.iterdir()] == ["kernel"]
