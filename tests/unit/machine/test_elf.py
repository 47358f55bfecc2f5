"""ELF files: good ones are read, and each kind of bad one is refused in words."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmbench.errors import LoadError
from kvmbench.machine.binutils import find_tool
from kvmbench.machine.elf import load_elf
from kvmbench.machine.program import Program

SOURCE = """.intel_syntax noprefix
.globl _start
_start: mov eax, [value]
hlt
.data
value: .long 9
.bss
.skip 32
"""


def build(folder: Path, *, bits: int = 64, link: tuple[str, ...] = ("-Ttext=0x100000", "-N")) -> Path:
    """An ELF file made by as and ld."""
    (folder / "guest.s").write_text(SOURCE, encoding="utf-8")
    subprocess.run([find_tool("as"), f"--{bits}", "-g", "-o", "guest.o", "guest.s"], cwd=folder, check=True)
    emulation = "elf_x86_64" if bits == 64 else "elf_i386"
    subprocess.run(
        [find_tool("ld"), "-m", emulation, "--no-warn-rwx-segments", *link, "-o", "guest.elf", "guest.o"],
        cwd=folder,
        check=True,
    )
    return folder / "guest.elf"


@pytest.fixture(scope="module")
def elf64(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return build(tmp_path_factory.mktemp("elf64")).read_bytes()


def make_elf(
    segments: list[tuple[int, int, bytes, int]], *, entry: int = 0x1000, machine: int = 62, kind: int = 2
) -> bytes:
    """A 64-bit ELF file with segments (vaddr, paddr, bytes, size in memory), written by hand."""
    first = 64 + 56 * len(segments)
    headers, body = b"", b""
    for vaddr, paddr, data, size in segments:
        headers += struct.pack("<IIQQQQQQ", 1, 7, first + len(body), vaddr, paddr, len(data), size, 1)
        body += data
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    return ident + head + headers + body


@pytest.mark.parametrize("bits", [32, 64])
def test_a_linked_program_is_read_with_symbols_and_lines(tmp_path: Path, bits: int) -> None:
    program = load_elf(build(tmp_path, bits=bits))
    assert program.bits == bits
    assert program.name == "guest.elf"
    assert program.entry == program.symbols["_start"] == 0x100000
    assert program.lines[0x100000] == (3, "_start: mov eax, [value]")
    end = program.end
    assert program.blank
    assert end - sum(program.blank[-1]) == 0
    assert program.blank[-1][1] >= 32


def test_lines_whose_source_is_gone_name_the_file(tmp_path: Path) -> None:
    path = build(tmp_path)
    (tmp_path / "guest.s").unlink()
    assert load_elf(path).lines[0x100000] == (3, "guest.s:3")


def test_a_stripped_program_has_no_names_but_runs(tmp_path: Path) -> None:
    program = load_elf(build(tmp_path, link=("-Ttext=0x100000", "-N", "-s")))
    assert not program.symbols
    assert not program.lines
    assert program.entry == 0x100000


def test_segments_go_to_physical_addresses_and_a_virtual_entry_follows() -> None:
    program = load_elf(
        make_elf([(0xFFFF_8000_0000_0000, 0x200000, b"\xf4" * 8, 24)], entry=0xFFFF_8000_0000_0004)
    )
    assert program.segments == ((0x200000, b"\xf4" * 8),)
    assert program.blank == ((0x200008, 16),)
    assert program.entry == 0x200004


def test_every_truncation_is_refused_or_only_loses_names(elf64: bytes) -> None:
    whole = load_elf(elf64, name="guest")
    refused = 0
    for length in range(len(elf64)):
        try:
            program = load_elf(elf64[:length], name="guest")
        except LoadError:
            refused += 1
        else:
            assert program.segments == whole.segments
    assert refused >= 64 + 56, "both headers are needed"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not an ELF file"),
        (b"#!/bin/sh\n", "load_flat"),
        (make_elf([], machine=183), r"machine 183 \(AArch64\)"),
        (make_elf([], machine=40), r"machine 40 \(ARM\)"),
        (make_elf([], kind=1), "not linked"),
        (make_elf([], kind=3), "-no-pie"),
        (make_elf([]), "nothing to load"),
        (make_elf([(0x1000, 0x1000, b"x" * 8, 4)]), "0x8 bytes in the file but 0x4 in memory"),
        (
            make_elf([(0x1000, 0x1000, b"x" * 8, 8), (0x1004, 0x1004, b"y" * 8, 8)]),
            "0x1000 and 0x1004 overlap",
        ),
        (make_elf([(0x1000, 0xFFFF_FFFF_FFFF_FFF8, b"x" * 8, 16)]), "leaves the address space"),
    ],
)
def test_bad_files_are_refused_with_the_value(data: bytes, words: str) -> None:
    with pytest.raises(LoadError, match=words):
        load_elf(data)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nothing\.elf"):
        load_elf(tmp_path / "nothing.elf")


def test_a_segment_of_terabytes_of_zeros_takes_no_memory() -> None:
    program = load_elf(make_elf([(0x1000, 0x1000, b"\xf4", 1 << 42)]))
    assert program.blank == ((0x1001, (1 << 42) - 1),)


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_files_are_read_or_refused_and_nothing_else(
    elf64: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(elf64)
    for offset, value in changes:
        data[offset % len(data)] = value
    try:
        program = load_elf(bytes(data))
    except LoadError:
        return
    assert isinstance(program, Program)
    assert all(gpa + len(piece) <= 1 << 64 for gpa, piece in program.segments)
