"""Lanes of vcpus over time."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import pytest
from matplotlib.collections import LineCollection, PolyCollection

from kvmbench import plot
from kvmbench.errors import MisuseError
from kvmbench.traces.exits import NOT_TOLD
from kvmbench.traces.trace import Mark

from ..traces.exit_tables import Traced, many, table, with_gap

ROWS = [
    {"time_ns": 1_000_000, "guest_ns": 40_000, "kvm_ns": 10_000, "reason": "npf"},
    {"time_ns": 1_100_000, "guest_ns": 90_000, "kvm_ns": 5_000, "user_ns": 20_000, "user_exit": 2},
]


def areas(drawn):
    """Label to (left, right) of each area, of what fills lanes."""
    found = {}
    for artist in drawn:
        if isinstance(artist, PolyCollection) and not artist.get_label().startswith("_"):
            boxes = [path.vertices for path in artist.get_paths()]
            found[artist.get_label()] = [(float(box[:, 0].min()), float(box[:, 0].max())) for box in boxes]
    return found


def test_few_exits_are_drawn_where_they_were():
    found = areas(plot.exit_timeline(table(ROWS)))
    assert found["guest"] == [(-40_000, 0), (10_000, 100_000)]
    assert found["KVM"] == [(0, 10_000), (100_000, 105_000)]
    assert found["user space answers"] == [(105_000, 125_000)]


def test_reasons_have_areas_of_their_own():
    found = areas(plot.exit_timeline(table(ROWS), by="reason"))
    assert found["npf"] == [(0, 10_000)]
    assert found["io"] == [(100_000, 125_000)]


def test_a_window_shows_what_is_in_it_and_counts_from_the_trace_s_first_exit():
    drawn = plot.exit_timeline(table(ROWS), start_ns=1_050_000, end_ns=1_102_000)
    assert areas(drawn) == {"guest": [(50_000, 100_000)], "KVM": [(100_000, 102_000)]}
    assert drawn[0].axes.get_xlim() == (50_000, 102_000)


def test_each_exit_of_few_is_named():
    texts = [t.get_text() for t in plot.exit_timeline(table(ROWS))[0].axes.texts]
    assert texts == ["npf", "io"]


def test_the_axis_has_its_unit_and_says_whose_time_it_is():
    ax = plot.exit_timeline(Traced(table(ROWS)))[0].axes
    ax.figure.canvas.draw()
    assert ax.get_xlabel() == "time since the first exit (us, emulator time)"
    low, high = ax.get_xlim()
    shown = [t.get_text() for t, at in zip(ax.get_xticklabels(), ax.get_xticks(), strict=True) if low <= at <= high]
    assert shown == ["-25", "0", "25", "50", "75", "100", "125"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["vcpu 0"]


@pytest.mark.parametrize("vcpus", [1, 64])
def test_many_exits_are_drawn_as_shares(vcpus):
    exits = many(200_000, vcpus=vcpus)
    drawn = plot.exit_timeline(exits)
    guest = next(a for a in drawn if a.get_label() == "guest")
    assert sum(len(path.vertices) for path in guest.get_paths()) < 200_000
    whole = {vcpu: (exits.guest_ns + exits.kvm_ns + exits.user_ns)[exits.vcpu == vcpu].sum() for vcpu in range(vcpus)}
    # The area of all of the guest's polygons is the guest's time, up to the height of a lane.
    areas = 0.0
    for path in guest.get_paths():
        x, y = path.vertices[:-1].T
        areas += abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() + x[-1] * y[0] - x[0] * y[-1]) / 2
    assert areas / 0.76 == pytest.approx(exits.guest_ns.sum(), rel=0.02)
    assert areas / 0.76 < sum(whole.values())


def test_lost_events_are_hatched_and_said():
    drawn = plot.exit_timeline(Traced(table(ROWS), with_gap(1_090_000, 1234)))
    (box,) = drawn[-1].get_paths()
    assert (box.vertices[:, 0].min(), box.vertices[:, 0].max()) == (0, 90_000)
    assert any("1,234 events lost in 1 gap" in t.get_text() for t in drawn[0].axes.texts)


def test_a_log_that_lost_rows_says_so():
    drawn = plot.exit_timeline(table(ROWS, lost=3))
    assert any("3 KVM_RUNs lost from the log" in t.get_text() for t in drawn[0].axes.texts)


def test_guest_and_kvm_together_are_not_called_guest():
    rows = [{"time_ns": 1_000, "guest_ns": 400, "kvm_ns": NOT_TOLD, "isa": 0, "user_ns": 50}]
    drawn = plot.exit_timeline(table(rows))
    assert set(areas(drawn)) == {"in KVM_RUN: guest and KVM together", "user space answers"}
    assert any("guest and KVM are one" in t.get_text() for t in drawn[0].axes.texts)


def test_exits_without_times_are_counted():
    drawn = plot.exit_timeline(table([*ROWS, {"time_ns": 1_200_000, "guest_ns": NOT_TOLD, "kvm_ns": NOT_TOLD}]))
    assert any("1 exit without times: not drawn" in t.get_text() for t in drawn[0].axes.texts)


def test_marks_are_named():
    marks = (Mark(1_050_000, "boot", "host", -1), Mark(9_000_000, "later", "host", -1))
    texts = [t.get_text() for t in plot.exit_timeline(Traced(table(ROWS), marks=marks))[0].axes.texts]
    assert "boot" in texts
    assert "later" not in texts


def test_marks_by_the_thousand_do_not_hide_the_lanes():
    exits = many(3000)
    marks = [Mark(int(at), "0x1", "guest", 0) for at in exits.time_ns]
    marks.append(Mark(int(exits.time_ns[1500]), "half", "host", -1))
    drawn = plot.exit_timeline(Traced(exits, marks=tuple(marks)))
    ax = drawn[0].axes
    texts = [t.get_text() for t in ax.texts]
    # What somebody wrote is read; the guest's are short lines at the foot, no more than fit beside each other.
    assert "half" in texts
    assert "0x1" not in texts
    assert any(text.endswith("3,000 marks of the guest: short lines at the foot") for text in texts)
    lines = [each for each in drawn if isinstance(each, LineCollection)]
    tall = [path.vertices[:, 1] for each in lines for path in each.get_paths()]
    assert sum(high.max() - high.min() == 1 for high in tall) == 1
    assert sum(high.max() - high.min() < 0.05 for high in tall) <= 400


def test_exits_close_together_are_named_at_two_heights():
    rows = [
        {"time_ns": at, "guest_ns": 10_000, "kvm_ns": 10_000, "reason": name}
        for at, name in [(100_000, "cpuid"), (120_000, "npf"), (900_000, "io"), (2_000_000, "io")]
    ]
    ax = plot.exit_timeline(table(rows))[0].axes
    assert [t.get_text() for t in ax.texts] == ["cpuid", "npf", "io", "io"]
    cpuid, npf, io, _ = (t.get_position()[1] for t in ax.texts)
    assert cpuid > npf
    assert cpuid == io


def test_an_exit_at_the_right_edge_is_named_left_of_its_line():
    rows = [{"time_ns": at, "guest_ns": 10_000, "kvm_ns": 1_000, "reason": "cpuid"} for at in (100_000, 900_000)]
    ax = plot.exit_timeline(table(rows))[0].axes
    assert [t.get_ha() for t in ax.texts] == ["left", "right"]
    ax.figure.canvas.draw()
    assert ax.texts[1].get_window_extent().x1 < ax.get_window_extent().x1


def test_names_of_exits_do_not_lie_on_the_lane_above():
    rows = [
        {"time_ns": at, "guest_ns": 10_000, "kvm_ns": 1_000, "vcpu": at // 100_000} for at in range(0, 600_000, 100_000)
    ]
    ax = plot.exit_timeline(table(rows))[0].axes
    ax.figure.canvas.draw()
    assert len(ax.texts) == 6
    for lane, name in enumerate(ax.texts):
        # The foot of the lane above, in dots of the canvas.
        assert name.get_window_extent().y1 < ax.transData.transform((0, lane - 1 + 0.38))[1]
    # In a figure that is too low for that there are ticks only.
    _, low = plt.subplots(figsize=(7, 2), layout="constrained")
    assert plot.exit_timeline(table(rows), ax=low)
    assert not low.texts


def test_lanes_of_shares_say_so():
    words = "stretches shorter than a dot: heights are shares of time"
    assert words in [t.get_text() for t in plot.exit_timeline(many(20_000))[0].axes.texts]
    assert words not in [t.get_text() for t in plot.exit_timeline(table(ROWS))[0].axes.texts]


def test_no_exits_are_said():
    (words,) = plot.exit_timeline(table())
    assert words.get_text() == "no exits"


def test_one_exit_has_a_lane():
    assert set(areas(plot.exit_timeline(table(ROWS[:1])))) == {"guest", "KVM"}


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ([1, 2], {}, "exit_timeline() draws a trace, as kb.trace(m) makes it, or its t.exits, not [1, 2]"),
        (table(ROWS), {"by": "resaon"}, "by='resaon': did you mean 'reason'?"),
        (table(ROWS), {"start_ns": 5, "end_ns": 5}, "start_ns=5, end_ns=5: there is no time between them"),
        (table(ROWS), {"start_ns": 1.5}, "start_ns=1.5: give an integer"),
        (table(ROWS), {"ax": 3}, "ax=3: give an Axes"),
        (table(ROWS), {"colour": 3}, "exit_timeline() has no option 'colour'"),
    ],
)
def test_something_else_is_refused(source, options, words):
    with pytest.raises(MisuseError, match=re.escape(words)):
        plot.exit_timeline(source, **options)
