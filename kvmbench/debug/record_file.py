"""Recordings as files: ``.npz`` to come back to, CSV and pandas frames for other tools.

The ``.npz`` is what numpy writes (a zip of ``.npy`` members, readable without
this library): ``rows`` and ``start`` in the layout of `step_rows.ROW`, and
``about``, JSON with everything else. Nothing in it is pickled.
"""

from __future__ import annotations

import csv
import json
import zipfile
import zlib
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmbench.debug.code_image import CodeImage
from kvmbench.debug.register_table import INTEGER
from kvmbench.debug.step_rows import ROW, Rows, distinct, exit_name
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import LoadError, MisuseError
from kvmbench.host.cache import replacing
from kvmbench.host.provenance import Provenance

if TYPE_CHECKING:
    import pandas

    from kvmbench.debug.record import StepRecord

_FORMAT = "kvmbench steps 1"
# Rows turned into text or compared at a time.
_CHUNK_ROWS = 65536
# What numpy and zipfile raise beside their own errors. A file without zip's signature is taken for a pickle
# and refused with ValueError; a damaged header can claim any size, encryption, or odd compression.
_DAMAGE = (ValueError, KeyError, TypeError, SyntaxError, MemoryError, NotImplementedError, RuntimeError)


def save(record: StepRecord, path: str | PathLike[str]) -> Path:
    """Writes a recording; an existing file is replaced only once the new one is complete."""
    target = _path(path)
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

    source = _path(path)
    members = _members(source)
    rows, start = members["rows"], members["start"]
    if rows.dtype != ROW or rows.ndim != 1 or start.dtype != ROW or start.shape != ():
        raise LoadError(f"{source}: its rows are {rows.dtype}, not the layout this version records")
    try:
        about = json.loads(members["about"].tobytes())
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MisuseError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(f"{source}: a recording with a damaged description ({error})") from None


def _path(path: object) -> Path:
    if not isinstance(path, str | PathLike):
        raise MisuseError(f"path={path!r}: give the name of a file, such as 'steps.npz'")
    return Path(path)


def _members(source: Path) -> dict[str, Rows]:
    with source.open("rb") as file:
        try:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise LoadError(f"{source}: a single numpy array, not a recording")
            with loaded as archive:
                missing = {"rows", "start", "about"} - set(archive.files)
                if missing:
                    raise LoadError(f"{source}: not a recording: it has no {', '.join(sorted(missing))}")
                return {name: archive[name] for name in ("rows", "start", "about")}
        except LoadError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise LoadError(f"{source}: a truncated or damaged recording ({error})") from None
        except _DAMAGE as error:
            raise LoadError(f"{source}: not a recording that StepRecord.save wrote ({error})") from None


def to_csv(record: StepRecord, path: str | PathLike[str]) -> Path:
    """Writes the CSV of `StepRecord.to_csv`."""
    target = _path(path)
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
