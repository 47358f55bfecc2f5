"""The words of an exit: each field of the manuals' tables, and nothing but the name where there is no more to say."""

from __future__ import annotations

import itertools
import random

import pytest

from kvmbench.traces.hardware_exits import _KNOWN, ISA_SVM, ISA_VMX, reason_name
from kvmbench.traces.qualification import (
    describe_ept_violation,
    describe_exit,
    describe_msr,
    describe_page_fault_error,
)

VALID = 1 << 31
HAS_CODE = 1 << 11


def vmx(reason, qualification=0, *, vectoring=0, event=0, code=0):
    return describe_exit(ISA_VMX, reason, qualification, vectoring, event, code)


def svm(reason, info1=0, info2=0, *, event=0, code=0):
    return describe_exit(ISA_SVM, reason, info1, info2, event, code)


# SDM volume 3, "Exit Qualification for I/O Instructions".
@pytest.mark.parametrize(
    ("qualification", "words"),
    [
        (0x03F8_0000, "out 1 byte to port 0x3f8"),
        (0x03F8_0040, "out 1 byte to port 0x3f8"),
        (0x0CFC_000B, "in 4 bytes from port 0xcfc"),
        (0x0060_0009, "in 2 bytes from port 0x60"),
        (0x01F0_0039, "in 2 bytes from port 0x1f0, string instruction, repeated"),
        (0x00E9_0010, "out 1 byte to port 0xe9, string instruction"),
    ],
)
def test_vmx_io_has_direction_size_and_port(qualification, words):
    assert vmx(30, qualification) == words


# APM volume 2, "IOIO Intercepts", EXITINFO1.
@pytest.mark.parametrize(
    ("info1", "words"),
    [
        (0x03F8_0010, "out 1 byte to port 0x3f8"),
        (0x03F8_0310, "out 1 byte to port 0x3f8"),
        (0x0CFC_0041, "in 4 bytes from port 0xcfc"),
        (0x0060_0021, "in 2 bytes from port 0x60"),
        (0x01F0_012D, "in 2 bytes from port 0x1f0, string instruction, repeated"),
        (0x00E9_0C14, "out 1 byte to port 0xe9, string instruction"),
    ],
)
def test_svm_io_has_direction_size_and_port(info1, words):
    assert svm(0x7B, info1, 0x1234) == words


@pytest.mark.parametrize(
    ("qualification", "words"),
    [
        (0x000, "mov to cr0 from rax"),
        (0x303, "mov to cr3 from rbx"),
        (0xF18, "mov from cr8 to r15"),
        (0x020, "clts"),
        (0x0001_0030, "lmsw 0x1 from a register"),
        (0x0002_0070, "lmsw 0x2 from memory"),
    ],
)
def test_vmx_access_to_a_control_register_names_both_registers(qualification, words):
    assert vmx(28, qualification) == words


@pytest.mark.parametrize(
    ("code", "info1", "words"),
    [
        (0x010, 1 << 63, "mov to cr0 from rax"),
        (0x013, 1 << 63 | 3, "mov to cr3 from rbx"),
        (0x008, 1 << 63 | 15, "mov from cr8 to r15"),
        (0x010, 0, "write of cr0"),
        (0x004, 0, "read of cr4"),
        (0x065, 1 << 63 | 1, "mov to cr0 from rcx"),
        (0x065, 0, "write of cr0"),
        (0x094, 0x6F8, "cr4 becomes 0x6f8"),
        (0x08F, 0xD01, "efer becomes 0xd01"),
    ],
)
def test_svm_access_to_a_control_register_names_what_is_known(code, info1, words):
    assert svm(code, info1) == words


def test_access_to_a_debug_register_names_both_registers():
    assert vmx(29, 0x007) == "mov to dr7 from rax"
    assert vmx(29, 0x116) == "mov from dr6 to rcx"
    assert svm(0x37, 2) == "mov to dr7 from rdx"
    assert svm(0x26, 1) == "mov from dr6 to rcx"


