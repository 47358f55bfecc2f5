"""kvm_run's exit union, as bytes, becomes the exit that it describes."""

from __future__ import annotations

import dataclasses

import pytest

from kvmbench import errors, uapi
from kvmbench.core.wire import KB_RUN_BYTES
from kvmbench.kvm import exits
from kvmbench.kvm.exits import decode_exit
from kvmbench.uapi import ExitReason
from kvmbench.uapi import constants as c


def run_bytes(reason: int, **parts: object) -> bytes:
    """The first bytes of a kvm_run with this exit reason, whose members are set by keyword."""
    run = uapi.ffi.new("struct kvm_run *", {"exit_reason": reason})
    for name, value in parts.items():
        setattr(run, name, value)
    return bytes(uapi.ffi.buffer(run))[:KB_RUN_BYTES]


def io(direction: int, **parts: int) -> bytes:
    return run_bytes(c.KVM_EXIT_IO, io={"direction": direction, "data_offset": 4096, **parts})


def test_an_out_is_a_port_and_the_bytes_written():
    exit = decode_exit(io(c.KVM_EXIT_IO_OUT, port=0x3F8, size=1, count=1), b"A")
    assert exit == exits.IoOut(port=0x3F8, data=b"A", size_bytes=1)
    assert exit.reason is ExitReason.IO


def test_a_rep_outs_has_the_data_of_all_its_accesses_and_no_more():
    exit = decode_exit(io(c.KVM_EXIT_IO_OUT, port=0x80, size=2, count=3), b"aabbccdd")
    assert exit == exits.IoOut(port=0x80, data=b"aabbcc", size_bytes=2, count=3)


def test_an_in_says_how_much_it_waits_for():
    assert decode_exit(io(c.KVM_EXIT_IO_IN, port=0x60, size=4, count=2)) == exits.IoIn(0x60, 4, 2)


def test_an_mmio_write_has_only_the_bytes_that_were_written():
    mmio = {"phys_addr": 0xFEE000B0, "data": [1, 2, 3, 4, 5, 6, 7, 8], "len": 4, "is_write": 1}
    assert decode_exit(run_bytes(c.KVM_EXIT_MMIO, mmio=mmio)) == exits.MmioWrite(0xFEE000B0, b"\1\2\3\4", 4)


def test_an_mmio_read_has_an_address_and_a_size():
    mmio = {"phys_addr": 1 << 40, "len": 8, "is_write": 0}
    assert decode_exit(run_bytes(c.KVM_EXIT_MMIO, mmio=mmio)) == exits.MmioRead(gpa=1 << 40, size_bytes=8)


def test_a_corrupt_mmio_length_does_not_read_past_the_data():
    mmio = {"phys_addr": 0, "len": 1 << 31, "is_write": 1}
    assert decode_exit(run_bytes(c.KVM_EXIT_MMIO, mmio=mmio)) == exits.MmioWrite(0, bytes(8), 8)


def test_a_debug_exit_has_the_registers_of_the_event():
    arch = {"exception": 1, "pc": 0x1003, "dr6": 0xFFFF4FF0, "dr7": 0x400}
    exit = decode_exit(run_bytes(c.KVM_EXIT_DEBUG, debug={"arch": arch}))
    assert exit == exits.Debug(vector=1, pc=0x1003, dr6=0xFFFF4FF0, dr7=0x400)
    assert str(exit) == "Debug(vector=1, pc=0x1003, dr6=0xffff4ff0, dr7=0x400)"


def test_an_instruction_that_kvm_cannot_emulate_is_shown():
    failure = {
        "suberror": c.KVM_INTERNAL_ERROR_EMULATION,
        "ndata": 3,
        "flags": c.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    }
    run = uapi.ffi.new("struct kvm_run *", {"emulation_failure": failure})
    run.exit_reason = c.KVM_EXIT_INTERNAL_ERROR
    run.emulation_failure.insn_size = 3
    run.emulation_failure.insn_bytes = b"\x0f\x01\xc1".ljust(15, b"\xcc")
    exit = decode_exit(bytes(uapi.ffi.buffer(run))[:KB_RUN_BYTES])
    assert isinstance(exit, exits.InternalError)
    assert exit.instruction == b"\x0f\x01\xc1"
    assert exit.data[0] == 1
    assert len(exit.data) == 3


def test_an_internal_error_of_another_sort_has_numbers_and_no_instruction():
    internal = {"suberror": c.KVM_INTERNAL_ERROR_DELIVERY_EV, "ndata": 2, "data": [7, 8, 9]}
    exit = decode_exit(run_bytes(c.KVM_EXIT_INTERNAL_ERROR, internal=internal))
    assert exit == exits.InternalError(suberror=3, data=(7, 8))


def test_a_corrupt_count_does_not_read_past_the_union():
    internal = {"suberror": 3, "ndata": 1000}
    assert len(decode_exit(run_bytes(c.KVM_EXIT_INTERNAL_ERROR, internal=internal)).data) == 16
    event = {"type": 1, "ndata": 1000}
    assert len(decode_exit(run_bytes(c.KVM_EXIT_SYSTEM_EVENT, system_event=event)).data) == 16


