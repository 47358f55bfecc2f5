"""Files of what a panel shows: CSV for the data, text, SVG and PNG for the picture, each with its provenance."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance

TYPES = {"csv": "text/csv", "txt": "text/plain", "svg": "image/svg+xml", "png": "image/png"}
# On white paper; each differs from the others in lightness too.
_COLOURS = {"": "#1a1a1a", "dim": "#6b6b6b", "name": "#1d4ed8", "changed": "#b45309", "bad": "#b00020"}
_POINTS, _LINE, _CHARACTER = 8.0, 11.0, 4.82  # font size, line pitch and advance in points (DejaVu Sans Mono: 0.602 em)


class Span(NamedTuple):
    """A piece of text and how it looks: "", "dim", "name", "changed", "bad" or "here"."""

    text: str
    style: str = ""


Line = list[Span]


class Table(NamedTuple):
    """Column names and rows of what is shown."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def make(
    kind: str,
    *,
    title: str,
    figure: Callable[[], Any],
    table: Callable[[], Table],
    text: Callable[[], str],
    where: Provenance,
) -> bytes:
    """The file's bytes.

    Raises:
        MisuseError: `kind` is not "csv", "txt", "svg" or "png".
    """
    if not isinstance(kind, str):
        raise MisuseError(f"a format is a word such as 'csv', not {kind!r}")
    if kind == "csv":
        return as_csv(table(), where, title)
    if kind == "txt":
        return f"{text()}\n\n{where.to_json()}\n".encode()
    if kind in ("svg", "png"):
        return as_picture(kind, figure(), where)
    raise MisuseError(f"cannot save {kind!r}; give a file name that ends in .csv, .txt, .svg or .png")


def as_csv(table: Table, where: Provenance, title: str) -> bytes:
    """Comment lines with the provenance, a line of column names, the rows."""
    out = io.StringIO()
    out.write(f"# kvmbench {title}\n# {where}\n# {where.to_json()}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return out.getvalue().encode()


def as_picture(kind: str, figure: Any, where: Provenance) -> bytes:
    """A figure as SVG or PNG, the provenance below it and in its metadata."""
    from kvmbench.plot.figure import save  # loads matplotlib, which takes half a second

    with tempfile.TemporaryDirectory() as folder:
        return save(figure, Path(folder) / f"panel.{kind}", provenance=where)[0].read_bytes()


def figure_of_text(lines: list[Line], title: str) -> Any:
    """Styled text as a figure, dark on white, for print."""
    from matplotlib.figure import Figure

    lines = [[Span(title, "title")], *lines]
    columns = max(sum(len(span.text) for span in line) for line in lines)
    width, height = columns * _CHARACTER + 16, len(lines) * _LINE + 16
    figure = Figure(figsize=(width / 72, height / 72))
    for number, line in enumerate(lines):
        column = 0
        for span in line:
            if span.text.strip():
                figure.text(
                    (8 + column * _CHARACTER) / width,
                    1 - (8 + (number + 0.8) * _LINE) / height,
                    span.text,
                    color=_COLOURS.get(span.style, _COLOURS[""]),
                    weight="bold" if span.style in ("title", "changed", "here") else "normal",
                    family="DejaVu Sans Mono",
                    fontsize=_POINTS,
                    parse_math=False,
                )
            column += len(span.text)
    return figure
