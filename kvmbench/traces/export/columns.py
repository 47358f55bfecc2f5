"""Tables as CSV and Parquet: one file is one table, exits or the events of one kind.

CSV is for reading with anything: addresses are in hex, a time that nothing tells is an empty cell, and a column names
the host, so that tables of several hosts can be put together. Parquet keeps the types, and what is known of the host
in its metadata.
"""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.errors import UnsupportedError
from kvmbench.host.cache import replacing
from kvmbench.host.provenance import Provenance
from kvmbench.traces.event_table import EventColumns
from kvmbench.traces.exits import NO_USER_EXIT, NOT_TOLD, ExitTable
from kvmbench.traces.export.timeline import Words, checked_path, clock_name, moments_of, text_file, vcpu_name
from kvmbench.traces.run_log import exit_name

_BLOCK = 1 << 14
_TIMES = ("guest_ns", "kvm_ns", "user_ns", "outside_ns")
_NUMBERS = ("info1", "info2", "intr_info", "error_code")
_ISAS = ("", "VMX", "SVM")
#: Columns of the table of exits.
EXIT_COLUMNS = ("time_ns", "vcpu", "reason", "rip", *_TIMES, "user_exit", "isa", "number", *_NUMBERS, "words", "host")


def write_csv(
    path: str | os.PathLike[str],
    exits: ExitTable,
    provenance: Provenance = Provenance(),  # noqa: B008 - frozen
    *,
    labels: Sequence[str] = (),
    clock: str = "mono",
) -> None:
    """Writes exits as CSV, the columns `EXIT_COLUMNS`.

    ``pandas.read_csv(path)`` reads it; ``.rip.map(lambda text: int(text, 16))`` makes numbers of addresses.

    Args:
        path: the file; one that is there is replaced.
        exits: the table.
        provenance: the host, for the column ``host``.
        labels: what vcpus are called, where that is not their number.
        clock: of the times.

    Raises:
        MisuseError: no path.
        OSError: it cannot be written.
    """
    target = checked_path(path)
    host = f"{provenance}; {clock_name(clock, provenance)}"
    words = Words(exits)
    names, users = exits.names, _user_exits(exits)
    with text_file(target) as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(EXIT_COLUMNS)
        for first in range(0, len(exits), _BLOCK):
            at = slice(first, min(first + _BLOCK, len(exits)))
            rows = range(at.start, at.stop)
            out.writerows(
                zip(
                    exits.time_ns[at].tolist(),
                    [vcpu_name(v, labels) if labels else v for v in exits.vcpu[at].tolist()],
                    [names[n] for n in exits.reason[at].tolist()],
                    map(hex, exits.rip[at].tolist()),
                    *(_told(getattr(exits, name)[at]) for name in _TIMES),
                    [users[n] for n in exits.user_exit[at].tolist()],
                    [_isa(n) for n in exits.isa[at].tolist()],
                    map(hex, exits.number[at].tolist()),
                    *(map(hex, getattr(exits, name)[at].tolist()) for name in _NUMBERS),
                    map(words, rows),
                    [host] * len(rows),
                    strict=True,
                )
            )


def write_events_csv(
    path: str | os.PathLike[str], columns: EventColumns, provenance: Provenance, *, clock: str = "mono"
) -> None:
    """Writes the events of one kind as CSV: time_ns, cpu, tid, vcpu, the event's own fields, host.

    Args:
        path: the file; one that is there is replaced.
        columns: the events.
        provenance: the host.
        clock: of the times.

    Raises:
        MisuseError: no path.
        OSError: it cannot be written.
    """
    target = checked_path(path)
    host = f"{provenance}; {clock_name(clock, provenance)}"
    wide = {f.name for f in columns.format.own_fields if not f.signed and f.size_bytes == 8}
    with text_file(target) as file:
        out = csv.writer(file, lineterminator="\n")
        names = _names(columns)
        out.writerow(("time_ns", "cpu", "tid", "vcpu", *names, "host"))
        for head, values in _rows(columns):
            cells = [hex(v) if name in wide and isinstance(v, int) else v for name, v in values.items()]
            out.writerow((*head, *cells, host))


