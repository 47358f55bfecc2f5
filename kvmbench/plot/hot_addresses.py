"""Which instructions a recording ran most."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer

from kvmbench.arguments import integer, spelled_out
from kvmbench.debug.record import StepRecord
from kvmbench.errors import MisuseError
from kvmbench.plot import look
from kvmbench.plot.figure import note_source

# Longer instructions would push the bars off the page.
_MOST_LETTERS = 32


@spelled_out
def hot_addresses(rec: StepRecord, *, count: int = 16, by: str = "address", ax: Axes | None = None) -> BarContainer:
    """Draws how often the most frequent instructions, or symbols, ran.

    Args:
        rec: the recording.
        count: how many bars at most.
        by: ``address`` for a bar an instruction, ``symbol`` for a bar a symbol.
        ax: where to draw, or None for a new figure.

    Returns:
        The bars, the most frequent first.

    Raises:
        MisuseError: the recording has no steps, `count` is below 1, or another `by`.
    """
    look.check_drawable(rec, ax)
    count = integer(count, "count")
    if count < 1:
        raise MisuseError(f"count = {count}: draw at least one bar")
    if by == "address":
        labels, values = _addresses(rec, count)
    elif by == "symbol":
        labels, values = _symbols(rec, count)
    else:
        raise MisuseError(f"by = {by!r}: give 'address' or 'symbol'")
    if ax is None:
        ax = look.new_axes(height_inches=1.1 + 0.21 * len(values))[0]
    rows = range(len(values))
    bars = ax.barh(rows, values, height=0.72, color=look.COLOURS[0])
    ax.set_yticks(list(rows), labels)
    ax.invert_yaxis()
    for row, value in zip(rows, values, strict=True):
        share = f"{value / len(rec):.1%}" if value >= 0.0005 * len(rec) else "<0.1%"
        ax.annotate(
            f"{value:,} ({share})",
            (value, row),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    # Room for the figures behind the longest bar.
    ax.set_xlim(0, max(values) * 1.22)
    what = "instructions" if by == "address" else "symbols"
    look.dress(ax, xlabel=f"times run, of {len(rec):,} steps", title=f"Most frequent {what}", grid="x")
    look.count_axis(ax)
    look.monospace(ax.get_yticklabels())
    note_source(ax, rec.provenance)
    return bars


def _addresses(rec: StepRecord, count: int) -> tuple[list[str], list[int]]:
    addresses, first_run, counts = np.unique(rec.executed_rip, return_index=True, return_counts=True)
    # Stable: equal counts stay in the order of addresses.
    order = np.argsort(-counts, kind="stable")[:count]
    cells = [_cells(rec, int(addresses[i]), int(first_run[i])) for i in order]
    # Addresses, names and instructions each in a column of their own.
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    labels = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return labels, [int(counts[i]) for i in order]


def _cells(rec: StepRecord, address: int, step: int) -> tuple[str, str, str]:
    instruction = rec.instruction(step, read=False)
    text = "" if instruction is None else instruction.text
    short = text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"
    return f"{address:#x}", rec.symbols.label(address + rec.code_base), short


def _symbols(rec: StepRecord, count: int) -> tuple[list[str], list[int]]:
    addresses, counts = np.unique(rec.executed_rip, return_counts=True)
    totals: dict[str, int] = {}
    for address, times in zip(addresses.tolist(), counts.tolist(), strict=True):
        found = rec.symbols.nearest(address + rec.code_base)
        name = found[0] if found is not None else f"{address:#x}"
        totals[name] = totals.get(name, 0) + times
    hottest = sorted(totals.items(), key=lambda item: -item[1])[:count]
    return [name for name, _ in hottest], [times for _, times in hottest]
