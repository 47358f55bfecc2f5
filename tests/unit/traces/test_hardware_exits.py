"""Names of exits: the kernel's own, by isa, and what a kernel's format file says wins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmbench.traces.hardware_exits import ISA_SVM, ISA_VMX, parse_reason_table, reason_name
from kvmbench.uapi.hardware_exits import SVM_EXIT_REASONS, VMX_EXIT_REASONS

# Of the tracepoint kvm:kvm_exit, read from tracefs of Linux 6.18.
FORMAT_6_18 = (Path(__file__).parent / "formats" / "kvm_exit-6.18.txt").read_text()


@pytest.fixture(scope="module")
def table():
    return parse_reason_table(FORMAT_6_18)


@pytest.mark.parametrize(
    ("isa", "reason", "name"),
    [
        (ISA_VMX, 0, "EXCEPTION_NMI"),
        (ISA_VMX, 12, "HLT"),
        (ISA_VMX, 30, "IO_INSTRUCTION"),
        (ISA_VMX, 48, "EPT_VIOLATION"),
        (ISA_VMX, 84, "MSR_READ_IMM"),
        (ISA_SVM, 0x4E, "PF excp"),
        (ISA_SVM, 0x72, "cpuid"),
        (ISA_SVM, 0x78, "hlt"),
        (ISA_SVM, 0x7B, "io"),
        (ISA_SVM, 0xA6, "idle-halt"),
        (ISA_SVM, 0x400, "npf"),
    ],
)
def test_the_same_number_is_named_by_isa(isa, reason, name):
    assert reason_name(isa, reason) == name


def test_a_failed_entry_is_named_beside_its_reason():
    assert reason_name(ISA_VMX, 0x80000021) == "INVALID_STATE FAILED_VMENTRY"


def test_upper_bits_that_kvm_has_no_name_for_are_shown_in_hex():
    assert reason_name(ISA_VMX, 0x08000000 | 48) == "EPT_VIOLATION 0x8000000"
    assert reason_name(ISA_VMX, 0x88000000 | 48) == "EPT_VIOLATION FAILED_VMENTRY 0x8000000"


@pytest.mark.parametrize("reason", [0xFFFFFFFF, -1, 0xFFFFFFFFFFFFFFFF])
def test_a_guest_state_that_svm_refuses_is_named_in_any_width(reason, table):
    assert reason_name(ISA_SVM, reason) == "invalid_guest_state"
    assert reason_name(ISA_SVM, reason, names=table) == "invalid_guest_state"


@pytest.mark.parametrize(
    ("isa", "reason", "name"),
    [
        (ISA_VMX, 0x1F3, "exit 0x1f3"),
        (ISA_VMX, 0x800001F3, "exit 0x1f3 FAILED_VMENTRY"),
        (ISA_SVM, 0x1F3, "exit 0x1f3"),
        (0, 1, "exit 0x1"),
        (99, 48, "exit 0x30"),
    ],
)
def test_an_unknown_exit_is_a_number_and_no_exception(isa, reason, name, table):
    assert reason_name(isa, reason) == name
    assert reason_name(isa, reason, names=table) == name


def test_every_pair_of_the_kernels_format_file_is_taken(table):
    lists = FORMAT_6_18[: FORMAT_6_18.index("FAILED_VMENTRY")]
    assert len(table[ISA_VMX]) + len(table[ISA_SVM]) == len(re.findall(r'", "|\{ [^}]*, "', lists)) - 1
    assert table.keys() == {ISA_VMX, ISA_SVM}


def test_the_kernels_format_file_and_the_headers_agree_on_what_both_know(table):
    for isa, header in ((ISA_VMX, VMX_EXIT_REASONS), (ISA_SVM, SVM_EXIT_REASONS)):
        shared = header.keys() & table[isa].keys()
        assert len(shared) > 60
        assert {number: header[number] for number in shared} == {number: table[isa][number] for number in shared}


def test_every_name_of_linux_6_18_is_known_without_its_format_file(table):
    for isa, names in table.items():
        assert {number: reason_name(isa, number) for number in names} == names


def test_sums_and_negative_numbers_in_the_format_file_are_numbers(table):
    assert table[ISA_SVM][0x4E] == "PF excp"
    assert table[ISA_SVM][0xFFFFFFFF] == "invalid_guest_state"
    assert table[ISA_SVM][0x8000FFFD] == "vmgexit_hypervisor_feature"


def test_a_newer_kernels_names_win():
    names = parse_reason_table(
        'print fmt: "%s", (REC->isa == 1) ? __print_symbolic(REC->exit_reason & 0xffff, { 12, "HALTED" }, '
        '{ 499, "NEW" }) : __print_symbolic_u64(REC->exit_reason, { 0x078ull, "halted" }, { -1ull, "refused" }), 1'
    )
    assert names == {ISA_VMX: {12: "HALTED", 499: "NEW"}, ISA_SVM: {0x78: "halted", 0xFFFFFFFF: "refused"}}
    assert reason_name(ISA_VMX, 499, names=names) == "NEW"
    assert reason_name(ISA_VMX, 12, names=names) == "HALTED"
    assert reason_name(ISA_SVM, 0x400, names=names) == "npf"


def test_the_flags_list_is_not_taken_for_reasons(table):
    assert "FAILED_VMENTRY" not in table[ISA_VMX].values()
    assert "FAILED_VMENTRY" not in table[ISA_SVM].values()


@pytest.mark.parametrize(
    "text",
    [
        "",
        'print fmt: "vcpu %u", REC->vcpu_id',
        "(REC->isa == 1) ? __print_symbolic(",
        '(REC->isa == 7) ? __print_symbolic(REC->exit_reason, { 1, "x" })',
    ],
)
def test_a_text_without_the_lists_gives_no_names(text):
    assert parse_reason_table(text) == {}


def test_an_entry_that_is_not_understood_is_left_out_and_the_rest_kept():
    text = (
        '(REC->isa == 1) ? __print_symbolic(REC->exit_reason, { 1, "one" }, { sizeof(int), "x" }, { 3, "three" }) : 0'
    )
    assert parse_reason_table(text) == {ISA_VMX: {1: "one", 3: "three"}}


def test_a_number_that_python_does_not_read_is_left_out():
    # 010 is eight in C, and nothing in Python.
    table = '{ 010, "a" }, { 0x, "b" }, { 2, "c" }'
    names = f"__print_symbolic(REC->exit_reason, {table})"
    text = f"(REC->isa == 1) ? {names} : {names}"
    assert parse_reason_table(text) == {1: {2: "c"}, 2: {2: "c"}}
