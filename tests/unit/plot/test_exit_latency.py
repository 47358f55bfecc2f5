"""How long exits took, drawn by reason."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kvmbench import plot
from kvmbench.errors import MisuseError
from kvmbench.traces.exits import NOT_TOLD

from ..traces.exit_tables import Traced, many, table

ROWS = [
    *({"time_ns": 1000 * n, "kvm_ns": 100 * n, "reason": "npf"} for n in range(1, 5)),
    {"time_ns": 9_000, "kvm_ns": 2_000, "user_ns": 8_000, "user_exit": 2, "vcpu": 1},
]


def words_of(drawn):
    return [text.get_text() for text in drawn[0].axes.texts]


def test_a_curve_reaches_each_time_at_its_share():
    npf, io = plot.exit_latency(table(ROWS))
    assert npf.get_xdata().tolist() == [100, 100, 200, 300, 400]
    assert npf.get_ydata().tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    assert io.get_xdata().tolist() == [10_000, 10_000]
    assert npf.get_label() == "npf\n4: median 200 ns, 99% 400 ns"
    assert io.get_label() == "io\n1: 10.0 us"


@pytest.mark.parametrize(
    ("part", "expected"), [("span", 10_000), ("kvm", 2_000), ("user", 8_000)], ids=["span", "kvm", "user"]
)
def test_a_part_is_what_it_says(part, expected):
    assert plot.exit_latency(table(ROWS), part=part)[-1].get_xdata()[-1] == expected


def test_exits_that_kvm_dealt_with_alone_have_no_time_in_user_space():
    (io,) = plot.exit_latency(table(ROWS), part="user")
    assert io.get_label().startswith("io")
    assert words_of([io]) == ["only exits that user space answered"]


def test_vcpus_can_be_told_apart():
    assert [line.get_label().split("\n")[0] for line in plot.exit_latency(table(ROWS), by="vcpu")] == [
        "vcpu 0",
        "vcpu 1",
    ]


def test_exits_to_user_space_can_be_told_apart():
    labels = [line.get_label().split("\n")[0] for line in plot.exit_latency(table(ROWS), by="user_exit")]
    assert labels == ["KVM alone", "IO"]


def test_the_least_frequent_are_drawn_as_one():
    names = tuple("abcdef")
    rows = [{"time_ns": n, "kvm_ns": 5 + n, "reason": names[min(n % 7, 5)]} for n in range(70)]
    labels = [line.get_label().split("\n")[0] for line in plot.exit_latency(table(rows, names=names), most=2)]
    assert labels == ["f", "a", "4 others"]


def test_a_histogram_counts_each_exit_once():
    exits = many(20_000)
    for row in plot.exit_latency(exits, kind="histogram"):
        values, edges, baseline = row.get_data()
        heights = baseline - values
        assert heights.max() == pytest.approx(0.8)
        assert np.all(np.diff(np.log10(edges)) == pytest.approx(1 / 12))
    ax = row.axes
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert set(labels) == {f"{name}\n{int((exits.reasons == name).sum()):,}" for name in exits.names}


def test_a_bucket_with_one_exit_among_many_is_still_seen():
    rows = [{"time_ns": n, "kvm_ns": 1000} for n in range(5000)] + [{"time_ns": 6000, "kvm_ns": 10_000_000}]
    (row,) = plot.exit_latency(table(rows), kind="histogram")
    values, _, baseline = row.get_data()
    assert sorted((baseline - values)[values < baseline].tolist()) == pytest.approx([0.04, 0.8])


def test_the_axis_is_logarithmic_with_units_and_says_whose_time_it_is():
    ax = plot.exit_latency(Traced(table(ROWS)))[0].axes
    ax.figure.canvas.draw()
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "time from the exit until the guest ran again (logarithmic, emulator time)"
    assert {"100 ns", "1 us", "10 us"} <= {label.get_text() for label in ax.get_xticklabels()}


def test_of_times_close_to_each_other_the_axis_still_has_ticks():
    ax = plot.exit_latency(table([{"time_ns": 1, "kvm_ns": 4_500}]))[0].axes
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    shown = [t.get_text() for t, at in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True) if low <= at <= high]
    assert shown == ["2 us", "5 us", "10 us"]


def test_times_that_are_not_told_are_left_out_and_counted():
    (line,) = plot.exit_latency(table([ROWS[0], {"time_ns": 1, "kvm_ns": NOT_TOLD, "reason": "npf"}]))
    assert line.get_label() == "npf\n1: 100 ns"
    assert words_of([line]) == ["1 exit without this time left out"]


def test_of_kvm_runs_without_exits_only_the_answer_is_a_time():
    rows = [{"time_ns": n, "isa": 0, "kvm_ns": NOT_TOLD, "guest_ns": 900, "user_ns": 50 * n} for n in range(3)]
    (line,) = plot.exit_latency(table(rows))
    assert line.get_xdata().tolist() == [50, 50, 100]
    assert "the time user space took" in words_of([line])[0]


@pytest.mark.parametrize("kind", ["cdf", "histogram"])
@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "no exits"), ([{"kvm_ns": NOT_TOLD}], "no times from the exit until the guest ran again")],
    ids=["none", "untold"],
)
def test_nothing_to_draw_is_said(kind, rows, words):
    (text,) = plot.exit_latency(table(rows), kind=kind)
    assert text.get_text() == words


def test_times_of_nothing_have_a_place_on_a_logarithmic_axis():
    (line,) = plot.exit_latency(table([{"time_ns": 5, "kvm_ns": 0}]))
    assert line.get_xdata().tolist() == [1, 1]
    line.figure.canvas.draw()


def test_a_curve_of_many_is_thinned_and_keeps_both_ends():
    exits = many(100_000)
    lines = plot.exit_latency(exits)
    assert all(len(line.get_xdata()) <= 2001 for line in lines)
    npf = next(line for line in lines if line.get_label().startswith("npf"))
    times = exits.span_ns[exits.reasons == "npf"]
    assert (npf.get_xdata()[0], npf.get_xdata()[-1]) == (times.min(), times.max())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "CDF"}, "kind='CDF': did you mean 'cdf'?"),
        ({"by": "rip"}, "by='rip': there are reason, vcpu, user_exit"),
        ({"part": "all"}, "part='all': there are span, kvm, user, guest"),
        ({"most": 0}, "most=0: give at least 1 and at most 40"),
    ],
)
def test_other_words_are_refused(options, words):
    with pytest.raises(MisuseError, match=re.escape(words)):
        plot.exit_latency(table(ROWS), **options)


def test_a_median_that_is_the_99th_percentile_is_named_once():
    ax = plot.exit_latency(table([{"kvm_ns": 1000}]), kind="histogram")[0].axes
    assert [t.get_text() for t in ax.texts] == ["median, 99%"]
    ax = plot.exit_latency(many(500), kind="histogram")[0].axes
    assert [t.get_text() for t in ax.texts] == ["median", "99%"]
