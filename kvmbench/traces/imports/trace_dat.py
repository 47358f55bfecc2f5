"""`trace.dat` of trace-cmd, versions 6 and 7."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.errors import LoadError
from kvmbench.traces.event_table import EventColumns, EventTable, Gap
from kvmbench.traces.format import TAIL, EventFormat, PageLayout, parse_format, parse_header_page
from kvmbench.traces.growing import GrowingEvents
from kvmbench.traces.imports.imported import Imported, number_vcpus
from kvmbench.traces.imports.sections import first_of, number_of
from kvmbench.traces.imports.trace_dat_file import (
    CPUSTAT,
    MAGIC,
    OFFSET,
    TIME_SHIFT,
    TRACECLOCK,
    TSC2NSEC,
    UNAME,
    Buffer,
    Parts,
    chosen,
    pages_of,
    read_parts,
)
from kvmbench.traces.pages import Decoded, decode

__all__ = ["MAGIC", "read_trace_dat"]

# Their times are no nanoseconds.
_NO_NANOSECONDS = {"counter": "a count of events", "x86-tsc": "cycles of the TSC"}
# What a table of exits is made of.
_EXIT_FIELDS = ("exit_reason", "guest_rip", "isa", "info1", "info2", "intr_info", "error_code")


def read_trace_dat(source: str | Path | bytes) -> Imported:
    """Reads a file that ``trace-cmd record`` wrote.

    Where the file is cut off or damaged behind its head, what is whole is there, with a gap in ``events.gaps`` and a
    sentence in ``notes``.

    Args:
        source: its path, or its bytes.

    Raises:
        LoadError: no such file of version 6 or 7, or one without a whole head; one of another byte order; one whose
            compression nothing here knows.
        OSError: it cannot be read.
    """
    if isinstance(source, bytes):
        return _read(source, "trace.dat")
    with open(source, "rb") as file:
        if not file.seek(0, 2):
            raise LoadError(f"{source}: is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                return _read(view, str(source))
            finally:
                view.release()


def _read(data: Any, name: str) -> Imported:
    try:
        parts = read_parts(data)
        layout = parse_header_page(parts.header_page)
    except LoadError as error:
        # What the error holds on to would keep the file mapped.
        raise LoadError(f"{name}: {error}") from None
    notes = list(parts.notes)
    formats, odd = _formats(parts, notes)
    if odd:
        notes.append(f"{odd} descriptions of events were not understood; such events are counted as unknown")
    events, cut = _events(parts, formats, layout)
    notes += cut
    clocks = {b.name: b.clock for b in parts.buffers if b.clock and any(size for _, _, size in b.cpus)}
    option = next((_text(value) for number, value in parts.options if number == TRACECLOCK), "")
    clock = next(iter(clocks.values()), "") or chosen(option)
    if len(set(clocks.values())) > 1:
        told = ", ".join(f"{name or 'the top one'}: {clock}" for name, clock in clocks.items())
        notes.append(f"its instances have different clocks ({told}): their times cannot be compared")
    events = _in_nanoseconds(events, parts, clock, notes)
    notes += _overruns(parts)
    events, labels = number_vcpus(events, parts.comms)
    uname = next((_text(value) for number, value in parts.options if number == UNAME), "")
    return Imported(events, labels, clock, parts.comms, uname, tuple(notes))


def _text(value: bytes) -> str:
    return value.split(b"\0")[0].decode("utf-8", "replace").strip()


def _are_numbers(described: EventFormat, names: Iterable[str]) -> bool:
    types = {f.name: f.dtype for f in described.fields}
    return all(name not in types or ((t := types[name]) is not None and t.kind in "iu") for name in names)


def _renamed(described: EventFormat) -> EventFormat:
    # A column of that name holds what follows the fields; io_uring and others have a field so called, too.
    fields = tuple(replace(f, name=f"{TAIL}_") if f.name == TAIL else f for f in described.fields)
    described = replace(described, fields=fields)
    described.dtype_of(described.size_bytes + 1)
    return described


def _formats(parts: Parts, notes: list[str]) -> tuple[dict[int, EventFormat], int]:
    formats: dict[int, EventFormat] = {}
    odd = 0
    names: set[str] = set()
    for system, text in parts.formats:
        try:
            described = _renamed(parse_format(text, system=system))
        except (LoadError, ValueError):  # numpy has no type of two fields with one name
            odd += 1
            continue
        if described.id in formats:
            continue
        if not _are_numbers(described, ("common_pid", "vcpu_id")):
            odd += 1
            continue
        if described.name == "kvm_exit" and not (
            {"exit_reason", "isa"} <= {f.name for f in described.fields} and _are_numbers(described, _EXIT_FIELDS)
        ):
            # Of an arm64 machine, say.
            notes.append(
                "its kvm_exit is not that of x86: here it is called kvm_kvm_exit, and only exits to user space are told"
            )
            described = replace(described, name="kvm_kvm_exit")
        if described.name in names:
            # Two groups may have an event of one name; the table goes by names.
            described = replace(described, name=f"{system}_{described.name}")
        names.add(described.name)
        formats[described.id] = described
    return formats, odd


def _events(parts: Parts, formats: Mapping[int, EventFormat], layout: PageLayout) -> tuple[EventTable, list[str]]:
    decoded: list[tuple[int, Decoded]] = []
    gaps: list[Gap] = []
    notes: list[str] = []
    last = 0
    for buffer in parts.buffers:
        for cpu, offset, size in buffer.cpus:
            try:
                last = max(last, _cpu(parts, buffer, (cpu, offset, size), formats, layout, decoded))
            except _Cut as cut:
                last = max(last, cut.last)
                of = f" of instance {buffer.name!r}" if buffer.name else ""
                notes.append(f"processor {cpu}{of}: the file is cut off or damaged ({cut}); what is whole is here")
                gaps.append(Gap(cut.last, cpu & 0xFFFF, 0))
    gaps += [Gap(last, 0, 0)] * parts.missing
    # All at once: they are sorted only then, and processors come one behind the other.
    events = GrowingEvents(formats, page_bytes=parts.page_bytes, layout=layout)
    events.add_decoded(decoded)
    return events.table([*events.gaps, *gaps]), first_of(notes, "processors")


class _Cut(Exception):
    # A processor's pages end too early; `last` is the time of its last event.
    def __init__(self, why: str, last: int) -> None:
        super().__init__(why)
        self.last = last


def _cpu(
    parts: Parts,
    buffer: Buffer,
    place: tuple[int, int, int],
    formats: Mapping[int, EventFormat],
    layout: PageLayout,
    decoded: list[tuple[int, Decoded]],
) -> int:
    cpu, offset, size = place
    last = 0
    try:
        for pages in pages_of(parts, offset, size):
            for found in decode(pages, formats, page_bytes=buffer.page_bytes, layout=layout):
                decoded.append((cpu & 0xFFFF, found))
                last = max([last, *(int(rows.time_ns.max()) for rows in found.rows.values())])
            if len(pages) % buffer.page_bytes and not parts.unpacker and len(pages) == size:
                raise LoadError(f"{size:,} bytes are no whole pages of {buffer.page_bytes}")
    except LoadError as error:
        raise _Cut(str(error), last) from None
    return last


def _in_nanoseconds(events: EventTable, parts: Parts, clock: str, notes: list[str]) -> EventTable:
    scale = next((number_of(value, "IIQ") for number, value in parts.options if number == TSC2NSEC), None)
    shift_ns = 0
    for number, value in parts.options:
        if number == OFFSET:
            try:
                shift_ns = int(_text(value), 0)
            except ValueError:
                notes.append(f"its offset of times, {_text(value)!r}, is no number and was not added")
        elif number == TIME_SHIFT:
            notes.append("its corrections of times against another machine's were not applied")
    if clock == "x86-tsc" and scale is not None and scale[0] and scale[1] < 64:
        return _moved(events, lambda time: _scaled(time, *scale) + shift_ns)
    if clock in _NO_NANOSECONDS:
        notes.append(f"its clock is {clock!r}: times are {_NO_NANOSECONDS[clock]}, not nanoseconds")
    if not -(1 << 62) < shift_ns < 1 << 62:
        notes.append(f"its offset of times, {shift_ns}, cannot be and was not added")
        return events
    return _moved(events, lambda time: time + shift_ns) if shift_ns else events


def _scaled(time: NDArray[np.int64], multiplier: int, shift: int, offset: int) -> NDArray[np.int64]:
    # (time - offset) * multiplier >> shift, of which the product has up to 96 bits.
    cycles = time.astype(np.uint64) - np.uint64(offset & 0xFFFF_FFFF_FFFF_FFFF)
    product = [int(c) * multiplier >> shift & 0x7FFF_FFFF_FFFF_FFFF for c in cycles]
    return np.array(product, np.int64)


def _moved(events: EventTable, by: Any) -> EventTable:
    def one(time_ns: int) -> int:
        return int(by(np.array([time_ns], np.int64))[0])

    columns: list[EventColumns] = [replace(c, time_ns=by(c.time_ns)) for c in events.values()]
    gaps = [replace(gap, time_ns=one(gap.time_ns)) for gap in events.gaps]
    return EventTable(columns, gaps=gaps, bad_pages=events.bad_pages, unknown=events.unknown)


def _overruns(parts: Parts) -> list[str]:
    lost = 0
    for number, value in parts.options:
        if number == CPUSTAT:
            for line in _text(value).splitlines():
                name, _, count = line.partition(":")
                if name.strip() in ("overrun", "dropped events") and count.strip().isdecimal():
                    lost += int(count)
    return [f"the kernel counted {lost:,} events that its ring buffer had no room for"] if lost else []
