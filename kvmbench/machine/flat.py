"""Flat binaries: bytes that go to one address as they are."""

from __future__ import annotations

import os

from kvmbench.arguments import integer
from kvmbench.errors import LoadError, MisuseError
from kvmbench.machine.elf import read_file
from kvmbench.machine.program import Program


def load_flat(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
    at: int = 0x1000,
    *,
    entry: int | None = None,
    bits: int = 64,
    name: str | None = None,
) -> Program:
    """A program from bare code, such as the output of ``objcopy -O binary``.

    Args:
        source: a path, or the bytes.
        at: gpa of the first byte; 0x7c00 for a boot sector.
        entry: address of the first instruction; `at` unless given.
        bits: width of the code at the entry.

    Raises:
        LoadError: the file cannot be read or is empty.
        MisuseError: `at` is no address.
    """
    data, name = read_file(source, name)
    if not data:
        raise LoadError(f"{name}: is empty; there is nothing to load")
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < 1 << 64:
        raise MisuseError(f"at={at!r} is not a guest-physical address")
    entry = at if entry is None else integer(entry, "entry", 0, (1 << 64) - 1)
    return Program(name=name, segments=((at, data),), entry=entry, bits=bits)
