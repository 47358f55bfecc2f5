"""Two traces held against each other: before and after, with confidence intervals.

The interval of a difference of means is Welch's, of a median that between two order statistics: neither takes the
times to be normally distributed, both take them to be independent. Exits that come in bursts are not quite, so an
interval is rather too narrow than too wide; several runs of each tell more than one long one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.traces.exits import NOT_TOLD, ExitTable
from kvmbench.traces.keyed_table import KeyedTable
from kvmbench.traces.places import Places
from kvmbench.traces.summary import group_exits
from kvmbench.traces.words import show_ns

if TYPE_CHECKING:
    import pandas as pd

# Degrees of freedom from which Student's t distribution is told by its distance to the normal one.
_NEARLY_NORMAL = 1000.0


@dataclass(frozen=True)
class Side:
    """One side of a row: exits of a kind in one trace.

    Attributes:
        count: how many.
        timed: of how many the span is known.
        total_ns: of the span, of those that are known.
        mean_ns, median_ns: of the span; None where none is known.
        median_interval_ns: of the median; None below six values, for there is none.
    """

    count: int
    timed: int
    total_ns: int
    mean_ns: float | None
    median_ns: float | None
    median_interval_ns: tuple[float, float] | None


@dataclass(frozen=True)
class ComparisonRow:
    """Exits of a kind, before and after.

    Attributes:
        key: what they have in common, a value for each of `Comparison.by`.
        before, after: the two sides.
        difference_ns: of the means, after less before; None where one is not known.
        interval_ns: of that difference; None with fewer than two values on a side.
    """

    key: tuple[str, ...]
    before: Side
    after: Side
    difference_ns: float | None
    interval_ns: tuple[float, float] | None

    @property
    def changed(self) -> bool | None:
        """Whether the interval leaves out zero; None if there is none."""
        if self.interval_ns is None:
            return None
        return not self.interval_ns[0] <= 0 <= self.interval_ns[1]

    @property
    def ratio(self) -> float | None:
        """Mean after by mean before."""
        if not self.before.mean_ns or self.after.mean_ns is None:
            return None
        return self.after.mean_ns / self.before.mean_ns


class Comparison(KeyedTable[ComparisonRow]):
    """Rows, those whose total time differs most first.

    Attributes:
        confidence: of the intervals, such as 0.95.
    """

    _words_at_the_end = 1

    def __init__(
        self,
        rows: Sequence[ComparisonRow],
        *,
        by: tuple[str, ...],
        confidence: float,
        clock: str = "",
        warnings: tuple[str, ...] = (),
    ) -> None:
        super().__init__(rows, by=by, clock=clock, warnings=warnings)
        self.confidence = confidence

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas frame with a row a kind."""
        import pandas as pd

        columns: dict[str, list[Any]] = {name: [row.key[n] for row in self] for n, name in enumerate(self.by)}
        for side in ("before", "after"):
            for name in ("count", "timed", "total_ns", "mean_ns", "median_ns"):
                columns[f"{side}_{name}"] = [getattr(getattr(row, side), name) for row in self]
        columns["difference_ns"] = [row.difference_ns for row in self]
        columns["least_ns"] = [row.interval_ns[0] if row.interval_ns else None for row in self]
        columns["most_ns"] = [row.interval_ns[1] if row.interval_ns else None for row in self]
        columns["changed"] = [row.changed for row in self]
        return pd.DataFrame(columns)

    def _head(self) -> list[str]:
        sides = [f"{what} {side}" for what in ("count", "total", "mean") for side in ("before", "after")]
        return [*sides, "difference of means", f"{self.confidence * 100:g}% interval", ""]

    def _cells(self, row: ComparisonRow) -> list[str]:
        words = {None: "", True: "changed", False: "no difference seen"}
        return [
            f"{row.before.count:,}",
            f"{row.after.count:,}",
            show_ns(row.before.total_ns),
            show_ns(row.after.total_ns),
            show_ns(row.before.mean_ns),
            show_ns(row.after.mean_ns),
            _signed(row.difference_ns) + (f" ({row.ratio:.2f} x)" if row.ratio is not None else ""),
            f"{_signed(row.interval_ns[0])} to {_signed(row.interval_ns[1])}" if row.interval_ns else "",
            words[row.changed],
        ]

    def _below(self) -> list[str]:
        clock = [f"times are {self.clock}"] if self.clock else []
        return [*clock, *super()._below()]


def _signed(ns: float | None) -> str:
    return "" if ns is None else f"{'-' if ns < 0 else '+'}{show_ns(abs(ns))}"