def test_the_three_exits_of_hyper_v_are_told_apart():
    hcall = {"type": c.KVM_EXIT_HYPERV_HCALL, "u": {"hcall": {"input": 0x5C, "params": [1, 2]}}}
    assert decode_exit(run_bytes(c.KVM_EXIT_HYPERV, hyperv=hcall)) == exits.HypervHypercall(0x5C, (1, 2))
    synic = {"type": c.KVM_EXIT_HYPERV_SYNIC, "u": {"synic": {"msr": 0x40000080, "control": 1}}}
    assert decode_exit(run_bytes(c.KVM_EXIT_HYPERV, hyperv=synic)) == exits.HypervSynic(0x40000080, 1, 0, 0)
    other = run_bytes(c.KVM_EXIT_HYPERV, hyperv={"type": 99})
    assert decode_exit(other) == exits.UnknownExit(c.KVM_EXIT_HYPERV)


@pytest.mark.parametrize(
    ("reason", "parts", "expected"),
    [
        (c.KVM_EXIT_HLT, {}, exits.Hlt()),
        (c.KVM_EXIT_SHUTDOWN, {}, exits.Shutdown()),
        (c.KVM_EXIT_INTR, {}, exits.Interrupted()),
        (c.KVM_EXIT_IRQ_WINDOW_OPEN, {}, exits.IrqWindowOpen()),
        (c.KVM_EXIT_UNKNOWN, {"hw": {"hardware_exit_reason": 0x404}}, exits.HardwareExit(0x404)),
        (
            c.KVM_EXIT_FAIL_ENTRY,
            {"fail_entry": {"hardware_entry_failure_reason": 0x80000021, "cpu": 3}},
            exits.FailEntry(0x80000021, 3),
        ),
        (c.KVM_EXIT_EXCEPTION, {"ex": {"exception": 14, "error_code": 2}}, exits.GuestException(14, 2)),
        (c.KVM_EXIT_SET_TPR, {"cr8": 5}, exits.SetTpr(5)),
        (c.KVM_EXIT_TPR_ACCESS, {"tpr_access": {"rip": 4096, "is_write": 1}}, exits.TprAccess(4096, True)),
        (
            c.KVM_EXIT_HYPERCALL,
            {"hypercall": {"nr": 12, "args": [1, 2, 3, 0, 0, 0], "longmode": 1}},
            exits.Hypercall(12, (1, 2, 3, 0, 0, 0), True),
        ),
        (
            c.KVM_EXIT_SYSTEM_EVENT,
            {"system_event": {"type": c.KVM_SYSTEM_EVENT_RESET, "ndata": 1, "data": [9]}},
            exits.SystemEvent(2, (9,)),
        ),
        (c.KVM_EXIT_IOAPIC_EOI, {"eoi": {"vector": 0x31}}, exits.IoapicEoi(0x31)),
        (c.KVM_EXIT_X86_RDMSR, {"msr": {"index": 0x10, "reason": 4}}, exits.RdMsr(0x10, 4)),
        (c.KVM_EXIT_X86_WRMSR, {"msr": {"index": 0x10, "reason": 1, "data": 5}}, exits.WrMsr(0x10, 5, 1)),
        (c.KVM_EXIT_DIRTY_RING_FULL, {}, exits.DirtyRingFull()),
        (c.KVM_EXIT_AP_RESET_HOLD, {}, exits.ApResetHold()),
        (c.KVM_EXIT_X86_BUS_LOCK, {}, exits.BusLock()),
        (
            c.KVM_EXIT_XEN,
            {"xen": {"type": 1, "u": {"hcall": {"longmode": 1, "cpl": 3, "input": 17, "params": [0] * 6}}}},
            exits.XenHypercall(True, 3, 17, (0,) * 6),
        ),
        (c.KVM_EXIT_NOTIFY, {"notify": {"flags": 1}}, exits.Notify(True)),
    ],
)
def test_the_exit_has_the_fields_of_its_part_of_the_union(reason, parts, expected):
    exit = decode_exit(run_bytes(reason, **parts))
    assert exit == expected
    assert exit.reason == reason
    assert type(exit).__name__ in str(exit)


def test_a_reason_that_has_no_class_is_a_value_with_its_bytes():
    exit = decode_exit(run_bytes(250, hw={"hardware_exit_reason": 0x1234}))
    assert exit == exits.UnknownExit(250, exit.raw)
    assert exit.reason == 250
    assert exit.raw[:2] == b"\x34\x12"
    assert len(exit.raw) == 256
    assert str(exit) == "UnknownExit(250)"
    assert str(decode_exit(run_bytes(c.KVM_EXIT_DCR))) == "UnknownExit(DCR)"


def test_too_few_bytes_are_refused_rather_than_read_past():
    with pytest.raises(errors.InternalError, match="287 bytes"):
        decode_exit(run_bytes(c.KVM_EXIT_HLT)[:-1])


def test_an_exit_cannot_be_changed():
    exit = decode_exit(io(c.KVM_EXIT_IO_IN, port=0x60, size=1, count=1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        exit.port = 0x61


def test_every_class_of_exit_has_a_reason():
    classes = [
        value
        for value in vars(exits).values()
        if isinstance(value, type) and issubclass(value, exits.Exit)
    ]
    classes = [kind for kind in classes if kind not in (exits.Exit, exits.UnknownExit)]
    assert len(classes) > 25
    for kind in classes:
        assert exits._REASONS[kind] in exits._DECODERS, kind
