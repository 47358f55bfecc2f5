"""Exits out of made-up events and rows of the log, nanosecond by nanosecond."""

from __future__ import annotations

import numpy as np
import pytest

from kvmbench.traces.assemble import attribute, run_log
from kvmbench.traces.event_table import EventTable, Gap
from kvmbench.traces.exits import NO_USER_EXIT, NOT_TOLD, exit_table
from kvmbench.uapi import ExitReason

from .made_up import HLT, IO, VCPUS, kvm_entry, kvm_exit, kvm_userspace_exit, log_of, rows, table

CPUID = 10


def exits_of(events, log):
    return exit_table(attribute(events, log, VCPUS), log)


def spans(exits):
    columns = (exits.guest_ns, exits.kvm_ns, exits.user_ns, exits.outside_ns)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_the_time_of_an_answered_exit_is_split_into_guest_kvm_and_user_space():
    events = table((100, kvm_entry()), (200, kvm_exit(IO)), (410, kvm_entry()), (500, kvm_exit(HLT)))
    exits = exits_of(events, log_of((100, rows((90, 250, ExitReason.IO), (400, 520, ExitReason.HLT)))))
    assert exits.reasons.tolist() == ["IO_INSTRUCTION", "HLT"]
    # 200 to 250 and 400 to 410 in KVM; the last exit's ends with KVM_RUN.
    assert spans(exits) == [(100, 60, 150, 0), (90, 20, 0, 0)]
    assert exits.user_exit.tolist() == [ExitReason.IO, ExitReason.HLT]
    assert exits.log_row.tolist() == [0, 1]
    assert exits.span_ns.tolist() == [210, 20]


def test_what_a_guest_stands_is_no_time_of_its_exit():
    events = table((100, kvm_entry()), (200, kvm_exit(HLT)), (910, kvm_entry()), (920, kvm_exit(HLT)))
    exits = exits_of(events, log_of((100, rows((90, 250, ExitReason.HLT), (900, 930, ExitReason.HLT)))))
    assert spans(exits) == [(100, 60, 0, 650), (10, 10, 0, 0)]
    assert exits.span_ns.tolist() == [60, 10]


def test_an_exit_that_kvm_deals_with_alone_has_no_user_space():
    events = table((100, kvm_entry()), (200, kvm_exit(CPUID)), (230, kvm_entry()), (300, kvm_exit(CPUID)))
    exits = exits_of(events, log_of((100, rows((90, 400, ExitReason.HLT)))))
    assert spans(exits) == [(100, 30, 0, 0), (70, 100, 0, 0)]
    assert exits.user_exit.tolist() == [NO_USER_EXIT, ExitReason.HLT]


def test_without_a_log_the_last_exit_is_open():
    events = table((100, kvm_entry()), (200, kvm_exit(CPUID)), (230, kvm_entry()), (300, kvm_exit(CPUID)))
    marked = attribute(events, log_of((100, rows((90, 400, ExitReason.HLT)))), VCPUS)
    exits = exit_table(marked, log_of())
    assert spans(exits) == [(100, 30, 0, 0), (70, NOT_TOLD, 0, 0)]
    assert exits.span_ns.tolist() == [30, NOT_TOLD]


@pytest.mark.parametrize(
    ("lost", "guest", "kvm"),
    [
        # Of entry 100, exit 200, entry 230, exit 300, entry 350, exit 360.
        ((100,), [NOT_TOLD, 70, 10], [30, 50, 40]),
        ((230,), [100, NOT_TOLD, 10], [NOT_TOLD, 50, 40]),
        ((200,), [70, 10], [50, 40]),
        ((230, 300), [100, 10], [150, 40]),
        ((100, 230, 350), [NOT_TOLD] * 3, [NOT_TOLD] * 3),
    ],
)
def test_where_events_are_lost_only_what_they_told_is_not_told(lost, guest, kvm):
    whole = [(100, kvm_entry()), (200, kvm_exit(CPUID)), (230, kvm_entry()), (300, kvm_exit(CPUID))]
    whole += [(350, kvm_entry()), (360, kvm_exit(HLT))]
    exits = exits_of(table(*(e for e in whole if e[0] not in lost)), log_of((100, rows((90, 400, ExitReason.HLT)))))
    assert exits.guest_ns.tolist() == guest
    assert exits.kvm_ns.tolist() == kvm


def test_a_kvm_run_without_an_exit_of_the_processor_is_a_row_by_itself():
    events = table((100, kvm_entry()), (200, kvm_exit(IO)), (410, kvm_entry()), (500, kvm_exit(HLT)))
    log = log_of((100, rows((90, 250, ExitReason.IO))), (100, rows((300, 310, 0), error=4)))
    log = log_of((100, rows((90, 250, ExitReason.IO)) + rows((300, 310, 0), error=4) + rows((400, 520, 5))))
    exits = exits_of(events, log)
    assert exits.reasons.tolist() == ["IO_INSTRUCTION", "EINTR", "HLT"]
    assert exits.isa.tolist() == [1, 0, 1]
    # Its own ten nanoseconds are not counted twice, nor the 90 behind it.
    assert spans(exits) == [(100, 60, 50, 0), (10, NOT_TOLD, 0, 90), (90, 20, 0, 0)]
    total = sum(value for row in spans(exits) for value in row if value != NOT_TOLD)
    assert total == 520 - 100


