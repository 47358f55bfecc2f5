"""64-bit axes keep every digit."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmbench.plot.look import HexScale, new_axes

TOP = (1 << 64) - 1


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 15), (0, TOP), (TOP - 3, TOP), (0xFFFFFFFF81000000, 0xFFFFFFFF81000021), (5, 5), (0x1000, 0x1FFF)],
)
def test_tick_labels_are_the_exact_value_of_their_place(low: int, high: int) -> None:
    ax = new_axes()[0]
    values = np.array([low, high], dtype=np.uint64)
    scale = HexScale.of(values)
    ax.plot([0, 1], scale.place(values))
    scale.apply(ax)
    ax.figure.draw_without_rendering()
    labels = [int(label.get_text(), 16) for label in ax.get_yticklabels()]
    assert len(labels) >= 2 or low == high
    assert labels == sorted(set(labels))
    assert all(0 <= label <= TOP for label in labels)
    assert [scale.place_one(label) for label in labels] == list(ax.get_yticks())


@given(st.lists(st.integers(0, TOP), min_size=1, max_size=20))
def test_ticks_are_round_numbers_in_hex(values: list[int]) -> None:
    low, high = min(values), max(values)
    scale = HexScale(low, high)
    fig = plt.figure()
    ax = fig.add_subplot()
    ax.set_ylim(scale.place_one(low), scale.place_one(high) + 1)
    scale.apply(ax)
    ticks = [scale.value(place) for place in ax.yaxis.get_major_locator()()]
    plt.close(fig)
    steps = {second - first for first, second in itertools.pairwise(ticks)}
    assert len(steps) <= 1
    assert all(step & (step - 1) == 0 for step in steps)
    assert all(tick % step == 0 for tick in ticks for step in steps)
    assert len(ticks) <= 7


@given(st.integers(0, TOP), st.integers(0, 1 << 40))
def test_neighbouring_values_have_places_of_their_own(low: int, span: int) -> None:
    high = min(low + span, TOP)
    scale = HexScale(low, high)
    places = scale.place(np.array([low, high], dtype=np.uint64))
    assert places[1] - places[0] == high - low
    assert scale.value(float(places[1])) == high
