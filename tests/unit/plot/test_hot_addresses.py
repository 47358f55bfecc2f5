"""Bars count how often each instruction ran."""

from __future__ import annotations

import pytest

from kvmbench import plot
from kvmbench.debug.record import StepRecord
from kvmbench.errors import MisuseError


def labels_of(bars: object) -> list[str]:
    axes = bars.patches[0].axes  # type: ignore[attr-defined]
    return [label.get_text().split("  ")[0] for label in axes.get_yticklabels()]


def test_the_most_frequent_come_first(rec: StepRecord) -> None:
    bars = plot.hot_addresses(rec)
    assert [bar.get_width() for bar in bars] == [12, 12, 12, 1, 1]
    assert labels_of(bars) == ["0x1010", "0x1013", "0x1014", "0x1000", "0x1020"]


def test_bars_can_be_symbols(rec: StepRecord) -> None:
    bars = plot.hot_addresses(rec, by="symbol")
    assert labels_of(bars) == ["loop", "start", "done"]
    assert [bar.get_width() for bar in bars] == [36, 1, 1]


def test_the_number_of_bars_is_bounded(rec: StepRecord) -> None:
    assert len(plot.hot_addresses(rec, count=2).patches) == 2


def test_bad_options_are_refused(rec: StepRecord) -> None:
    with pytest.raises(MisuseError, match="count = 0"):
        plot.hot_addresses(rec, count=0)
    with pytest.raises(MisuseError, match="by = 'line'"):
        plot.hot_addresses(rec, by="line")