def test_a_log_alone_makes_a_row_of_each_kvm_run():
    log = log_of((100, rows((0, 10, ExitReason.IO), (15, 30, ExitReason.HLT), (90, 95, ExitReason.IO))))
    exits = exit_table(EventTable(), log)
    assert exits.reasons.tolist() == ["IO", "HLT", "IO"]
    assert spans(exits) == [(10, NOT_TOLD, 5, 0), (15, NOT_TOLD, 0, 60), (5, NOT_TOLD, 0, 0)]
    # Of a HLT, and of what was never answered, nothing tells how long it took.
    assert exits.span_ns.tolist() == [5, NOT_TOLD, NOT_TOLD]
    assert exits.time_ns.tolist() == [10, 30, 95]


def test_vcpus_do_not_take_each_others_times():
    events = table(
        (100, kvm_entry(pid=7)),
        (110, kvm_entry(pid=8)),
        (120, kvm_exit(CPUID, pid=8)),
        (125, kvm_entry(pid=8)),
        (200, kvm_exit(IO, pid=7)),
        (230, kvm_exit(HLT, pid=8)),
    )
    log = log_of((100, rows((90, 210, ExitReason.IO), thread=7)), (101, rows((105, 240, ExitReason.HLT), thread=8)))
    exits = exits_of(events, log)
    assert exits.vcpu.tolist() == [1, 0, 1]
    assert exits.guest_ns.tolist() == [10, 100, 105]
    assert exits.kvm_ns.tolist() == [5, 10, 10]


def test_nothing_at_all_makes_an_empty_table():
    exits = exit_table(EventTable(), log_of())
    assert len(exits) == 0
    assert exits.reasons.tolist() == []
    assert exits.span_ns.tolist() == []
    assert repr(exits) == "<ExitTable: 0 exits>"
    assert len(exits.between(0, 100)) == 0
    assert len(exits.to_dataframe()) == 0


def test_rows_can_be_taken_and_cut_out_by_time():
    log = log_of((100, rows((0, 10, ExitReason.IO), (15, 30, ExitReason.HLT), (90, 95, ExitReason.IO))))
    exits = exit_table(EventTable(), log)
    assert exits.between(10, 95).time_ns.tolist() == [10, 30]
    assert exits.take(exits.reasons == "IO").time_ns.tolist() == [10, 95]
    assert exits.take(np.array([2, 0])).log_row.tolist() == [2, 0]
    frame = exits.to_dataframe()
    assert frame["reason"].tolist() == ["IO", "HLT", "IO"]


def test_errors_are_named():
    log = log_of((100, rows((0, 10, 0), error=4) + rows((15, 30, 0), error=14) + rows((40, 50, 999))))
    assert exit_table(EventTable(), log).reasons.tolist() == ["EINTR", "EFAULT", "exit 999"]


def with_gap(*timed, gap):
    """Those events, of which some were lost before the one at the time `gap`."""
    found = table(*timed)
    return EventTable(found.values(), gaps=[Gap(gap, 0, 0)])


def test_an_exit_before_a_gap_is_not_what_kvm_run_came_back_with():
    # An entry at 210 and the I/O's exit at 300 are lost.
    events = with_gap((100, kvm_entry()), (200, kvm_exit(CPUID)), (460, kvm_entry()), (500, kvm_exit(HLT)), gap=460)
    exits = exits_of(events, log_of((100, rows((90, 350, ExitReason.IO), (450, 520, ExitReason.HLT)))))
    assert exits.reasons.tolist() == ["CPUID", "IO", "HLT"]
    assert exits.user_exit.tolist() == [NO_USER_EXIT, ExitReason.IO, ExitReason.HLT]
    # Nothing tells what of the first KVM_RUN was the guest's; user space's answer is known all the same.
    assert spans(exits) == [(100, NOT_TOLD, 0, 0), (NOT_TOLD, NOT_TOLD, 100, 0), (40, 20, 0, 0)]


def test_an_entry_before_a_gap_ends_its_exit():
    # Behind the entry at 230 an I/O's exit is lost, a whole KVM_RUN, and the entry of the next.
    events = with_gap((100, kvm_entry()), (200, kvm_exit(CPUID)), (230, kvm_entry()), (900, kvm_exit(HLT)), gap=900)
    log = log_of((100, rows((90, 350, ExitReason.IO), (450, 600, ExitReason.IO), (700, 930, ExitReason.HLT))))
    exits = exits_of(events, log)
    assert exits.reasons.tolist() == ["CPUID", "IO", "IO", "HLT"]
    assert spans(exits) == [
        (100, 30, 0, 0),
        (NOT_TOLD, NOT_TOLD, 100, 0),
        (150, NOT_TOLD, 100, 0),
        (NOT_TOLD, NOT_TOLD, 0, 0),
    ]