def compare(
    before: ExitTable,
    after: ExitTable,
    by: tuple[str, ...],
    *,
    places: tuple[Places, Places],
    confidence: float,
    clock: str = "",
    warnings: tuple[str, ...] = (),
) -> Comparison:
    """Compares the spans of two tables' exits.

    Args:
        before, after: the tables.
        by: some of `summary.KEYS`.
        places: of each table, what is at its addresses.
        confidence: above 0 and below 1.
        clock: what to write beside times.
        warnings: what makes the two hard to compare.
    """
    sides = [_spans(table, by, of) for table, of in zip((before, after), places, strict=True)]
    keys = list(dict.fromkeys([*sides[0], *sides[1]]))
    nothing = (0, np.zeros(0, np.int64))
    rows = []
    for key in keys:
        one, two = sides[0].get(key, nothing), sides[1].get(key, nothing)
        difference, interval = _difference(one[1], two[1], confidence)
        rows.append(ComparisonRow(key, _side(*one, confidence), _side(*two, confidence), difference, interval))
    rows.sort(key=lambda row: -abs(row.after.total_ns - row.before.total_ns))
    return Comparison(rows, by=by, confidence=confidence, clock=clock, warnings=warnings)


def _spans(
    table: ExitTable, by: tuple[str, ...], places: Places
) -> dict[tuple[str, ...], tuple[int, NDArray[np.int64]]]:
    span = table.span_ns
    found = {}
    for key, at in group_exits(table, by, places):
        values = span[at]
        found[key] = len(at), np.sort(values[values != NOT_TOLD])
    return found


def _side(count: int, values: NDArray[np.int64], confidence: float) -> Side:
    if not len(values):
        return Side(count, 0, 0, None, None, None)
    interval = median_interval(values, confidence)
    total = int(values.sum())
    return Side(count, len(values), total, total / len(values), float(np.median(values)), interval)


def median_interval(ordered: NDArray[np.int64], confidence: float) -> tuple[float, float] | None:
    """Between which two values the median lies with that confidence, whatever the distribution.

    Args:
        ordered: values in ascending order.
        confidence: above 0 and below 1.
    """
    n = len(ordered)
    # How many of n values lie below the median is binomial: cut off half of what is left on either side.
    allowed = (1 - confidence) / 2
    if 0.5**n > allowed:
        return None
    if n > 1000:
        # One less than that of the normal distribution, which is a little too high for some.
        rank = max(0, int(n / 2 - NormalDist().inv_cdf(1 - allowed) * math.sqrt(n) / 2) - 1)
    else:
        rank, below = 0, 0.0
        while below + math.comb(n, rank) * 0.5**n <= allowed:
            below += math.comb(n, rank) * 0.5**n
            rank += 1
        rank -= 1
    return float(ordered[rank]), float(ordered[n - 1 - rank])


def _difference(
    one: NDArray[np.int64], two: NDArray[np.int64], confidence: float
) -> tuple[float | None, tuple[float, float] | None]:
    if not len(one) or not len(two):
        return None, None
    difference = float(two.mean() - one.mean())
    if len(one) < 2 or len(two) < 2:
        return difference, None
    parts = [float(values.var(ddof=1)) / len(values) for values in (one, two)]
    variance = sum(parts)
    if variance == 0:
        return difference, (difference, difference)
    freedom = variance**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (one, two), strict=True))
    half = student_quantile((1 + confidence) / 2, freedom) * math.sqrt(variance)
    return difference, (difference - half, difference + half)


def student_quantile(p: float, freedom: float) -> float:
    """The p-quantile of Student's t distribution.

    Args:
        p: above 0.5 and below 1.
        freedom: degrees of freedom, at least 1; need not be whole.
    """
    if freedom > _NEARLY_NORMAL:
        # Its expansion about the normal distribution; a sum of a fixed number of terms would be too coarse.
        z = NormalDist().inv_cdf(p)
        return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    # Bisection on the distribution itself, whose tail is a sum of a well-behaved function.
    low, high = 0.0, 1.0
    while _student_tail(high, freedom) > 1 - p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        if _student_tail(middle, freedom) > 1 - p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_tail(t: float, freedom: float) -> float:
    # P(T > t) with t = sqrt(freedom) * tan(angle): an integral of cos(angle) ** (freedom - 1) over a finite range.
    start = math.atan(t / math.sqrt(freedom))
    angle = np.linspace(start, math.pi / 2, 4001)
    values = np.cos(angle) ** (freedom - 1)
    if freedom < 1.5:
        values[-1] = values[-2]
    weights = np.full(len(angle), 2.0)
    weights[1::2] = 4.0
    weights[[0, -1]] = 1.0
    integral = float((values * weights).sum()) * (angle[1] - angle[0]) / 3
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return float(scale * integral)
