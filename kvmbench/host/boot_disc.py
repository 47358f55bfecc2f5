"""A disc that Bochs boots in a fraction of what GRUB takes: the kernel unpacked, read by a loader of its own.

Measured in instructions of Bochs 2.7 until the kernel's first ones: 300 million with
GRUB, an ISO image of grub-mkrescue and a kernel that unpacks itself; 30 million so.
The kernel enters by its PVH entry, as in QEMU.

The disc is an ISO 9660 image as far as a BIOS looks: a volume descriptor, a boot
record, a boot catalog, then the loader (`loader.S`) with its table of pieces, then
the pieces: the kernel's segments, initramfs, command line and PVH module list.

Sources: El Torito 1.0; ECMA-119, volume descriptors; Xen, public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import NoteSegment

from kvmbench.errors import HostUnavailable

SOURCE = Path(__file__).with_name("loader.S")

SECTOR_BYTES = 2048
_BOOT_SECTOR_BYTES = 512
_LOADER_AT = 0x7C00
# Where the loader has its entry, start info and table; it takes two boot sectors, the table goes on behind.
_TABLE_AT = 0x240
_INFO_AT = 0x200
_MOST_LOADER_BYTES = SECTOR_BYTES
# Physical addresses below the loader and above the BIOS data, and one above the kernel.
_MEMORY_MAP = 0x9000
_COMMAND_LINE = 0x9800
_MOST_COMMAND_LINE_BYTES = 0x7FF
_MODULE_LIST = 0xA000
_ALIGNMENT = 0x200000
_VOLUME, _BOOT_RECORD, _END, _CATALOG, _LOADER, _FIRST_PIECE = 16, 17, 18, 19, 20, 21
_START_MAGIC = 0x336EC578
_PHYS32_ENTRY = (18, "XEN_ELFNOTE_PHYS32_ENTRY")


def disc(kernel: bytes, initramfs: bytes, command_line: str, loader: bytes) -> bytes:
    """The whole disc.

    Args:
        kernel: an ELF kernel with a PVH entry (`vmlinux.unpacked`).
        initramfs: the archive, not compressed.
        command_line: of the kernel.
        loader: what `assemble_loader` returns.

    Raises:
        HostUnavailable: the kernel has no PVH entry, or the command line is too long.
    """
    words = command_line.encode()
    if len(words) > _MOST_COMMAND_LINE_BYTES:
        raise HostUnavailable(f"the kernel's command line has {len(words)} bytes, more than {_MOST_COMMAND_LINE_BYTES}")
    entry, pieces = _kernel(kernel)
    end = max(address + size for address, _, size in pieces)
    where = -(-end // _ALIGNMENT) * _ALIGNMENT
    placed = [(address, data) for address, data, _ in pieces]
    placed += [
        (where, initramfs),
        (_COMMAND_LINE, words + b"\0"),
        (_MODULE_LIST, struct.pack("<4Q", where, len(initramfs), 0, 0)),
    ]
    info = struct.pack("<4I4Q2I", _START_MAGIC, 1, 0, 1, _MODULE_LIST, _COMMAND_LINE, 0, _MEMORY_MAP, 0, 0)
    sector, table, body = _FIRST_PIECE, b"", []
    for address, data in placed:
        count = -(-len(data) // SECTOR_BYTES)
        table += struct.pack("<3I", address, sector, count)
        body.append(data.ljust(count * SECTOR_BYTES, b"\0"))
        sector += count
    program = loader[:_INFO_AT] + struct.pack("<2I", entry, 0) + info + table + bytes(12)
    assert len(program) <= _MOST_LOADER_BYTES
    return b"".join(
        [bytes(_VOLUME * SECTOR_BYTES), *_descriptors(sector, len(program)), program.ljust(SECTOR_BYTES, b"\0"), *body]
    )


def _kernel(image: bytes) -> tuple[int, list[tuple[int, bytes, int]]]:
    # The PVH entry, and (physical address, data without the zeros at its end, size) of each segment.
    entry = None
    segments = []
    try:
        file = ELFFile(io.BytesIO(image))
        for segment in file.iter_segments():
            if isinstance(segment, NoteSegment):
                for note in segment.iter_notes():
                    if note["n_name"] == "Xen" and note["n_type"] in _PHYS32_ENTRY:
                        start = int(note["n_offset"]) + 12 + 4  # header of three words, "Xen\0"
                        (entry,) = struct.unpack_from("<I", image, start)
            elif segment["p_type"] == "PT_LOAD":
                data = segment.data()
                segments.append((int(segment["p_paddr"]), data.rstrip(b"\0"), int(segment["p_memsz"])))
    except (ELFError, ValueError, KeyError, struct.error) as error:
        raise HostUnavailable(f"the kernel cannot be read: {error}") from error
    if entry is None or not segments:
        raise HostUnavailable("the kernel has no PVH entry (CONFIG_PVH), by which the Intel appliance starts it")
    return entry, segments


def _descriptors(sectors: int, loader_bytes: int) -> Sequence[bytes]:
    volume = bytearray(SECTOR_BYTES)
    volume[:7] = b"\x01CD001\x01"
    struct.pack_into("<I", volume, 80, sectors)
    struct.pack_into(">I", volume, 84, sectors)
    boot = bytearray(SECTOR_BYTES)
    boot[:39] = b"\0CD001\x01" + b"EL TORITO SPECIFICATION".ljust(32, b"\0")
    struct.pack_into("<I", boot, 71, _CATALOG)
    catalog = bytearray(SECTOR_BYTES)
    catalog[0] = 1
    catalog[30:32] = b"\x55\xaa"
    struct.pack_into("<H", catalog, 28, -sum(struct.unpack_from("<16H", catalog)) & 0xFFFF)
    boot_sectors = -(-loader_bytes // _BOOT_SECTOR_BYTES)
    struct.pack_into("<BBHBBHI", catalog, 32, 0x88, 0, 0, 0, 0, boot_sectors, _LOADER)
    return [bytes(volume), bytes(boot), b"\xffCD001\x01".ljust(SECTOR_BYTES, b"\0"), bytes(catalog)]


def assemble_loader(*, search_path: str | None = None) -> bytes:
    """The loader's code, assembled with the binutils.

    Raises:
        HostUnavailable: no `as` or `ld`, or they fail.
    """
    with tempfile.TemporaryDirectory(prefix="kvmbench-") as folder:
        parts = Path(folder) / "loader.o", Path(folder) / "loader.bin"
        _run(search_path, "as", "--32", str(SOURCE), "-o", str(parts[0]))
        layout = ("-m", "elf_i386", f"-Ttext={_LOADER_AT:#x}", "--oformat", "binary")
        _run(search_path, "ld", *layout, str(parts[0]), "-o", str(parts[1]))
        code = parts[1].read_bytes()
    assert len(code) == _TABLE_AT
    return code


def _run(search_path: str | None, name: str, *words: str) -> None:
    found = shutil.which(name, path=search_path if search_path is not None else os.environ.get("PATH"))
    if found is None:
        raise HostUnavailable(f"no {name} here: `sudo apt-get install --no-install-recommends binutils`")
    done = subprocess.run([found, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostUnavailable(f"{found} cannot assemble {SOURCE}:\n{done.stderr.strip()}")
