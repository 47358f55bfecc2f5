"""KVM_RUNs made of kvm_userspace_exit, so that user space's time in somebody else's trace is not KVM's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvmbench.traces.exits import exit_table
from kvmbench.traces.imports import Imported, read_perf_script, read_trace_dat
from kvmbench.traces.imports.runs import log_of
from kvmbench.uapi.exit_reasons import ExitReason

FILES = Path(__file__).parents[1] / "files"


def read(*lines: str) -> Imported:
    return read_perf_script("".join(f"qemu 7 [000] {line}\n" for line in lines).encode())


def test_user_space_has_the_time_from_its_exit_to_the_next_entry():
    imported = read_trace_dat(FILES / "amd-v6.dat")
    data = imported.trace_data()
    exits = exit_table(data.events, data.log)
    answered = np.flatnonzero(exits.user_exit == ExitReason.IO)
    assert exits.reasons[answered].tolist() == ["io"] * 25
    left, entered = imported.events["kvm_userspace_exit"].time_ns, imported.events["kvm_entry"].time_ns
    following = entered[np.searchsorted(entered, left[:25])]
    assert exits.user_ns[answered].tolist() == (following - left[:25]).tolist()
    assert exits.words(int(answered[0])).endswith("to user space: IO out 0x41 to port 0x3f8, 1 byte")
    assert "so KVM's way into the guest counts as user space's" in data.notes[-1]
    # Nothing got lost on the way: from exit to entry there are KVM and user space.
    parts = (exits.kvm_ns + exits.user_ns)[answered]
    assert parts.tolist() == (following - exits.time_ns[answered]).tolist()


def test_the_load_of_the_fpu_ends_user_space_where_it_was_traced():
    imported = read(
        "1.000000: kvm:kvm_fpu: load",
        "1.000002: kvm:kvm_entry: vcpu 0, rip 0x1",
        "1.000010: kvm:kvm_exit: vcpu 0 reason IO_INSTRUCTION rip 0x1 info1 0x0 info2 0x0",
        "1.000012: kvm:kvm_pio: pio_write at 0x60 size 2 count 1 val 0x1234",
        "1.000014: kvm:kvm_fpu: unload",
        "1.000015: kvm:kvm_userspace_exit: reason KVM_EXIT_IO (2)",
        "1.000030: kvm:kvm_fpu: load",
        "1.000033: kvm:kvm_entry: vcpu 0, rip 0x3",
        "1.000040: kvm:kvm_exit: vcpu 0 reason EXTERNAL_INTERRUPT rip 0x3 info1 0x0 info2 0x0",
        "1.000042: kvm:kvm_userspace_exit: reason restart (4)",
    )
    data = imported.trace_data()
    exits = exit_table(data.events, data.log)
    assert exits.user_ns.tolist() == [15_000, 0]
    assert exits.kvm_ns.tolist() == [8_000, 2_000]
    assert exits.guest_ns.tolist() == [8_000, 7_000]
    assert [exits.words(n) for n in range(2)] == [
        exits.words(0).split(";")[0] + "; to user space: IO out 0x1234 to port 0x60, 2 bytes",
        "to user space: EINTR interrupted",
    ]
    assert data.log["enter_ns"].tolist() == [1_000_000_000, 1_000_030_000]
    assert "the load of the guest's FPU" in data.notes[-1]


def test_an_exit_whose_access_was_not_traced_has_no_words():
    imported = read(
        "1.000002: kvm:kvm_entry: vcpu 0, rip 0x1",
        "1.000015: kvm:kvm_userspace_exit: reason KVM_EXIT_IO (2)",
        "1.000033: kvm:kvm_entry: vcpu 0, rip 0x3",
        "1.000042: kvm:kvm_userspace_exit: reason KVM_EXIT_X86_RDMSR (29)",
    )
    data = imported.trace_data()
    exits = exit_table(data.events, data.log)
    assert exits.reasons.tolist() == ["IO", "X86_RDMSR"]
    assert [exits.words(n) for n in range(2)] == ["", ""]


def test_mmio_is_told_by_address_and_direction():
    imported = read(
        "1.000002: kvm:kvm_entry: vcpu 0, rip 0x1",
        "1.000004: kvm:kvm_mmio: mmio write len 4 gpa 0xfe000010 val 0x7",
        "1.000015: kvm:kvm_userspace_exit: reason KVM_EXIT_MMIO (6)",
    )
    data = imported.trace_data()
    assert exit_table(data.events, data.log).words(0) == "write 0x7 to 0xfe000010, 4 bytes"


def test_where_nothing_tells_when_kvm_run_began_there_is_no_log():
    imported = read(
        "1.000015: kvm:kvm_userspace_exit: reason KVM_EXIT_IO (2)",
        "1.000042: kvm:kvm_userspace_exit: reason KVM_EXIT_IO (2)",
    )
    log, note = log_of(imported.events)
    assert (len(log), note) == (0, "")


def test_a_kvm_run_that_came_back_without_entering_has_no_length():
    imported = read(
        "1.000002: kvm:kvm_entry: vcpu 0, rip 0x1",
        "1.000015: kvm:kvm_userspace_exit: reason KVM_EXIT_IO (2)",
        "1.000020: kvm:kvm_userspace_exit: reason restart (4)",
        "1.000033: kvm:kvm_entry: vcpu 0, rip 0x3",
        "1.000042: kvm:kvm_userspace_exit: reason KVM_EXIT_HLT (5)",
    )
    log = imported.trace_data().log
    assert (log["leave_ns"] - log["enter_ns"]).tolist() == [13_000, 0, 9_000]
    assert log["error"].tolist() == [0, 4, 0]
