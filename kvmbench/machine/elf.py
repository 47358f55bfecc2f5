"""Static x86 ELF files, 32 and 64 bits, read by pyelftools.

Segments go to their *physical* addresses (``p_paddr``), since that is where
they lie in guest memory; symbols and lines keep the addresses they were linked
to. In the usual bare-metal program, linked with ``ld -Ttext=``, both are equal.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elftools.common.exceptions import DWARFError, ELFError
from elftools.construct import ConstructError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from kvmbench.errors import LoadError
from kvmbench.machine.program import Program
from kvmbench.machine.source_lines import read_source_lines

# ELF header values (System V gABI, "ELF Header").
_MACHINES = {3: 32, 62: 64}
_OTHER_MACHINES = {
    2: "SPARC", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "s390", 40: "ARM", 50: "Itanium",
    183: "AArch64", 243: "RISC-V", 258: "LoongArch",
}  # fmt: skip
_ET_REL, _ET_EXEC, _ET_DYN = 1, 2, 3

# What pyelftools lets through from its own parsing of damaged files, beside its two families.
_DAMAGE = (ELFError, DWARFError, ConstructError, struct.error, ValueError, KeyError, IndexError, TypeError,
           AttributeError, AssertionError, OverflowError, UnicodeError, RecursionError)  # fmt: skip


def read_file(source: str | os.PathLike[str] | bytes | bytearray | memoryview, name: str | None) -> tuple[bytes, str]:
    """The bytes of a file, or those given, and a name for them.

    Raises:
        LoadError: the file cannot be read.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), name or "bytes"
    if not isinstance(source, str | os.PathLike):
        raise LoadError(f"cannot load {source!r}: give the path of a file, or its bytes")
    try:
        return Path(source).read_bytes(), name or Path(source).name
    except OSError as error:
        raise LoadError(f"cannot read {os.fspath(source)!r}: {error.strerror}") from error


def load_elf(source: str | os.PathLike[str] | bytes | bytearray | memoryview, *, name: str | None = None) -> Program:
    """Reads a static ELF executable for 32-bit or 64-bit x86.

    Args:
        source: a path, or the file's bytes.
        name: shown for the program; the file's name unless given.

    Raises:
        LoadError: not an ELF file, truncated, of another machine, not linked, position-independent, or with
            segments that overlap; the message has the value and what to do.
    """
    data, name = read_file(source, name)
    return program_from_elf(data, name)


def program_from_elf(
    data: bytes,
    name: str,
    *,
    text: str | None = None,
    bits: int | None = None,
    warnings: tuple[str, ...] = (),
) -> Program:
    """`load_elf` of bytes, with the source text where the caller has it.

    Args:
        text: the assembly source, for the text of `Program.lines`.
        bits: width of the code at the entry; that of the file's class unless given.
    """
    _check_header(data, name)
    try:
        elf = ELFFile(io.BytesIO(data))
        machine_bits = 64 if elf.elfclass == 64 else 32
        segments, blank, entry = _segments(elf, data, name)
    except LoadError:
        raise
    except _DAMAGE as error:
        raise LoadError(f"{name}: its ELF headers are damaged ({error}); build or copy the file again") from error
    remarks = list(warnings)
    symbols: Mapping[str, int] = {}
    lines: Mapping[int, tuple[int, str]] = {}
    try:
        symbols = _symbols(elf)
        lines = read_source_lines(elf, text)
    except Exception as error:  # pyelftools lets anything through from damaged tables
        # Names are an aid: a stripped or odd section header table must not keep a program from running.
        remarks.append(f"symbols or source lines are damaged and left out ({error})")
    return Program(
        name=name,
        segments=tuple(segments),
        entry=entry,
        bits=machine_bits if bits is None else bits,
        symbols=symbols,
        lines=lines,
        blank=tuple(blank),
        warnings=tuple(remarks),
    )


def is_elf(data: bytes) -> bool:
    """True if the bytes begin as an ELF file does."""
    return data[:4] == b"\x7fELF"


