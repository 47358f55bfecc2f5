"""The kernel without its compression, which QEMU starts directly (PVH).

A distribution's bzImage unpacks itself, and under emulation that is 0.3 s of
each cold start.  So it is unpacked once, here.  QEMU starts an ELF kernel that
has the note XEN_ELFNOTE_PHYS32_ENTRY (CONFIG_PVH); Debian's kernels do.

Sources: the kernel's Documentation/x86/boot.rst (payload_offset, payload_length)
and include/xen/interface/elfnote.h; LZ4 block format and legacy frame in
doc/lz4_Block_format.md and doc/lz4_Frame_format.md of LZ4.
"""

from __future__ import annotations

import bz2
import io
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from kvmbench.host.cache import write_file

_PHYS32_ENTRY = 18
# A kernel that unpacks to more than this is none.
_MOST_BYTES = 1 << 29
_LZ4_BLOCK_BYTES = 8 << 20


def unpacked(kernel: Path, *, progress: Callable[[str], None] | None = None) -> Path:
    """The kernel as QEMU starts it quickest: ``vmlinux`` beside it, made at the first call; else itself.

    Args:
        kernel: a bzImage in a folder of the cache.
        progress: gets a line before the seconds that unpacking takes.
    """
    target = kernel.with_name("vmlinux")
    if target.exists():
        return target
    try:
        payload = payload_of(kernel.read_bytes())
        if payload is None or _unpacker(payload) is None:
            return kernel
        if progress is not None:
            progress("unpacking the kernel (once)")
        image = unpack(payload)
        if image is None:
            return kernel
        write_file(target, image)
    except OSError:
        return kernel  # no room, or a cache that may not be written: the kernel unpacks itself
    return target


def payload_of(bzimage: bytes) -> bytes | None:
    """The compressed part of a bzImage; None if it is no such file."""
    if len(bzimage) < 0x250 or bzimage[0x202:0x206] != b"HdrS":
        return None
    (version,) = struct.unpack_from("<H", bzimage, 0x206)
    if version < 0x208:  # payload_offset is younger
        return None
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (sectors + 1) * 512 + offset
    return bzimage[start : start + length] if length and start + length <= len(bzimage) else None


def unpack(payload: bytes) -> bytes | None:
    """The ELF kernel in a payload; None if it is damaged, packed in another way, or cannot be started directly."""
    unpacker = _unpacker(payload)
    if unpacker is None:
        return None
    try:
        image = unpacker(payload)
    except (ValueError, IndexError, EOFError, OSError, struct.error, zlib.error, lzma.LZMAError):
        return None
    return image if has_pvh_entry(image) else None


def has_pvh_entry(image: bytes) -> bool:
    """Whether an ELF file has the note that QEMU looks for."""
    try:
        for segment in ELFFile(io.BytesIO(image)).iter_segments("PT_NOTE"):
            if isinstance(segment, NoteSegment):
                for note in segment.iter_notes():
                    if note["n_name"] == "Xen" and note["n_type"] in (_PHYS32_ENTRY, "XEN_ELFNOTE_PHYS32_ENTRY"):
                        return True
    except (ELFError, ValueError, KeyError, UnicodeDecodeError):
        pass
    return False


def _unpacker(payload: bytes) -> Callable[[bytes], bytes] | None:
    # zstd, which some kernels have, is not in Python's library.
    for magic, unpacker in (
        (b"\x02\x21\x4c\x18", unpack_lz4),
        (b"\x1f\x8b", lambda data: zlib.decompressobj(31).decompress(data, _MOST_BYTES)),
        (b"\xfd7zXZ\0", lambda data: lzma.LZMADecompressor().decompress(data, _MOST_BYTES)),
        (b"BZh", lambda data: bz2.BZ2Decompressor().decompress(data, _MOST_BYTES)),
    ):
        if payload.startswith(magic):
            return unpacker
    return None


def unpack_lz4(data: bytes) -> bytes:
    """The contents of a legacy LZ4 frame, as kernels have it; 53 MB take 2 s.

    Raises:
        ValueError, IndexError: the data is damaged.
    """
    pieces: list[bytes] = []
    place, total = 4, 0
    while place + 8 <= len(data):  # the last 4 bytes are the kernel's own: the size when unpacked
        (size,) = struct.unpack_from("<I", data, place)
        place += 4
        if place + size > len(data):
            raise ValueError("an LZ4 block is cut short")
        piece = _unpack_block(data[place : place + size])
        total += len(piece)
        if total > _MOST_BYTES:
            raise ValueError("unpacks to too much")
        pieces.append(piece)
        place += size
    return b"".join(pieces)


def _unpack_block(data: bytes) -> bytes:
    out = bytearray()
    place, end = 0, len(data)
    while place < end:
        token = data[place]
        place += 1
        length = token >> 4
        if length == 15:
            while (more := data[place]) == 255:
                length += 255
                place += 1
            length += more
            place += 1
        if length:
            out += data[place : place + length]
            place += length
        if place >= end:  # the last sequence has no match
            break
        distance = data[place] | data[place + 1] << 8
        place += 2
        length = (token & 15) + 4
        if length == 19:
            while (more := data[place]) == 255:
                length += 255
                place += 1
            length += more
            place += 1
        start = len(out) - distance
        if start < 0 or not distance or len(out) + length > _LZ4_BLOCK_BYTES:
            raise ValueError("an LZ4 block is damaged")
        if distance >= length:
            out += out[start : start + length]
        else:  # overlaps itself: the last bytes again and again
            out += (out[start:] * (length // distance + 1))[:length]
    return bytes(out)
