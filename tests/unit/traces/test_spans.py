"""Stretches of a vcpu's time out of a table of exits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvmbench.traces.exits import NOT_TOLD
from kvmbench.traces.spans import Place, covered, spans_of, told

from .exit_tables import many, table


def stretches(exits, vcpu=0):
    spans = spans_of(exits, vcpu)
    columns = (spans.begin_ns.tolist(), spans.end_ns.tolist(), [Place(p) for p in spans.place], spans.row.tolist())
    return list(zip(*columns, strict=True))


def test_an_exit_is_guest_then_kvm():
    exits = table([{"time_ns": 100, "guest_ns": 40, "kvm_ns": 7}])
    assert stretches(exits) == [(60, 100, Place.GUEST, 0), (100, 107, Place.KVM, 0)]


def test_kvm_time_is_on_both_sides_of_user_space():
    row = {"time_ns": 100, "guest_ns": 10, "kvm_ns": 30, "user_ns": 50, "user_exit": 2}
    assert stretches(table([row], leave_ns=[112])) == [
        (90, 100, Place.GUEST, 0),
        (100, 112, Place.KVM, 0),
        (112, 162, Place.USER, 0),
        (162, 180, Place.KVM, 0),
    ]


def test_a_kvm_run_without_exits_is_guest_and_kvm_together():
    row = {"time_ns": 100, "guest_ns": 40, "kvm_ns": NOT_TOLD, "user_ns": 5, "isa": 0}
    assert stretches(table([row])) == [(60, 100, Place.TOGETHER, 0), (100, 105, Place.USER, 0)]


def test_what_is_not_told_is_no_stretch():
    assert stretches(table([{"time_ns": 100, "guest_ns": NOT_TOLD, "kvm_ns": NOT_TOLD}])) == []


def test_stretches_do_not_overlap_whatever_the_numbers_claim():
    rows = [
        {"time_ns": 100, "guest_ns": 10, "kvm_ns": 500},
        {"time_ns": 150, "guest_ns": 20, "kvm_ns": 5},
        {"time_ns": 160, "guest_ns": 90, "kvm_ns": 1},
    ]
    found = stretches(table(rows))
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(found))
    assert (100, 130, Place.KVM, 0) in found


def test_each_vcpu_has_its_own():
    exits = table([{"time_ns": 10, "guest_ns": 3}, {"time_ns": 12, "guest_ns": 5, "vcpu": 1}])
    assert stretches(exits, 1) == [(7, 12, Place.GUEST, 1)]


def test_times_without_holes_stay_without_holes():
    exits = many(5000, vcpus=3)
    spans = spans_of(exits, 1)
    assert np.array_equal(spans.begin_ns[1:], spans.end_ns[:-1])
    mine = exits.vcpu == 1
    assert np.diff([spans.begin_ns[0], spans.end_ns[-1]]) == (exits.guest_ns + exits.kvm_ns + exits.user_ns)[mine].sum()


def test_buckets_are_covered_in_parts():
    share = covered(np.array([0, 30]), np.array([10, 35]), np.array([0.0, 20.0, 40.0, 60.0]))
    assert share.tolist() == [0.5, 0.25, 0.0]


def test_nothing_covers_nothing():
    assert covered(np.zeros(0, np.int64), np.zeros(0, np.int64), np.array([0.0, 1.0])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], (False, False, 0)),
        ([{"isa": 0, "kvm_ns": NOT_TOLD}], (True, True, 0)),
        ([{"isa": 0}, {"kvm_ns": NOT_TOLD}, {}], (True, False, 1)),
    ],
)
def test_what_times_leave_open_is_counted(rows, expected):
    assert told(table(rows)) == expected
