"""Runs one notebook without a browser and keeps what it made (runs in `.venv`).

Usage: ``python notebook_run.py NOTEBOOK FOLDER``. FOLDER gets the executed
notebook, and what the notebook saves: its figures as PNG and SVG (it asks
``$KVMBENCH_OUT`` where to). Prints each section with its time.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets.config import Config

CELL_TIMEOUT_S = 300


def run(notebook: Path, folder: Path, *, sockets: Path) -> int:
    """Executes `notebook`; returns 0, or 1 when a cell failed.

    Args:
        notebook: the file to run.
        folder: where its products go; it exists.
        sockets: a private, empty folder for the kernel's sockets.

    The executed notebook is written in either case, so that a failure can be read in its place.
    """
    book = nbformat.read(notebook, as_version=4)
    os.environ["KVMBENCH_OUT"] = str(folder)  # the kernel inherits it
    since = time.time()
    # Unix sockets instead of TCP ports: no other user of this machine can listen to the kernel.
    # Their path is short because the name of such a socket has room for 107 bytes.
    config = Config({"KernelManager": {"transport": "ipc", "ip": str(sockets / "kernel")}})
    client = NotebookClient(
        book,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        record_timing=True,
        resources={"metadata": {"path": str(folder)}},
        config=config,
    )
    print(f"Running {notebook.name}", flush=True)
    start = time.monotonic()
    failure = ""
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        failure = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # colours are for the notebook
    seconds = time.monotonic() - start
    executed = folder / notebook.name
    nbformat.write(book, executed)
    for line in _hosts(book):
        print(f"  {line}")
    for heading, taken in _sections(book):
        print(f"  {heading:<64}{taken:6.1f} s")
    if failure:
        print(f"\nA cell failed after {seconds:.1f} s; {executed} shows where:\n\n{failure}")
        return 1
    print(f"Done in {seconds:.1f} s. Made:")
    # File systems keep times in steps; what was there before is a run older than that.
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_mtime > since - 1):
        print(f"  {path}  ({path.stat().st_size / 1024:.0f} kB)")
    return 0


def _hosts(book: Any) -> list[str]:
    # The hosts the notebook used: what `connect()` said of one, or how a `Host` shows itself.
    found: list[str] = []
    for cell in book.cells:
        for output in cell.get("outputs", []):
            text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
            found += re.findall(r"^(?:<Host )?((?:local|appliance|ssh): [^\n>]*)", text, flags=re.MULTILINE)
    return list(dict.fromkeys(found))


def _sections(book: Any) -> Iterator[tuple[str, float]]:
    # Each heading with the time its cells took, in the order of the notebook.
    heading, taken, ran = "", 0.0, False
    for cell in book.cells:
        if cell.cell_type == "markdown":
            titles = [line for line in cell.source.splitlines() if line.startswith("#")]
            if titles:
                if ran:
                    yield heading, taken
                heading, taken, ran = titles[-1].lstrip("# ").strip(), 0.0, False
        elif cell.cell_type == "code":
            times = cell.metadata.get("execution", {})
            begin, end = times.get("iopub.execute_input"), times.get("shell.execute_reply")
            if begin and end:
                taken += (_moment(end) - _moment(begin)).total_seconds()
                ran = True
    if ran:
        yield heading, taken


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


if __name__ == "__main__":
    if not Path(sys.argv[1]).is_file():
        sys.exit(f"there is no notebook {sys.argv[1]}")
    with tempfile.TemporaryDirectory(prefix="kvmbench-") as private:
        status = run(Path(sys.argv[1]), Path(sys.argv[2]), sockets=Path(private))
    sys.exit(status)
