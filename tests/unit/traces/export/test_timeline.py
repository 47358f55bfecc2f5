"""Slices of a vcpu: one inside the other, with the lengths that the table of exits has."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmbench.host.provenance import Provenance
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.exits import ExitTable, exit_table
from kvmbench.traces.export.timeline import (
    EXIT,
    GUEST,
    RUN,
    STOPPED,
    USER,
    Lost,
    Slice,
    clock_name,
    lost_of,
    moments_of,
    slices_of,
    without_length,
)
from kvmbench.traces.run_log import ROW, RunLog


def check_nested(slices: list[Slice]) -> None:
    """Each begins no earlier than the one before it, and ends no later than the one it lies in."""
    open_slices: list[Slice] = []
    last = None
    for one in slices:
        assert one.start_ns <= one.end_ns
        assert last is None or last <= one.start_ns
        while open_slices and open_slices[-1].end_ns <= one.start_ns:
            open_slices.pop()
        assert not open_slices or one.end_ns <= open_slices[-1].end_ns
        open_slices.append(one)
        last = one.start_ns


def test_the_slices_have_the_lengths_of_the_table(traced):
    exits = traced.exits
    slices = list(slices_of(exits, 0))
    check_nested(slices)
    told = exits.guest_ns >= 0
    guest = [s for s in slices if s.kind == GUEST]
    assert [s.end_ns - s.start_ns for s in guest] == exits.guest_ns[told].tolist()
    lasting = {s.row: s.end_ns - s.start_ns for s in slices if s.kind == EXIT}
    whole = exits.kvm_ns + exits.user_ns + exits.outside_ns
    assert lasting == {n: int(whole[n]) for n in range(57) if n in lasting}
    assert sorted({*lasting, *without_length(exits, 0).tolist()}) == list(range(57))
    user = {s.row: (s.start_ns, s.end_ns - s.start_ns) for s in slices if s.kind == USER}
    answered = np.flatnonzero(exits.user_ns > 0)
    assert len(answered) == 25
    assert user == {
        n: (int(traced.log["leave_ns"][exits.log_row[n]]), int(exits.user_ns[n])) for n in answered.tolist()
    }
    assert not [s for s in slices if s.kind in (RUN, STOPPED)]


def test_without_events_of_the_processor_a_slice_is_a_kvm_run(traced):
    exits = exit_table(EventTable(), traced.log)
    slices = list(slices_of(exits, 0))
    check_nested(slices)
    runs = [s for s in slices if s.kind == RUN]
    assert [s.start_ns for s in runs] == traced.log["enter_ns"].tolist()
    assert [s.end_ns for s in runs] == traced.log["leave_ns"].tolist()
    assert len([s for s in slices if s.kind == USER]) == 25
    assert without_length(exits, 0).tolist() == [25]


def test_a_gap_begins_with_the_last_event_before_it(traced):
    last = int(traced.events["kvm_exit"].time_ns[-1])
    times = np.sort(np.concatenate([c.time_ns for c in traced.events.values()]))
    before = int(times[np.searchsorted(times, last) - 1])
    counted, uncounted = lost_of(traced.events)
    assert counted == Lost(before, last, 0, 12)
    assert uncounted == Lost(last + 5, last + 5, 1, 0)
    assert (counted.name, uncounted.name) == ("12 events lost", "events lost")


def test_exits_that_slices_show_are_no_moments_again(traced):
    assert list(moments_of(traced.events["kvm_exit"])) == []
    first = next(moments_of(traced.events["kvm_pio"]))
    assert first.values == {"rw": 1, "port": 0x3F8, "size": 1, "count": 1, "val": 0x41}


def test_the_clock_is_named_and_an_emulators_time_is_said(traced):
    assert clock_name("mono", traced.provenance) == "CLOCK_MONOTONIC, emulator time"
    assert clock_name("local", Provenance()) == "trace clock local"
    assert clock_name("", Provenance()) == "clock not told"


NUMBERS = st.integers(-1, 40)
ROWS = st.lists(st.tuples(*[NUMBERS] * 5, st.integers(0, 2), st.integers(-1, 3)), max_size=12)


@settings(max_examples=300, deadline=None)
@given(ROWS)
def test_times_that_contradict_each_other_are_cut_to_nest(rows):
    n = len(rows)
    time, guest, kvm, user, outside, isa, logged = (np.array([row[k] for row in rows], np.int64) for k in range(7))
    log = RunLog(np.zeros(4, np.int16), np.zeros(4, ROW))
    log.data["leave_ns"] = (3, 9, 20, 33)
    zeros = {name: np.zeros(n, np.uint64) for name in ("rip", "info1", "info2", "intr_info", "error_code")}
    exits = ExitTable(
        names=("HLT",),
        time_ns=np.sort(time),
        vcpu=np.zeros(n, np.int16),
        reason=np.zeros(n, np.uint16),
        guest_ns=guest,
        kvm_ns=kvm,
        user_ns=np.maximum(user, 0),
        outside_ns=np.maximum(outside, 0),
        user_exit=np.zeros(n, np.int16),
        isa=isa.astype(np.uint8),
        number=np.zeros(n, np.uint32),
        log=log,
        log_row=logged,
        **zeros,
    )
    slices = list(slices_of(exits, 0))
    check_nested(slices)
    shown = {s.row for s in slices if s.kind == EXIT} | set(without_length(exits, 0).tolist())
    assert shown == set(range(n))


def test_a_kvm_run_of_its_own_lies_in_the_exit_that_user_space_answered(traced):
    log, exits = traced.log, traced.exits
    row = int(np.flatnonzero(exits.user_ns > 0)[4])
    at = int(exits.log_row[row])
    left, gap = int(log["leave_ns"][at]), int(exits.user_ns[row])
    inserted = log.data[at : at + 1].copy()
    inserted["enter_ns"], inserted["leave_ns"] = left + gap // 4, left + gap // 2
    longer = RunLog(np.zeros(len(log) + 1, np.int16), np.insert(log.data, at + 1, inserted))
    table = exit_table(traced.events, longer)
    assert len(table) == 58
    slices = list(slices_of(table, 0))
    check_nested(slices)
    outer = next(s for s in slices if s.kind == EXIT and s.start_ns == exits.time_ns[row])
    resumed = traced.events["kvm_entry"].time_ns
    assert outer.end_ns == resumed[np.searchsorted(resumed, outer.start_ns)]
    (run,) = (s for s in slices if s.kind == RUN)
    assert (run.start_ns, run.end_ns) == (left + gap // 4, left + gap // 2)
    assert outer.start_ns <= run.start_ns
    assert run.end_ns <= outer.end_ns
