"""The log and the events put together: what was lost, and whose each event was."""

from __future__ import annotations

import numpy as np
import pytest

from kvmbench.traces.assemble import attribute, count_gaps, event_table, run_log
from kvmbench.traces.event_table import NO_VCPU, Gap
from kvmbench.traces.format import PageLayout
from kvmbench.uapi import ExitReason

from .made_up import FORMATS, IO, SIZE, VCPUS, kvm_entry, kvm_exit, log_of, mark, rows, table, tables, thread_mark
from .ring import event, page


def vcpus_of(events, name="kvm_exit"):
    return events[name].vcpu.tolist()


def test_rows_come_in_order_of_their_beginning_whoever_made_them():
    log = log_of((100, rows((50, 60, 2), (10, 20, 2))), (101, rows((30, 40, 5))), (999, rows((70, 80, 5))))
    assert log["enter_ns"].tolist() == [10, 30, 50, 70]
    assert log.vcpu.tolist() == [0, 1, 0, NO_VCPU]
    assert log.under_way == ()


def test_lost_rows_add_up():
    data = memoryview(rows((1, 2, 2)))
    assert run_log([(100, data, 3), (101, data[:0], 4)], VCPUS).lost == 7
    assert run_log([], VCPUS).lost == 0


def test_a_row_that_is_cut_off_is_left_out():
    assert len(log_of((100, rows((1, 2, 2), (3, 4, 2))[:-1]))) == 1


def test_a_kvm_run_under_way_is_no_row_until_it_has_ended():
    assert log_of((100, rows((10, 20, 2), (30, 0, 0)))).under_way == ((0, 7, 30),)
    assert len(log_of((100, rows((10, 20, 2), (30, 0, 0))))) == 1
    ended = log_of((100, rows((10, 20, 2), (30, 0, 0))), (100, rows((30, 40, 2))))
    assert (len(ended), ended.under_way) == (2, ())
    # Its row was lost, but there is one behind it.
    later = log_of((100, rows((30, 0, 0))), (100, rows((50, 60, 2))))
    assert (len(later), later.under_way) == (1, ())
    # Another vcpu's rows say nothing.
    other = log_of((100, rows((30, 0, 0))), (101, rows((50, 60, 2))))
    assert other.under_way == ((0, 7, 30),)
    assert other.of_vcpu(1).under_way == ()
    assert other.of_vcpu(0).under_way == ((0, 7, 30),)


@pytest.mark.parametrize(
    ("gaps", "told", "lost"),
    [
        ([], {0: 5}, []),
        ([(10, 0, 0)], {0: 5}, [5]),
        ([(10, 0, 2), (20, 0, 0)], {0: 5}, [2, 3]),
        ([(10, 0, 0), (20, 0, 0)], {0: 5}, [5, 0]),
        ([(10, 0, 7), (20, 0, 0)], {0: 5}, [7, 0]),
        ([(10, 0, 0), (20, 1, 0)], {0: 5, 1: 6}, [5, 6]),
        ([(10, 1, 0)], {0: 5}, [0]),
    ],
)
def test_gaps_without_a_number_get_what_the_kernel_counted(gaps, told, lost):
    assert [gap.lost for gap in count_gaps([Gap(*gap) for gap in gaps], told)] == lost


def test_events_of_several_processors_come_in_order_of_time():
    events = tables({0: [(10, kvm_exit(IO, 1)), (30, kvm_exit(IO, 3))], 1: [(20, kvm_exit(IO, 2))]})
    assert events["kvm_exit"].time_ns.tolist() == [10, 20, 30]
    assert events["kvm_exit"].cpu.tolist() == [0, 1, 0]
    assert events["kvm_exit"]["guest_rip"].tolist() == [1, 2, 3]


def test_what_is_not_understood_is_counted():
    pages = [
        (0, memoryview(page(5, event(0, b"\xff\xff" + bytes(10)), page_bytes=SIZE))),
        (1, memoryview(page(9, b"\0\0\0\0", lost=3, page_bytes=SIZE))),
    ]
    events = event_table(pages, FORMATS, page_bytes=SIZE, layout=PageLayout())
    assert (events.unknown, events.bad_pages, events.lost) == (1, 1, 3)
    assert events.gaps == (Gap(9, 1, 3),)
    kept = attribute(events, log_of(), VCPUS)
    assert (kept.unknown, kept.bad_pages, kept.gaps) == (1, 1, events.gaps)


