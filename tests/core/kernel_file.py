"""A file like /proc/kcore of a kernel that is not there: a test must know what is in it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

# As in kernel_seeds.c.
FIRST, FIRST_BYTES = 0xFFFF_8880_0000_0000, 65536
SECOND, SECOND_BYTES = 0xFFFF_FFFF_8100_0000, 16384
_NOTE = struct.pack("<III", 11, 8, 0) + b"VMCOREINFO\0\0" + b"A=1\nB=2\n"


def write_kernel_file(path: Path) -> None:
    """Two pieces of memory, full of words that lead into them, so that lists go round in both; and a note."""
    chance = random.Random(1)

    def memory(size: int) -> bytes:
        words = [
            0 if chance.random() < 0.3
            else chance.getrandbits(64) if chance.random() < 0.1
            else chance.choice((FIRST + chance.randrange(FIRST_BYTES), SECOND + chance.randrange(SECOND_BYTES))) & ~7
            for _ in range(size // 8)
        ]  # fmt: skip
        return struct.pack(f"<{len(words)}Q", *words)

    start = 0x1000
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 4, 62, 1, 0, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    programs = b"".join(
        struct.pack("<IIQQQQQQ", kind, 7, offset, address, 0, size, size, 0)
        for kind, offset, address, size in (
            (4, 0x200, 0, len(_NOTE)),
            (1, start, FIRST, FIRST_BYTES),
            (1, start + FIRST_BYTES, SECOND, SECOND_BYTES),
        )
    )
    head = (header + programs).ljust(0x200, b"\0") + _NOTE
    path.write_bytes(head.ljust(start, b"\0") + memory(FIRST_BYTES) + memory(SECOND_BYTES))
