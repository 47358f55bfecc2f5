"""The text of `perf script`, of `trace-cmd report`, and of ftrace's own file `trace`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from kvmbench.errors import LoadError
from kvmbench.traces.event_table import NO_VCPU, EventColumns, EventTable, Gap
from kvmbench.traces.format import TAIL, EventFormat, Field
from kvmbench.traces.imports.event_line import EventLine, parse_line
from kvmbench.traces.imports.imported import Imported, number_vcpus
from kvmbench.traces.imports.payload_text import Reasons, Values, values_of

# Longer lines are none of an event; and of an event's text so much is kept.
_MOST_LINE = 1 << 16
_MOST_TEXT = 256
_CHAIN = re.compile(r"\s+[0-9a-f]{4,16}\s+\S")
_LOST_BY_PERF = re.compile(r"PERF_RECORD_LOST(?:_SAMPLES)?\b\D*(\d{1,18})")
_RECORD = re.compile(r"(PERF_RECORD_[A-Z_0-9]+):?")
# trace-cmd's "CPU:3 [1234 EVENTS DROPPED]", the kernel's "CPU:3 [LOST 1234 EVENTS]"; neither always has a number.
_LOST_BY_FTRACE = re.compile(
    r"CPU:\s*(\d{1,5}) \[(?:LOST )?(?:(\d{1,18}) )?EVENTS?(?: DROPPED| LOST)?\]", re.IGNORECASE
)
_DESCRIBES = re.compile(r"\s*(?:#|cpus=\d|version = |CPU \d+ is empty|$)")


@dataclass
class _Kind:
    # The events of one name, still as lists.
    system: str
    time: list[int] = field(default_factory=list)
    cpu: list[int] = field(default_factory=list)
    tid: list[int] = field(default_factory=list)
    values: list[Values] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


@dataclass
class _Reading:
    kinds: dict[str, _Kind] = field(default_factory=dict)
    reasons: Reasons = field(default_factory=Reasons)
    comms: dict[int, str] = field(default_factory=dict)
    processes: dict[int, int] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    waiting: list[tuple[int, int]] = field(default_factory=list)
    ignored: int = 0
    first_ignored: str = ""
    chains: int = 0
    records: int = 0
    digits: int = 9
    last_ns: int = 0


def read_perf_script(source: str | Path | bytes) -> Imported:
    """Reads what ``perf script`` printed, or ``trace-cmd report``, or what ftrace's file ``trace`` says.

    Fields are those that the text tells, with the kernel's names; of events other than KVM's best known ones the text
    itself is kept: ``events["kvm_fpu"].text(0)``. Numbers of exits are found by their names, and so is the isa.

    Args:
        source: the file's path, or its bytes.

    Raises:
        LoadError: no line of it is an event.
        OSError: it cannot be read.
    """
    reading = _Reading()
    if isinstance(source, bytes):
        _read(io.TextIOWrapper(io.BytesIO(source), "utf-8", "replace", newline="\n"), reading)
    else:
        with open(source, encoding="utf-8", errors="replace", newline="\n") as file:
            _read(file, reading)
    if not reading.kinds:
        name = "the text" if isinstance(source, bytes) else str(source)
        if not reading.first_ignored:
            raise LoadError(f"{name}: there is nothing in it")
        raise LoadError(
            f"{name}: no line is an event of perf script or trace-cmd report; it begins {reading.first_ignored!r}"
        )
    notes: list[str] = []
    columns = [_columns(name, kind, n + 1, reading, notes) for n, (name, kind) in enumerate(reading.kinds.items())]
    reading.gaps += (Gap(reading.last_ns, cpu, lost) for cpu, lost in reading.waiting)
    events, labels = number_vcpus(EventTable(columns, gaps=reading.gaps), reading.comms, reading.processes)
    return Imported(events, labels, "", reading.comms, "", (*_notes(reading), *notes), reading.ignored)


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(_MOST_LINE):
        yield line


def _read(file: TextIO, reading: _Reading) -> None:
    for line in _lines(file):
        if not line.endswith("\n"):
            # Cut off, or longer than any event: a number in it may have lost its last digits.
            if line.strip():
                _ignore(reading, line)
                reading.gaps.append(Gap(reading.last_ns, 0, 0))
            continue
        found = parse_line(line.rstrip("\r\n"))
        if found is None:
            _other(line, reading)
        elif found.event.startswith("PERF_RECORD_"):
            _record(line, found, reading)
        else:
            _event(line, found, reading)


def _event(line: str, found: EventLine, reading: _Reading) -> None:
    values = values_of(found.event, found.text, reading.reasons)
    if values is None:
        _ignore(reading, line)
        return
    kind = reading.kinds.get(found.event)
    if kind is None:
        system = found.system or ("kvm" if found.event.startswith("kvm_") else "")
        kind = reading.kinds[found.event] = _Kind(system)
    kind.time.append(found.time_ns)
    kind.cpu.append(found.cpu)
    kind.tid.append(found.tid)
    kind.values.append(values)
    kind.text.append("" if values else found.text[:_MOST_TEXT])
    reading.last_ns = found.time_ns
    reading.digits = min(reading.digits, found.digits)
    if found.comm and found.tid >= 0:
        reading.comms[found.tid] = found.comm
    if found.pid >= 0:
        reading.processes[found.tid] = found.pid
    if reading.waiting:
        behind = [one for one in reading.waiting if one[0] == found.cpu]
        if behind:
            reading.gaps += (Gap(found.time_ns, cpu, lost) for cpu, lost in behind)
            reading.waiting = [one for one in reading.waiting if one[0] != found.cpu]


def _record(line: str, found: EventLine, reading: _Reading) -> None:
    lost = _LOST_BY_PERF.search(line)
    if lost is None:
        reading.records += 1
        return
    reading.gaps.append(Gap(found.time_ns, found.cpu, int(lost[1])))


def _other(line: str, reading: _Reading) -> None:
    if lost := _LOST_BY_FTRACE.match(line):
        reading.waiting.append((int(lost[1]) & 0xFFFF, int(lost[2] or 0)))
    elif "PERF_RECORD_" in line:
        # Without the colon that events have: "PERF_RECORD_LOST lost 55".
        found = parse_line(_RECORD.sub(r"\1: ", line.rstrip(), count=1))
        if found is None:
            _ignore(reading, line)
        else:
            _record(line, found, reading)
    elif _CHAIN.match(line):
        reading.chains += 1
    elif not _DESCRIBES.match(line):
        _ignore(reading, line)


def _ignore(reading: _Reading, line: str) -> None:
    reading.ignored += 1
    reading.first_ignored = reading.first_ignored or line.strip()[:80]


def _notes(reading: _Reading) -> list[str]:
    notes = []
    if reading.ignored:
        lines = "1 line was" if reading.ignored == 1 else f"{reading.ignored:,} lines were"
        notes.append(f"{lines} not understood, the first: {reading.first_ignored!r}")
    if reading.chains:
        notes.append(f"{reading.chains:,} lines of call chains were left out")
    if reading.records:
        notes.append(f"{reading.records:,} records of tasks were left out")
    if reading.digits < 9:
        how = "'perf script --ns' and 'trace-cmd report -t' print all digits"
        notes.append(f"its times are microseconds: spans are exact to 1,000 ns ({how})")
    names = [name for table in reading.reasons.unknown.values() for name in table]
    if names:
        notes.append(f"exits whose numbers are not known here: {', '.join(names[:5])}")
    return notes


def _columns(name: str, kind: _Kind, number: int, reading: _Reading, notes: list[str]) -> EventColumns:
    counts: dict[str, int] = {}
    for values in kind.values:
        for key in values:
            counts[key] = counts.get(key, 0) + 1
    partly = [key for key, count in counts.items() if count < len(kind.values)]
    if partly:
        notes.append(f"not each {name} tells its {', '.join(sorted(partly)[:5])}: left out")
    columns = {key: _numbers([v[key] for v in kind.values]) for key in counts if key not in partly}
    fields = [Field("common_pid", 4, 4, True, "int")]
    for key, column in columns.items():
        signed = column.dtype.kind == "i"
        fields.append(Field(key, 8 * len(fields), 8, signed, "s64" if signed else "u64"))
    texts = [text.encode()[:_MOST_TEXT] for text in kind.text]
    tail = max(map(len, texts))
    if tail:
        fields.append(Field("text", 8 * len(fields), 0, False, "char", 0))
    printed = reading.reasons.print_format() if name == "kvm_exit" else ""
    described = EventFormat(kind.system, name, number, tuple(fields), printed)
    data = np.zeros(len(kind.time), described.dtype_of(described.size_bytes + tail))
    data["common_pid"] = kind.tid
    for key, column in columns.items():
        data[key] = column
    if tail:
        data[TAIL] = np.array(texts, dtype=f"S{tail}").view(f"V{tail}")
    time = np.array(kind.time, np.int64)
    at = np.argsort(time, kind="stable")
    cpu, tid = np.array(kind.cpu, np.uint16), np.array(kind.tid, np.int32)
    return EventColumns(described, time[at], cpu[at], tid[at], np.full(len(time), NO_VCPU, np.int16), data[at])


def _numbers(values: list[int]) -> NDArray[np.generic]:
    if max(values) < 1 << 63:
        return np.array(values, np.int64 if min(values) < 0 else np.uint64)
    return np.array([value & 0xFFFF_FFFF_FFFF_FFFF for value in values], np.uint64)
