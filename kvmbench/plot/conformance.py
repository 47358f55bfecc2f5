"""How much of guest debug holds on each host: points or families of them by hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from kvmbench.arguments import spelled_out
from kvmbench.conformance import Answer, Matrix, Report, Result
from kvmbench.errors import MisuseError
from kvmbench.plot import look
from kvmbench.plot.figure import note_source

# More rows than these are drawn by family: `kvm.write`, `kvmbench.step`.
_MOST_ROWS = 40
_UNEXPLAINED = "differs, unexplained"
# What is drawn, its colour and its hatching: told apart in grey print too.
_KINDS: dict[str, tuple[str, str]] = {
    str(Answer.HOLDS): (look.COLOURS[0], ""),
    str(Answer.DIFFERS): (look.COLOURS[4], "////"),
    _UNEXPLAINED: (look.COLOURS[1], "xxxx"),
    str(Answer.CANNOT): ("#bbbbbb", "...."),
}
_BAR = 0.9


@spelled_out
def conformance(source: Report | Matrix | Mapping[str, Report], *, ax: Axes | None = None) -> list[Artist]:
    """Draws which points hold: a row a point or family, a column a host, bars of what holds, differs or cannot.

    Args:
        source: what `kvmbench.conformance.run` or `survey` returned, or column to report.
        ax: where to draw, or None for a new figure.

    Returns:
        The bars, row by row, and the legend's handles.

    Raises:
        MisuseError: something else was given, or no report has a result.
    """
    reports = _reports(source)
    rows = _rows(reports)
    if ax is None:
        ax = look.new_axes(height_inches=1.2 + 0.21 * len(rows))[0]
    drawn: list[Artist] = []
    for column, label in enumerate(reports):
        for row, answers in enumerate(rows.values()):
            drawn += _cell(ax, column, row, answers.get(label, ()))
    ax.set_xticks([column + _BAR / 2 for column in range(len(reports))], list(reports))
    ax.set_yticks(range(len(rows)), list(rows))
    look.monospace(ax.get_yticklabels())
    ax.set_xlim(-0.05, len(reports))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    look.dress(ax, title="Guest debug held against the manuals\n", xlabel="host (2/3: two points of three hold)")
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=kind)
        for kind, (colour, hatch) in _KINDS.items()
        if kind != _UNEXPLAINED or any(report.unexplained for report in reports.values())
    ]
    # Below the title, which is as long as the figure is wide when there are few columns.
    ax.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=7, frameon=False)
    for report in reports.values():
        note_source(ax, report.provenance)
    return [*drawn, *handles]


def _reports(source: object) -> dict[str, Report]:
    if isinstance(source, Report):
        shown = source.provenance
        named = " ".join([shown.module or shown.kind, *(f"{key}={value}" for key, value in shown.parameters.items())])
        found = {named: source}
    elif isinstance(source, Matrix):
        found = dict(source.reports)
    elif isinstance(source, Mapping) and all(isinstance(report, Report) for report in source.values()):
        found = {str(label): report for label, report in source.items()}
    else:
        raise MisuseError(f"conformance() draws what conformance.run() or survey() returned, not {source!r}")
    if not any(report.results for report in found.values()):
        raise MisuseError("no host has answered a point: there is nothing to draw")
    return found


def _rows(reports: Mapping[str, Report]) -> dict[str, dict[str, list[Result]]]:
    """Row to column to results; rows are points, or their families where there are many."""
    points = dict.fromkeys(result.point.name for report in reports.values() for result in report.results)
    by_family = len(points) > _MOST_ROWS
    rows: dict[str, dict[str, list[Result]]] = {}
    for label, report in reports.items():
        for result in report.results:
            name = result.point.name
            row = ".".join(name.split(".")[:2]) if by_family else name
            rows.setdefault(row, {}).setdefault(label, []).append(result)
    return rows


def _cell(ax: Axes, column: int, row: int, results: Sequence[Result]) -> list[Artist]:
    """One stacked bar, and how many hold."""
    kinds = [_UNEXPLAINED if result.unexplained else str(result.answer) for result in results]
    names, counts = np.unique(kinds, return_counts=True) if kinds else ((), ())
    count = dict(zip(names, counts, strict=True))
    drawn: list[Artist] = []
    left = float(column)
    for kind, (colour, hatch) in _KINDS.items():
        if not count.get(kind):
            continue
        width = _BAR * count[kind] / len(results)
        drawn += ax.barh(row, width, left=left, height=0.72, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        left += width
    if len(results) > 1:
        text = f"{count.get(str(Answer.HOLDS), 0)}/{len(results)}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        at = (column + _BAR / 2, row)
        drawn.append(ax.annotate(text, at, ha="center", va="center", fontsize=6.5, color="black", bbox=box))
    return drawn