def test_a_thread_of_one_vcpu_made_that_ones_events_also_between_its_kvm_runs():
    events = table(*((time, kvm_exit(IO)) for time in (5, 15, 25, 35)))
    log = log_of((100, rows((10, 20, 2), (30, 40, 2))))
    assert vcpus_of(attribute(events, log, VCPUS)) == [0, 0, 0, 0]


def test_where_threads_are_shared_only_what_lies_in_a_kvm_run_is_its_vcpus():
    events = table(*((time, kvm_exit(IO)) for time in (5, 10, 15, 20, 25, 35, 45)))
    log = log_of((100, rows((10, 20, 2), (30, 40, 2))))
    assert vcpus_of(attribute(events, log, VCPUS, dedicated=False)) == [-1, 0, 0, 0, -1, 0, -1]


def test_a_kvm_run_under_way_has_the_events_since_it_began():
    events = table(*((time, kvm_exit(IO)) for time in (15, 25, 35, 1 << 60)))
    log = log_of((100, rows((10, 20, 2), (30, 0, 0))))
    assert vcpus_of(attribute(events, log, VCPUS, dedicated=False)) == [0, -1, 0, 0]


@pytest.mark.parametrize("log", [log_of(), log_of((100, rows((10, 20, 2))), lost=1)], ids=["no log", "holes in it"])
def test_without_a_whole_log_a_shared_thread_counts_as_its_vcpus(log):
    events = table((1, thread_mark(7, 7, 100)), (15, kvm_exit(IO)), (25, kvm_exit(IO)))
    assert vcpus_of(attribute(events, log, VCPUS, dedicated=False)) == [0, 0]


def test_a_thread_that_ran_two_vcpus_is_told_apart_by_time():
    events = table(*((time, kvm_exit(IO)) for time in (12, 22, 25, 32)))
    log = log_of((100, rows((10, 15, 2), (30, 35, 2))), (101, rows((20, 23, 2))))
    assert vcpus_of(attribute(events, log, VCPUS)) == [0, 1, -1, 0]


def test_a_thread_mark_translates_the_kernels_number_of_the_thread():
    # In a container thread 7 is the kernel's 4007.
    events = table((1, thread_mark(4007, 7, 101)), (12, kvm_exit(IO, pid=4007)), (13, kvm_exit(IO, pid=7)))
    assert vcpus_of(attribute(events, log_of(), VCPUS)) == [1, -1]
    log = log_of((101, rows((10, 20, 2))))
    assert vcpus_of(attribute(events, log, VCPUS, dedicated=False)) == [1, -1]


def test_marks_that_are_not_the_cores_tell_nothing():
    events = table((1, thread_mark(7, 7, 100, magic=1)), (12, kvm_exit(IO)))
    kept = attribute(events, log_of(), VCPUS)
    assert vcpus_of(kept) == [-1]
    assert "raw_data" not in kept


def test_another_machines_vcpu_is_nobodys():
    events = table((1, thread_mark(7, 7, 555)), (12, kvm_exit(IO)), (13, kvm_entry(pid=8)), (14, mark("x", pid=8)))
    kept = attribute(events, log_of(), VCPUS)
    assert vcpus_of(kept) == [-1]
    assert vcpus_of(kept, "kvm_entry") == [-1]
    assert kept["print"].text(0) == "x"


def test_a_thousand_events_of_two_threads_find_their_vcpus():
    rng = np.random.default_rng(1)
    pids = rng.integers(7, 9, 300)
    events = table(*((1000 + n, kvm_exit(IO, pid=int(pid))) for n, pid in enumerate(pids)))
    log = log_of((100, rows((1000, 2000, ExitReason.IO), thread=7)), (101, rows((1000, 2000, ExitReason.IO), thread=8)))
    for dedicated in (True, False):
        assert vcpus_of(attribute(events, log, VCPUS, dedicated=dedicated)) == (pids - 7).tolist()
