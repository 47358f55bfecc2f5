"""Pages of the kernel's ring buffer made by hand, and events to put into them."""

from __future__ import annotations

import struct

from kvmbench.traces.format import EventFormat, parse_format

PAGE = 256
HEAD = 16
LOST, COUNTED = 1 << 31, 1 << 30
PADDING, EXTEND, STAMP = 29, 30, 31

FORMAT = """name: {name}
ID: {number}
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

{fields}
print fmt: "x", REC->x
"""


def make_format(name: str, number: int, *fields: tuple[str, str, int], system: str = "kvm") -> EventFormat:
    """A description with fields of (type, name, bytes) behind the common ones."""
    lines, at = [], 8
    for c_type, field, size in fields:
        lines.append(f"\tfield:{c_type} {field};\toffset:{at};\tsize:{size};\tsigned:{int(c_type == 'int')};")
        at += size
    return parse_format(FORMAT.format(name=name, number=number, fields="\n".join(lines)), system=system)


def payload(number: int, pid: int = 7, rest: bytes = b"") -> bytes:
    """An event's bytes."""
    return struct.pack("<HBBi", number, 0, 0, pid) + rest


def event(delta: int, data: bytes) -> bytes:
    """A record with its length in the head, or in a word of its own where it is long."""
    data += bytes(-len(data) % 4)
    if len(data) <= 28 * 4:
        return struct.pack("<I", len(data) // 4 | delta << 5) + data
    return struct.pack("<II", delta << 5, len(data) + 4) + data


def extend(delta: int) -> bytes:
    """Time that does not fit into 27 bits."""
    return struct.pack("<II", EXTEND | (delta & (1 << 27) - 1) << 5, delta >> 27)


def stamp(time: int) -> bytes:
    """The time itself, but for its upper five bits."""
    return struct.pack("<II", STAMP | (time & (1 << 27) - 1) << 5, time >> 27 & 0xFFFF_FFFF)


def discarded(delta: int, size: int) -> bytes:
    """An event that its writer took back: padding of `size` bytes, its head among them."""
    return struct.pack("<II", PADDING | delta << 5, size - 4) + bytes(size - 8)


def end() -> bytes:
    """Padding up to the page's end."""
    return struct.pack("<I", PADDING)


def page(time: int, *records: bytes, lost: int | None = None, size: int | None = None, page_bytes: int = PAGE) -> bytes:
    """A page; `lost`: so many events before it, 0 where the kernel did not count them."""
    data = b"".join(records)
    told = len(data) if size is None else size
    tail = b""
    if lost is not None:
        told |= LOST
        if lost:
            told |= COUNTED
            tail = struct.pack("<Q", lost)
    whole = struct.pack("<QQ", time, told) + data + tail
    assert len(whole) <= page_bytes
    return whole + bytes(page_bytes - len(whole))
