"""What exits add up to: counts, times, percentiles, shares."""

from __future__ import annotations

import pytest

from kvmbench.traces.assemble import attribute
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.exits import exit_table
from kvmbench.traces.places import Places
from kvmbench.traces.summary import summarise
from kvmbench.traces.words import show_ns
from kvmbench.uapi import ExitReason

from .made_up import HLT, IO, VCPUS, kvm_entry, kvm_exit, log_of, rows, table

CPUID = 10


@pytest.fixture
def hardware():
    """CPUID (30 ns in KVM), IO (60 in KVM, 150 in user space), CPUID (40), HLT (20 until KVM_RUN came back)."""
    events = table(
        (100, kvm_entry()),
        (120, kvm_exit(CPUID, 0x1000)),
        (150, kvm_entry()),
        (200, kvm_exit(IO, 0x1002)),
        (410, kvm_entry()),
        (420, kvm_exit(CPUID, 0x1000)),
        (460, kvm_entry()),
        (500, kvm_exit(HLT, 0x2000)),
    )
    log = log_of((100, rows((90, 250, ExitReason.IO), (400, 520, ExitReason.HLT))))
    return exit_table(attribute(events, log, VCPUS), log)


PLACES = Places({"ids": 0x1000, "end": 0x2000})


def test_rows_are_by_reason_and_those_with_the_most_time_come_first(hardware):
    found = summarise(hardware, ("reason",), places=PLACES)
    assert [(row.key, row.count, row.total_ns) for row in found] == [
        (("IO_INSTRUCTION",), 1, 210),
        (("CPUID",), 2, 70),
        (("HLT",), 1, 20),
    ]
    io, cpuid = found["IO_INSTRUCTION"], found["CPUID"]
    assert (io.kvm_ns, io.user_ns) == (60, 150)
    assert (cpuid.mean_ns, cpuid.p50_ns, cpuid.p99_ns, cpuid.max_ns) == (35, 30, 40, 40)
    assert found.exits == 4
    assert found.counts == {"IO_INSTRUCTION": 1, "CPUID": 2, "HLT": 1}


def test_the_shares_are_of_all_time_and_the_rest_is_the_guests(hardware):
    found = summarise(hardware, ("reason",), places=PLACES)
    assert (found.guest_ns, found.kvm_ns, found.user_ns, found.outside_ns) == (120, 150, 150, 0)
    assert found.guest_ns + found.kvm_ns + found.user_ns == 520 - 100
    assert sum(row.share for row in found) + found.guest_ns / 420 == pytest.approx(1)
    assert found.where_time_went == "guest 120 ns (28.6%), KVM 150 ns (35.7%), user space 150 ns (35.7%)"


def test_several_keys_make_a_row_for_each_combination(hardware):
    found = summarise(hardware, ("symbol", "user_exit", "vcpu"), places=PLACES)
    assert {row.key: row.count for row in found} == {
        ("ids", "", "vcpu 0"): 2,
        ("ids", "IO", "vcpu 0"): 1,
        ("end", "HLT", "vcpu 0"): 1,
    }
    by_rip = summarise(hardware, ("rip",), places=PLACES)
    assert {row.key: row.count for row in by_rip} == {("0x1000",): 2, ("0x1002",): 1, ("0x2000",): 1}


