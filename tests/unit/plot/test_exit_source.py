"""What figures of exits have in common: source, window, gaps, provenance; and axes of time."""

from __future__ import annotations

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kvmbench import plot
from kvmbench.errors import MisuseError
from kvmbench.plot.exit_source import most_frequent, open_window, shade_gaps, vcpu_names
from kvmbench.plot.time_axis import duration, linear_time_axis, log_edges, log_limits, unit_of
from kvmbench.traces.event_table import EventTable, Gap

from ..traces.exit_tables import Traced, many, table

FIGURES = [plot.exit_timeline, plot.exit_latency, plot.exit_heat_map, plot.exit_flame]


@pytest.mark.parametrize("draw", FIGURES)
def test_a_saved_figure_says_where_its_exits_come_from(draw, tmp_path):
    (path,) = plot.save(draw(Traced(many(50))), tmp_path / "exits.svg")
    assert "kvm_amd, QEMU (TCG) 7.2: times are emulator time" in path.read_text()


@pytest.mark.parametrize("draw", FIGURES)
def test_a_figure_is_drawn_into_the_axes_given(draw):
    _, ax = plt.subplots()
    assert draw(many(50), ax=ax)[0].axes is ax
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("source", [None, "trace", SimpleNamespace(exits=3)])
def test_what_has_no_exits_is_refused(draw, source):
    with pytest.raises(MisuseError, match=r"draws a trace, as kb\.trace\(m\) makes it, or its t\.exits"):
        draw(source)


@pytest.mark.parametrize("draw", FIGURES)
def test_a_window_without_exits_says_where_there_are_some(draw):
    # Such as times read off an axis, which counts from the first exit.
    exits = many(50)
    (words,) = draw(exits, start_ns=5, end_ns=6)
    first, last = exits.time_ns[[0, -1]].tolist()
    assert words.get_text() == f"no exits between start_ns=5 and end_ns=6;\nt.exits.time_ns is {first} to {last}"


def test_a_trace_reaches_from_the_first_guest_s_run_to_the_end_of_the_last_exit():
    rows = [{"time_ns": 100, "guest_ns": 30}, {"time_ns": 105, "guest_ns": 60, "vcpu": 1, "kvm_ns": 8}]
    window = open_window(table(rows), "f", None, start_ns=None, end_ns=None)
    assert (window.start_ns, window.zero_ns, window.end_ns) == (45, 100, 114)


def test_gaps_that_meet_are_one():
    gaps = [Gap(10**12 + n, 0, 1) for n in range(0, 4_000_000, 1000)]
    window = open_window(Traced(many(3000), EventTable(gaps=gaps)), "f", None, start_ns=None, end_ns=None)
    (bars,) = shade_gaps(plt.gca(), window)
    assert 1 <= len(bars.get_paths()) <= 400


def test_a_gap_reaches_back_to_the_last_exit_before_it():
    rows = [{"time_ns": 1000}, {"time_ns": 2000}, {"time_ns": 9000}]
    trace = Traced(table(rows), EventTable(gaps=[Gap(8000, 1, 5)]))
    (bars,) = shade_gaps(plt.gca(), open_window(trace, "f", None, start_ns=None, end_ns=None))
    x = bars.get_paths()[0].vertices[:, 0]
    assert (x.min(), x.max()) == (1000, 7000)


def test_vcpus_are_called_what_the_trace_calls_them():
    trace = SimpleNamespace(data=SimpleNamespace(labels=("boot",)))
    assert vcpu_names(trace, [0, 1]) == ["boot", "vcpu 1"]


def test_the_least_frequent_are_one():
    codes = np.array([3, 3, 3, 0, 0, 1, 2])
    place, names = most_frequent(codes, ("a", "b", "c", "d"), 2)
    assert names == ["d", "a", "2 others"]
    assert place.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_one_that_is_left_over_keeps_its_name():
    assert most_frequent(np.array([0, 0, 1]), ("a", "b"), 1)[1] == ["a", "b"]


def test_weights_decide_where_they_are_given():
    assert most_frequent(np.array([0, 0, 1]), ("a", "b"), 1, weights=np.array([1, 1, 9]))[1] == ["b", "a"]


@pytest.mark.parametrize(
    ("time_ns", "words"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_000, "1.00 us"),
        (12_345, "12.3 us"),
        (999_400, "999 us"),
        (999_600, "1.00 ms"),
        (2_500_000_000, "2.50 s"),
        (1_234_000_000_000, "1,234 s"),
    ],
)
def test_a_time_in_words_has_three_digits(time_ns, words):
    assert duration(time_ns) == words


def test_the_unit_suits_the_span():
    assert [unit_of(span)[1] for span in (0, 1500, 2000, 5e6, 5e9)] == ["ns", "ns", "us", "ms", "s"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 3_500_000, ["0.0", "0.5", "1.0"]), (5e6, 25e6, ["5", "10", "15"]), (0, 6e9, ["0", "1,000", "2,000"])],
)
def test_ticks_are_round_in_the_unit_written_and_have_digits_alike(low, high, expected):
    ax = plt.gca()
    ax.set_xlim(low, high)
    linear_time_axis(ax, "time (ms)", 10**6)
    ax.figure.canvas.draw()
    shown = [t.get_text() for t, at in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True) if low <= at <= high]
    assert shown[:3] == expected


def test_logarithmic_buckets_hold_all_times():
    times = np.array([1, 17, 10**9])
    edges = log_edges(times)
    assert np.histogram(times, edges)[0].sum() == 3
    assert edges[0] < 1
    assert edges[-1] > 10**9


def test_limits_are_a_decade_apart_at_least():
    low, high = log_limits(50, 50)
    assert high / low == pytest.approx(10)
