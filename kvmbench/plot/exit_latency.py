"""How long exits took, by reason: cumulative distributions or histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from kvmbench.arguments import integer, spelled_out
from kvmbench.debug.step_rows import exit_name
from kvmbench.plot import look
from kvmbench.plot.exit_source import (
    ExitSource,
    Window,
    chosen,
    head,
    most_frequent,
    no_exits,
    open_window,
    say_nothing_to_draw,
    vcpu_names,
)
from kvmbench.plot.time_axis import duration, log_edges, log_limits, log_time_axis
from kvmbench.traces.exits import NO_USER_EXIT, NOT_TOLD, ExitTable
from kvmbench.traces.words import counted

#: Which time of an exit is meant, in words for an axis.
PART_WORDS = {
    "span": "from the exit until the guest ran again",
    "kvm": "in KVM, of an exit",
    "user": "in user space, of an exit that it answered",
    "guest": "in the guest, before an exit",
}
# Points of a curve; more would fall on the same dots.
_MOST_POINTS = 2000
_QUANTILES = (0.5, 0.99)


@spelled_out
def exit_latency(
    source: ExitSource | ExitTable,
    *,
    kind: str = "cdf",
    by: str = "reason",
    part: str = "span",
    most: int = 6,
    start_ns: int | None = None,
    end_ns: int | None = None,
    ax: Axes | None = None,
) -> list[Artist]:
    """Draws how long exits took, on a logarithmic axis.

    Args:
        source: a trace or its exits.
        kind: ``cdf`` for a curve each: how many per cent took at most so long; ``histogram`` for a row each, in
            buckets of which twelve make a decade, with the median and the 99th percentile marked.
        by: ``reason``, ``vcpu``, or ``user_exit`` for what KVM_RUN returned with.
        part: ``span`` from the exit until the guest ran again, ``kvm`` or ``user`` for that share of it, ``guest``
            for the guest's run before the exit.
        most: how many curves or rows at most; the least frequent are drawn as one.
        start_ns: of the window, by the trace's clock as in ``t.exits.time_ns``; None: from the beginning.
        end_ns: its end, not included; None: to the last exit.
        ax: where to draw, or None for a new figure.

    Returns:
        One artist a curve or row, the most frequent first; if no times are told, the words that say so.

    Raises:
        MisuseError: no trace, another `kind`, `by` or `part`, an empty window.
    """
    kind = chosen(kind, "kind", ("cdf", "histogram"))
    by = chosen(by, "by", ("reason", "vcpu", "user_exit"))
    part = chosen(part, "part", tuple(PART_WORDS))
    most = integer(most, "most", 1, 40)
    window = open_window(source, "exit_latency", ax, start_ns=start_ns, end_ns=end_ns)
    times, kept, words = latencies(window, part)
    place, names = groups(source, window.exits.take(kept), by, most)
    parts = [np.sort(times[place == n]) for n in range(len(names))]
    if ax is None:
        inches = 3.4 if kind == "cdf" else 1.2 + 0.42 * max(1, len(names))
        ax = look.new_axes(height_inches=inches)[0]
    what = {"reason": "reason", "vcpu": "vcpu", "user_exit": "exit to user space"}[by]
    title = "The guest's runs between exits" if part == "guest" else "How long exits took"
    head(ax, window, f"{title}, by {what}", *words)
    if not len(times):
        return say_nothing_to_draw(ax, no_exits(window) if not len(window.exits) else f"no times {PART_WORDS[part]}")
    drawn = _curves(ax, parts, names) if kind == "cdf" else _rows(ax, parts, names, log_edges(times))
    log_time_axis(ax.xaxis)
    look.dress(ax, xlabel=f"time {PART_WORDS[part]} (logarithmic{window.clock_words})", grid="x")
    return drawn


def latencies(window: Window, part: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], list[str]]:
    """Times of the exits of a window, where they are told, and at least 1 ns.

    Args:
        window: what is drawn.
        part: one of `PART_WORDS`.

    Returns:
        The times, shape (n,); of which rows of ``window.exits`` they are, shape (n,); sentences about the others.
    """
    exits = window.exits
    together = exits.isa == 0
    column = {"span": exits.span_ns, "kvm": exits.kvm_ns, "user": exits.user_ns, "guest": exits.guest_ns}[part]
    words = []
    has = column != NOT_TOLD
    if part == "user":
        has = column > 0
        words.append("only exits that user space answered" if not has.all() else "")
    elif part == "span" and together.any():
        # Of a KVM_RUN without an exit of the processor only the answer's time is known.
        has &= ~together | (column > 0)
        words.append("of KVM_RUNs without exits of the processor: the time user space took")
    elif part == "guest" and together.any():
        words.append("without exits of the processor: in KVM_RUN, guest and KVM together")
    if part != "user" and (missing := int(np.count_nonzero(~has))):
        words.append(f"{counted(missing, 'exit')} without this time left out")
    rows = np.flatnonzero(has)
    return np.maximum(column[rows], 1), rows, words


def groups(
    source: ExitSource | ExitTable, exits: ExitTable, by: str, most: int
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Numbers exits by reason, vcpu or exit to user space, the most frequent first: (place of each, names)."""
    if by == "reason":
        return most_frequent(exits.reason, exits.names, most)
    column: npt.NDArray[Any] = exits.vcpu if by == "vcpu" else exits.user_exit
    values, codes = np.unique(column, return_inverse=True)
    if by == "vcpu":
        return most_frequent(codes, vcpu_names(source, values.tolist()), most)
    called = ["KVM alone" if value == NO_USER_EXIT else exit_name(int(value)) for value in values]
    return most_frequent(codes, called, most)