def _check_header(data: bytes, name: str) -> None:
    if not is_elf(data):
        raise LoadError(
            f"{name}: not an ELF file (begins with {data[:4].hex(' ') or 'nothing'}); "
            "for bare code use load_flat, for a source load_asm"
        )
    if len(data) < 20 or len(data) < (64 if data[4] == 2 else 52):
        raise LoadError(f"{name}: truncated: {len(data)} bytes do not hold an ELF header; copy the file again")
    if data[4] not in (1, 2) or data[5] not in (1, 2):
        raise LoadError(f"{name}: ELF class {data[4]} and byte order {data[5]} do not exist; copy the file again")
    order = "<" if data[5] == 1 else ">"
    kind, machine = struct.unpack_from(order + "HH", data, 16)
    if data[5] == 2 or machine not in _MACHINES:
        other = _OTHER_MACHINES.get(machine, "unknown")
        raise LoadError(
            f"{name}: built for machine {machine} ({other}), not for x86; build it with an x86 compiler, "
            "such as x86_64-linux-gnu-gcc"
        )
    if kind == _ET_REL:
        raise LoadError(f"{name}: an object file that is not linked; link it: `ld -Ttext=0x1000 -o prog {name}`")
    if kind == _ET_DYN:
        raise LoadError(f"{name}: position-independent (ET_DYN); link it with -static -no-pie")
    if kind != _ET_EXEC:
        raise LoadError(f"{name}: ELF type {kind} is no executable; link it with -static -no-pie")


def _segments(elf: Any, data: bytes, name: str) -> tuple[list[tuple[int, bytes]], list[tuple[int, int]], int]:
    """Loaded bytes, ranges of zeros, and the entry's physical address."""
    entry = int(elf.header["e_entry"])
    end_of_headers = elf.header["e_phoff"] + elf.header["e_phnum"] * elf.header["e_phentsize"]
    if end_of_headers > len(data):
        raise LoadError(
            f"{name}: truncated: the program headers end at byte {end_of_headers:#x}, "
            f"the file at {len(data):#x}; copy the file again"
        )
    segments: list[tuple[int, bytes]] = []
    blank: list[tuple[int, int]] = []
    places: list[tuple[int, int]] = []  # (gpa, end) of each segment
    moved = entry
    for index, segment in enumerate(elf.iter_segments()):
        header = segment.header
        if header["p_type"] == "PT_INTERP":
            raise LoadError(f"{name}: wants a dynamic linker; link it with -static -no-pie")
        if header["p_type"] != "PT_LOAD" or header["p_memsz"] == 0:
            continue
        gpa, size, in_file = header["p_paddr"], header["p_memsz"], header["p_filesz"]
        first = header["p_offset"]
        if first + in_file > len(data):
            raise LoadError(
                f"{name}: truncated: segment {index} ends at byte {first + in_file:#x}, the file at "
                f"{len(data):#x}; copy the file again"
            )
        if in_file > size:
            raise LoadError(
                f"{name}: segment {index} has {in_file:#x} bytes in the file but {size:#x} in memory; "
                "the file is damaged"
            )
        if gpa + size > 1 << 64:
            raise LoadError(f"{name}: segment {index} at {gpa:#x} + {size:#x} leaves the address space")
        for other, end in places:
            if gpa < end and other < gpa + size:
                raise LoadError(
                    f"{name}: segments at {other:#x} and {gpa:#x} overlap; mend the linker script's addresses"
                )
        places.append((gpa, gpa + size))
        if in_file:
            segments.append((gpa, data[first : first + in_file]))
        if size > in_file:
            blank.append((gpa + in_file, size - in_file))
        # The vcpu starts in identity-mapped memory: an entry at a high virtual address is moved down.
        if header["p_vaddr"] != gpa and header["p_vaddr"] <= entry < header["p_vaddr"] + size:
            moved = entry - header["p_vaddr"] + gpa
    if not places:
        raise LoadError(f"{name}: has nothing to load (no PT_LOAD segment); link it into an executable")
    if any(gpa <= entry < end for gpa, end in places):
        moved = entry
    return sorted(segments), sorted(blank), moved


def _symbols(elf: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for section in elf.iter_sections():
        if not isinstance(section, SymbolTableSection):
            continue
        for symbol in section.iter_symbols():
            # Absolute symbols are constants (`SIZE = 16`), undefined ones and file names are no places.
            if symbol["st_shndx"] in ("SHN_UNDEF", "SHN_ABS", "SHN_COMMON") or not symbol.name:
                continue
            if symbol["st_info"]["type"] in ("STT_SECTION", "STT_FILE", "STT_TLS"):
                continue
            found[symbol.name] = int(symbol["st_value"])
    return found