@pytest.mark.parametrize("count", [1, 2, 3, 99, 100, 101, 200])
def test_percentiles_are_of_those_there_are(count):
    """Spans of 1, 2, 3, ... ns: the 50th percentile is the middle one, the lower of two."""
    runs, at = [], 0
    for span in range(count, 0, -1):
        runs.append((at, at + 10, ExitReason.IO))
        at += 10 + span
    log = log_of((100, rows(*runs, (at, at + 1, ExitReason.HLT))))
    row = summarise(exit_table(EventTable(), log), ("reason",), places=Places())["IO"]
    assert row.count == count
    assert row.p50_ns == (count + 1) // 2
    assert row.p99_ns == -(-count * 99 // 100)
    assert row.max_ns == count
    assert row.total_ns == count * (count + 1) // 2


def test_without_events_guest_and_kvm_are_one():
    log = log_of((100, rows((0, 10, ExitReason.IO), (15, 30, ExitReason.HLT), (90, 95, ExitReason.HLT))))
    found = summarise(exit_table(EventTable(), log), ("reason",), places=Places())
    assert found.together
    assert found.where_time_went == "guest and KVM 30 ns (85.7%), user space 5 ns (14.3%); stood 60 ns"


def test_times_that_nothing_tells_are_left_out_and_said():
    events = table((120, kvm_exit(CPUID)), (200, kvm_exit(CPUID)), (210, kvm_entry()))
    log = log_of((100, rows((90, 250, ExitReason.IO))))
    found = summarise(exit_table(attribute(events, log, VCPUS), log_of()), ("reason",), places=Places())
    assert (found["CPUID"].count, found["CPUID"].timed, found["CPUID"].total_ns) == (2, 1, 10)
    assert found.untimed == 1
    assert "of 1 exit nothing tells when the guest ran again" in repr(found)


def test_nothing_is_summarised_too():
    found = summarise(exit_table(EventTable(), log_of()), ("reason", "rip"), places=Places())
    assert len(found) == found.exits == 0
    assert found.where_time_went == "no time was told"
    assert "no time was told" in repr(found)
    assert len(found.to_dataframe()) == 0
    with pytest.raises(KeyError, match="no exits 'IO'"):
        found["IO"]


def test_it_is_shown_with_its_clock_and_warnings_and_escaped(hardware):
    found = summarise(
        hardware, ("symbol",), places=Places({"<b>": 0x1000}), clock="emulator time", warnings=("5 events < 6",)
    )
    assert "(emulator time)" in repr(found)
    assert repr(found).endswith("5 events < 6")
    html = found._repr_html_()
    assert "&lt;b&gt;" in html
    assert "5 events &lt; 6" in html
    assert "<b>" not in html


def test_a_frame_has_a_column_for_each_key(hardware):
    frame = summarise(hardware, ("reason", "vcpu"), places=PLACES).to_dataframe()
    assert frame["reason"].tolist() == ["IO_INSTRUCTION", "CPUID", "HLT"]
    assert frame["vcpu"].tolist() == ["vcpu 0"] * 3
    assert frame["total_ns"].tolist() == [210, 70, 20]


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0 ns"), (999, "999 ns"), (1000, "1 us"), (1234, "1.23 us"), (5e6, "5 ms"), (2e9, "2 s"), (None, "")],
)
def test_times_are_shown_with_a_unit_that_fits(ns, text):
    assert show_ns(ns) == text


def test_what_kvm_waited_after_a_hlt_is_named():
    # The first waits in KVM for its interrupt, the second goes to user space.
    events = table((100, kvm_entry()), (200, kvm_exit(HLT)), (900, kvm_entry()), (1000, kvm_exit(HLT)))
    log = log_of((100, rows((90, 1050, ExitReason.HLT))))
    found = summarise(exit_table(attribute(events, log, VCPUS), log), ("reason",), places=Places())
    assert (found.kvm_ns, found.halted_ns) == (750, 700)
    assert (
        found.where_time_went == "guest 200 ns (21.1%), KVM 750 ns (78.9%; of it 700 ns halted), user space 0 ns (0.0%)"
    )


def test_a_kvm_run_without_an_exit_of_the_processor_is_not_counted_as_the_guests():
    events = table((100, kvm_entry()), (200, kvm_exit(IO)), (610, kvm_entry()), (700, kvm_exit(HLT)))
    log = log_of((100, rows((90, 250, ExitReason.IO), (300, 400, ExitReason.DEBUG), (600, 720, ExitReason.HLT))))
    found = summarise(exit_table(attribute(events, log, VCPUS), log), ("reason",), places=Places())
    assert (found.guest_ns, found.kvm_ns, found.undivided_ns, found.user_ns) == (190, 80, 100, 50)
    assert found.where_time_went == (
        "guest 190 ns (45.2%), KVM 80 ns (19.0%), guest or KVM 100 ns (23.8%), user space 50 ns (11.9%); stood 200 ns"
    )