def _curves(ax: Axes, parts: Sequence[npt.NDArray[np.int64]], names: Sequence[str]) -> list[Artist]:
    drawn: list[Artist] = []
    for n, (times, name) in enumerate(zip(parts, names, strict=True)):
        # The k-th of n times is where the curve reaches k / n; of many, points that are as far apart as each other.
        at = np.unique(np.linspace(0, len(times) - 1, min(len(times), _MOST_POINTS)).astype(np.int64))
        x = np.concatenate([times[:1], times[at]])
        y = np.concatenate([[0.0], (at + 1) / len(times)])
        (line,) = ax.step(
            x,
            y,
            where="post",
            color=look.COLOURS[n % len(look.COLOURS)],
            linestyle=look.DASHES[n % len(look.DASHES)],
            linewidth=1.4,
            marker="o" if len(times) <= 20 else "",
            markersize=3,
            markevery=slice(1, None),
            label=f"{name}\n{_counted(times)}",
        )
        drawn.append(line)
    ax.set_xscale("log")
    ax.set_xlim(log_limits(min(int(times[0]) for times in parts), max(int(times[-1]) for times in parts)))
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    look.dress(ax, ylabel="of these exits", grid="both")
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), fontsize=7, frameon=False, handlelength=2.6)
    return drawn


def _rows(
    ax: Axes, parts: Sequence[npt.NDArray[np.int64]], names: Sequence[str], edges: npt.NDArray[np.float64]
) -> list[Artist]:
    drawn: list[Artist] = []
    for row, times in enumerate(parts):
        counts = np.histogram(times, edges)[0]
        # A bucket with one exit among a million is still seen.
        height = np.where(counts, np.maximum(counts / counts.max(), 0.05), 0) * 0.8
        colour = look.COLOURS[0]
        drawn.append(ax.stairs(row + 0.4 - height, edges, baseline=row + 0.4, fill=True, color=colour, linewidth=0))
        for quantile, style in zip(_QUANTILES, "-:", strict=True):
            value = _quantile(times, quantile)
            ax.vlines(value, row - 0.42, row + 0.4, color="black", linewidth=0.9, linestyle=style)
    # The first row's lines have names.
    middle, high = (_quantile(parts[0], share) for share in _QUANTILES)
    named = [("median", middle, "right"), ("99%", high, "left")] if high > middle else [("median, 99%", high, "center")]
    for words, value, side in named:
        ax.annotate(words, (value, -0.44), fontsize=6, ha=side, va="bottom")
    ax.set_xscale("log")
    ax.set_xlim(log_limits(edges[0], edges[-1]))
    ax.set_yticks(range(len(names)), [f"{name}\n{len(times):,}" for name, times in zip(names, parts, strict=True)])
    ax.set_ylim(len(names) - 0.5, -0.75)
    ax.hlines(np.arange(len(names)) + 0.4, *ax.get_xlim(), color="#cccccc", linewidth=0.5, zorder=0)
    right = ax.secondary_yaxis("right")
    right.set_yticks(range(len(names)), [_told(times) for times in parts])
    right.tick_params(length=0, labelsize=7)
    right.spines["right"].set_visible(False)
    return drawn


def _quantile(times: npt.NDArray[np.int64], share: float) -> int:
    # A time that was measured: the least of which so many are no longer.
    return int(times[max(0, int(np.ceil(share * len(times))) - 1)])


def _told(times: npt.NDArray[np.int64]) -> str:
    if len(times) == 1:
        return duration(int(times[0]))
    middle, high = (_quantile(times, share) for share in _QUANTILES)
    return f"median {duration(middle)}\n99%: {duration(high)}\nmost: {duration(int(times[-1]))}"


def _counted(times: npt.NDArray[np.int64]) -> str:
    if len(times) == 1:
        return f"1: {duration(int(times[0]))}"
    middle, high = (_quantile(times, share) for share in _QUANTILES)
    return f"{len(times):,}: median {duration(middle)}, 99% {duration(high)}"