def log_with_a_hole():
    """Two KVM_RUNs, many of which nothing is known, and two more."""
    early = rows((0, 10, ExitReason.IO), (15, 20, ExitReason.IO))
    late = rows((90, 95, ExitReason.IO), (97, 99, ExitReason.HLT))
    return run_log([(100, memoryview(early), 5), (100, memoryview(late), 0)], VCPUS)


def test_user_space_has_no_time_across_lost_rows_of_the_log():
    exits = exit_table(EventTable(), log_with_a_hole())
    assert spans(exits) == [
        (10, NOT_TOLD, 5, 0),
        (5, NOT_TOLD, 0, 0),
        (5, NOT_TOLD, 2, 0),
        (2, NOT_TOLD, 0, 0),
    ]
    assert exits.span_ns.tolist() == [5, NOT_TOLD, 2, NOT_TOLD]


def test_an_exit_before_lost_rows_of_the_log_has_no_time_in_kvm():
    timed = [(1, kvm_entry()), (5, kvm_exit(IO)), (16, kvm_entry()), (18, kvm_exit(IO)), (91, kvm_entry())]
    events = table(*timed, (93, kvm_exit(IO)), (98, kvm_entry()), (99, kvm_exit(HLT)))
    exits = exits_of(events, log_with_a_hole())
    assert spans(exits) == [(4, 6, 5, 0), (2, NOT_TOLD, 0, 0), (2, 3, 2, 0), (1, 0, 0, 0)]


@pytest.mark.parametrize(("reason", "name"), [(IO, ExitReason.IO), (HLT, ExitReason.HLT)])
def test_what_a_guest_waited_for_the_kvm_run_that_is_under_way_is_no_time_of_kvms(reason, name):
    events = table((100, kvm_entry()), (200, kvm_exit(reason)), (910, kvm_entry()), (950, kvm_exit(CPUID)))
    log = log_of((100, rows((90, 250, name), (900, 0, 0))))
    waited = (650, 0) if reason == IO else (0, 650)
    assert spans(exits_of(events, log)) == [(100, 60, *waited), (40, NOT_TOLD, 0, 0)]
    # A log alone knows it, too.
    assert spans(exit_table(EventTable(), log)) == [(160, NOT_TOLD, *waited)]


def test_exits_around_a_log_that_begins_later_and_ends_earlier_have_no_time_in_kvm():
    timed = [(10, kvm_entry()), (20, kvm_exit(IO)), (95, kvm_entry()), (100, kvm_exit(CPUID)), (110, kvm_entry())]
    timed += [(200, kvm_exit(IO)), (310, kvm_entry()), (320, kvm_exit(IO)), (450, kvm_entry()), (460, kvm_exit(HLT))]
    log = log_of((100, rows((90, 220, ExitReason.IO))))
    exits = exits_of(table(*timed), log)
    assert exits.kvm_ns.tolist() == [NOT_TOLD, 10, NOT_TOLD, NOT_TOLD, NOT_TOLD]
    assert exits.guest_ns.tolist() == [10, 5, 90, 10, 10]
    assert exits.user_exit.tolist() == [NO_USER_EXIT, NO_USER_EXIT, ExitReason.IO, NO_USER_EXIT, NO_USER_EXIT]


def test_an_exit_that_went_to_user_space_without_a_row_of_the_log_has_no_time_in_kvm():
    # What is read of the log is older than the last events: the KVM_RUN under way has ended, and another begun.
    timed = [(100, kvm_entry()), (110, kvm_exit(CPUID)), (120, kvm_entry()), (200, kvm_exit(IO))]
    timed += [(210, kvm_userspace_exit(2)), (910, kvm_entry()), (950, kvm_exit(CPUID)), (960, kvm_entry())]
    exits = exits_of(table(*timed), log_of((100, rows((90, 0, 0)))))
    assert exits.kvm_ns.tolist() == [10, NOT_TOLD, 10]
    whole = exits_of(table(*timed), log_of((100, rows((90, 220, ExitReason.IO), (900, 0, 0)))))
    assert whole.kvm_ns.tolist() == [10, 30, 10]
    assert whole.user_ns.tolist() == [0, 680, 0]


def test_an_exit_whose_entry_is_not_there_yet_has_no_part_of_its_time():
    events = table((100, kvm_entry()), (200, kvm_exit(IO)))
    log = log_of((100, rows((90, 250, ExitReason.IO), (400, 0, 0))))
    assert spans(exits_of(events, log)) == [(100, NOT_TOLD, 150, 0)]
