"""A flame chart of exits: the guest, reasons, KVM and user space, instructions; nested exits below what caused them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.patches import Patch

from kvmbench.arguments import integer, spelled_out
from kvmbench.errors import MisuseError
from kvmbench.plot import look
from kvmbench.plot.exit_frames import ADDRESS, GUEST, KVM, REASON, TOGETHER, USER, Frame, by_share, in_order, levels_of
from kvmbench.plot.exit_source import (
    ExitSource,
    chosen,
    head,
    inches_wide,
    no_exits,
    open_window,
    say_nothing_to_draw,
    shade_gaps,
    time_axis,
)
from kvmbench.plot.time_axis import duration, linear_time_axis, unit_of
from kvmbench.traces.exits import ExitTable
from kvmbench.traces.places import Places
from kvmbench.traces.spans import told
from kvmbench.traces.words import counted

# Exits drawn one by one, in order of time; more are no wider than a dot each.
_MOST_IN_ORDER = 3000
# Frames narrower than this share of the figure are not drawn.
_LEAST = 1 / 1500
# Light enough for black letters; darker from the guest to KVM, so that grey print tells them apart too.
_LOOKS = {
    GUEST: ("#e6e6e6", "guest"),
    TOGETHER: ("#d3dde4", "guest and KVM"),
    REASON: ("#b5dcf3", "reason of the exit"),
    KVM: ("#6fb3dc", "KVM"),
    USER: ("#f0a877", "user space"),
    ADDRESS: ("#f5efdc", "instruction"),
}
_MOST_EDGED = 60
_ROW_INCHES = 0.3
_NESTED = "L2: nested guest, L1: its hypervisor; below an exit of L2 all until L2 ran again"
_LETTER_POINTS = 6.5


@spelled_out
def exit_flame(
    source: ExitSource | ExitTable,
    *,
    order: str = "share",
    vcpu: int | None = None,
    addresses: str = "symbol",
    symbols: Mapping[str, int] | None = None,
    start_ns: int | None = None,
    end_ns: int | None = None,
    ax: Axes | None = None,
) -> list[Artist]:
    """Draws where the time went as frames, the whole above its parts.

    From above: the guest, or the reason of an exit; KVM, or user space that answered it; the instruction. Where
    kvm:kvm_nested_vmexit was traced and the guest is a hypervisor, an exit of its guest (L2) has below it what the
    hypervisor (L1) did until its guest ran again, with the exits that this made.

    Args:
        source: a trace or its exits.
        order: ``share`` puts all that has the same path together, the widest first; ``time`` keeps exits where they
            were in time (of one vcpu, and of at most 3000 exits).
        vcpu: only this one's; None: all of them together.
        addresses: what the innermost frames are: a ``symbol``, a ``rip``, or an ``instruction``.
        symbols: name to address; None: those of the trace.
        start_ns: of the window, by the trace's clock as in ``t.exits.time_ns``; None: from the beginning.
        end_ns: its end, not included; None: to the last exit.
        ax: where to draw, or None for a new figure.

    Returns:
        One artist a kind of frame, then the texts in them.

    Raises:
        MisuseError: no trace, another `order` or `addresses`, a vcpu without exits, an empty window, too many exits
            in `order` ``time``.
    """
    order = chosen(order, "order", ("share", "time"))
    window = open_window(source, "exit_flame", ax, start_ns=start_ns, end_ns=end_ns)
    rows, vcpu = _of_vcpu(window.exits, order, vcpu)
    exits = window.exits.take(rows)
    places = getattr(getattr(source, "data", None), "places", Places()) if symbols is None else Places(symbols)
    name = places.namer(chosen(addresses, "addresses", ("symbol", "rip", "instruction")))
    frames: Sequence[Frame] = ()
    nested = False
    if len(exits):
        # Of the whole trace: an exit of L2 may be open when the window begins.
        levels = levels_of(window.whole, window.events).take(rows + window.first)
        nested = levels.nested
        frames = by_share(exits, levels, name) if order == "share" else in_order(exits, levels, vcpu or 0, name)
    depth = max((frame.depth for frame in frames), default=0) + 1
    if ax is None:
        ax = look.new_axes(height_inches=1.25 + _ROW_INCHES * max(depth, 3))[0]
    title = "Where the time went" if order == "share" else "Exits in time"
    vcpus = len(np.unique(exits.vcpu))
    who = f", vcpu {vcpu}" if vcpu is not None else f", {vcpus:,} vcpus together" if vcpus > 1 else ""
    head(ax, window, f"{title}: {counted(len(exits), 'exit')}{who}", *_untold(exits), _NESTED if nested else "")
    if not frames:
        return say_nothing_to_draw(ax, "no times are told" if len(exits) else no_exits(window))
    shift = window.zero_ns if order == "time" else 0
    if order == "share":
        total = sum(frame.width_ns for frame in frames if frame.depth == 0)
        ax.set_xlim(0, total)
        size, unit = unit_of(total)
        linear_time_axis(ax, f"time ({unit}{window.clock_words})", size)
    else:
        time_axis(ax, window)
        total = float(window.end_ns - window.start_ns)
    drawn = _draw(ax, frames, shift, total, shares=order == "share")
    if order == "time":
        drawn += shade_gaps(ax, window)
    ax.set_ylim(depth - 0.02, -0.02)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    kinds = [kind for kind in _LOOKS if any(frame.kind == kind for frame in frames)]
    handles = [Patch(facecolor=_LOOKS[k][0], edgecolor=look.GREY, linewidth=0.5, label=_LOOKS[k][1]) for k in kinds]
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False, handlelength=1.4)
    return drawn


def _of_vcpu(exits: ExitTable, order: str, vcpu: int | None) -> tuple[npt.NDArray[np.int64], int | None]:
    # Which rows are drawn, and of which vcpu if of one.
    there = [int(each) for each in np.unique(exits.vcpu)]
    if vcpu is not None:
        vcpu = integer(vcpu, "vcpu")
        if there and vcpu not in there:
            raise MisuseError(f"vcpu={vcpu}: these have exits here: {', '.join(map(str, there))}")
    elif order == "time" and there:
        if len(there) > 1:
            raise MisuseError(f"order='time' draws one vcpu: give vcpu, one of {', '.join(map(str, there))}")
        vcpu = there[0]
    rows = np.arange(len(exits)) if vcpu is None else np.flatnonzero(exits.vcpu == vcpu)
    if order == "time" and len(rows) > _MOST_IN_ORDER:
        first, last = exits.time_ns[rows[[0, _MOST_IN_ORDER]]].tolist()
        raise MisuseError(
            f"order='time' draws at most {_MOST_IN_ORDER:,} exits, not {len(rows):,}: give start_ns and end_ns, "
            f"such as start_ns={first}, end_ns={last}"
        )
    return rows, vcpu


def _untold(exits: ExitTable) -> list[str]:
    _, every, untimed = told(exits)
    stood = int(exits.outside_ns.sum())
    return [
        "no exits of the processor were told: guest and KVM are one" if every else "",
        f"{counted(untimed, 'exit')} without times" if untimed else "",
        f"without {duration(stood)} in which vcpus stood" if stood else "",
    ]


def _draw(ax: Axes, frames: Sequence[Frame], shift: int, total: float, *, shares: bool) -> list[Artist]:
    seen = [frame for frame in frames if frame.width_ns >= total * _LEAST]
    drawn: list[Artist] = []
    for kind, (colour, words) in _LOOKS.items():
        boxes = [_box(frame, shift) for frame in seen if frame.kind == kind]
        if boxes:
            # A dark edge would be all that is seen of many narrow frames side by side.
            edge = "#bbbbbb" if kind == ADDRESS and len(boxes) <= _MOST_EDGED else "white"
            filled = PolyCollection(boxes, facecolor=colour, edgecolor=edge, linewidth=0.5, label=words)
            drawn.append(ax.add_collection(filled, autolim=False))
    letters = inches_wide(ax) * 72 / (_LETTER_POINTS * 0.64)
    for frame in seen:
        text = _text(frame, int(frame.width_ns / total * letters), total, shares=shares)
        if text:
            at = (frame.begin_ns - shift + frame.width_ns / 2, frame.depth + 0.48)
            drawn.append(ax.annotate(text, at, ha="center", va="center", fontsize=_LETTER_POINTS, clip_on=True))
    return drawn


def _box(frame: Frame, shift: int) -> list[tuple[float, float]]:
    left, right = frame.begin_ns - shift, frame.begin_ns - shift + frame.width_ns
    return [(left, frame.depth), (left, frame.depth + 0.96), (right, frame.depth + 0.96), (right, frame.depth)]


def _text(frame: Frame, room: int, total: float, *, shares: bool) -> str:
    # As much as there is room for: the name and its share or time, the name, the beginning of it.
    full = f"{frame.label} {frame.width_ns / total:.0%}" if shares else f"{frame.label} {duration(frame.width_ns)}"
    if len(full) <= room:
        return full
    if len(frame.label) <= room:
        return frame.label
    return frame.label[: room - 1] + "…" if room >= 5 else ""