def test_svm_without_decode_assists_does_not_name_a_register():
    assert svm(0x37) == "mov to dr7"
    assert svm(0x79) == ""
    assert svm(0x75) == ""


# SDM volume 3, "Exit Qualification for EPT Violations".
@pytest.mark.parametrize(
    ("qualification", "words"),
    [
        (0x181, "read of the final address, not present"),
        (0x182, "write of the final address, not present"),
        (0x184, "fetch of the final address, not present"),
        (0x083, "read and write during the page walk, not present"),
        (0x1AA, "write of the final address, EPT allows read and fetch"),
        (0x18B, "read and write of the final address, EPT allows read"),
        (0x001, "read without a linear address, not present"),
        (
            0xF82,
            "write of the final address, not present, user address, writable in the guest, no-execute in the guest",
        ),
        (0xE83, "read and write during the page walk, not present"),
        (0x1181, "read of the final address, not present, NMIs unblocked by IRET"),
        (0x2182, "write of the final address, not present, shadow stack"),
        (0x10182, "write of the final address, not present, asynchronous"),
    ],
)
def test_an_ept_violation_has_access_place_and_permissions(qualification, words):
    assert vmx(48, qualification) == words
    assert describe_ept_violation(qualification) == words


# APM volume 2, "Nested Page Faults, #VMEXIT(NPF)", EXITINFO1.
@pytest.mark.parametrize(
    ("info1", "words"),
    [
        (1 << 32 | 0x04, "read of the final address, not present"),
        (1 << 32 | 0x06, "write of the final address, not present"),
        (1 << 32 | 0x14, "fetch of the final address, not present"),
        (1 << 33 | 0x06, "write during the page walk, not present"),
        (1 << 32 | 0x07, "write of the final address, access not allowed"),
        (1 << 32 | 0x0D, "read of the final address, access not allowed, reserved bit set"),
        (
            1 << 37 | 1 << 32 | 0x47,
            "write of the final address, access not allowed, shadow stack, supervisor shadow stack",
        ),
        (
            1 << 34 | 1 << 32 | 1 << 31 | 0x07,
            "write of the final address, access not allowed, RMP check, encrypted page",
        ),
    ],
)
def test_a_nested_page_fault_has_access_place_cause_and_guest_physical_address(info1, words):
    assert svm(0x400, info1, 0xFEB0_0010) == f"{words}, gpa 0xfeb00010"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0x00, "supervisor read, not present"),
        (0x02, "supervisor write, not present"),
        (0x04, "user read, not present"),
        (0x07, "user write, access not allowed"),
        (0x15, "user fetch, access not allowed"),
        (0x09, "supervisor read, access not allowed, reserved bit set"),
        (0x25, "user read, access not allowed, protection key"),
        (0x47, "user write, access not allowed, shadow stack"),
        (0x87, "user write, access not allowed, HLAT paging"),
        (0x8007, "user write, access not allowed, SGX"),
    ],
)
def test_a_page_faults_error_code_is_the_same_on_both(code, words):
    assert describe_page_fault_error(code) == words
    expected = f"vector 14 (#PF), error code {code:#x} ({words}), address 0x7ffe1000"
    assert vmx(0, 0x7FFE1000, event=VALID | HAS_CODE | 3 << 8 | 14, code=code) == expected
    assert svm(0x4E, code, 0x7FFE1000) == expected


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "vector 13 (#GP), error code 0x0"),
        (0x18, "vector 13 (#GP), error code 0x18 (GDT selector 0x18)"),
        (0x0F, "vector 13 (#GP), error code 0xf (IDT vector 1, external event)"),
        (0x2C, "vector 13 (#GP), error code 0x2c (LDT selector 0x28)"),
        (0x102, "vector 13 (#GP), error code 0x102 (IDT vector 32)"),
        (0x1001, "vector 13 (#GP), error code 0x1001 (GDT selector 0x1000, external event)"),
    ],
)
def test_an_error_code_that_names_a_descriptor_says_which(code, words):
    assert vmx(0, event=VALID | HAS_CODE | 3 << 8 | 13, code=code) == words
    assert svm(0x4D, code) == words


