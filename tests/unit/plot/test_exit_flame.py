"""Frames of exits: shares, order of time, nested guests."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kvmbench import plot
from kvmbench.errors import MisuseError
from kvmbench.plot.exit_frames import by_share, in_order, levels_of
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.exits import NOT_TOLD

from ..traces.exit_tables import Traced, many, nested_exits, table

IO = {"guest_ns": 40, "kvm_ns": 10, "user_ns": 30, "user_exit": 2, "rip": 0x1004}
NPF = {"guest_ns": 60, "kvm_ns": 20, "reason": "npf", "rip": 0x1008}
ROWS = [{"time_ns": 100, **IO}, {"time_ns": 200, **NPF}, {"time_ns": 260, **IO}]
NAMES = ("io", "npf", "cpuid", "vmrun", "vmload")


def frames(exits, events=None, order="share"):
    """(depth, label, begin, width) of all frames."""
    levels = levels_of(exits, events or EventTable())
    found = by_share(exits, levels, hex) if order == "share" else in_order(exits, levels, 0, hex)
    return sorted((f.depth, f.begin_ns, f.label, f.width_ns) for f in found)


def test_what_has_the_same_path_is_one_frame():
    assert frames(table(ROWS)) == [
        (0, 0, "guest", 140),
        (0, 140, "io", 80),
        (0, 220, "npf", 20),
        (1, 140, "user space: IO", 60),
        (1, 200, "KVM", 20),
        (1, 220, "KVM", 20),
        (2, 140, "0x1004", 60),
        (2, 200, "0x1004", 20),
        (2, 220, "0x1008", 20),
    ]


def test_in_order_exits_stay_where_they_were():
    found = frames(table(ROWS[:2]), order="time")
    assert [frame for frame in found if frame[0] == 0] == [
        (0, 60, "guest", 40),
        (0, 100, "io", 40),
        (0, 140, "guest", 60),
        (0, 200, "npf", 20),
    ]
    assert (1, 110, "user space: IO", 30) in found


def test_in_order_kvm_before_and_after_user_space_is_one_exit():
    found = frames(table([{"time_ns": 100, **IO}], leave_ns=[104]), order="time")
    assert (0, 100, "io", 40) in found
    assert [frame[1:] for frame in found if frame[0] == 1] == [
        (100, "KVM", 4),
        (104, "user space: IO", 30),
        (134, "KVM", 6),
    ]


def nested():
    # L2 runs CPUID; its hypervisor looks at it, does a VMLOAD and goes back with VMRUN.
    rows = [
        {"time_ns": 100, "guest_ns": 100, "kvm_ns": 5, "reason": "vmrun"},
        {"time_ns": 205, "guest_ns": 100, "kvm_ns": 10, "reason": "cpuid"},
        {"time_ns": 230, "guest_ns": 15, "kvm_ns": 20, "reason": "vmload"},
        {"time_ns": 257, "guest_ns": 7, "kvm_ns": 8, "reason": "vmrun"},
        {"time_ns": 300, "guest_ns": 35, "kvm_ns": 3, "reason": "npf"},
    ]
    return table(rows, names=NAMES), nested_exits(206, 301)


def test_exits_of_a_nested_guest_are_known_by_the_event_behind_them():
    levels = levels_of(*nested())
    assert levels.from_l2.tolist() == [False, True, False, False, True]
    assert levels.under.tolist() == [-1, -1, 1, 1, -1]


def test_what_a_hypervisor_does_lies_below_the_exit_of_its_guest():
    found = frames(*nested())
    assert [(label, width) for depth, _, label, width in found if depth == 0] == [
        ("L2 guest", 135),
        ("L1 guest", 100),
        ("L2 cpuid", 60),
        ("L1 vmrun", 5),
        ("L2 npf", 3),
    ]
    assert {(label, width) for depth, begin, label, width in found if depth == 1 and 235 <= begin < 295} == {
        ("L1 guest", 22),
        ("L1 vmload", 20),
        ("KVM", 10),
        ("L1 vmrun", 8),
    }
    assert (2, "KVM", 20) in {(depth, label, width) for depth, _, label, width in found}


def test_in_order_an_exit_of_l2_is_open_until_l2_runs_again():
    found = frames(*nested(), order="time")
    assert [frame[1:] for frame in found if frame[0] == 0] == [
        (0, "L1 guest", 100),
        (100, "L1 vmrun", 5),
        (105, "L2 guest", 100),
        (205, "L2 cpuid", 60),
        (265, "L2 guest", 35),
        (300, "L2 npf", 3),
    ]
    assert [frame[1:3] for frame in found if frame[0] == 1 and 205 <= frame[1] < 265] == [
        (205, "KVM"),
        (215, "L1 guest"),
        (230, "L1 vmload"),
        (250, "L1 guest"),
        (257, "L1 vmrun"),
    ]


def test_a_window_that_begins_inside_an_exit_of_l2_still_has_it_around():
    exits, events = nested()
    drawn = plot.exit_flame(Traced(exits, events), order="time", start_ns=225, end_ns=299)
    texts = [text.get_text() for text in drawn[0].axes.texts]
    assert "L2 cpuid 50 ns" in texts
    assert texts[0].startswith("L2: nested guest, L1: its hypervisor")


def test_frames_of_many_exits_are_their_times():
    exits = many(50_000, vcpus=2)
    found = by_share(exits, levels_of(exits, EventTable()), hex)
    total = sum(frame.width_ns for frame in found if frame.depth == 0)
    assert total == (exits.guest_ns + exits.kvm_ns + exits.user_ns).sum()
    by_reason = {frame.label: frame.width_ns for frame in found if frame.depth == 0}
    npf = exits.reasons == "npf"
    assert by_reason["npf"] == exits.span_ns[npf].sum()
    assert len([frame for frame in found if frame.depth == 2 and frame.label == "other addresses"]) == 4


def test_instructions_with_the_most_time_keep_their_frames():
    rows = [{"time_ns": 1000 * n, "kvm_ns": 1 + n, "rip": 0x1000 + n} for n in range(100)]
    labels = [label for depth, _, label, _ in frames(table(rows)) if depth == 2]
    assert len(labels) == 61
    assert hex(0x1000 + 99) in labels
    assert hex(0x1000) not in labels
    assert labels[-1] == "other addresses"


def test_instructions_are_named_by_symbols():
    drawn = plot.exit_flame(table(ROWS), symbols={"start": 0x1000, "fault": 0x1008})
    texts = [text.get_text() for text in drawn[0].axes.texts]
    assert "start 25%" in texts


def test_the_guest_and_kvm_together_are_not_called_guest():
    drawn = plot.exit_flame(table([{"time_ns": 100, "guest_ns": 80, "kvm_ns": NOT_TOLD, "isa": 0, "outside_ns": 5}]))
    legend = [text.get_text() for text in drawn[0].axes.get_legend().get_texts()]
    assert legend == ["guest and KVM"]
    words = drawn[0].axes.texts[0].get_text()
    assert words == "no exits of the processor were told: guest and KVM are one; without 5 ns in which vcpus stood"


def test_the_axis_has_its_unit_and_says_whose_time_it_is():
    ax = plot.exit_flame(Traced(table(ROWS)))[0].axes
    assert ax.get_xlabel() == "time (ns, emulator time)"
    assert ax.get_xlim() == (0, 240)


@pytest.mark.parametrize("order", ["share", "time"])
def test_nothing_to_draw_is_said(order):
    (words,) = plot.exit_flame(table(), order=order)
    assert words.get_text() == "no exits"
    (words,) = plot.exit_flame(table([{"guest_ns": NOT_TOLD, "kvm_ns": NOT_TOLD}]), order=order)
    assert words.get_text() == "no times are told"


@pytest.mark.parametrize("order", ["share", "time"])
def test_one_exit_is_drawn(order):
    drawn = plot.exit_flame(table(ROWS[:1]), order=order)
    drawn[0].figure.canvas.draw()
    assert "io" in " ".join(text.get_text() for text in drawn[0].axes.texts)


def test_vcpus_are_drawn_together_or_one_by_one():
    exits = many(400, vcpus=2)
    both = plot.exit_flame(exits)[0].axes.get_xlim()[1]
    each = [plot.exit_flame(exits, vcpu=vcpu)[0].axes.get_xlim()[1] for vcpu in (0, 1)]
    assert sum(each) == both


@pytest.mark.parametrize(
    ("exits", "options", "words"),
    [
        (many(20, vcpus=2), {"order": "time"}, "order='time' draws one vcpu: give vcpu, one of 0, 1"),
        (many(4000), {"order": "time"}, "order='time' draws at most 3,000 exits, not 4,000: give start_ns and end_ns"),
        (table(ROWS), {"order": "size"}, "order='size': there are share, time"),
        (table(ROWS), {"vcpu": 7}, "vcpu=7: these have exits here: 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(exits, options, words):
    with pytest.raises(MisuseError, match=re.escape(words)):
        plot.exit_flame(exits, **options)


def test_narrow_frames_are_not_drawn():
    exits = many(100_000)
    boxes = sum(len(artist.get_paths()) for artist in plot.exit_flame(exits) if hasattr(artist, "get_paths"))
    assert boxes < 400
    assert np.all(exits.guest_ns >= 0)
