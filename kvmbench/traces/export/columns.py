"""Exits as CSV and Parquet; the events of one kind are a pandas frame, which writes itself.

CSV is for reading with anything: addresses are in hex, a time that nothing tells is an empty cell, and a column names
the host, so that tables of several hosts can be put together. Parquet keeps the types, and what is known of the host
in its metadata.
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.debug.step_rows import exit_name
from kvmbench.errors import UnsupportedError
from kvmbench.host.cache import replacing
from kvmbench.traces.exits import NO_USER_EXIT, NOT_TOLD, ExitTable
from kvmbench.traces.export.timeline import Words, clock_name, text_file, vcpu_name

if TYPE_CHECKING:
    from kvmbench.traces.trace import Trace

_BLOCK = 1 << 14
_TIMES = ("guest_ns", "kvm_ns", "user_ns", "outside_ns")
_NUMBERS = ("info1", "info2", "intr_info", "error_code")
_ISAS = ("", "VMX", "SVM")
#: Columns of the table of exits.
EXIT_COLUMNS = ("time_ns", "vcpu", "reason", "rip", *_TIMES, "user_exit", "isa", "number", *_NUMBERS, "words", "host")


def write_csv(path: Path, trace: Trace) -> None:
    """Writes exits as CSV, the columns `EXIT_COLUMNS`.

    ``pandas.read_csv(path)`` reads it; ``.rip.map(lambda text: int(text, 16))`` makes numbers of addresses.

    Args:
        path: the file; one that is there is replaced.
        trace: one that does not run.

    Raises:
        OSError: it cannot be written.
    """
    exits, labels, host = trace.exits, trace.data.labels, _host(trace)
    words = Words(exits)
    names, users = exits.names, _user_exits(exits)
    with text_file(path) as file:
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


def write_parquet(path: Path, trace: Trace) -> None:
    """Writes exits as Parquet: the columns `EXIT_COLUMNS`, numbers as numbers, and null for a time nothing tells.

    Args:
        path: the file; one that is there is replaced.
        trace: one that does not run.

    Raises:
        UnsupportedError: the package pyarrow is not installed.
        OSError: it cannot be written.
    """
    arrow, parquet = _arrow()
    exits, host = trace.exits, _host(trace)
    words = Words(exits)
    users = _user_exits(exits)

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

    _write_blocks(path, arrow, parquet, len(exits), block, _metadata(trace))


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


def _host(trace: Trace) -> str:
    return f"{trace.provenance}; {clock_name(trace.data.clock, trace.provenance)}"


def _metadata(trace: Trace) -> dict[str, str]:
    return {
        "kvmbench.provenance": trace.provenance.to_json(),
        "kvmbench.clock": clock_name(trace.data.clock, trace.provenance),
        "kvmbench.vcpus": "\n".join(trace.data.labels),
        "kvmbench.notes": "\n".join(trace.notes),
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