def test_svm_takes_an_error_code_from_the_exceptions_that_have_one():
    # APM volume 2, "Vectors": those that push an error code.
    with_code = {vector for vector in range(32) if "error code" in svm(0x40 + vector, 0x18)}
    assert with_code == {8, 10, 11, 12, 13, 14, 17, 21, 29, 30}
    assert {vector for vector in range(32) if "selector" in svm(0x40 + vector, 0x18)} == {10, 11, 12, 13}


def test_an_exception_without_error_code_has_none():
    assert vmx(0, event=VALID | 3 << 8 | 6) == "vector 6 (#UD)"
    assert svm(0x46, 0x1234, 0x5678) == "vector 6 (#UD)"
    assert svm(0x43) == "vector 3 (#BP)"
    assert vmx(0, event=VALID | 6 << 8 | 3) == "vector 3 (#BP)"
    assert svm(0x5F) == "vector 31"


def test_vmx_debug_exception_has_what_met_its_conditions():
    event = VALID | 3 << 8 | 1
    assert vmx(0, 1 << 14, event=event) == "vector 1 (#DB), single step"
    assert vmx(0, 0x5, event=event) == "vector 1 (#DB), breakpoint 0 met, breakpoint 2 met"
    assert vmx(0, 0xFFFF_FFFF_FFFF_BFF8, event=event).startswith("vector 1 (#DB), breakpoint 3 met, bus lock, debug")
    assert vmx(0, 1 << 4, event=event) == "vector 1 (#DB)"
    assert vmx(0, 1 << 16, event=event) == "vector 1 (#DB), RTM"
    assert vmx(0, 1 << 13, event=event) == "vector 1 (#DB), debug register access"


def test_vmx_nmi_and_interrupt():
    assert vmx(0, event=VALID | 2 << 8 | 2) == "NMI"
    assert vmx(1, event=VALID | 236) == "host interrupt 236"
    assert vmx(1, event=236) == ""


def test_vmx_unblocked_nmis_are_said_only_where_the_bit_is_defined():
    event = VALID | 3 << 8 | 1 << 12
    assert vmx(0, event=event | 6) == "vector 6 (#UD), NMIs unblocked by IRET"
    assert vmx(0, event=event | 8) == "vector 8 (#DF)"
    assert vmx(0, event=event | 6, vectoring=VALID | 32) == "vector 6 (#UD), while delivering interrupt 32"


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (3 << 8 | 14, "vector 14 (#PF)"),
        (236, "interrupt 236"),
        (2 << 8 | 2, "NMI"),
        (4 << 8 | 0x80, "software interrupt 0x80"),
    ],
)
def test_the_event_that_was_being_delivered_is_named_on_both(info, words):
    assert (
        vmx(48, 0x182, vectoring=VALID | info) == f"write of the final address, not present, while delivering {words}"
    )
    assert svm(0x400, 1 << 32 | 6, 0x1000, event=VALID | info) == (
        f"write of the final address, not present, gpa 0x1000, while delivering {words}"
    )
    assert vmx(12, vectoring=info) == svm(0x78, event=info) == ""


def test_only_vmx_tells_these_kinds_of_events_apart():
    assert vmx(48, 0x182, vectoring=VALID | 5 << 8 | 1).endswith("while delivering INT1")
    assert vmx(48, 0x182, vectoring=VALID | 6 << 8 | 3).endswith("while delivering software exception 3 (#BP)")
    assert vmx(48, 0x182, vectoring=VALID | 7 << 8 | 1).endswith("while delivering event 1")


def test_svm_has_the_error_code_of_the_event_that_was_being_delivered():
    assert svm(0x7F, event=VALID | HAS_CODE | 3 << 8 | 14, code=2) == (
        "while delivering vector 14 (#PF) with error code 0x2 (supervisor write, not present)"
    )


