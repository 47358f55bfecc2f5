"""Register values over the steps of a recording."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from kvmbench.arguments import spelled_out
from kvmbench.debug.record import StepRecord
from kvmbench.debug.register_table import GENERAL, INTEGER
from kvmbench.errors import MisuseError
from kvmbench.plot import look
from kvmbench.plot.figure import figure_of, note_source

# Points drawn for one register. More would fall on the same pixels: a page is about 2,000 dots wide.
_MOST_POINTS = 8000
# Registers drawn when none are named.
_MOST_ROWS = 6


@spelled_out
def registers(
    rec: StepRecord, *, names: Sequence[str] | None = None, ax: Axes | Sequence[Axes] | None = None
) -> list[Line2D]:
    """Draws the values registers had after each step.

    Long recordings are thinned to the lowest and highest value of each short
    run of steps, so nothing that stands out is lost.

    Args:
        rec: the recording.
        names: registers, as in ``rec.rax``; unless told, the general registers that changed, at most the six
            that changed most often.
        ax: one Axes for all registers on one scale, or one Axes a register; None makes small multiples, each
            with its own scale.

    Returns:
        One line a register, in the order of `names`.

    Raises:
        MisuseError: an unknown register, an empty recording, or as many Axes as registers do not match.
    """
    look.check_drawable(rec, *(ax if isinstance(ax, Iterable) else [ax]))
    chosen = list(names) if names is not None else _busiest(rec)
    for name in chosen:
        if name not in INTEGER:
            raise MisuseError(f"no register {name!r} in a recording; there are {', '.join(INTEGER)}")
    if not chosen:
        raise MisuseError("names is empty: name at least one register")
    columns = {name: getattr(rec, name) for name in chosen}
    if isinstance(ax, Axes):
        return _together(rec, columns, ax)
    if ax is None:
        axes = look.new_axes(len(chosen), height_inches=0.9 + 0.95 * len(chosen))
    else:
        axes = list(ax)
        if len(axes) != len(chosen):
            raise MisuseError(f"{len(axes)} Axes for {len(chosen)} registers: give one Axes, or one a register")
    lines = []
    for index, (name, one) in enumerate(zip(chosen, axes, strict=True)):
        scale = look.HexScale.of(columns[name])
        lines.append(_line(rec, columns[name], scale, one, name, look.COLOURS[0]))
        scale.apply(one)
        is_last = index == len(chosen) - 1
        look.dress(one, xlabel="step" if is_last else "", grid="y")
        # The name stands level at the line's left: a turned label of three letters is hard to read.
        one.set_ylabel(name, rotation=0, ha="right", va="center", fontweight="bold", fontsize=9)
        look.count_axis(one)
        note_source(one, rec.provenance)
    axes[0].set_title("Registers after each step", loc="left", fontsize=10)
    figure_of(axes[0]).align_ylabels(axes)
    return lines


def _together(rec: StepRecord, columns: dict[str, npt.NDArray[np.uint64]], ax: Axes) -> list[Line2D]:
    scale = look.HexScale.of(*columns.values())
    lines = [
        _line(rec, column, scale, ax, name, look.COLOURS[index % 7], look.DASHES[index % 4])
        for index, (name, column) in enumerate(columns.items())
    ]
    scale.apply(ax)
    look.dress(ax, xlabel="step", ylabel="value", grid="y")
    look.count_axis(ax)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    note_source(ax, rec.provenance)
    return lines


def _line(
    rec: StepRecord,
    column: npt.NDArray[np.uint64],
    scale: look.HexScale,
    ax: Axes,
    name: str,
    colour: str,
    dashes: str = "-",
) -> Line2D:
    at = _thin(column)
    (line,) = ax.plot(
        at + rec.first_step,
        scale.place(column[at]),
        drawstyle="steps-post",
        # A thinned line is mostly up and down: thick, it would be a block.
        linewidth=1.2 if len(at) == len(column) else 0.7,
        color=colour,
        linestyle=dashes,
        label=name,
    )
    # A register that never changes has no range of its own: give it one, off the frame.
    if len(column) and column.min() == column.max():
        here = scale.place_one(int(column[0]))
        ax.set_ylim(here - 8, here + 8)
    return line


def _thin(column: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Indexes to draw: all, or the lowest and highest of each of some equal runs, and both ends."""
    count = len(column)
    if count <= _MOST_POINTS:
        return np.arange(count)
    run = -(-count // (_MOST_POINTS // 2))
    whole = count // run * run
    runs = column[:whole].reshape(-1, run)
    first = np.arange(0, whole, run)
    picked = [first + runs.argmin(axis=1), first + runs.argmax(axis=1)]
    if whole < count:
        rest = column[whole:]
        picked.append(np.array([whole + rest.argmin(), whole + rest.argmax()]))
    return np.unique(np.concatenate([*picked, [0, count - 1]]))


def _busiest(rec: StepRecord) -> list[str]:
    counts = rec.change_counts()
    busy = sorted((name for name in GENERAL if counts[name]), key=lambda name: -counts[name])[:_MOST_ROWS]
    # Back into the table's order, so that figures of different runs compare.
    return [name for name in GENERAL if name in busy] or ["rip"]
