"""What a trace is asked, asked wrongly: each is told in words that name the argument and its value."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import LoadError, MisuseError
from kvmbench.host.provenance import Provenance
from kvmbench.traces.assemble import attribute
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.trace import Trace, TraceData
from kvmbench.uapi import ExitReason

from .made_up import HLT, IO, kvm_entry, kvm_exit, kvm_userspace_exit, log_of, rows, table

FILES = Path(__file__).parent / "files"
VCPUS = {100: 0}
EMULATED = Provenance(kind="appliance", module="kvm_amd", emulator="QEMU (TCG) 7.2")


def made(*notes: str, events: bool = True) -> Trace:
    log = log_of((100, rows((0, 20, ExitReason.IO), (40, 90, ExitReason.HLT))))
    told = table(*((n, kvm_exit(IO if n % 20 else HLT)) for n in range(10, 90, 10)), (95, kvm_entry()))
    return Trace(TraceData(attribute(told, log, VCPUS) if events else EventTable(), log, EMULATED, notes=notes))


@pytest.fixture(scope="module")
def trace() -> Trace:
    return kb.open_trace(FILES / "amd-v6.dat")


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (None, "by=None: there are reason"),
        (5, "by=5: there are reason"),
        (b"reason", "by=b'reason': there are reason"),
        ([["reason"]], r"by=\['reason'\]: there are reason"),
        ("", "by='': there are reason"),
        ("reasn", "by='reasn': did you mean 'reason'"),
        ([], r"by=\[\]: give one or several of reason"),
        (["vcpu", "vcpu"], r"by=\['vcpu', 'vcpu'\]: 'vcpu' is there twice"),
    ],
)
def test_what_exits_are_told_apart_by_is_checked(trace, by, said):
    with pytest.raises(MisuseError, match=said):
        trace.summary(by)
    with pytest.raises(MisuseError, match=said):
        trace.compare(trace, by)


@pytest.mark.parametrize("vcpu", ["0", 0.0, True, [0], -1])
def test_a_vcpu_is_a_number(trace, vcpu):
    with pytest.raises(MisuseError, match="vcpu="):
        trace.summary(vcpu=vcpu)


@pytest.mark.parametrize("confidence", [float("nan"), 1, 95, 0.4, 1.0, "0.95", None])
def test_a_confidence_is_named_with_its_value(trace, confidence):
    with pytest.raises(MisuseError, match=f"confidence={confidence!r}: give a number from 0.5 to 0.9999"):
        trace.compare(trace, confidence=confidence)


def test_a_confidence_of_numpys_is_one_and_is_shown_whole(trace):
    assert "99.9% interval" in repr(trace.compare(trace, confidence=np.float32(0.999)))


@pytest.mark.parametrize("row", [57, -58, 1.5, "0", None])
def test_words_of_an_exit_that_is_not_there_are_refused(trace, row):
    with pytest.raises(MisuseError, match="row="):
        trace.exits.words(row)
    with pytest.raises(MisuseError, match="row=0: this table has no exits"):
        made().exits.take(np.arange(0)).words(0)


def test_words_count_from_the_end_too(trace):
    assert trace.exits.words(-57) == trace.exits.words(0)


def test_a_comparison_says_before_and_after_and_whose_time_it_is():
    one, two = made("the same", "cut short"), made("the same", "late")
    text, html = repr(one.compare(two)), one.compare(two)._repr_html_()
    for said in ("count before", "count after", "mean before", "mean after", "times are emulator time"):
        assert said in text
        assert said in html
    assert text.splitlines()[-3:] == ["the same", "before: cut short", "after: late"]


def test_a_trace_without_exits_is_not_taken_for_one_of_kvm_runs():
    nothing = Trace(TraceData(EventTable(), log_of(), EMULATED))
    assert not nothing.compare(made()).warnings
    assert "KVM_RUNs" in made(events=False).compare(made()).warnings[0]


def test_a_summary_of_kvm_runs_says_what_its_times_are():
    assert "total to max are what user space took" in repr(made(events=False).summary())
    assert "total to max" not in repr(made().summary())


def test_events_that_make_no_exits_are_told_so():
    notes = kb.open_trace(FILES / "local-perf-script-ns.txt").notes
    assert any("it has no exits" in note and "trace-cmd record -e kvm" in note for note in notes)
    assert not any("it has no exits" in note for note in kb.open_trace(FILES / "intel-v7.dat").notes)


@pytest.mark.parametrize("path", ["", "a\0.npz", None, 5, b"exits.npz"])
def test_a_path_that_is_none_is_refused(trace, path):
    for call in (trace.save, kb.open_trace):
        with pytest.raises(MisuseError, match="give the name of a file"):
            call(path)


@pytest.mark.parametrize("suffix", ["npz", "perfetto-trace", "json", "csv", "parquet"])
def test_a_missing_directory_is_named(trace, tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=f"there is no directory '{tmp_path}/none'.*make that first"):
        trace.save(tmp_path / "none" / f"exits.{suffix}")


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_a_file_for_another_program_is_not_opened_again(trace, tmp_path, suffix):
    with pytest.raises(LoadError, match=r"open what was saved as \.npz"):
        kb.open_trace(trace.save(tmp_path / f"exits{suffix}"))


@pytest.mark.parametrize("key", [0, None, "kvm_exi"])
def test_events_of_no_kind_are_a_key_error_that_says_which_there_are(trace, key):
    with pytest.raises(KeyError, match="there are kvm_"):
        trace.events[key]
    assert trace.events.get(key) is None


@pytest.mark.parametrize("given", ["a", None, 1.5])
def test_places_and_times_are_numbers(trace, given):
    for call in (trace.events.rows, lambda n: trace.events.between(n, 5), lambda n: trace.exits.between(5, n)):
        with pytest.raises(MisuseError, match="give an integer"):
            call(given)


def test_vcpus_of_another_programs_trace_are_called_as_its_figures_call_them(trace):
    assert trace.data.labels
    (row,) = trace.summary("vcpu")
    assert row.key == trace.data.labels[:1]


@pytest.mark.parametrize("suffix", ["npz", "perfetto-trace", "json", "csv", "parquet"])
def test_an_older_file_stays_where_a_new_one_cannot_be_written(trace, tmp_path, suffix):
    path = trace.save(tmp_path / f"exits.{suffix}")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            trace.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_times_are_the_same_in_a_file_whose_trace_ended_within_a_kvm_run(tmp_path):
    log = log_of((100, rows((0, 20, ExitReason.HLT), (500, 0, 0))))
    events = attribute(table((5, kvm_entry()), (10, kvm_exit(HLT)), (510, kvm_entry())), log, VCPUS)
    before = Trace(TraceData(events, log, EMULATED))
    after = kb.open_trace(before.save(tmp_path / "exits.npz"))
    assert after.log.under_way == ((0, 7, 500),)
    for exits in (before.exits, after.exits):
        assert (exits.kvm_ns.tolist(), exits.outside_ns.tolist()) == ([20], [480])


def test_events_of_one_moment_are_in_the_same_order_in_a_file(tmp_path):
    events = table((10, kvm_userspace_exit(2)), (10, kvm_exit(IO)), (10, kvm_entry()))
    before = Trace(TraceData(events, log_of(), EMULATED))
    after = kb.open_trace(before.save(tmp_path / "exits.npz"))
    assert list(after.events) == list(before.events)
    assert after.events.rows() == before.events.rows()