def test_vmx_error_code_is_not_that_of_the_event_that_was_being_delivered():
    words = vmx(0, 0x1000, vectoring=VALID | HAS_CODE | 3 << 8 | 13, event=VALID | HAS_CODE | 3 << 8 | 14, code=2)
    assert words == (
        "vector 14 (#PF), error code 0x2 (supervisor write, not present), address 0x1000, "
        "while delivering vector 13 (#GP)"
    )


@pytest.mark.parametrize(
    ("reason", "qualification", "words"),
    [
        (4, 0x9A, "vector 0x9a"),
        (9, 0x0000_0028, "CALL to TSS selector 0x28"),
        (9, 0x4000_0028, "IRET to TSS selector 0x28"),
        (9, 0x8000_0028, "JMP to TSS selector 0x28"),
        (9, 0xC000_0028, "task gate to TSS selector 0x28"),
        (14, 0xFFFF_8000_0000_1000, "address 0xffff800000001000"),
        (31, 0, "read of an MSR"),
        (32, 0, "write of an MSR"),
        (36, 1, "monitor armed"),
        (44, 0x0020, "read of APIC register 0x20 (APICID)"),
        (44, 0x1300, "write of APIC register 0x300 (ICR)"),
        (44, 0x2300, "fetch of APIC register 0x300 (ICR)"),
        (44, 0x30F0, "access during event delivery of APIC register 0xf0 (SIVR)"),
        (44, 0x00E0, "read of APIC register 0xe0 (DFR)"),
        (44, 0x00E1, "read of APIC register 0xe1 (DFR)"),
        (44, 0x00D1, "read of APIC register 0xd1 (LDR)"),
        (44, 0x0400, "read of APIC register 0x400"),
        (44, 0x4300, "monitoring of APIC register 0x300 (ICR)"),
        (44, 0xB000, "guest-physical access during monitoring"),
        (44, 0xA000, "guest-physical access during event delivery"),
        (44, 0xF000, "guest-physical access during an instruction"),
        (44, 0x7000, ""),
        (45, 33, "vector 33"),
        (46, 0x10, "displacement 0x10"),
        (46, (1 << 64) - 8, "displacement -0x8"),
        (50, 0, ""),
        (56, 0xB0, "write of APIC register 0xb0 (EOI)"),
        (56, 0x310, "write of APIC register 0x310 (ICR2)"),
        (75, 1, "VM context not valid"),
        (84, 0xC0000080, "read of IA32_EFER (0xc0000080)"),
        (85, 0x10, "write of IA32_TIME_STAMP_COUNTER (0x10)"),
        (12, 0x1234, ""),
        (49, 0x1234, ""),
    ],
)
def test_other_vmx_qualifications(reason, qualification, words):
    assert vmx(reason, qualification) == words


def test_the_displacement_of_an_operand_is_told_by_the_instructions_that_have_one():
    # SDM volume 3, "Basic VM-Exit Information": INVEPT, INVPCID, INVVPID, LGDT, LIDT, LLDT, LTR, SGDT, SIDT, SLDT, STR,
    # VMCLEAR, VMPTRLD, VMPTRST, VMREAD, VMWRITE, VMXON, XRSTORS, XSAVES.
    names = {reason_name(ISA_VMX, reason) for reason in range(100) if vmx(reason, 0x10) == "displacement 0x10"}
    assert names == {
        *("INVEPT", "INVPCID", "INVVPID", "GDTR_IDTR", "LDTR_TR", "VMCLEAR", "VMPTRLD", "VMPTRST", "VMREAD", "VMWRITE"),
        *("VMON", "XRSTORS", "XSAVES"),
    }


def test_svm_codes_that_are_a_range_begin_and_end_where_the_manual_has_them():
    assert (svm(0x00), svm(0x0F), svm(0x10), svm(0x1F)) == (
        "read of cr0",
        "read of cr15",
        "write of cr0",
        "write of cr15",
    )
    assert (svm(0x20), svm(0x2F), svm(0x30), svm(0x3F)) == (
        "mov from dr0",
        "mov from dr15",
        "mov to dr0",
        "mov to dr15",
    )
    assert (svm(0x40), svm(0x5F), svm(0x60)) == ("vector 0 (#DE)", "vector 31", "")
    assert (svm(0x90, 1), svm(0x9F, 1), svm(0xA0, 1)) == ("cr0 becomes 0x1", "cr15 becomes 0x1", "")


