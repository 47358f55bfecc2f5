"""What all figures share: colours, light frames, and axes for 64-bit numbers.

The colours are those of Okabe and Ito (2008), told apart by people with any
common form of colour-blindness and in grey print; yellow is left out, since it
vanishes on white. Nothing is said by colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import Formatter, Locator, MaxNLocator, StrMethodFormatter

from kvmbench.debug.record import StepRecord
from kvmbench.errors import MisuseError

#: Blue, vermilion, bluish green, reddish purple, orange, sky blue, black.
COLOURS: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: For frames, bands and remarks.
GREY = "#666666"
#: Line styles that go round in step with `COLOURS`, for print in grey.
DASHES: tuple[str, ...] = ("-", "--", ":", "-.")

_FONT_POINTS = 9
_MONOSPACE = "DejaVu Sans Mono"


def check_drawable(rec: object, *axes: object) -> None:
    """Raises MisuseError if `rec` is no recording with steps, or one of `axes` neither None nor an Axes."""
    if not isinstance(rec, StepRecord):
        raise MisuseError(f"a recording is drawn, as cpu.record() returns it, not {rec!r}")
    if not len(rec):
        raise MisuseError("the recording has no steps to draw")
    for ax in axes:
        if ax is not None and not isinstance(ax, Axes):
            raise MisuseError(f"ax={ax!r}: give an Axes of matplotlib, such as plt.gca(), or None for a new figure")


def new_axes(count: int = 1, *, width_inches: float = 7.2, height_inches: float = 3.2) -> list[Axes]:
    """A new figure with `count` Axes above each other that share the x axis."""
    _, axes = plt.subplots(
        count, 1, sharex=True, squeeze=False, layout="constrained", figsize=(width_inches, height_inches)
    )
    return list(axes[:, 0])


def dress(ax: Axes, *, xlabel: str = "", ylabel: str = "", title: str = "", grid: str = "") -> None:
    """Labels and a light frame for one Axes; `grid` is ``x``, ``y``, ``both`` or empty."""
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GREY)
    ax.tick_params(colors="#333333", labelsize=_FONT_POINTS - 1, length=3)
    if xlabel:
        ax.set_xlabel(xlabel, fontsize=_FONT_POINTS)
    if ylabel:
        ax.set_ylabel(ylabel, fontsize=_FONT_POINTS)
    if title:
        ax.set_title(title, fontsize=_FONT_POINTS + 1, loc="left")
    if grid:
        ax.grid(True, axis=grid, color="#cccccc", linewidth=0.5)  # type: ignore[arg-type]
        ax.set_axisbelow(True)


def count_axis(ax: Axes, which: str = "x") -> None:
    """Whole numbers with thousands separated on one axis: steps, occurrences."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def monospace(labels: Sequence[Any], *, points: float = _FONT_POINTS - 1.5) -> None:
    """Sets tick labels or texts that hold addresses in a fixed-width font."""
    for label in labels:
        label.set_fontfamily(_MONOSPACE)
        label.set_fontsize(points)


class HexScale:
    """Puts 64-bit integers on a matplotlib axis without losing digits.

    matplotlib computes in doubles, which hold 53 bits: 0xffffffff81000000 and
    its neighbours would fall together. So values are drawn as distances from a
    base that is subtracted as an integer, and the base is added back, again as
    an integer, when a tick is written.
    """

    def __init__(self, low: int, high: int) -> None:
        """A scale for values from `low` to `high`, both included."""
        # A base on a power of two at least as large as the range keeps ticks at round numbers exact.
        span_bits = max(high - low, 15).bit_length()
        self.base = low >> span_bits << span_bits
        self.low, self.high = low, high

    @classmethod
    def of(cls, *columns: npt.NDArray[np.uint64]) -> HexScale:
        """A scale that holds all values of some uint64 arrays; from 0 to 15 if they are empty."""
        filled = [column for column in columns if len(column)]
        if not filled:
            return cls(0, 15)
        return cls(min(int(column.min()) for column in filled), max(int(column.max()) for column in filled))

    def place(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
        """Where values of the range go on the axis, as doubles."""
        return (values - np.uint64(self.base)).astype(np.float64)

    def place_one(self, value: int) -> float:
        """The same for one value, which may lie outside the range."""
        return float(value - self.base)

    def value(self, place: float) -> int:
        """The value drawn at a place on the axis."""
        return self.base + round(place)

    def apply(self, ax: Axes, which: str = "y") -> None:
        """Gives an axis hexadecimal ticks at round hexadecimal numbers."""
        axis = ax.yaxis if which == "y" else ax.xaxis
        axis.set_major_locator(_HexLocator(self))
        axis.set_major_formatter(_HexFormatter(self))
        monospace(axis.get_ticklabels())
        axis.set_tick_params(labelfontfamily=_MONOSPACE, labelsize=_FONT_POINTS - 1.5)


class _HexLocator(Locator):
    """Ticks at multiples of 1, 2, 4 or 8 times a power of 16."""

    def __init__(self, scale: HexScale, *, wanted: int = 5) -> None:
        self._scale = scale
        self._wanted = wanted

    def __call__(self) -> list[float]:
        low, high = self.axis.get_view_interval()  # type: ignore[union-attr]
        return self.tick_values(low, high)

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        first = max(self._scale.value(min(vmin, vmax)), 0)
        # rip and the registers end at 64 bits; a margin above them must not invent a 65th.
        last = min(self._scale.value(max(vmin, vmax)), (1 << 64) - 1)
        step = 1
        while (last - first) // step > self._wanted:
            step *= 2
        start = -(-first // step) * step
        return [self._scale.place_one(tick) for tick in range(start, last + 1, step)]


class _HexFormatter(Formatter):
    """Writes a tick as the whole number it stands for, all digits of it."""

    def __init__(self, scale: HexScale) -> None:
        self._scale = scale

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{self._scale.value(x):#x}"

    def format_data_short(self, value: float) -> str:
        # The status line of an interactive window.
        return f"{self._scale.value(value):#x}"
