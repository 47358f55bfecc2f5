"""Each vcpu's time as a lane: in the guest, in KVM for which reason, in user space."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from kvmbench.arguments import spelled_out
from kvmbench.plot import look
from kvmbench.plot.exit_source import (
    ExitSource,
    Window,
    chosen,
    head,
    inches_high,
    inches_wide,
    most_frequent,
    no_exits,
    open_window,
    say_nothing_to_draw,
    shade_gaps,
    time_axis,
    vcpu_names,
)
from kvmbench.traces.exits import ExitTable
from kvmbench.traces.spans import PLACE_WORDS, Place, Spans, covered, spans_of, told
from kvmbench.traces.words import counted

# Columns of a lane, and of all lanes together; a page's width has about 1,900 dots. Up to so many stretches of time
# are drawn each as it is.
_COLUMNS, _ALL_COLUMNS, _LEAST_COLUMNS = 1200, 12_000, 300
# Up to so many areas of a kind are hatched; up to so many corners stay vectors in SVG and PDF.
_HATCHED, _VECTORS = 250, 20_000
# Up to so many exits get a tick of their own.
_TICKS = 120
# Points that a tick is high, and that a name above it takes.
_TICK_POINTS, _NAME_POINTS = 3.0, 7.5
# Between so many lanes there is room made for names, in a new figure.
_NAMED_LANES, _NAMED_LANE_INCHES = 8, 0.7
# Up to so many marks are written out; of more there are at most so many lines.
_NAMED, _FEET = 24, 400
# Reasons with a colour of their own.
_REASONS = 5
_HEIGHT = 0.76
# The reasons with most of the time differ in grey print as well.
_FILLS = (
    (look.COLOURS[0], ""),
    (look.COLOURS[4], "////"),
    (look.COLOURS[6], ""),
    (look.COLOURS[5], "...."),
    (look.COLOURS[2], "\\\\\\\\"),
    (look.COLOURS[3], "xxxx"),
)


@dataclass(frozen=True)
class _Kind:
    # What a lane can be filled with.
    label: str
    colour: str
    hatch: str


_PLACES = {
    Place.GUEST: _Kind(PLACE_WORDS[Place.GUEST], "#dddddd", ""),
    Place.TOGETHER: _Kind(PLACE_WORDS[Place.TOGETHER], "#b5d5ea", ""),
    Place.KVM: _Kind(PLACE_WORDS[Place.KVM], look.COLOURS[0], ""),
    Place.USER: _Kind(PLACE_WORDS[Place.USER], look.COLOURS[4], "////"),
    Place.OUTSIDE: _Kind(PLACE_WORDS[Place.OUTSIDE], "#ffffff", "...."),
}


@spelled_out
def exit_timeline(
    source: ExitSource | ExitTable,
    *,
    by: str = "place",
    start_ns: int | None = None,
    end_ns: int | None = None,
    ax: Axes | None = None,
) -> list[Artist]:
    """Draws a lane a vcpu: where its time went, moment by moment.

    Where stretches of time are shorter than a dot, a column shows their shares one above the other. White is time
    that nothing tells.

    Args:
        source: a trace or its exits.
        by: ``place`` tells the guest, KVM, user space and standing apart; ``reason`` also what KVM and user space
            were there for.
        start_ns: of the window, by the trace's clock as in ``t.exits.time_ns``; None: from the beginning.
        end_ns: its end, not included; None: to the last exit.
        ax: where to draw, or None for a new figure.

    Returns:
        One artist a kind of place or reason, then ticks of exits (if few), marks and gaps.

    Raises:
        MisuseError: no trace, another `by`, an empty window.
    """
    by = chosen(by, "by", ("place", "reason"))
    window = open_window(source, "exit_timeline", ax, start_ns=start_ns, end_ns=end_ns)
    # The exit behind the window's end may have its guest time in it: spans are made of the whole and cut.
    table = window.whole
    vcpus = [int(vcpu) for vcpu in np.unique(table.vcpu)]
    if ax is None:
        high = min(0.42 * max(1, len(vcpus)), 0.7 + 0.11 * len(vcpus))
        if 0 < len(window.exits) <= _TICKS and 1 < len(vcpus) <= _NAMED_LANES:
            high = _NAMED_LANE_INCHES * len(vcpus)
        ax = look.new_axes(height_inches=1.5 + high)[0]
    if not len(table):
        head(ax, window, "Where the vcpus were")
        return say_nothing_to_draw(ax, "no exits")
    kinds, kind_of_row = _kinds(table, by)
    lanes = [_cut(spans_of(table, vcpu), window) for vcpu in vcpus]
    drawn: list[Artist] = []
    columns = min(_COLUMNS, max(_LEAST_COLUMNS, _ALL_COLUMNS // len(vcpus)))
    columns = 0 if all(len(lane.begin_ns) <= columns for lane in lanes) else columns
    stacks = [_stack(lane, kind_of_row, len(kinds), window, columns) for lane in lanes]
    # The legend's order is that from bottom to top of a lane.
    for n, kind in enumerate(kinds):
        polygons = [polygon for lane, (edges, tops) in enumerate(stacks) for polygon in _outline(lane, n, edges, tops)]
        if not polygons:
            continue
        corners = sum(map(len, polygons))
        filled = PolyCollection(
            polygons,
            facecolor=kind.colour,
            edgecolor=look.GREY if kind.hatch else "none",
            linewidth=0.0,
            # Hatching of what is narrower than its lines would only be noise, and slow.
            hatch=kind.hatch if kind.hatch and len(polygons) <= _HATCHED and corners <= _VECTORS else None,
            label=kind.label,
            rasterized=corners > _VECTORS,
        )
        drawn.append(ax.add_collection(filled, autolim=False))
    if not drawn:
        head(ax, window, "Where the vcpus were")
        return say_nothing_to_draw(ax, no_exits(window) if not len(window.exits) else "no times are told")
    ticks, above = _ticks(ax, window, vcpus)
    marks, unnamed = _marks(ax, source, window)
    drawn += [*ticks, *marks, *shade_gaps(ax, window)]
    every = max(1, -(-len(vcpus) // 32))
    ax.set_yticks(range(0, len(vcpus), every), vcpu_names(source, vcpus[::every]))
    ax.set_ylim(len(vcpus) - 0.5, -0.5 - above)
    _, every_row, untimed = told(window.exits)
    words = [
        "no exits of the processor were told: guest and KVM are one" if every_row else "",
        f"{counted(untimed, 'exit')} without times: not drawn" if untimed and not every_row else "",
        "stretches shorter than a dot: heights are shares of time" if columns else "",
        unnamed,
    ]
    head(
        ax,
        window,
        f"Where the vcpu{'s were' if len(vcpus) != 1 else ' was'}: {counted(len(window.exits), 'exit')}",
        *words,
    )
    time_axis(ax, window)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        ax.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False, handlelength=1.4
        )
    return drawn


def _kinds(table: ExitTable, by: str) -> tuple[list[_Kind], npt.NDArray[np.uint8]]:
    # What lanes are filled with; and which of them it is for each row and `Place`, shape (rows, places).
    if by == "place":
        return list(_PLACES.values()), np.tile(np.arange(len(Place), dtype=np.uint8), (len(table), 1))
    spent = np.maximum(table.kvm_ns, 0) + table.user_ns
    place, names = most_frequent(table.reason, table.names, _REASONS, weights=spent)
    kinds = [_PLACES[Place.GUEST], _PLACES[Place.TOGETHER]]
    kinds += [_Kind(name, *fill) for name, fill in zip(names, _FILLS, strict=False)]
    kinds.append(_PLACES[Place.OUTSIDE])
    of_row = np.empty((len(table), len(Place)), np.uint8)
    of_row[:, Place.GUEST], of_row[:, Place.TOGETHER], of_row[:, Place.OUTSIDE] = 0, 1, len(kinds) - 1
    of_row[:, Place.KVM] = of_row[:, Place.USER] = place + 2
    return kinds, of_row


def _cut(spans: Spans, window: Window) -> Spans:
    # What of them lies in the window, counted from its zero.
    first = int(np.searchsorted(spans.end_ns, window.start_ns, side="right"))
    last = int(np.searchsorted(spans.begin_ns, window.end_ns))
    begin = np.maximum(spans.begin_ns[first:last], window.start_ns) - window.zero_ns
    end = np.minimum(spans.end_ns[first:last], window.end_ns) - window.zero_ns
    return Spans(begin, end, spans.place[first:last], spans.row[first:last])


def _stack(
    lane: Spans, kind_of_row: npt.NDArray[np.uint8], kinds: int, window: Window, columns: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    # Edges of columns, and up to where each kind fills them, from 0: shapes (columns + 1,), (kinds + 1, columns).
    # No columns: a column for each stretch of time.
    if not columns:
        edges = np.unique(np.concatenate([lane.begin_ns, lane.end_ns])).astype(np.float64)
    else:
        edges = np.linspace(window.start_ns - window.zero_ns, window.end_ns - window.zero_ns, columns + 1)
    if len(edges) < 2:
        edges = np.array([0.0, 0.0])
    kind = kind_of_row[lane.row, lane.place]
    tops = np.zeros((kinds + 1, len(edges) - 1))
    for n in range(kinds):
        mine = kind == n
        tops[n + 1] = tops[n] + covered(lane.begin_ns[mine], lane.end_ns[mine], edges)
    return edges, np.minimum(tops, 1)


def _outline(
    lane: int, kind: int, edges: npt.NDArray[np.float64], tops: npt.NDArray[np.float64]
) -> Iterator[npt.NDArray[np.float64]]:
    # A polygon for each run of columns in which there is some of the kind.
    low, high = lane + _HEIGHT * (0.5 - tops[kind]), lane + _HEIGHT * (0.5 - tops[kind + 1])
    there = np.flatnonzero(low - high > 1e-9)
    for run in np.split(there, np.flatnonzero(np.diff(there) > 1) + 1) if len(there) else ():
        x = np.repeat(edges[run[0] : run[-1] + 2], 2)[1:-1]
        around = np.concatenate([np.repeat(low[run], 2), np.repeat(high[run], 2)[::-1]])
        yield np.stack([np.concatenate([x, x[::-1]]), around], axis=1)


def _ticks(ax: Axes, window: Window, vcpus: list[int]) -> tuple[list[Artist], float]:
    # Where the guest was left, and why, if there is room to say it; how much room that takes above the first lane.
    table = window.exits
    if not 0 < len(table) <= _TICKS:
        return [], 0.0
    lane = np.searchsorted(vcpus, table.vcpu)
    x = table.time_ns - window.zero_ns
    # Names stand behind a line as high as they are, so that a line without one is not taken for its neighbour's. Of
    # one lane there may be names above names; a line must not go through a lower one.
    point = len(vcpus) / (inches_high(ax) * 72)
    low: dict[int, float] = {}
    high: dict[int, float] = {}
    heights = np.full(len(table), _TICK_POINTS)
    drawn: list[Artist] = []
    width, span = inches_wide(ax), window.end_ns - window.start_ns
    # Of several lanes a name must not lie on the one above. A layout may still take some of the height.
    named = len(vcpus) == 1 or 0.9 * (1 - _HEIGHT) / point >= _TICK_POINTS + _NAME_POINTS
    names = table.reasons.tolist() if named else ()
    for n, (at, row, name) in enumerate(zip(x.tolist(), lane.tolist(), names, strict=False)):
        inches = (at - (window.start_ns - window.zero_ns)) / span * width
        # A letter of 6 points is about 0.05 inches wide. The legend is to the right of the lanes.
        room = 0.062 * len(name) + 0.06
        side = "left" if inches + room <= width else "right"
        begin = inches if side == "left" else inches - room
        if begin < low.get(row, 0.0):
            continue
        upper = len(vcpus) == 1 and begin >= high.get(row, 0.0)
        (high if upper else low)[row] = begin + room
        foot = _TICK_POINTS + _NAME_POINTS * upper
        heights[n] = foot + _NAME_POINTS
        place = (2 if side == "left" else -2, foot)
        drawn.append(
            ax.annotate(
                name, (at, row - _HEIGHT / 2), place, textcoords="offset points", fontsize=6, ha=side, va="bottom"
            )
        )
    roof = lane - _HEIGHT / 2
    lines = ax.vlines(x, roof - heights * point, roof, color="black", linewidth=0.8)
    return [lines, *drawn], max(0.0, float(heights[lane == 0].max(initial=0)) * point - (0.5 - _HEIGHT / 2))


def _marks(ax: Axes, source: ExitSource | ExitTable, window: Window) -> tuple[list[Artist], str]:
    # Moments that somebody named. Where the guest's are many, they are short lines without their names, which the
    # words say, so that they do not hide the lanes.
    marks = [mark for mark in getattr(source, "marks", ()) if window.start_ns <= mark.time_ns <= window.end_ns]
    groups = {whose: [mark for mark in marks if mark.source == whose] for whose in ("host", "guest")}
    if len(marks) <= _NAMED:
        groups = {"host": marks}
    drawn: list[Artist] = []
    words: list[str] = []
    place = ax.get_xaxis_transform()
    span = window.end_ns - window.start_ns
    for whose, group in groups.items():
        x = np.array([mark.time_ns - window.zero_ns for mark in group], np.int64)
        if not group:
            continue
        if len(group) > _NAMED:
            # No more than fit beside each other.
            x = x[np.unique((x - x.min()) * _FEET // span, return_index=True)[1]]
            drawn.append(ax.vlines(x, 0, 0.03, transform=place, color="black", linewidth=0.6))
            words.append(f"{counted(len(group), 'mark')} of the {whose}: short lines at the foot")
            continue
        drawn.append(ax.vlines(x, 0, 1, transform=place, color="black", linewidth=0.8, linestyle="--"))
        # A line of 6 points is as wide as a ninetieth of a page.
        room, last = span / 70, -float("inf")
        for at, mark in zip(x.tolist(), group, strict=True):
            if at - last < room:
                continue
            last = at
            drawn.append(
                ax.annotate(
                    mark.text,
                    (at, 0),
                    (2, 2),
                    xycoords=place,
                    textcoords="offset points",
                    fontsize=6,
                    rotation=90,
                    va="bottom",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
                )
            )
    return drawn, "; ".join(words)
