"""Exits over time as a heat map: how long they took, or which there were."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kvmbench.arguments import integer, spelled_out
from kvmbench.errors import MisuseError
from kvmbench.plot import look
from kvmbench.plot.exit_latency import PART_WORDS, groups, latencies
from kvmbench.plot.exit_source import (
    ExitSource,
    Window,
    chosen,
    head,
    no_exits,
    open_window,
    say_nothing_to_draw,
    shade_gaps,
    time_axis,
)
from kvmbench.plot.time_axis import log_edges, log_limits, log_time_axis
from kvmbench.traces.exits import ExitTable

# Dark is many, in colour as in grey; a single exit is far enough from white, which is none.
_COLOURS = LinearSegmentedColormap.from_list("exits", ("#9fcbea", "#4a98cc", "#0072B2", "#003a5d", "#000d18"))
_COLUMNS = 200
_ROWS = ("latency", "reason", "vcpu", "user_exit")


@spelled_out
def exit_heat_map(
    source: ExitSource | ExitTable,
    *,
    rows: str = "latency",
    part: str = "span",
    reason: str | None = None,
    most: int = 12,
    columns: int = _COLUMNS,
    start_ns: int | None = None,
    end_ns: int | None = None,
    ax: Axes | None = None,
) -> list[Artist]:
    """Draws how many exits there were in each stretch of time, by how long they took or by kind.

    Args:
        source: a trace or its exits.
        rows: ``latency`` shows how long exits took, on a logarithmic axis; ``reason``, ``vcpu`` and ``user_exit``
            have a row for each.
        part: which time ``latency`` is, as for `exit_latency`.
        reason: only exits of this reason; None: all.
        most: rows of the other kinds at most; the least frequent are one.
        columns: stretches of time.
        start_ns: of the window, by the trace's clock as in ``t.exits.time_ns``; None: from the beginning.
        end_ns: its end, not included; None: to the last exit.
        ax: where to draw, or None for a new figure.

    Returns:
        The map and its scale, and what is drawn for gaps; if there is nothing to draw, the words that say so.

    Raises:
        MisuseError: no trace, other `rows` or `part`, a `reason` that no exit has, an empty window.
    """
    rows = chosen(rows, "rows", _ROWS)
    part = chosen(part, "part", tuple(PART_WORDS))
    most, columns = integer(most, "most", 1, 60), integer(columns, "columns", 2, 2000)
    window = open_window(source, "exit_heat_map", ax, start_ns=start_ns, end_ns=end_ns)
    title = "Exits over time" if reason is None else f"Exits for {reason} over time"
    if reason is not None:
        window = _only(window, reason)
    words: list[str] = []
    if rows == "latency":
        times, kept, words = latencies(window, part)
        shown = window.exits.time_ns[kept]
        edges = log_edges(times) if len(times) else np.ones(2)
        values: npt.NDArray[np.float64] = times.astype(np.float64)
        names: list[str] = []
    else:
        place, names = groups(source, window.exits, rows, most)
        shown, values = window.exits.time_ns, place.astype(np.float64)
        edges = np.arange(len(names) + 1, dtype=np.float64) - 0.5
    if ax is None:
        ax = look.new_axes(height_inches=3.4 if rows == "latency" else 1.3 + 0.26 * max(1, len(names)))[0]
    head(ax, window, title, *words)
    if not len(shown):
        return say_nothing_to_draw(ax, no_exits(window) if not len(window.exits) else f"no times {PART_WORDS[part]}")
    across = np.linspace(window.start_ns, window.end_ns, columns + 1) - window.zero_ns
    counts = _count(shown - window.zero_ns, values, across, edges)
    cells = ax.pcolormesh(
        across,
        edges,
        np.ma.masked_equal(counts, 0),
        cmap=_COLOURS,
        norm=LogNorm(1, max(10, int(counts.max()))),
        rasterized=True,
    )
    bar = ax.figure.colorbar(cells, ax=ax, pad=0.01, fraction=0.05, aspect=30)
    bar.ax.yaxis.set_major_locator(LogLocator(10))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    bar.ax.tick_params(labelsize=7, length=2)
    bar.set_label("exits a cell", fontsize=8)
    bar.outline.set_visible(False)
    drawn: list[Artist] = [cells, bar.ax]
    if rows == "latency":
        ax.set_yscale("log")
        ax.set_ylim(log_limits(edges[0], edges[-1]))
        log_time_axis(ax.yaxis)
        look.dress(ax, ylabel=f"time {PART_WORDS[part]}\n(logarithmic{window.clock_words})", grid="y")
    else:
        of_row = counts.sum(axis=1).astype(np.int64)
        ax.set_yticks(range(len(names)), [f"{name}  ({n:,})" for name, n in zip(names, of_row, strict=True)])
        ax.set_ylim(len(names) - 0.5, -0.5)
    drawn += shade_gaps(ax, window)
    time_axis(ax, window)
    return drawn


def _only(window: Window, reason: str) -> Window:
    exits = window.exits
    if reason not in exits.names:
        raise MisuseError(f"reason={reason!r}: the exits have {', '.join(exits.names) or 'none'}")
    kept = exits.take(np.flatnonzero(exits.reason == exits.names.index(reason)))
    return replace(window, exits=kept)


def _count(
    times: npt.NDArray[np.int64],
    values: npt.NDArray[np.float64],
    across: npt.NDArray[np.float64],
    edges: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    # Exits a cell, shape (rows, columns). Columns are equally wide, so these need no search, as np.histogram2d does.
    columns, rows = len(across) - 1, len(edges) - 1
    column = ((times - across[0]) * (columns / (across[-1] - across[0]))).astype(np.int64)
    row = np.searchsorted(edges, values, side="right") - 1
    cell = np.clip(row, 0, rows - 1) * columns + np.clip(column, 0, columns - 1)
    return np.asarray(np.bincount(cell, minlength=rows * columns).reshape(rows, columns))
