"""Where a recording ran: the instruction pointer over the steps."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from kvmbench.arguments import spelled_out
from kvmbench.debug.record import StepRecord
from kvmbench.debug.step_rows import EXIT_DEBUG, distinct, exit_name
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError
from kvmbench.plot import look
from kvmbench.plot.figure import note_source

# Up to this many steps each is drawn as itself; beyond, steps share columns.
_MOST_STEPS = 4000
_COLUMNS = 1200
# Exits marked one by one, and bands that still get a name.
_MOST_MARKS = 48
_MOST_NAMES = 24


@spelled_out
def control_flow(rec: StepRecord, *, symbols: Symbols | None = None, ax: Axes | None = None) -> list[Artist]:
    """Draws which instruction each step ran, with a band for every symbol.

    Only instructions that ran have a place on the vertical axis, in the order
    of their addresses, so code far apart lies close together and a loop of
    three instructions is as plain as one of three hundred. Exits other than
    plain steps are marked.

    Args:
        rec: the recording.
        symbols: names for the bands; the recording's own unless told.
        ax: where to draw, or None for a new figure.

    Returns:
        The path, then the marks of each exit kind.

    Raises:
        MisuseError: the recording has no steps.
    """
    look.check_drawable(rec, ax)
    if symbols is not None and not isinstance(symbols, Symbols):
        raise MisuseError(f"symbols={symbols!r}: give a Symbols, such as m.symbols")
    names = symbols if symbols is not None else rec.symbols
    addresses, place = distinct(rec.executed_rip)
    if ax is None:
        height = min(5.5, 1.6 + 0.12 * len(addresses))
        ax = look.new_axes(height_inches=max(2.6, height))[0]
    steps = np.arange(len(rec)) + rec.first_step
    drawn: list[Artist] = [_path(ax, steps, place)]
    drawn += _exits(ax, rec, steps, place)
    _bands(ax, addresses, names, rec.code_base)
    look.dress(ax, xlabel="step", ylabel="instruction (by address)", title="Control flow")
    look.count_axis(ax)
    ax.set_ylim(-0.8, len(addresses) - 0.2)
    ax.margins(x=0.01)
    note_source(ax, rec.provenance)
    return drawn


def _path(ax: Axes, steps: npt.NDArray[np.intp], place: npt.NDArray[np.intp]) -> Artist:
    if len(steps) <= _MOST_STEPS:
        dots = 3.2 if len(steps) <= 300 else 1.6
        (line,) = ax.plot(
            steps, place, color=look.COLOURS[0], linewidth=0.6, marker="o", markersize=dots, markeredgewidth=0
        )
        return line
    # Many steps share a column; columns next to each other in which an instruction ran become one bar.
    column = (np.arange(len(steps)) * _COLUMNS) // len(steps)
    rows, most = int(place.max()) + 1, _COLUMNS + 1
    cells = np.unique(place * most + column)
    breaks = np.flatnonzero(np.diff(cells) != 1)
    first, last = cells[np.concatenate([[0], breaks + 1])], cells[np.concatenate([breaks, [len(cells) - 1]])]
    width = len(steps) / _COLUMNS
    return ax.hlines(
        first // most,
        steps[0] + first % most * width,
        steps[0] + (last % most + 1) * width,
        color=look.COLOURS[0],
        linewidth=max(0.8, min(3.0, 150 / rows)),
        # An instruction that ran once in a hundred thousand steps must not vanish.
        capstyle="projecting",
    )


def _exits(ax: Axes, rec: StepRecord, steps: npt.NDArray[np.intp], place: npt.NDArray[np.intp]) -> list[Artist]:
    kinds = [int(kind) for kind in np.unique(rec.exit) if int(kind) != EXIT_DEBUG]
    marks: list[Artist] = []
    for number, kind in enumerate(kinds):
        at = np.flatnonzero(rec.exit == kind)
        shown = at[:: -(-len(at) // _MOST_MARKS)]
        marks.append(
            ax.scatter(
                steps[shown],
                place[shown],
                marker="^vsDPX"[number % 6],
                s=26,
                facecolor="white",
                edgecolor=look.COLOURS[1 + number % 6],
                linewidth=1.1,
                zorder=3,
                label=f"exit {exit_name(kind)} ({_counted(len(at), len(shown))})",
            )
        )
    if marks:
        ax.legend(
            frameon=False,
            fontsize=8,
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=4,
            borderaxespad=0.2,
        )
    return marks


def _counted(count: int, shown: int) -> str:
    return f"{count:,}" if shown == count else f"{shown} of {count:,} marked"


def _bands(ax: Axes, addresses: npt.NDArray[np.uint64], symbols: Symbols, code_base: int) -> None:
    # Runs of neighbouring instructions with the same symbol; without symbols, neighbours in memory.
    starts: list[tuple[int, str]] = []
    previous: tuple[str | None, int] = (None, -1)
    for row, address in enumerate(addresses.tolist()):
        found = symbols.nearest(address + code_base)
        name = found[0] if found is not None else ""
        if row == 0 or name != previous[0] or (not name and address - previous[1] > 64):
            starts.append((row, f"{address:#x} {name}".rstrip()))
        previous = (name, address)
    for index, (row, _) in enumerate(starts):
        end = starts[index + 1][0] if index + 1 < len(starts) else len(addresses)
        if index % 2 == 0:
            ax.axhspan(row - 0.5, end - 0.5, color="#eef2f6", linewidth=0, zorder=0)
    # Too many names would overprint each other: leave out those that come too soon after the last one.
    least = len(addresses) / _MOST_NAMES
    kept: list[tuple[int, str]] = []
    for row, label in starts:
        if not kept or row - kept[-1][0] >= least:
            kept.append((row, label))
    ax.set_yticks([row for row, _ in kept], [label for _, label in kept])
    look.monospace(ax.get_yticklabels())
