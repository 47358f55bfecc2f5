"""Axes of times: units that suit the span, round ticks, logarithmic ones with a unit at each tick."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import Formatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from kvmbench.plot import look

#: Of each, nanoseconds it has and its name; the largest first.
UNITS = ((10**9, "s"), (10**6, "ms"), (10**3, "us"), (1, "ns"))


def unit_of(span_ns: float) -> tuple[int, str]:
    """The unit in which a span is a number of one to four digits: (nanoseconds, name)."""
    return next(((size, name) for size, name in UNITS if span_ns >= 2 * size), UNITS[-1])


def duration(time_ns: float) -> str:
    """A time in words of three digits: "4.21 us"."""
    size, name = next(((size, name) for size, name in UNITS if time_ns >= 0.9995 * size), UNITS[-1])
    value = time_ns / size
    if size == 1:
        return f"{value:,.0f} {name}"
    return f"{value:,.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {name}"


def linear_time_axis(ax: Axes, xlabel: str, size: int) -> None:
    """Ticks at round numbers of a unit of `size` nanoseconds, on an x axis that is in nanoseconds."""
    ax.xaxis.set_major_locator(_UnitLocator(size))
    ax.xaxis.set_major_formatter(_UnitFormatter(size))
    look.dress(ax, xlabel=xlabel)


class _UnitFormatter(Formatter):
    """Writes all ticks with as many digits behind the point as the distance between them has."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._digits = 0

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        step = (values[1] - values[0]) / self._size if len(values) > 1 else 1.0
        self._digits = next((n for n in range(9) if abs(round(step, n) - step) < 1e-6 * step), 9)
        return [self(value) for value in values]

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x / self._size + 0.0:,.{self._digits}f}"


class _UnitLocator(MaxNLocator):
    """Ticks at round numbers of a unit that is `size` times that of the axis."""

    def __init__(self, size: int) -> None:
        super().__init__(nbins=7, steps=[1, 2, 2.5, 5, 10])
        self._size = size

    def tick_values(self, vmin: float, vmax: float) -> Sequence[float]:
        return [tick * self._size for tick in super().tick_values(vmin / self._size, vmax / self._size)]


def log_time_axis(axis: Axis) -> None:
    """Ticks with their unit, "10 us", on an axis that is logarithmic, in nanoseconds, and has its limits."""
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if high < 150 * low else (1,), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: duration(x).replace(".00", "").replace(".0 ", " ")))
    axis.set_minor_formatter(NullFormatter())


def log_edges(values: npt.NDArray[np.int64], *, a_decade: int = 12) -> npt.NDArray[np.float64]:
    """Edges of buckets that are as wide as each other on a logarithmic axis, for times of at least 1 ns."""
    low, high = np.log10(max(int(values.min()), 1)), np.log10(max(int(values.max()), 1))
    first = np.floor(low * a_decade - 0.5)
    last = np.ceil(high * a_decade + 0.5)
    return np.asarray(10 ** (np.arange(first, last + 1) / a_decade))


def log_limits(low: float, high: float) -> tuple[float, float]:
    """Limits with some room, and at least a decade apart: with fewer ticks than that an axis says nothing."""
    spread = max(1.15, (10 * low / high) ** 0.5)
    return low / spread, high * spread
