"""Multiboot 1 kernels: the loader's half of the specification, version 0.6.96.

The kernel is an ELF file, or a flat one whose header says where it goes (the
"a.out kludge"). It starts in flat 32-bit protected mode with paging off, EAX
holding a magic number and EBX the address of the information structure.

Where things go: modules to the first pages at or above 1 MiB that the kernel
leaves free; the information structure with its strings to the first free
place from 0x9000 on. The memory map tells of a PC: memory below 640 KiB and
above 1 MiB, the hole between reserved.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvmbench.errors import LoadError, MisuseError
from kvmbench.kvm.region import PAGE_BYTES
from kvmbench.kvm.segment import DescriptorTable
from kvmbench.machine.boot import BootPlan, BootState, plan_boot
from kvmbench.machine.elf import is_elf, program_from_elf, read_file
from kvmbench.machine.program import Program

HEADER_MAGIC = 0x1BADB002
BOOT_MAGIC = 0x2BADB002
SEARCH_BYTES = 8192
INFO_GPA = 0x9000
LOADER_NAME = "kvmbench"

# Header flags. Bits 0 to 15 are demands: a loader that does not know one must refuse.
_ALIGN_MODULES, _WANT_MEMORY, _WANT_VIDEO, _HAS_ADDRESSES = 1 << 0, 1 << 1, 1 << 2, 1 << 16
_KNOWN_DEMANDS = _ALIGN_MODULES | _WANT_MEMORY | _WANT_VIDEO

# Information flags.
_INFO_MEMORY, _INFO_CMDLINE, _INFO_MODULES, _INFO_MMAP, _INFO_LOADER = 1, 1 << 2, 1 << 3, 1 << 6, 1 << 9
_INFO_BYTES = 116
_MAP_RAM, _MAP_RESERVED = 1, 2

_CONVENTIONAL_END, _HIGH = 0xA0000, 0x100000


@dataclass(frozen=True, slots=True)
class Header:
    """A kernel's Multiboot header.

    Attributes:
        offset: of the header in the file, in bytes.
        flags: what the kernel demands, and which fields are there.
        addresses: (header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr), if flag 16 is set.
    """

    offset: int
    flags: int
    addresses: tuple[int, int, int, int, int] | None


@dataclass(frozen=True, slots=True)
class MultibootImage:
    """A kernel with its modules and information structure, ready to be placed.

    Attributes:
        program: all of it.
        header: as found in the file.
        info_gpa: address of the information structure, for EBX.
    """

    program: Program
    header: Header
    info_gpa: int

    def state(self, plan: BootPlan) -> BootState:
        """Registers at the entry, as the specification demands; the IDT and GDT are not to be relied on."""
        state = plan.state(self.program.entry, bits=32)
        return replace(
            state,
            gdt=DescriptorTable(0, 0),
            registers={"rax": BOOT_MAGIC, "rbx": self.info_gpa},
        )


def find_header(data: bytes, name: str = "kernel") -> Header:
    """Searches the first 8192 bytes for a header with a right checksum, on a 4-byte boundary.

    Raises:
        LoadError: there is none, or it is cut off.
    """
    head = data[:SEARCH_BYTES]
    for offset in range(0, len(head) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", head, offset)
        if magic != HEADER_MAGIC or (magic + flags + checksum) & 0xFFFF_FFFF:
            continue
        if not flags & _HAS_ADDRESSES:
            return Header(offset, flags, None)
        if offset + 32 > len(head):
            raise LoadError(f"{name}: truncated: its Multiboot header at byte {offset:#x} is cut off")
        return Header(offset, flags, struct.unpack_from("<5I", head, offset + 12))
    raise LoadError(
        f"{name}: no Multiboot header in its first {SEARCH_BYTES} bytes (the magic {HEADER_MAGIC:#x} "
        "with a right checksum, on a 4-byte boundary); for a plain ELF file use load_elf"
    )


def load_multiboot(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    memory_bytes: int,
    *,
    command_line: str = "",
    modules: Sequence[tuple[bytes, str]] = (),
    name: str | None = None,
) -> MultibootImage:
    """Reads a kernel and lays out what its loader has to give it.

    Args:
        source: the kernel, a path or its bytes.
        memory_bytes: size of the memory that starts at gpa 0.
        command_line: handed to the kernel as it is.
        modules: pairs of (bytes, command line) to be loaded beside it.

    Raises:
        LoadError: no Multiboot kernel, damaged, demands what is not known here, or does not fit the memory.
        MisuseError: a command line with a null character.
    """
    data, name = read_file(source, name)
    header = find_header(data, name)
    unknown = header.flags & 0xFFFF & ~_KNOWN_DEMANDS
    if unknown:
        raise LoadError(
            f"{name}: its Multiboot header demands flags {unknown:#06x}, which version 0.6.96 does not "
            "define; the specification has the loader refuse"
        )
    try:
        modules = [(bytes(memoryview(content)), text) for content, text in modules]
    except (TypeError, ValueError):
        raise MisuseError(f"modules={modules!r}: give pairs of (bytes, command line)") from None
    for text in (command_line, *(text for _, text in modules)):
        if not isinstance(text, str):
            raise MisuseError(f"command line {text!r} is no text")
        if "\0" in text:
            raise MisuseError(f"command line {text!r} holds a null character, which ends it")
    kernel = _from_addresses(data, header, name) if header.addresses else _from_elf(data, name)
    warnings = list(kernel.warnings)
    if header.flags & _WANT_VIDEO:
        warnings.append("the kernel asks for a video mode; this machine has no display, so it is told of none")
    _check_fits(kernel, memory_bytes, name)

    used = list(kernel.ranges)
    placed: list[tuple[int, bytes, str]] = []
    for content, text in modules:
        gpa = _free_place(used, max(len(content), 1), _HIGH, memory_bytes, PAGE_BYTES)
        if gpa is None:
            raise LoadError(
                f"{name}: a module of {len(content):#x} bytes does not fit {memory_bytes:#x} bytes of "
                "memory; give the machine more"
            )
        used.append((gpa, max(len(content), 1)))
        placed.append((gpa, bytes(content), text))
    size = len(_information(0, command_line, placed, memory_bytes))
    info_gpa = _free_place(used, size, INFO_GPA, memory_bytes, 16)
    if info_gpa is None:
        raise LoadError(f"{name}: no free place for the Multiboot information; give the machine more memory")
    info = _information(info_gpa, command_line, placed, memory_bytes)
    segments = [
        *kernel.segments,
        *((gpa, content) for gpa, content, _ in placed if content),
        (info_gpa, info),
    ]
    program = replace(kernel, segments=tuple(sorted(segments)), warnings=tuple(warnings))
    return MultibootImage(program, header, info_gpa)


def multiboot_plan(memory_bytes: int, *, vcpus: int = 1) -> BootPlan:
    """The boot plan of a machine that a Multiboot kernel starts in: protected mode, paging off."""
    return plan_boot("protected", memory_bytes, vcpus=vcpus)


def _from_elf(data: bytes, name: str) -> Program:
    if not is_elf(data):
        raise LoadError(
            f"{name}: neither an ELF file nor are there load addresses in its Multiboot header (flag 16); "
            "link it as ELF or set the flag"
        )
    program = program_from_elf(data, name, bits=32)
    if program.end > 1 << 32 or program.entry >= 1 << 32:
        raise LoadError(
            f"{name}: lies above 4 GiB (up to {program.end:#x}), out of reach of 32-bit code; link it lower"
        )
    return program


def _from_addresses(data: bytes, header: Header, name: str) -> Program:
    assert header.addresses is not None
    header_gpa, load, load_end, bss_end, entry = header.addresses
    # The header's own place in the file and in memory fixes where the loaded part begins in the file.
    first = header.offset - (header_gpa - load)
    if load > header_gpa or first < 0:
        raise LoadError(
            f"{name}: load_addr {load:#x} and header_addr {header_gpa:#x} do not agree with the header "
            f"at byte {header.offset:#x} of the file"
        )
    length = load_end - load if load_end else len(data) - first
    if length < 0 or first + length > len(data):
        raise LoadError(
            f"{name}: truncated: its header says bytes {first:#x} to {first + length:#x}, the file has "
            f"{len(data):#x}; copy the file again"
        )
    end = load + length
    if bss_end and bss_end < end:
        raise LoadError(f"{name}: bss_end_addr {bss_end:#x} lies before the end of what is loaded, {end:#x}")
    if not load <= entry < max(end, bss_end):
        raise LoadError(f"{name}: entry_addr {entry:#x} lies outside what is loaded, {load:#x} to {end:#x}")
    blank = ((end, bss_end - end),) if bss_end > end else ()
    program = Program(name, ((load, data[first : first + length]),), entry, bits=32, blank=blank)
    if is_elf(data):
        # The addresses win over the ELF headers, but names are still welcome.
        try:
            elf = program_from_elf(data, name, bits=32)
            program = replace(program, symbols=elf.symbols, lines=elf.lines)
        except LoadError as error:
            program = replace(program, warnings=(f"no symbols: {error}",))
    return program


def _check_fits(program: Program, memory_bytes: int, name: str) -> None:
    for gpa, length in program.ranges:
        if gpa + length > memory_bytes:
            raise LoadError(
                f"{name}: {length:#x} bytes at {gpa:#x} lie outside the {memory_bytes:#x} bytes of memory; "
                "give the machine more, or link the kernel lower"
            )


def _free_place(used: list[tuple[int, int]], size: int, start: int, memory_bytes: int, align: int) -> int | None:
    # The first aligned place at or above `start` that keeps clear of the ranges used and of the hole.
    taken = sorted([*used, (_CONVENTIONAL_END, _HIGH - _CONVENTIONAL_END)])
    at = -(-start // align) * align
    for gpa, length in taken:
        if at < gpa + length and gpa < at + size:
            at = -(-(gpa + length) // align) * align
    return at if at + size <= min(memory_bytes, 1 << 32) else None


def _memory_map(memory_bytes: int) -> list[tuple[int, int, int]]:
    entries = [(0, min(memory_bytes, _CONVENTIONAL_END), _MAP_RAM)]
    if memory_bytes > _CONVENTIONAL_END:
        entries.append((_CONVENTIONAL_END, _HIGH - _CONVENTIONAL_END, _MAP_RESERVED))
    if memory_bytes > _HIGH:
        entries.append((_HIGH, memory_bytes - _HIGH, _MAP_RAM))
    return entries


def _information(at: int, command_line: str, modules: Sequence[tuple[int, bytes, str]], memory_bytes: int) -> bytes:
    # The structure at `at`, and behind it what it points to.
    tail = bytearray()

    def put(data: bytes) -> int:
        while len(tail) % 4:
            tail.append(0)
        gpa = at + _INFO_BYTES + len(tail)
        tail.extend(data)
        return gpa

    def text(value: str) -> int:
        return put(value.encode() + b"\0")

    flags = _INFO_MEMORY | _INFO_CMDLINE | _INFO_MODULES | _INFO_MMAP | _INFO_LOADER
    entries = b"".join(struct.pack("<IQQI", 20, base, length, kind) for base, length, kind in _memory_map(memory_bytes))
    mmap_gpa = put(entries)
    command_gpa = text(command_line)
    loader_gpa = text(LOADER_NAME)
    table = b"".join(struct.pack("<IIII", gpa, gpa + len(content), text(words), 0) for gpa, content, words in modules)
    modules_gpa = put(table)
    lower_kib = min(memory_bytes, _CONVENTIONAL_END) // 1024
    upper_kib = min(max(memory_bytes - _HIGH, 0) // 1024, 0xFFFF_FFFF)
    info = bytearray(_INFO_BYTES)
    struct.pack_into("<III", info, 0, flags, lower_kib, upper_kib)
    struct.pack_into("<III", info, 16, command_gpa, len(modules), modules_gpa)
    struct.pack_into("<II", info, 44, len(entries), mmap_gpa)
    struct.pack_into("<I", info, 64, loader_gpa)
    return bytes(info) + bytes(tail)
