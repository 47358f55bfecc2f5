"""Recordings as files: ``.npz`` to come back to, CSV and pandas frames for other tools.

The ``.npz`` is what numpy writes (a zip of ``.npy`` members, readable without
this library): ``rows`` and ``start`` in the layout of `step_rows.ROW`, and
``about``, JSON with everything else. Nothing in it is pickled.
"""

from __future__ import annotations

import csv
import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmbench.arguments import file_path
from kvmbench.debug.code_image import CodeImage
from kvmbench.debug.npz_file import reading
from kvmbench.debug.register_table import INTEGER
from kvmbench.debug.step_rows import ROW, distinct, exit_name
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import LoadError
from kvmbench.host.cache import replacing
from kvmbench.host.provenance import Provenance

if TYPE_CHECKING:
    import pandas

    from kvmbench.debug.record import StepRecord

_FORMAT = "kvmbench steps 1"
# Rows turned into text or compared at a time.
_CHUNK_ROWS = 65536


def save(record: StepRecord, path: str | PathLike[str]) -> Path:
    """Writes a recording; an existing file is replaced only once the new one is complete."""
    target = file_path(path, "steps.npz")
    about = {
        "format": _FORMAT,
        "first_step": record.first_step,
        "bits": record.bits,
        "code_base": record.code_base,
        "vcpu": record.vcpu,
        "ended": record.ended,
        "provenance": json.loads(record.provenance.to_json()),
        # JSON numbers are doubles to many readers: addresses travel as hex.
        "symbols": {name: hex(address) for name, address in record.symbols},
        "lines": {hex(address): [number, text] for address, (number, text) in record.symbols.lines.items()},
        "code": {hex(address): code.hex() for address, code in record.code.stretches.items()},
    }
    text = np.frombuffer(json.dumps(about, sort_keys=True).encode(), dtype=np.uint8)
    with replacing(target) as file:
        np.savez_compressed(file, rows=record.rows, start=record.start, about=text)
    return target


def load(path: str | PathLike[str]) -> StepRecord:
    """Reads what `save` wrote; see `StepRecord.load`."""
    from kvmbench.debug.record import StepRecord

    source = file_path(path, "steps.npz")
    with reading(source, "recording", members=("rows", "start", "about")) as archive:
        rows, start = archive["rows"], archive["start"]
        if rows.dtype != ROW or rows.ndim != 1 or start.dtype != ROW or start.shape != ():
            raise LoadError(f"{source}: its rows are {rows.dtype}, not the layout this version records")
        about = json.loads(archive["about"].tobytes())
        if about["format"] != _FORMAT:
            raise LoadError(f"{source}: written as {about['format']!r}; this version reads {_FORMAT!r}")
        lines = {int(address, 16): (int(line[0]), str(line[1])) for address, line in about["lines"].items()}
        return StepRecord(
            rows,
            start,
            first_step=int(about["first_step"]),
            bits=about["bits"],
            code_base=int(about["code_base"]),
            symbols=Symbols.of({str(name): int(where, 16) for name, where in about["symbols"].items()}, lines),
            code=CodeImage({int(where, 16): bytes.fromhex(code) for where, code in about["code"].items()}),
            provenance=Provenance.from_json(json.dumps(about["provenance"])),
            vcpu=int(about["vcpu"]),
            ended=str(about.get("ended", "")),  # files of earlier versions have none
        )


def to_csv(record: StepRecord, path: str | PathLike[str]) -> Path:
    """Writes the CSV of `StepRecord.to_csv`."""
    target = file_path(path, "steps.csv")
    executed = record.executed_rip
    with target.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "executed_rip", "symbol", *INTEGER, "exit"])
        for first in range(0, len(record), _CHUNK_ROWS):
            rows = record.rows[first : first + _CHUNK_ROWS].tolist()
            for number, row in enumerate(rows, first):
                rip = int(executed[number])
                registers = [hex(value) for value in row[: len(INTEGER)]]
                label = record.symbols.label(rip + record.code_base)
                exit = exit_name(row[len(INTEGER)])
                writer.writerow([record.first_step + number, hex(rip), label, *registers, exit])
    return target


def to_dataframe(record: StepRecord) -> pandas.DataFrame:
    """Builds the frame of `StepRecord.to_dataframe`."""
    import pandas

    executed = record.executed_rip
    addresses, place = distinct(executed)
    labels = [record.symbols.label(int(address) + record.code_base) for address in addresses]
    reasons, exits = distinct(record.rows["exit"])
    columns: dict[str, Any] = {
        "executed_rip": executed,
        "symbol": _categories(labels, place),
        **{name: record.rows[name] for name in INTEGER},
        "exit": _categories([exit_name(int(reason)) for reason in reasons], exits),
        "entered_vector": record.entered_vector,
    }
    index = pandas.RangeIndex(record.first_step, record.first_step + len(record), name="step")
    return pandas.DataFrame(columns, index=index)


def _categories(names: list[str], place: Any) -> Any:
    # One code a row instead of one string object a row.
    import pandas

    unique = list(dict.fromkeys(names))
    codes = np.array([unique.index(name) for name in names], dtype=np.int32)
    taken = codes[place] if len(codes) else codes
    return pandas.Categorical.from_codes(taken, categories=unique)
