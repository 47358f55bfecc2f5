"""Traces as files of our own, ``.npz``: everything is in them, and nothing is pickled.

The file is what numpy writes, a zip of ``.npy`` members, readable without this library: ``about`` is JSON, ``log``
the rows of the log, ``log.vcpu`` whose they are, and for each kind of event ``NAME.time_ns``, ``.cpu``, ``.tid``,
``.vcpu`` and ``.data``, the event's bytes as the kernel wrote them, one row an event.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.debug.code_image import CodeImage
from kvmbench.debug.npz_file import reading
from kvmbench.errors import LoadError
from kvmbench.host.cache import replacing
from kvmbench.host.provenance import Provenance
from kvmbench.traces.event_table import EventColumns, EventTable, Gap
from kvmbench.traces.format import EventFormat, Field
from kvmbench.traces.places import Places
from kvmbench.traces.run_log import ROW, RunLog
from kvmbench.traces.trace import Mark, TraceData

FORMAT = "kvmbench trace 1"
_TIME = range(-(1 << 63), 1 << 63)
_VCPU = range(-(1 << 15), 1 << 15)
_CPU = range(-1, 1 << 16)
_COUNT = range(1 << 64)
_COLUMNS = {"time_ns": np.int64, "cpu": np.uint16, "tid": np.int32, "vcpu": np.int16}


def save_trace(data: TraceData, path: Path, *, compress: bool = True) -> Path:
    """Writes a trace; an existing file is replaced only once the new one is complete."""
    arrays: dict[str, NDArray[Any]] = {"log": data.log.data, "log.vcpu": data.log.vcpu}
    kinds = {}
    for name, columns in data.events.items():
        for column in _COLUMNS:
            arrays[f"{name}.{column}"] = getattr(columns, column)
        rows = np.ascontiguousarray(columns.data)
        arrays[f"{name}.data"] = rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
        kinds[name] = {
            "system": columns.format.system,
            "id": columns.format.id,
            "fields": [asdict(field) for field in columns.format.fields],
            "print_format": columns.format.print_format,
        }
    about = {
        "format": FORMAT,
        "provenance": json.loads(data.provenance.to_json()),
        "events": kinds,
        "gaps": [[gap.time_ns, gap.cpu, gap.lost] for gap in data.events.gaps],
        "bad_pages": data.events.bad_pages,
        "unknown": data.events.unknown,
        "log_lost": data.log.lost,
        "log_holes": [list(hole) for hole in data.log.holes],
        "log_under_way": [list(run) for run in data.log.under_way],
        "marks": [list(mark) for mark in data.marks],
        "clock_error_ns": data.clock_error_ns,
        "notes": list(data.notes),
        "statistics": [dict(grown) for grown in data.statistics],
        # JSON numbers are doubles to many readers: addresses travel as hex.
        "symbols": {name: hex(address) for name, address in data.places.symbols.items()},
        "code": {hex(address): code.hex() for address, code in data.places.code.stretches.items()},
        "bits": data.places.bits,
        "code_base": hex(data.places.code_base),
        "labels": list(data.labels),
        "clock": data.clock,
    }
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    with replacing(path) as file:
        write: Any = np.savez_compressed if compress else np.savez
        write(file, **arrays)
    return path


def load_trace(path: Path) -> TraceData:
    """Reads what `save_trace` wrote.

    Raises:
        LoadError: another file, another version, or a damaged one.
        OSError: it cannot be opened.
    """
    with reading(path, "trace", members=("about", "log", "log.vcpu")) as archive:
        return _read(path, archive)


def _read(path: Path, archive: Mapping[str, NDArray[Any]]) -> TraceData:
    about = json.loads(archive["about"].tobytes())
    # JSON may hold half of a surrogate pair, which no file of text takes.
    json.dumps(about, ensure_ascii=False).encode()
    if about["format"] != FORMAT:
        raise LoadError(f"{path}: written as {about['format']!r}; this version reads {FORMAT!r}")
    events = EventTable(
        [_columns(path, archive, name, kind) for name, kind in about["events"].items()],
        gaps=[Gap(_in(_TIME, time), _in(_CPU, cpu), _in(_COUNT, lost)) for time, cpu, lost in about["gaps"]],
        bad_pages=_in(_COUNT, about["bad_pages"]),
        unknown=_in(_COUNT, about["unknown"]),
    )
    rows, vcpu = archive["log"], archive["log.vcpu"]
    if rows.dtype != ROW or rows.ndim != 1 or vcpu.shape != rows.shape or vcpu.dtype != np.int16:
        raise LoadError(f"{path}: its log is {rows.dtype}, not the layout this version writes")
    error = about["clock_error_ns"]
    holes = tuple((_in(_VCPU, vcpu), _in(_TIME, left)) for vcpu, left in about.get("log_holes", ()))
    under_way = tuple(
        (_in(_VCPU, vcpu), _in(_COUNT, of), _in(_TIME, enter)) for vcpu, of, enter in about.get("log_under_way", ())
    )
    return TraceData(
        events,
        RunLog(vcpu, rows, _in(_COUNT, about["log_lost"]), under_way, holes),
        Provenance.from_json(json.dumps(about["provenance"])),
        tuple(
            Mark(_in(_TIME, time), str(text), str(source), _in(_VCPU, of)) for time, text, source, of in about["marks"]
        ),
        None if error is None else _in(_TIME, error),
        tuple(str(note) for note in about["notes"]),
        tuple({str(name): int(value) for name, value in grown.items()} for grown in about["statistics"]),
        Places(
            {str(name): _in(_COUNT, int(address, 16)) for name, address in about["symbols"].items()},
            CodeImage({_in(_COUNT, int(at, 16)): bytes.fromhex(code) for at, code in about["code"].items()}),
            _bits(about["bits"]),
            _in(_COUNT, int(about["code_base"], 16)),
        ),
        tuple(str(label) for label in about["labels"]),
        str(about["clock"]),
    )


def _in(limits: range, value: object) -> int:
    # JSON has numbers of any size.
    if not isinstance(value, int) or value not in limits:
        raise ValueError(f"{value!r:.40} where a number from {limits.start} to {limits.stop - 1} should be")
    return value


def _bits(value: object) -> int:
    if value not in (16, 32, 64):
        raise ValueError(f"code of {value!r} bits")
    return int(value)


def _columns(path: Path, archive: Mapping[str, NDArray[Any]], name: str, kind: Mapping[str, Any]) -> EventColumns:
    fields = tuple(Field(**field) for field in kind["fields"])
    described = EventFormat(str(kind["system"]), str(name), int(kind["id"]), fields, str(kind["print_format"]))
    raw = archive[f"{name}.data"]
    columns = {column: archive[f"{name}.{column}"] for column in _COLUMNS}
    shapes = {column.shape for column in columns.values()} | {raw.shape[:1]}
    types_fit = all(columns[column].dtype == dtype for column, dtype in _COLUMNS.items())
    if raw.dtype != np.uint8 or raw.ndim != 2 or len(shapes) != 1 or not types_fit:
        raise LoadError(f"{path}: the columns of {name} do not fit together")
    if raw.shape[1] < described.size_bytes:
        raise LoadError(f"{path}: rows of {name} have {raw.shape[1]} bytes, its fields need {described.size_bytes}")
    rows = np.ascontiguousarray(raw).view(described.dtype_of(raw.shape[1])).reshape(len(raw))
    return EventColumns(described, data=rows, **columns)