@pytest.mark.parametrize(
    ("code", "info1", "info2", "words"),
    [
        (0x75, 0x80, 0, "int 0x80"),
        (0x78, 0, 0, ""),
        (0x79, 0xFFFF_8000_0000_1000, 0, "address 0xffff800000001000"),
        (0x7C, 0, 0, "read of an MSR"),
        (0x7C, 1, 0, "write of an MSR"),
        (0x7D, 0x28, 0, "CALL or task gate to TSS selector 0x28"),
        (0x7D, 0x28, 1 << 36, "IRET to TSS selector 0x28"),
        (0x7D, 0x28, 1 << 38, "JMP to TSS selector 0x28"),
        (0x7D, 0x28, 1 << 44 | 0x18, "CALL or task gate to TSS selector 0x28, error code 0x18"),
        (0xA2, 0x1000, 2, "type 2, descriptor at 0x1000"),
        (0x401, 0x1_0000_00FD, 1 << 32 | 1, "target not running, ICR 0x1000000fd"),
        (0x402, 1 << 32 | 0xB0, 33, "write of APIC register 0xb0 (EOI), vector 33"),
        (0x402, 0x20, 0, "read of APIC register 0x20 (APICID)"),
        (0x80000001, 0xFEB0_0000, 4, "gpa 0xfeb00000, 4 bytes"),
    ],
)
def test_other_svm_exit_information(code, info1, info2, words):
    assert svm(code, info1, info2) == words


def test_the_upper_bits_of_a_vmx_reason_are_put_into_words():
    assert vmx(0x80000021) == "entry failed"
    assert vmx(0x80000021, 2) == "entry failed, PDPTEs not valid"
    assert vmx(0x80000021, 3) == "entry failed, NMI in the shadow of STI"
    assert vmx(0x80000021, 4) == "entry failed, VMCS link pointer not valid"
    assert vmx(0x80000022, 3) == "entry failed, entry 3 of the MSR list"
    assert vmx(0x0400000C) == "bus lock"
    assert vmx(0x0200000C) == "shadow stack left busy"
    assert vmx(0x1000000C) == "MTF exit pending"
    assert vmx(0x2000000C) == "from VMX root operation"
    assert vmx(0x08000030, 0x182) == "in an enclave, write of the final address, not present"


def test_an_msr_has_name_and_number():
    assert describe_msr(0xC0000080) == "IA32_EFER (0xc0000080)"
    assert describe_msr(0x4B564D01) == "MSR_KVM_SYSTEM_TIME_NEW (0x4b564d01)"
    assert describe_msr(0x12345) == "0x12345"


def test_the_same_number_is_read_by_isa():
    assert vmx(0x1E, 0x03F8_0000) == "out 1 byte to port 0x3f8"
    assert svm(0x1E, 0x03F8_0000) == "write of cr14"
    assert describe_exit(0, 30, 0x03F8_0000, 0, 0, 0) == ""


def test_no_content_of_the_fields_raises_or_breaks_the_line():
    # Every known reason, and some that are not, with fields of all ones and of random bits.
    draw = random.Random(5)
    for isa in (0, ISA_VMX, ISA_SVM, 3):
        reasons = sorted({*_KNOWN.get(isa, {}), *range(0x110), 0x1F3, 0x7FFFFFFF, 0xFFFFFFFF, -1, (1 << 64) - 1})
        contents = [((1 << 64) - 1,) * 2 + ((1 << 32) - 1,) * 2, (0, 0, 0, 0)]
        contents += [tuple(draw.getrandbits(bits) for bits in (64, 64, 32, 32)) for _ in range(20)]
        for reason, fields in itertools.product(reasons, contents):
            words = describe_exit(isa, reason, *fields)
            assert "\n" not in words
            assert words == words.strip(", ")
