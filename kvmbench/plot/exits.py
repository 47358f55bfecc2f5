"""Which exits happened: how many of each kind, and when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from kvmbench.arguments import spelled_out
from kvmbench.debug.record import StepRecord
from kvmbench.debug.step_rows import EXIT_DEBUG, exit_name
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance
from kvmbench.plot import look
from kvmbench.plot.figure import note_source

# Marks drawn for one kind of exit; more fall on the same pixels.
_MOST_MARKS = 5000


class ExitSeries(Protocol):
    """Exits in time, as a trace has them."""

    @property
    def exit_times_ns(self) -> npt.NDArray[np.int64]:
        """When each exit happened, in nanoseconds, ascending, shape (n,)."""

    @property
    def exit_names(self) -> npt.NDArray[np.str_]:
        """The kind of each, shape (n,)."""

    @property
    def provenance(self) -> Provenance: ...


@spelled_out
def exits(source: StepRecord | ExitSeries | Mapping[str, int], *, ax: Axes | None = None) -> list[Artist]:
    """Draws exits by kind: a timeline of a recording or trace, or bars for bare counts.

    Args:
        source: a recording (over its steps; plain steps, which are DEBUG exits, are left out), a trace (over
            time), or a mapping of kind to count.
        ax: where to draw, or None for a new figure.

    Returns:
        One artist a kind, the most frequent first; if there were no exits, the words that say so.

    Raises:
        MisuseError: something else was given.
    """
    if isinstance(source, Mapping):
        return _counts(source, ax)
    if isinstance(source, StepRecord):
        at = np.flatnonzero(source.exit != EXIT_DEBUG)
        kinds = [exit_name(int(kind)) for kind in source.exit[at]]
        end = source.first_step + len(source)
        return _timeline(at + source.first_step, kinds, "step", (source.first_step, end), source.provenance, ax)
    try:
        times, names, provenance = source.exit_times_ns, source.exit_names, source.provenance
    except AttributeError:
        raise MisuseError(f"exits() draws a StepRecord, a trace or a mapping of counts, not {source!r}") from None
    microseconds = (times - times[0]) / 1e3 if len(times) else times.astype(float)
    unit = f"time since the first exit (us{', emulator time' if provenance.is_emulated else ''})"
    limits = (0.0, float(microseconds[-1]) if len(times) else 1.0)
    return _timeline(microseconds, [str(name) for name in names], unit, limits, provenance, ax)


def _counts(counts: Mapping[str, int], ax: Axes | None) -> list[Artist]:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    if ax is None:
        ax = look.new_axes(height_inches=1.1 + 0.26 * max(1, len(ordered)))[0]
    bars = ax.barh(range(len(ordered)), [count for _, count in ordered], height=0.7, color=look.COLOURS[0])
    ax.set_yticks(range(len(ordered)), [name for name, _ in ordered])
    ax.invert_yaxis()
    for row, (_, count) in enumerate(ordered):
        ax.annotate(f"{count:,}", (count, row), (3, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set_xlim(0, max([1, *counts.values()]) * 1.12)
    look.dress(ax, xlabel="exits", title="Exits by kind", grid="x")
    look.count_axis(ax)
    return list(bars)


def _timeline(
    places: npt.NDArray[np.generic],
    kinds: list[str],
    xlabel: str,
    limits: tuple[float, float],
    provenance: Provenance,
    ax: Axes | None,
) -> list[Artist]:
    names, codes, counts = np.unique(np.array(kinds, dtype=str), return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    if ax is None:
        ax = look.new_axes(height_inches=1.3 + 0.34 * max(1, len(names)))[0]
    drawn: list[Artist] = []
    for row, kind in enumerate(order):
        here = places[codes == kind]
        shown = here[:: -(-len(here) // _MOST_MARKS)]
        drawn.append(ax.vlines(shown, row - 0.34, row + 0.34, color=look.COLOURS[row % 7], linewidth=1.0))
    ax.set_yticks(range(len(order)), [f"{names[kind]}  ({counts[kind]:,})" for kind in order])
    ax.set_ylim(max(1, len(order)) - 0.5, -0.5)
    margin = (limits[1] - limits[0]) * 0.01
    ax.set_xlim(limits[0] - margin, limits[1] + margin)
    look.dress(ax, xlabel=xlabel, title="Exits", grid="x")
    if not kinds:
        words = "no exits but plain steps" if xlabel == "step" else "no exits"
        drawn.append(ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", color=look.GREY))
    look.count_axis(ax)
    note_source(ax, provenance)
    return drawn