def write_parquet(
    path: str | os.PathLike[str],
    exits: ExitTable,
    provenance: Provenance = Provenance(),  # noqa: B008 - frozen
    *,
    labels: Sequence[str] = (),
    clock: str = "mono",
) -> None:
    """Writes exits as Parquet: the columns `EXIT_COLUMNS`, numbers as numbers, and null for a time nothing tells.

    Args:
        path: the file; one that is there is replaced.
        exits: the table.
        provenance: the host, for the metadata and the column ``host``.
        labels: what vcpus are called, for the metadata.
        clock: of the times.

    Raises:
        MisuseError: no path.
        UnsupportedError: the package pyarrow is not installed.
        OSError: it cannot be written.
    """
    target = checked_path(path)
    arrow, parquet = _arrow()
    words = Words(exits)
    users = _user_exits(exits)
    host = f"{provenance}; {clock_name(clock, provenance)}"

    def block(at: NDArray[np.int64]) -> dict[str, Any]:
        part = exits.take(at)
        user = [users[n] or None for n in part.user_exit.tolist()]
        return {
            "time_ns": part.time_ns,
            "vcpu": part.vcpu,
            "reason": _words_of(arrow, part.reason, exits.names),
            "rip": part.rip,
            **{name: _nullable(arrow, getattr(part, name)) for name in _TIMES},
            "user_exit": arrow.array(user, arrow.string()),
            "isa": arrow.array([_isa(n) or None for n in part.isa.tolist()], arrow.string()),
            "number": part.number,
            **{name: getattr(part, name) for name in _NUMBERS},
            "words": arrow.array([words(int(row)) for row in at], arrow.string()),
            "host": _words_of(arrow, np.zeros(len(part), np.uint16), (host,)),
        }

    _write_blocks(target, arrow, parquet, len(exits), block, _metadata(provenance, clock, labels))


def write_events_parquet(
    path: str | os.PathLike[str], columns: EventColumns, provenance: Provenance, *, clock: str = "mono"
) -> None:
    """Writes the events of one kind as Parquet: time_ns, cpu, tid, vcpu and the event's own fields.

    Args:
        path: the file; one that is there is replaced.
        columns: the events.
        provenance: the host, for the metadata.
        clock: of the times.

    Raises:
        MisuseError: no path.
        UnsupportedError: the package pyarrow is not installed.
        OSError: it cannot be written.
    """
    target = checked_path(path)
    arrow, parquet = _arrow()
    located = {f.name for f in columns.format.own_fields if f.located}
    names = _names(columns)
    plain = {name for name in names if name in columns.fields and name not in located and _is_number(columns[name])}

    def block(at: NDArray[np.int64]) -> dict[str, Any]:
        part = columns.take(at)
        found: dict[str, Any] = {name: getattr(part, name) for name in ("time_ns", "cpu", "tid", "vcpu")}
        told = [values for _, values in _rows(part)] if len(plain) < len(names) else []
        for name in names:
            is_plain = name in plain
            found[name] = (
                np.ascontiguousarray(part[name]) if is_plain else arrow.array([_cell(one[name]) for one in told])
            )
        return found

    _write_blocks(target, arrow, parquet, len(columns), block, _metadata(provenance, clock, ()))


def _arrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UnsupportedError(
            f"Parquet needs the package pyarrow ({error}): pip install 'kvmbench[parquet]'; CSV needs none"
        ) from None


def _write_blocks(
    path: Path,
    arrow: Any,
    parquet: Any,
    count: int,
    block: Callable[[NDArray[np.int64]], dict[str, Any]],
    metadata: dict[str, str],
) -> None:
    size = _BLOCK * 8
    first = arrow.table(block(np.arange(min(size, count))))
    schema = first.schema.with_metadata(metadata)
    with replacing(path) as file, parquet.ParquetWriter(file, schema) as out:
        out.write_table(first.replace_schema_metadata(metadata))
        for start in range(size, count, size):
            table = arrow.table(block(np.arange(start, min(start + size, count))))
            out.write_table(table.replace_schema_metadata(metadata).cast(schema))


def _metadata(provenance: Provenance, clock: str, labels: Sequence[str]) -> dict[str, str]:
    return {
        "kvmbench.provenance": provenance.to_json(),
        "kvmbench.clock": clock_name(clock, provenance),
        "kvmbench.vcpus": "\n".join(labels),
    }


def _words_of(arrow: Any, places: NDArray[np.uint16], names: Sequence[str]) -> Any:
    # The same dictionary in each block, whichever of its words occur in it.
    return arrow.DictionaryArray.from_arrays(arrow.array(places.astype(np.int32)), arrow.array(names, arrow.string()))


def _nullable(arrow: Any, times: NDArray[np.int64]) -> Any:
    return arrow.array(times, mask=times == NOT_TOLD)


def _told(times: NDArray[np.int64]) -> list[Any]:
    return ["" if time == NOT_TOLD else time for time in times.tolist()]


def _user_exits(exits: ExitTable) -> dict[int, str]:
    return {n: "" if n == NO_USER_EXIT else exit_name(n) for n in np.unique(exits.user_exit).tolist()}


def _isa(number: int) -> str:
    return _ISAS[number] if number < len(_ISAS) else str(number)


def _names(columns: EventColumns) -> list[str]:
    # As the rows have them, which is known of the first.
    return list(next((values for _, values in _rows(columns)), dict.fromkeys(columns.fields)))


def _rows(columns: EventColumns) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    # All of them, also those that a timeline shows as slices.
    for moment, tid in zip(moments_of(columns, whole=True), columns.tid.tolist(), strict=True):
        yield (moment.time_ns, moment.cpu, tid, moment.vcpu), moment.values


def _is_number(column: NDArray[Any]) -> bool:
    return column.ndim == 1 and column.dtype.kind in "iu"


def _cell(value: Any) -> Any:
    return value.hex() if isinstance(value, bytes) else value
