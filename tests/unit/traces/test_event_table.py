"""Events by kind and in order of time; what was lost stays with them."""

from __future__ import annotations

import pytest

from kvmbench.errors import MisuseError
from kvmbench.traces.assemble import attribute
from kvmbench.traces.event_table import EventTable, Gap

from .made_up import IO, VCPUS, kvm_entry, kvm_exit, log_of, mark, rows, table, tables


@pytest.fixture
def events() -> EventTable:
    made = tables(
        {
            0: [(10, kvm_entry()), (20, kvm_exit(IO, 0x1000)), (40, mark("a longer text"))],
            1: [(15, kvm_entry(pid=8)), (30, mark("b")), (50, kvm_exit(IO, 0x2000, pid=8))],
        }
    )
    log = log_of((100, rows((5, 99, 2), thread=7)), (101, rows((5, 99, 2), thread=8)))
    return attribute(made, log, VCPUS)


def test_kinds_are_found_by_name_with_or_without_their_system(events):
    assert events["kvm_exit"] is events["kvm/kvm_exit"]
    assert "kvm/kvm_entry" in events
    assert 5 not in events
    assert set(events) == {"kvm_entry", "kvm_exit", "print"}
    with pytest.raises(KeyError, match="no events 'kvm_pio'; there are kvm_"):
        events["kvm_pio"]
    with pytest.raises(KeyError, match="kvm_exit has no field 'port'; it has exit_reason, guest_rip"):
        events["kvm_exit"]["port"]


def test_counts_are_by_kind(events):
    assert events.count == 6
    assert events.counts == {"kvm_entry": 2, "kvm_exit": 2, "print": 2}


def test_rows_are_in_order_of_time(events):
    shown = events.rows(0, 10)
    assert [(time, cpu, vcpu, name) for time, cpu, vcpu, name, _ in shown] == [
        (10, 0, 0, "kvm_entry"),
        (15, 1, 1, "kvm_entry"),
        (20, 0, 0, "kvm_exit"),
        (30, 1, 0, "print"),
        (40, 0, 0, "print"),
        (50, 1, 1, "kvm_exit"),
    ]
    assert [row[0] for row in events.rows(-2)] == [40, 50]
    assert [row[0] for row in events.rows(1, 2)] == [15, 20]
    assert events.rows(99) == []
    with pytest.raises(MisuseError, match="count=-1"):
        events.rows(0, -1)


def test_texts_of_different_lengths_are_whole(events):
    assert [events["print"].text(n) for n in range(2)] == ["b", "a longer text"]
    assert events.rows(3, 1)[0][4]["text"] == "b"


def test_events_of_a_vcpu_and_of_a_time_keep_what_was_lost():
    gaps = [Gap(90, 0, 4), Gap(12, 1, 0)]
    table_ = EventTable(table((10, kvm_exit(IO)), (90, kvm_exit(IO))).values(), gaps=gaps, bad_pages=2, unknown=3)
    assert table_.gaps == (gaps[1], gaps[0])
    assert table_.lost == 4
    assert (table_.of_vcpu(0).lost, table_.of_vcpu(0).bad_pages, table_.of_vcpu(0).unknown) == (4, 2, 3)
    assert table_.between(0, 50).gaps == (gaps[1],)
    assert table_.between(10, 90)["kvm_exit"].time_ns.tolist() == [10]
    assert "lost: 4 in 2 gaps; 2 pages made no sense" in repr(table_)


def test_frames_have_a_row_an_event(events):
    frame = events.to_dataframe()
    assert frame["time_ns"].tolist() == [10, 15, 20, 30, 40, 50]
    assert frame["event"].tolist() == ["kvm_entry", "kvm_entry", "kvm_exit", "print", "print", "kvm_exit"]
    assert frame["vcpu"].tolist() == [0, 1, 0, 0, 0, 1]
    assert events["kvm_exit"].to_dataframe()["guest_rip"].tolist() == [0x1000, 0x2000]


def test_an_empty_table_can_be_asked_everything():
    empty = EventTable()
    assert (empty.count, empty.counts, empty.lost, len(empty)) == (0, {}, 0, 0)
    assert empty.rows() == []
    assert len(empty.to_dataframe()) == 0
    assert empty.between(0, 5).count == empty.of_vcpu(0).count == 0
    with pytest.raises(KeyError, match="there are none at all"):
        empty["kvm_exit"]
