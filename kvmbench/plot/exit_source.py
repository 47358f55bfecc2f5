"""What the figures of exits share: their source, the window that is drawn, axes of time, events that were lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from kvmbench.arguments import instead, integer
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance
from kvmbench.plot import look
from kvmbench.plot.figure import figure_of, note_source
from kvmbench.plot.time_axis import linear_time_axis, unit_of
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.exits import ExitTable
from kvmbench.traces.words import counted

# Rows at either end of a table that are looked at for where it begins and ends: those of all vcpus, as a rule.
_ENDS = 1024


class ExitSource(Protocol):
    """A trace, as far as figures of its exits need it; a bare `ExitTable` is taken too."""

    @property
    def exits(self) -> ExitTable: ...

    @property
    def events(self) -> EventTable: ...

    @property
    def provenance(self) -> Provenance: ...


@dataclass(frozen=True)
class Window:
    """The exits that a figure shows.

    Attributes:
        exits: those in the window, in order of time.
        whole: those of all the trace; of a trace that runs, what was there when the figure was asked for.
        first: place in `whole` of the first of `exits`.
        events: all of the trace; empty for a bare table.
        provenance: the host.
        zero_ns: the trace's first exit, where axes of time begin to count.
        start_ns, end_ns: of the window, by the trace's clock.
        lost_runs: KVM_RUNs that the core's log had no room for.
    """

    exits: ExitTable
    whole: ExitTable
    first: int
    events: EventTable
    provenance: Provenance
    zero_ns: int
    start_ns: int
    end_ns: int
    lost_runs: int

    @property
    def clock_words(self) -> str:
        """ ", emulator time" where KVM ran in an emulator."""
        return f", {self.provenance.time_unit_note}" if self.provenance.is_emulated else ""


def open_window(
    source: ExitSource | ExitTable, figure: str, ax: Axes | None, *, start_ns: int | None, end_ns: int | None
) -> Window:
    """Takes the exits out of a trace or a table, and checks what all these figures are given.

    Args:
        source: a trace or its exits.
        figure: name of the function, for messages.
        ax: what the caller gave.
        start_ns: of the window, by the trace's clock as in ``t.exits.time_ns``; None: from the beginning.
        end_ns: its end, not included; None: to the last exit.

    Raises:
        MisuseError: no trace and no table, no Axes, or an empty window.
    """
    if ax is not None and not isinstance(ax, Axes):
        raise MisuseError(f"ax={ax!r}: give an Axes of matplotlib, such as plt.gca(), or None for a new figure")
    events, provenance = EventTable(), Provenance()
    table = source if isinstance(source, ExitTable) else getattr(source, "exits", None)
    if not isinstance(table, ExitTable):
        raise MisuseError(f"{figure}() draws a trace, as kb.trace(m) makes it, or its t.exits, not {source!r:.80}")
    if not isinstance(source, ExitTable):
        events, provenance = source.events, source.provenance
    times = table.time_ns
    begin, last = _extent(table)
    start = begin if start_ns is None else integer(start_ns, "start_ns")
    end = last if end_ns is None else integer(end_ns, "end_ns")
    if (start_ns is not None or end_ns is not None) and end <= start:
        raise MisuseError(f"start_ns={start}, end_ns={end}: there is no time between them")
    everything = start_ns is None and end_ns is None
    shown = table if everything else table.between(start, end)
    first = 0 if everything else int(np.searchsorted(times, start))
    zero = int(times[0]) if len(times) else 0
    return Window(shown, table, first, events, provenance, zero, start, max(end, start + 1), table.log.lost)


def _extent(table: ExitTable) -> tuple[int, int]:
    # The guests' runs before their first exits belong to a trace, and what their last exits took.
    if not len(table):
        return 0, 1
    first, last = table.take(np.arange(min(_ENDS, len(table)))), table.take(np.arange(-min(_ENDS, len(table)), 0))
    begin = first.time_ns - np.maximum(first.guest_ns, 0)
    end = last.time_ns + np.maximum(last.kvm_ns, 0) + last.user_ns
    return int(begin.min()), int(end.max()) + 1


def vcpu_names(source: ExitSource | ExitTable, vcpus: Sequence[int]) -> list[str]:
    """What vcpus are called: as the trace has it, else "vcpu 0"."""
    labels = getattr(getattr(source, "data", None), "labels", ())
    return [labels[vcpu] if 0 <= vcpu < len(labels) else f"vcpu {vcpu}" for vcpu in vcpus]


def chosen(value: Any, name: str, allowed: Sequence[str]) -> str:
    """`value` if it is one of the words allowed; else a MisuseError that says which there are."""
    if value not in allowed:
        raise MisuseError(f"{name}={value!r}: {instead(value, allowed)}")
    return str(value)


def most_frequent(
    codes: npt.NDArray[Any], names: Sequence[str], most: int, weights: npt.NDArray[Any] | None = None
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Numbers things by how frequent they are, with all but the `most` frequent as one, "others".

    Args:
        codes: places in `names`, shape (n,).
        names: what they are called.
        most: how many keep their name.
        weights: of each of `codes`, at least 0, where it is not their number that counts.

    Returns:
        For each of `codes` its place in the second, shape (n,); the names, the most frequent or heaviest first.
    """
    counts = np.bincount(codes, minlength=len(names)) if len(codes) else np.zeros(len(names), np.int64)
    rank = counts if weights is None else np.bincount(codes, weights=weights, minlength=len(names))
    order = [int(n) for n in np.argsort(-rank, kind="stable") if counts[n]]
    kept = order if len(order) <= most + 1 else order[:most]
    place = np.full(max(len(names), 1), len(kept), np.int64)
    place[kept] = np.arange(len(kept))
    others = len(order) - len(kept)
    called = [names[n] for n in kept] + ([f"{others} others"] if others else [])
    return place[codes], called


