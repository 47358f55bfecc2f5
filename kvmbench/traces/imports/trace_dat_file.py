"""The parts of a `trace.dat`: of version 6, where they follow each other, and of version 7, which has sections.

As trace-cmd.dat.v6(5) and trace-cmd.dat.v7(5) describe them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kvmbench.errors import LoadError
from kvmbench.traces.imports.sections import Claims, Cursor, Unpacker, first_of

#: Every trace.dat begins so.
MAGIC = b"\x17\x08\x44tracing"
# What the kernel has: 4 kB to 64 kB, and sub-buffers of some pages.
_PAGE_BYTES = range(1 << 10, (1 << 22) + 1)
_MOST_CPUS = 1 << 14
# Of a part that says how many there are: no file of the kernel's comes near.
_MOST_PARTS = 1 << 17

# Options, and sections of the same numbers.
DONE, CPUSTAT, BUFFER, TRACECLOCK, UNAME, OFFSET, CPUCOUNT, TIME_SHIFT, TSC2NSEC = 0, 2, 3, 4, 5, 7, 8, 12, 14
_HEADER_INFO, _FTRACE_EVENTS, _EVENT_FORMATS, _CMDLINES, _BUFFER_TEXT = 16, 17, 18, 21, 22
_COMPRESSED = 1


@dataclass(frozen=True)
class Buffer:
    """What one instance of tracing wrote.

    Attributes:
        name: of the instance; "": the top one.
        clock: its trace clock, "mono"; "": not told here.
        page_bytes: of a page of its ring buffer.
        cpus: (processor, offset, bytes) of its pages in the file.
    """

    name: str
    clock: str
    page_bytes: int
    cpus: tuple[tuple[int, int, int], ...]


@dataclass
class Parts:
    """What a file holds, still as text and places.

    Attributes:
        data: the file.
        claims: what was read of it so far.
        version: 6 or 7.
        page_bytes: of a page of the machine.
        unpacker: of compressed pieces; None: nothing is compressed.
        header_page: the kernel's description of a page.
        formats: (system, description) of events.
        comms: names of threads.
        options: (number, bytes).
        buffers: the instances.
        notes: sentences on parts that could not be read.
        missing: parts with events that could not be read.
    """

    data: Any
    claims: Claims
    version: int = 0
    page_bytes: int = 0
    unpacker: Unpacker | None = None
    header_page: str = ""
    formats: list[tuple[str, str]] = field(default_factory=list)
    comms: dict[int, str] = field(default_factory=dict)
    options: list[tuple[int, bytes]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: int = 0


def read_parts(data: Any) -> Parts:
    """Finds the parts.

    Args:
        data: the file's bytes.

    Raises:
        LoadError: no trace.dat, one of another sort of machine or version, or one whose head is cut off or damaged.
    """
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise LoadError(f"no trace.dat of trace-cmd: it begins {bytes(data[:10])!r}")
    at = Cursor(data, len(MAGIC))
    version = at.string("the version", 16)
    if version not in ("6", "7"):
        raise LoadError(f"a trace.dat of version {version!r}; versions 6 and 7 are read")
    if at.number(1, "the byte order"):
        raise LoadError("its numbers are big-endian: it is of another sort of machine than those that KVM on x86 has")
    if (long := at.number(1, "the size of a long")) not in (4, 8):
        raise LoadError(f"damaged: a long of {long} bytes")
    parts = Parts(data, Claims(len(data)), int(version), at.number(4, "the size of a page"))
    if parts.page_bytes not in _PAGE_BYTES:
        raise LoadError(f"damaged: pages of {parts.page_bytes:,} bytes")
    if parts.version == 6:
        _read_6(parts, at)
    else:
        _read_7(parts, at)
    if not parts.header_page:
        raise LoadError("damaged: it does not describe the pages of the ring buffer")
    if parts.missing and not parts.buffers:
        raise LoadError("cut off: nothing says where its events are")
    return parts


def _header_info(parts: Parts, at: Cursor) -> None:
    at.expect(b"header_page\0", "the description of pages")
    parts.header_page = at.take(at.number(8, "its size"), "the description of pages").decode("utf-8", "replace")
    at.expect(b"header_event\0", "the description of events' heads")
    at.take(at.number(8, "its size"), "the description of events' heads")


def _ftrace_events(parts: Parts, at: Cursor) -> None:
    for _ in range(_count(at, "ftrace's own events")):
        parts.formats.append(("ftrace", at.take(at.number(8, "the size"), "an event").decode("utf-8", "replace")))


def _event_formats(parts: Parts, at: Cursor) -> None:
    for _ in range(_count(at, "groups of events")):
        system = at.string("the name of a group")
        for _ in range(_count(at, f"events of {system}")):
            text = at.take(at.number(8, "the size"), f"an event of {system}")
            parts.formats.append((system, text.decode("utf-8", "replace")))


def _count(at: Cursor, what: str) -> int:
    count = at.number(4, f"the number of {what}")
    if count > min(_MOST_PARTS, at.left):
        raise LoadError(f"damaged: {count:,} {what}")
    return count


def _cmdlines(parts: Parts, at: Cursor) -> None:
    text = at.take(at.number(8, "the size"), "names of threads").decode("utf-8", "replace")
    for line in text.splitlines():
        number, _, name = line.strip().partition(" ")
        if number.isdecimal() and len(number) < 11:
            parts.comms[int(number)] = name


def _read_6(parts: Parts, at: Cursor) -> None:
    _header_info(parts, at)
    _ftrace_events(parts, at)
    _event_formats(parts, at)
    at.take(at.number(4, "the size"), "names of functions")
    at.take(at.number(4, "the size"), "formats of printk")
    _cmdlines(parts, at)
    cpus = at.number(4, "the number of processors")
    if cpus > _MOST_CPUS:
        raise LoadError(f"damaged: {cpus:,} processors")
    kind = at.take(10, "the kind of data")
    if kind == b"options  \0":
        while number := at.number(2, "an option"):
            parts.options.append((number, at.take(at.number(4, "the size"), "an option")))
        kind = at.take(10, "the kind of data")
    if kind != b"flyrecord\0":
        raise LoadError("it has the text of a latency tracer, not events" if kind[:7] == b"latency" else "damaged")
    parts.buffers.append(Buffer("", *_data_6(parts, at, cpus)))
    troubles: list[str] = []
    for number, value in parts.options:
        if number == BUFFER:
            _instance_6(parts, value, cpus, troubles)
    parts.notes += first_of(troubles, "instances")
    parts.missing += len(troubles)


def _instance_6(parts: Parts, value: bytes, cpus: int, troubles: list[str]) -> None:
    # Like the file's end: the word, the table of processors, the clock.
    offset = Cursor(value).number(8, "the place of an instance")
    name = value[8:].split(b"\0")[0].decode("utf-8", "replace")
    if not offset:
        return
    try:
        at = Cursor(parts.data, offset)
        at.expect(b"flyrecord\0", f"instance {name!r}")
        parts.buffers.append(Buffer(name, *_data_6(parts, at, cpus)))
    except LoadError as error:
        troubles.append(f"instance {name!r} is missing: {error}")


def _data_6(parts: Parts, at: Cursor, cpus: int) -> tuple[str, int, tuple[tuple[int, int, int], ...]]:
    parts.claims.add(16 * cpus, "a table of processors")
    table = tuple((cpu, at.number(8, "a place"), at.number(8, "a size")) for cpu in range(cpus))
    # Old files have no clock there: what follows are zeros up to the first page.
    size = at.number(8, "the size of a clock's name") if at.left >= 8 else 0
    clock = at.take(size, "the clock").decode("utf-8", "replace") if size <= min(at.left, 4096) else ""
    return chosen(clock), parts.page_bytes, table


def chosen(clock: str) -> str:
    """The clock in use, of the text of the file `trace_clock`."""
    # "local global [mono] boot", or the name alone.
    return clock.partition("[")[2].partition("]")[0] or clock.strip("\0\n ")


def _read_7(parts: Parts, at: Cursor) -> None:
    method = at.string("the compression")
    at.string("the compression's version")
    parts.unpacker = Unpacker(method, len(parts.data)) if method != "none" else None
    where = at.number(8, "the place of the options")
    seen: set[int] = set()
    while where:
        if where in seen:
            raise LoadError("damaged: its options go round in a circle")
        seen.add(where)
        section = _section(parts, where, DONE)
        where = 0
        for number, value in _options(section):
            if number == DONE:
                where = Cursor(value).number(8, "the place of more options")
                break
            parts.options.append((number, value))
        if where and where >= len(parts.data):
            parts.notes.append("the file is cut off: some of its options are behind its end")
            parts.missing += 1
            break
    readers = {
        _HEADER_INFO: _header_info,
        _FTRACE_EVENTS: _ftrace_events,
        _EVENT_FORMATS: _event_formats,
        _CMDLINES: _cmdlines,
    }
    for number, value in parts.options:
        if number in readers:
            readers[number](parts, _section(parts, Cursor(value).number(8, "the place of a section"), number))
        elif number == BUFFER:
            parts.buffers.append(_instance_7(value))
        elif number == _BUFFER_TEXT:
            parts.notes.append("the text of a latency tracer in it is left out")


def _options(section: Cursor) -> Iterator[tuple[int, bytes]]:
    while section.left:
        number = section.number(2, "an option")
        yield number, section.take(section.number(4, "its size"), "an option")


def _section(parts: Parts, where: int, wanted: int) -> Cursor:
    # Its head, then its bytes: compressed as one piece or as they are.
    at = Cursor(parts.data, where)
    number, flags = at.number(2, "a section"), at.number(2, "its flags")
    at.number(4, "its description")
    size = at.number(8, "its size")
    if number != wanted:
        raise LoadError(f"damaged: at byte {where:,} is section {number}, not {wanted}")
    if size > at.left:
        raise LoadError(f"cut off or damaged: a section takes {size:,} bytes, {at.left:,} are left")
    parts.claims.add(size, f"section {number}")
    if not flags & _COMPRESSED:
        return Cursor(parts.data, at.at, at.at + size)
    return Cursor(_piece(parts, at))


def _piece(parts: Parts, at: Cursor) -> bytes:
    if parts.unpacker is None:
        raise LoadError("damaged: a compressed section in a file that is not compressed")
    packed, size = at.number(4, "its size"), at.number(4, "its size unpacked")
    return parts.unpacker.unpack(at.take(packed, "a compressed piece"), size)


def _instance_7(value: bytes) -> Buffer:
    at = Cursor(value)
    at.number(8, "the place of an instance")
    name, clock = at.string("the name of an instance"), at.string("its clock")
    page_bytes, cpus = at.number(4, "the size of a page"), at.number(4, "the number of processors")
    if page_bytes not in _PAGE_BYTES or cpus > _MOST_CPUS:
        raise LoadError(f"damaged: instance {name!r} has {cpus:,} processors and pages of {page_bytes:,} bytes")
    table = tuple((at.number(4, "a processor"), at.number(8, "a place"), at.number(8, "a size")) for _ in range(cpus))
    return Buffer(name, chosen(clock), page_bytes, table)


def pages_of(parts: Parts, offset: int, size_bytes: int) -> Iterator[Any]:
    """The pages of one processor, in one piece or chunk by chunk.

    Raises:
        LoadError: when it comes to where the file is cut off or damaged.
    """
    if not size_bytes:
        return
    if parts.unpacker is None:
        at = Cursor(parts.data, offset)
        parts.claims.add(min(size_bytes, at.left), "pages")
        yield parts.data[at.at : at.at + min(size_bytes, at.left)]
        if size_bytes > at.left:
            raise LoadError(f"{size_bytes:,} bytes of it should be there, {at.left:,} are")
        return
    at = Cursor(parts.data, offset)
    for _ in range(_count(at, "compressed pieces")):
        before = at.at
        piece = _piece(parts, at)
        parts.claims.add(at.at - before, "pages")
        yield piece
