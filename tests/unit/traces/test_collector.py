"""The end of what was taken: which pages and rows belong together."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest

from kvmbench.host.client import Core
from kvmbench.traces.assemble import run_log, without_cut
from kvmbench.traces.collector import Collector
from kvmbench.uapi import ExitReason

from .made_up import HLT, IO, SIZE, VCPUS, kvm_entry, kvm_exit, log_of, rows, tables
from .ring import event, page


@pytest.fixture
def collector() -> Collector:
    """One that has read nothing, and will not."""
    return Collector(cast(Core, None), 0, limit_bytes=1 << 20, when_full=cast(Callable[[], None], None))


def piece(*times: int) -> memoryview:
    return memoryview(b"".join(page(time, event(0, kvm_exit(IO)), page_bytes=SIZE) for time in times))


def test_the_rest_of_a_page_begins_behind_the_time_it_tells(collector):
    # The event at 30 is at the end of the second piece: the third is the rest of its page.
    collector.pages = [(0, piece(10)), (0, piece(20, 30)), (0, piece(30)), (0, piece(90))]
    collector.readings = [0, 1, 2, 3]
    pages, _, since = collector.end(2 * SIZE)
    assert [len(data) // SIZE for _, data in pages] == [1, 1, 1]
    assert since == 31


def test_what_all_processors_wrote_meanwhile_is_there(collector):
    # The second reading is of both; so is the third, which left something behind.
    collector.pages = [(0, piece(10)), (1, piece(20)), (0, piece(30)), (1, piece(40)), (0, piece(50)), (0, piece(60))]
    collector.readings = [0, 1, 3]
    pages, _, _ = collector.end(SIZE)
    assert [int.from_bytes(data[:8], "little") for _, data in pages] == [10, 20, 40, 50, 60]
    pages, _, since = collector.end(4 * SIZE)
    assert len(pages) == 6
    assert since == 31


def test_rows_of_all_vcpus_are_there_though_the_last_one_read_is_old(collector):
    collector.pages = [(0, piece(10)), (0, piece(50)), (0, piece(100))]
    collector.readings = [0, 1, 2]
    collector.rows = [
        (100, memoryview(rows((1, 10, 2))), 0),
        (101, memoryview(rows((2, 20, 2))), 0),
        (100, memoryview(rows((60, 70, 2))), 0),
        (101, memoryview(rows((30, 40, 2))), 0),
        (100, memoryview(rows((80, 90, 2))), 0),
    ]
    _, taken, since = collector.end(2 * SIZE)
    assert since == 51
    assert [leave for leave in run_log(taken, VCPUS)["leave_ns"].tolist() if leave >= since] == [70, 90]


def test_a_kvm_run_that_began_long_ago_is_known_to_be_under_way(collector):
    collector.pages = [(0, piece(10)), (0, piece(50)), (0, piece(100))]
    collector.readings = [0, 1, 2]
    collector.rows = [
        (100, memoryview(rows((1, 10, 2), (11, 0, 0))), 0),
        (101, memoryview(rows((2, 20, 2), (21, 0, 0))), 0),
        (101, memoryview(rows((21, 30, 2))), 0),
        (101, memoryview(rows((31, 40, 2))), 0),
        (101, memoryview(rows((60, 70, 2))), 0),
    ]
    _, taken, _ = collector.end(2 * SIZE)
    assert run_log(taken, VCPUS).under_way == ((0, 7, 11),)


def test_a_kvm_run_whose_exits_are_cut_off_is_not_taken_for_one_without():
    cpus = {0: [(10, kvm_entry()), (20, kvm_exit(IO)), (110, kvm_entry()), (120, kvm_exit(HLT))]}
    log = log_of((100, rows((5, 60, ExitReason.IO), (100, 130, ExitReason.HLT))))
    events = tables(cpus)
    for columns in events.values():
        columns.vcpu[:] = 0
    assert without_cut(log, events, 50)["leave_ns"].tolist() == [130]
    # Nothing of it is cut off, or its exit is there.
    assert without_cut(log, events, 5)["leave_ns"].tolist() == [60, 130]
    assert without_cut(log, events, 15)["leave_ns"].tolist() == [60, 130]
    # Without any exit of the processor a KVM_RUN is what there is.
    assert without_cut(log, events.of_vcpu(1), 50)["leave_ns"].tolist() == [60, 130]
