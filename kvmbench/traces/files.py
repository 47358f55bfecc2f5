"""Which file a trace is written to and read from: the suffix, or the first bytes, say it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path

from kvmbench.arguments import file_path, spelled_out
from kvmbench.errors import LoadError, MisuseError
from kvmbench.traces.trace import Trace
from kvmbench.traces.trace_file import load_trace, save_trace

#: What `Trace.save` writes, by suffix.
WRITTEN = {
    ".npz": "everything, to open again with kb.open_trace",
    ".perfetto-trace": "Perfetto's viewer",
    ".pftrace": "Perfetto's viewer",
    ".json": "Chrome's trace format",
    ".csv": "the exits, a line each",
    ".parquet": "the exits, for data tools",
}
_PROBE_BYTES = 512
_TRACE_CMD = b"\x17\x08\x44tracing"


def save_as(trace: Trace, path: Path, *, runs: bool = False) -> Path:
    """Writes a trace in the format that the suffix names, with a note if it still `runs`; see `Trace.save`."""
    suffix = path.suffix.lower()
    if suffix not in WRITTEN:
        known = ", ".join(f"{name} ({what})" for name, what in WRITTEN.items())
        raise MisuseError(f"{path.name!r}: a trace is saved as one of {known}")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"there is no directory {str(path.parent)!r} to save it in, make that first", str(path)
        )
    if runs:
        note = "saved while the trace ran: what came later is not in it"
        trace = Trace(replace(trace.data, notes=(*trace.data.notes, note)))
    if suffix == ".npz":
        return save_trace(trace.data, path)
    from kvmbench.traces import export

    writers: dict[str, Callable[[Path, Trace], None]] = {
        ".perfetto-trace": export.write_perfetto,
        ".pftrace": export.write_perfetto,
        ".json": export.write_chrome,
        ".csv": export.write_csv,
        ".parquet": export.write_parquet,
    }
    writers[suffix](path, trace)
    return path


@spelled_out
def open_trace(path: str | PathLike[str]) -> Trace:
    """Opens a trace: one that `Trace.save` wrote as ``.npz``, trace-cmd's ``trace.dat``, or text of ``perf script``.

    The text of ``trace-cmd report`` and ftrace's own file ``trace`` are read like that of perf.

    Raises:
        LoadError: none of these, or damaged; what it was taken for is said.
        OSError: it cannot be opened.
    """
    source = file_path(path, "trace.npz")
    try:
        return _opened(source)
    except LoadError as error:
        suffix = source.suffix.lower()
        if suffix not in WRITTEN or suffix == ".npz":
            raise
        raise LoadError(f"{error}; {suffix} is for {WRITTEN[suffix]}: open what was saved as .npz") from None


def _opened(source: Path) -> Trace:
    with source.open("rb") as file:
        head = file.read(_PROBE_BYTES)
    if head.startswith(b"PK"):
        return Trace(load_trace(source))
    if head.startswith(_TRACE_CMD):
        from kvmbench.traces.imports.trace_dat import read_trace_dat

        return Trace(read_trace_dat(source).trace_data())
    if head.startswith(b"PERFILE2"):
        raise LoadError(f"{source}: perf's own file: write it as text with `perf script -i {source.name} > trace.txt`")
    if b"\0" in head:
        raise LoadError(f"{source}: neither a trace of kvmbench's nor trace-cmd's nor text; it begins {head[:8]!r}")
    from kvmbench.traces.imports.perf_script import read_perf_script

    return Trace(read_perf_script(source).trace_data())
