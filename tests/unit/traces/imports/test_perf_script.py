"""Text of perf script and trace-cmd report: real text, and lines in the formats of several kernels and options."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmbench.errors import LoadError
from kvmbench.traces.exits import exit_table
from kvmbench.traces.hardware_exits import reason_name
from kvmbench.traces.imports import Imported, read_perf_script, read_trace_dat
from kvmbench.traces.imports.event_line import parse_line
from kvmbench.traces.imports.payload_text import Reasons

FILES = Path(__file__).parents[1] / "files"


def read(*lines: str) -> Imported:
    return read_perf_script("".join(f"{line}\n" for line in lines).encode())


def exit_line(payload: str, *, event: str = "kvm:kvm_exit", time: str = "5.000001") -> str:
    return f"       CPU 0/KVM 4321 [003] {time}: {event}: {payload}"


# Real text.


@pytest.mark.parametrize("name", ["amd", "intel"])
def test_the_report_of_a_file_has_the_exits_of_the_file(name):
    text = read_perf_script(FILES / f"{name}-report.txt")
    binary = read_trace_dat(next(FILES.glob(f"{name}-v?.dat")))
    ours, theirs = (exit_table(one.trace_data().events, one.trace_data().log) for one in (text, binary))
    assert text.ignored == 0
    assert ours.reasons.tolist() == theirs.reasons.tolist()
    assert text.events.counts == binary.events.counts
    assert text.labels == binary.labels
    for column in ("number", "isa", "rip", "info1", "info2", "vcpu"):
        assert getattr(ours, column).tolist() == getattr(theirs, column).tolist(), column
    assert np.abs(ours.time_ns - theirs.time_ns).max() <= 500
    # Of the last one the text does not tell what was being delivered.
    assert [ours.words(n) for n in range(56)] == [theirs.words(n) for n in range(56)]


def test_real_text_of_perf_script_is_understood_to_the_last_line():
    text = read_perf_script(FILES / "local-perf-script.txt")
    exact = read_perf_script(FILES / "local-perf-script-ns.txt")
    assert (
        text.events.counts == exact.events.counts == {"kvm_emulate_insn": 13, "kvm_userspace_exit": 13, "kvm_pio": 12}
    )
    assert (text.ignored, exact.ignored) == (0, 0)
    assert text.labels == exact.labels == ("python tid 10372",)
    assert exact.events["kvm_pio"].time_ns[0] == 13905_017931648
    assert text.events["kvm_pio"].time_ns[0] == 13905_017931000
    assert "microseconds" in text.notes[0]
    assert exact.notes == ()
    assert exact.events["kvm_userspace_exit"]["reason"].tolist() == [2] * 12 + [8]
    assert exact.events["kvm_emulate_insn"].text(0) == "0:100b:ee (prot64)"


# What stands in front of the event.


@pytest.mark.parametrize(
    ("head", "cpu", "pid", "tid", "comm"),
    [
        ("CPU 0/KVM 4321 [003]", 3, -1, 4321, "CPU 0/KVM"),
        ("CPU 0/KVM  4300/4321  [003]", 3, 4300, 4321, "CPU 0/KVM"),
        ("qemu-kvm 77 [127]", 127, -1, 77, "qemu-kvm"),
        ("qemu-system-x86-77 [001]", 1, -1, 77, "qemu-system-x86"),
        ("CPU 0/KVM-4321  [003] d..1.", 3, -1, 4321, "CPU 0/KVM"),
        ("<...>-75    [000]", 0, -1, 75, "<...>"),
        ("two:           python-8371  [000]", 0, -1, 8371, "python"),
        ("python-9319    0d..1.", 0, -1, 9319, "python"),
        ("kworker/0:1-events 45 [000]", 0, -1, 45, "kworker/0:1-events"),
        ("4321 [003]", 3, -1, 4321, ""),
        ("CPU 0/KVM 4321", 0, -1, 4321, "CPU 0/KVM"),
        ("vhost-4300 4302 [001]", 1, -1, 4302, "vhost-4300"),
        ("", 0, -1, -1, ""),
    ],
)
def test_the_head_of_a_line_tells_thread_and_processor(head, cpu, pid, tid, comm):
    line = parse_line(f"  {head} 12.000034: kvm:kvm_fpu: load")
    assert line is not None
    assert (line.cpu, line.pid, line.tid, line.comm) == (cpu, pid, tid, comm)
    assert (line.time_ns, line.system, line.event, line.text) == (12_000_034_000, "kvm", "kvm_fpu", "load")


@pytest.mark.parametrize("between", ["", "(+925120) ", "1 ", "        1   "])
def test_periods_and_differences_before_the_event_are_passed_over(between):
    line = parse_line(f"qemu 1 [000] 1.000000001: {between}kvm:kvm_entry: vcpu 0")
    assert line is not None
    assert (line.event, line.text, line.time_ns) == ("kvm_entry", "vcpu 0", 1_000_000_001)


# kvm_exit through the years.


@pytest.mark.parametrize(
    ("payload", "isa", "number", "fields"),
    [
        (
            "reason EPT_VIOLATION rip 0xffffffff81063f36 info 181 0",
            1,
            48,
            {"guest_rip": 0xFFFFFFFF81063F36, "info1": 0x181, "info2": 0},
        ),
        ("reason npf rip 0x7fff info 100000006 fee00000", 2, 0x400, {"info1": 0x100000006, "info2": 0xFEE00000}),
        (
            "vcpu 3 reason MSR_WRITE rip 0xffff info1 0x0000000000000000 info2 0x0000000000000000 "
            "intr_info 0x00000000 error_code 0x00000000",
            1,
            32,
            {"vcpu_id": 3, "guest_rip": 0xFFFF, "intr_info": 0, "error_code": 0},
        ),
        (
            "vcpu 0 reason EXCEPTION_NMI rip 0x10 info1 0x0 info2 0x0 intr_info 0x80000b0e error_code 0x00000006 "
            "requests 0x0000000000000000",
            1,
            0,
            {"intr_info": 0x80000B0E, "error_code": 6, "requests": 0},
        ),
        ("reason EXIT_IOIO rip 0x100b info 3f80010 100c", 2, 0x7B, {"info1": 0x3F80010}),
        ("reason EXIT_INTR rip 0x100b info 0 0", 2, 0x60, {}),
        ("reason PENDING_INTERRUPT rip 0x1 info 0 0", 1, 7, {}),
        ("vcpu 0 reason INVALID_STATE FAILED_VMENTRY rip 0xfff0 info1 0x0 info2 0x0", 1, 0x80000021, {}),
        ("vcpu 0 reason PF excp rip 0xfff0 info1 0x2 info2 0x1000", 2, 0x4E, {}),
        ("vcpu 0 reason invalid_guest_state rip 0x0 info1 0x0 info2 0x0", 2, 0xFFFFFFFF, {}),
        ("reason HLT rip 0x20", 1, 12, {"guest_rip": 0x20}),
        ("exit_reason=48 guest_rip=0x1000 isa=1 info1=0x82 vcpu_id=0", 1, 48, {"info1": 0x82}),
    ],
)
def test_exits_as_kernels_of_many_years_print_them(payload, isa, number, fields):
    imported = read(exit_line(payload))
    found = imported.events["kvm_exit"]
    assert imported.ignored == 0
    assert (found["isa"][0], found["exit_reason"][0]) == (isa, number)
    assert {name: int(found[name][0]) for name in fields} == fields
    data = imported.trace_data()
    (name,) = exit_table(data.events, data.log).reasons
    assert name == reason_name(isa, number)


def test_every_name_of_an_exit_finds_its_number_again():
    reasons = Reasons()
    for isa, numbers in ((1, range(0x80)), (2, (*range(0x410), *range(0x80000000, 0x80000014), 0xFFFFFFFF))):
        for number in numbers:
            if not (name := reason_name(isa, number)).startswith("exit "):
                assert reasons(name) == (isa, number)
    assert not any(reasons.unknown.values())


def test_a_name_that_no_table_has_stays_the_exits_name():
    imported = read(
        exit_line("vcpu 0 reason SEAMCALL_NEW rip 0x1 info1 0x0 info2 0x0"),
        exit_line("vcpu 0 reason HLT rip 0x1 info1 0x0 info2 0x0", time="5.000002"),
    )
    data = imported.trace_data()
    assert exit_table(data.events, data.log).reasons.tolist() == ["SEAMCALL_NEW", "HLT"]
    assert "SEAMCALL_NEW" in imported.notes[-1]


def test_a_number_instead_of_a_name_belongs_to_the_isa_of_the_exits_around_it():
    imported = read(
        exit_line("vcpu 0 reason npf rip 0x1 info1 0x0 info2 0x0"),
        exit_line("vcpu 0 reason 0x9f rip 0x1 info1 0x0 info2 0x0", time="5.000002"),
    )
    assert imported.events["kvm_exit"]["isa"].tolist() == [2, 2]
    assert imported.events["kvm_exit"]["exit_reason"].tolist() == [0x400, 0x9F]


# Other events.


@pytest.mark.parametrize(
    ("event", "payload", "fields"),
    [
        ("kvm_entry", "vcpu 2", {"vcpu_id": 2}),
        ("kvm_entry", "vcpu 2, rip 0xfff0", {"vcpu_id": 2, "rip": 0xFFF0}),
        ("kvm_entry", "vcpu 2 rip 0xfff0", {"vcpu_id": 2, "rip": 0xFFF0}),
        (
            "kvm_entry",
            "vcpu 2, rip 0xfff0 intr_info 0x80000b0e error_code 0x00000002 [immediate exit]",
            {"vcpu_id": 2, "rip": 0xFFF0, "intr_info": 0x80000B0E, "error_code": 2},
        ),
        ("kvm_pio", "pio_write at 0x3f8 size 1 count 1 val 0x41 ", {"rw": 1, "port": 0x3F8, "size": 1, "val": 0x41}),
        ("kvm_pio", "pio_read at 0x60 size 1 count 2 val 0x1c (...)", {"rw": 0, "port": 0x60, "count": 2}),
        ("kvm_mmio", "mmio write len 4 gpa 0xfee000b0 val 0x0", {"type": 2, "len": 4, "gpa": 0xFEE000B0, "val": 0}),
        ("kvm_msr", "msr_write 6e0 = 0x1234", {"write": 1, "ecx": 0x6E0, "data": 0x1234, "exception": 0}),
        ("kvm_msr", "msr_read 122 = 0x0 (#GP)", {"write": 0, "ecx": 0x122, "exception": 1}),
        ("kvm_userspace_exit", "reason KVM_EXIT_IO (2)", {"reason": 2, "errno": 0}),
        ("kvm_userspace_exit", "reason restart (4)", {"reason": 0, "errno": -4}),
        (
            "kvm_page_fault",
            "address 3fef42812000 error_code 181",
            {"fault_address": 0x3FEF42812000, "error_code": 0x181},
        ),
        (
            "kvm_page_fault",
            "vcpu 0 rip 0x1000 address 0x0000000000084000 error_code 0x82",
            {"vcpu_id": 0, "guest_rip": 0x1000, "fault_address": 0x84000},
        ),
        ("sched_stat_runtime", "comm_len=3 pid=44 runtime=17 delta=-5", {"pid": 44, "delta": -5}),
    ],
)
def test_fields_of_other_events(event, payload, fields):
    imported = read(exit_line(payload, event=f"kvm:{event}"))
    found = imported.events[event]
    assert {name: int(found[name][0]) for name in fields} == fields
    assert imported.ignored == 0


def test_of_events_that_nobody_takes_apart_the_text_is_kept():
    imported = read(
        exit_line("prev_comm=CPU 0/KVM prev_pid=1 ==> next_comm=swapper/3", event="sched:sched_switch"),
        exit_line("x" * 5000, event="probe:mine"),
    )
    assert imported.events["sched_switch"].text(0) == "prev_comm=CPU 0/KVM prev_pid=1 ==> next_comm=swapper/3"
    assert imported.events["sched_switch"].format.system == "sched"
    assert imported.events["mine"].text(0) == "x" * 256


def test_a_field_that_not_each_line_tells_is_left_out_and_said():
    imported = read(
        exit_line("vcpu 0", event="kvm:kvm_entry"), exit_line("vcpu 0, rip 0x1", event="kvm:kvm_entry", time="6.000000")
    )
    assert imported.events["kvm_entry"].fields == ("vcpu_id",)
    assert "not each kvm_entry tells its rip" in imported.notes[-1]


# Whose vcpu.


def test_two_machines_with_the_same_vcpu_ids_have_vcpus_of_their_own():
    lines = []
    for n, (pid, tid) in enumerate([(200, 204), (100, 103), (200, 203), (100, 104)]):
        head, number = f"CPU {tid % 2}/KVM {pid}/{tid} [001]", 1 - tid % 2
        lines.append(f"{head} 7.00000{n}: kvm:kvm_entry: vcpu {number}, rip 0x10")
        lines.append(f"{head} 8.00000{n}: kvm:kvm_exit: vcpu {number} reason HLT rip 0x10 info1 0x0 info2 0x0")
        lines.append(f"{head} 9.00000{n}: kvm:kvm_fpu: unload")
    imported = read(*sorted(lines, key=lambda line: line.split(": ")[0][-8:]))
    assert imported.ignored == 0
    assert imported.labels == (
        "CPU 1/KVM pid 100 tid 103 vcpu 0",
        "CPU 0/KVM pid 100 tid 104 vcpu 1",
        "CPU 1/KVM pid 200 tid 203 vcpu 0",
        "CPU 0/KVM pid 200 tid 204 vcpu 1",
    )
    for name in ("kvm_entry", "kvm_exit", "kvm_fpu"):
        assert imported.events[name].vcpu.tolist() == [3, 0, 2, 1]


def test_old_exits_without_a_vcpu_belong_to_the_one_their_thread_entered():
    imported = read(
        "qemu 12 [000] 1.000000: kvm:kvm_entry: vcpu 1",
        "qemu 11 [001] 1.000001: kvm:kvm_entry: vcpu 0",
        "qemu 12 [000] 1.000002: kvm:kvm_exit: reason HLT rip 0x1 info 0 0",
        "qemu 11 [001] 1.000003: kvm:kvm_exit: reason CPUID rip 0x1 info 0 0",
    )
    assert imported.labels == ("qemu tid 11 vcpu 0", "qemu tid 12 vcpu 1")
    assert imported.events["kvm_exit"].vcpu.tolist() == [1, 0]
    data = imported.trace_data()
    assert exit_table(data.events, data.log).guest_ns.tolist() == [2000, 2000]


# What is not understood, and what is lost.


def test_lines_that_are_not_understood_are_counted_and_the_first_is_shown():
    imported = read(
        "# ========",
        "cpus=2",
        "",
        exit_line("reason HLT rip 0x1 info 0 0"),
        "what is this",
        exit_line("reason without the rest"),
        "\tffffffff81000000 vmx_vcpu_run+0x1 ([kernel.kallsyms])",
        "\t           7f00 __GI_ioctl+0x7 (/usr/lib/libc.so.6)",
        "qemu 1 [000] 6.000000: PERF_RECORD_COMM: qemu:1/1",
        exit_line("reason HLT rip 0xfffffffffffffffff info 0 0"),
    )
    assert imported.events.count == 1
    assert imported.ignored == 3
    assert imported.notes[:3] == (
        "3 lines were not understood, the first: 'what is this'",
        "2 lines of call chains were left out",
        "1 records of tasks were left out",
    )


def test_lost_events_of_perf_and_of_ftrace_are_gaps():
    imported = read(
        exit_line("reason HLT rip 0x1 info 0 0"),
        "CPU:3 [1234 EVENTS DROPPED]",
        exit_line("reason HLT rip 0x1 info 0 0", time="5.000009"),
        "CPU:3 [EVENTS DROPPED]",
        "CPU:2 [LOST 77 EVENTS]",
        "CPU:2 [LOST EVENTS]",
        "qemu 1 [002] 6.000000: PERF_RECORD_LOST lost 55",
    )
    # The kernel's own file says it another way than trace-cmd.
    assert [(gap.time_ns, gap.cpu, gap.lost) for gap in imported.events.gaps] == [
        (5_000_009_000, 3, 1234),
        (5_000_009_000, 3, 0),
        (5_000_009_000, 2, 77),
        (5_000_009_000, 2, 0),
        (6_000_000_000, 2, 55),
    ]
    assert imported.ignored == 0


def test_text_cut_off_anywhere_has_only_whole_lines_and_a_gap():
    text = (FILES / "intel-report.txt").read_bytes()[:2000]
    whole = read_perf_script(text[: text.rindex(b"\n") + 1])
    rows = whole.events.rows(0, whole.events.count)
    for cut in range(len(text)):
        try:
            found = read_perf_script(text[:cut])
        except LoadError:
            assert text[:cut].count(b"\n") < 2
            continue
        lines = text[:cut].count(b"\n")
        assert found.events.rows(0, found.events.count) == rows[: lines - 1]
        assert bool(found.events.gaps) == (text[:cut].rpartition(b"\n")[2].strip() != b"")


@pytest.mark.parametrize(
    "data",
    [b"PERFILE2\0\0\0", b"\x7fELF" + bytes(range(256)) * 40, b"a,b,c\n1,2,3\n", b"1.000000: " * 9000],
)
def test_what_holds_no_event_is_an_error(data):
    with pytest.raises(LoadError, match="no line is an event"):
        read_perf_script(data)


@pytest.mark.parametrize("data", [b"", b"\n\n"])
def test_an_empty_file_is_called_so(data):
    with pytest.raises(LoadError, match="there is nothing in it"):
        read_perf_script(data)


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "notes.txt").write_text("hello\n")
    with pytest.raises(LoadError, match=r"notes\.txt: no line .* begins 'hello'"):
        read_perf_script(tmp_path / "notes.txt")


ALPHABET = "0123456789abcdefx.:[]()/-+= \t,#KVMrip"
LINES = st.text(ALPHABET, max_size=120)


@settings(max_examples=300, deadline=None)
@given(st.lists(LINES | LINES.map(lambda t: exit_line(f"vcpu 0 reason {t} rip 0x1 {t}")) | LINES.map(exit_line)))
def test_no_text_does_anything_but_make_a_table_or_an_error(lines):
    try:
        imported = read(*lines)
    except LoadError:
        return
    data = imported.trace_data()
    exit_table(data.events, data.log)
    assert imported.events.count + imported.ignored <= sum(line.count("\n") + 1 for line in lines)


def test_a_line_of_a_megabyte_costs_no_more_than_its_length():
    imported = read(exit_line("reason HLT rip 0x1 info 0 0"), " " * 500_000, "a " * 500_000, "1.000000: " * 100_000)
    assert imported.events.count == 1
    assert imported.ignored >= 2