def inches_wide(ax: Axes) -> float:
    """About how wide an Axes is, of which a layout may still take something."""
    return float(figure_of(ax).get_figwidth() * ax.get_position().width)


def inches_high(ax: Axes) -> float:
    """The same of its height."""
    return float(figure_of(ax).get_figheight() * ax.get_position().height)


def time_axis(ax: Axes, window: Window) -> None:
    """The x axis of a figure over time, which is drawn in nanoseconds since the window's `zero_ns`."""
    low, high = window.start_ns - window.zero_ns, window.end_ns - window.zero_ns
    size, name = unit_of(max(high - low, abs(low), abs(high)) if len(window.exits) else 1)
    ax.set_xlim(low, high)
    linear_time_axis(ax, f"time since the first exit ({name}{window.clock_words})", size)


def shade_gaps(ax: Axes, window: Window) -> list[Artist]:
    """Hatches the times whose events the kernel had no room for; x is nanoseconds since `zero_ns`."""
    gaps = [g for g in window.events.gaps if window.start_ns <= g.time_ns <= window.end_ns]
    if not gaps:
        return []
    ends = np.array([gap.time_ns for gap in gaps], np.int64)
    # A gap says when it ended; it began with the last event before, which is no later than the last exit.
    times = window.whole.time_ns
    before = np.searchsorted(times, ends) - 1
    begins = np.where(before >= 0, times[np.maximum(before, 0)], window.start_ns) if len(times) else ends
    least = (window.end_ns - window.start_ns) / 400
    left = np.maximum(np.minimum(begins, ends - least), window.start_ns) - window.zero_ns
    right = ends - window.zero_ns
    # Those that meet are one, so there are never more than fit beside each other.
    apart = np.concatenate([[True], left[1:] > np.maximum.accumulate(right)[:-1]])
    left, right = left[apart], np.maximum.reduceat(right, np.flatnonzero(apart))
    bars = ax.broken_barh(
        [(float(a), float(b - a)) for a, b in zip(left, right, strict=True)],
        (0.0, 1.0),
        transform=ax.get_xaxis_transform(),
        facecolor="white",
        edgecolor=look.GREY,
        hatch="xxxxx",
        linewidth=0.0,
        alpha=0.85,
        zorder=3,
    )
    return [bars]


def lost_words(window: Window) -> str:
    """What a figure says of data that is missing; empty if none is."""
    gaps = [g for g in window.events.gaps if window.start_ns <= g.time_ns <= window.end_ns]
    lost = sum(gap.lost for gap in gaps)
    words = []
    if gaps:
        many = counted(lost, "event") if lost else "events, uncounted,"
        words.append(f"{many} lost in {counted(len(gaps), 'gap')}")
    if window.lost_runs:
        words.append(f"{counted(window.lost_runs, 'KVM_RUN')} lost from the log")
    return "; ".join(words)


def head(ax: Axes, window: Window, title: str, *words: str) -> None:
    """Title, a small line of words below it (what is not told, what was lost), and the source of the figure."""
    said = [each for each in (*words, lost_words(window)) if each]
    look.dress(ax, title=title + "\n" * bool(said))
    if said:
        ax.annotate(
            "; ".join(said),
            (0, 1),
            (0, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=7,
            color=look.GREY,
            va="bottom",
        )
    note_source(ax, window.provenance)


def no_exits(window: Window) -> str:
    """What an empty figure says: there are no exits, or where there are some."""
    if not len(window.whole):
        return "no exits"
    first, last = window.whole.time_ns[[0, -1]].tolist()
    # Figures count time from the first exit, windows are given by the trace's clock: easily mistaken for each other.
    return (
        f"no exits between start_ns={window.start_ns} and end_ns={window.end_ns};\nt.exits.time_ns is {first} to {last}"
    )


def say_nothing_to_draw(ax: Axes, words: str) -> list[Artist]:
    """Words in the middle of an empty figure."""
    ax.set_xticks([])
    ax.set_yticks([])
    return [ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", color=look.GREY)]
