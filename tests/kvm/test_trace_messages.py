"""Malformed messages about traces: each gets an error reply, and the core goes on."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import kvmbench as kb
from kvmbench import errors
from kvmbench.core import wire
from kvmbench.core._wire import ffi
from kvmbench.errors import ClosedError
from kvmbench.host import trace_messages
from kvmbench.traces.format import parse_format
from kvmbench.traces.pages import decode
from kvmbench.traces.run_log import ROW

from .test_messages import ask, message, struct, works

BIG = 0xFFFF_FFFF
LOG = {"flags": wire.KB_TRACE_LOG, "log_rows": 16}
EVENTS = {"flags": wire.KB_TRACE_EVENTS, "buffer_kb": 64}


def open_trace(machine: kb.Machine, names: bytes = b"", **fields: int) -> tuple[int, bytes]:
    fields = {"vm": machine.vm.handle, "names_bytes": len(names), **fields}
    return ask(machine.host, message(wire.KB_TRACE_OPEN, struct("kb_trace_open", **fields) + names))


def text(host: kb.Host, name: bytes = b"", **fields: int) -> tuple[int, bytes]:
    fields = {"name_bytes": len(name), **fields}
    return ask(host, message(wire.KB_TRACE_TEXT, struct("kb_trace_text", **fields) + name))


@pytest.fixture
def trace(machine: kb.Machine) -> Iterator[int]:
    """The handle of a trace with a log only, switched on."""
    status, reply = open_trace(machine, **LOG)
    assert status == 0
    handle = ffi.cast("struct kb_trace_open_reply *", ffi.from_buffer(reply)).handle
    assert ask(machine.host, message(wire.KB_TRACE_SET, struct("kb_trace_set", handle=handle, on=1)))[0] == 0
    yield handle
    with contextlib.suppress(ClosedError):
        machine.host.core.close_handle(handle)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, wire.KB_BAD_VALUE),
        ({"flags": 8, "log_rows": 16}, wire.KB_BAD_VALUE),
        ({"flags": 0x8000_0001, "log_rows": 16}, wire.KB_BAD_VALUE),
        ({**LOG, "reserved": 1}, wire.KB_BAD_VALUE),
        ({**LOG, "log_rows": 0}, wire.KB_BAD_VALUE),
        ({**LOG, "log_rows": 8}, wire.KB_BAD_VALUE),
        ({**LOG, "log_rows": 17}, wire.KB_BAD_VALUE),
        ({**LOG, "log_rows": wire.KB_MAX_TRACE_LOG_ROWS * 2}, wire.KB_BAD_VALUE),
        ({**LOG, "log_rows": 0x8000_0000}, wire.KB_BAD_VALUE),
        ({**LOG, "buffer_kb": wire.KB_MAX_TRACE_BUFFER_KB + 1}, wire.KB_BAD_VALUE),
        ({**EVENTS, "buffer_kb": 0}, wire.KB_BAD_VALUE),
        ({**EVENTS, "buffer_kb": BIG}, wire.KB_BAD_VALUE),
        ({**LOG, "names_bytes": 1}, wire.KB_BAD_LENGTH),
        ({**LOG, "names_bytes": BIG}, wire.KB_BAD_LENGTH),
        ({**LOG, "vm": 0}, wire.KB_BAD_HANDLE),
        ({**LOG, "vm": wire.KB_SYSTEM_HANDLE}, wire.KB_BAD_HANDLE),
        ({**LOG, "vm": BIG}, wire.KB_BAD_HANDLE),
    ],
)
def test_opening_refuses_what_cannot_be(machine, fields, status):
    assert open_trace(machine, **fields)[0] == status
    with kb.trace(machine, ()):
        pass


@pytest.mark.parametrize(
    "names",
    [
        b"kvm/kvm_exit",  # no end
        b"kvm/kvm_exit\n\n",
        b"\n",
        b"/\n",
        b"kvm/\n",
        b"/kvm_exit\n",
        b"kvm_exit\n",
        b"kvm/../../x\n",
        b"kvm/..\n",
        b"../kvm/kvm_exit\n",
        b"kvm/kvm_exit/enable\n",
        b"kvm//kvm_exit\n",
        b"kvm/kvm_exit \n",
        b"kvm/kvm_exit\0\n",
        b"kvm\0/kvm_exit\n",
        b"KVM/kvm_exit\n",
        b"kv/kvm_exit\n",
        b"kvmm/kvm_exit\n",
        b"ftrace/print\n",
        b"syscalls/sys_enter_read\n",
        b"kvm/" + b"x" * 128 + b"\n",
        b"kvm/kvm_exit\nkvm/\xff\n",
    ],
)
def test_names_that_are_none_are_refused(machine, names):
    for fields in (EVENTS, LOG):
        assert open_trace(machine, names, **fields)[0] == wire.KB_NOT_ALLOWED
    if not names.startswith(b"ftrace/"):
        assert text(machine.host, names.rstrip(b"\n") + b"\n", what=wire.KB_TRACE_FORMAT)[0] == wire.KB_NOT_ALLOWED
    assert works(machine.host)


def test_names_beyond_the_limit_are_refused(machine):
    names = b"kvm/kvm_exit\n" * (wire.KB_MAX_TRACE_NAMES // 13 + 1)
    assert open_trace(machine, names, **EVENTS)[0] == wire.KB_BAD_LENGTH


def test_an_event_there_is_not_is_told_by_its_place(machine):
    status, raw = open_trace(machine, b"kvm/kvm_exit\nkvm/no_such\nkvm/kvm_entry\n", **EVENTS)
    assert status == 0
    reply = ffi.cast("struct kb_trace_open_reply *", ffi.from_buffer(raw))
    assert (reply.events_status, reply.step, reply.cpus) == (-errno.ENOENT, wire.KB_TRACE_STEP_EVENT, 1)
    assert reply.page_bytes == 0
    machine.host.core.close_handle(reply.handle)


def test_a_vm_has_one_trace_until_it_is_closed(machine, trace):
    assert open_trace(machine, **LOG)[0] == wire.KB_BUSY
    machine.host.core.close_handle(trace)
    status, reply = open_trace(machine, **LOG)
    assert status == 0
    machine.host.core.close_handle(ffi.cast("struct kb_trace_open_reply *", ffi.from_buffer(reply)).handle)
    assert ask(machine.host, message(wire.KB_TRACE_READ, struct("kb_trace_read", handle=trace, max_bytes=100)))[0] == (
        wire.KB_BAD_HANDLE
    )


@pytest.mark.parametrize("handle", [0, 1, 2, 0xFFFF, 0x10002, BIG, None])
def test_a_handle_that_is_no_trace_is_answered(machine, handle):
    handle = machine.vm.handle if handle is None else handle
    requests = [
        message(wire.KB_TRACE_SET, struct("kb_trace_set", handle=handle, on=1)),
        message(wire.KB_TRACE_READ, struct("kb_trace_read", handle=handle, max_bytes=8192)),
        message(wire.KB_TRACE_MARK, struct("kb_trace_mark", handle=handle, text_bytes=1) + b"x"),
        message(wire.KB_TRACE_TEXT, struct("kb_trace_text", handle=handle, what=wire.KB_TRACE_STATS)),
    ]
    for request in requests:
        assert ask(machine.host, request)[0] == wire.KB_BAD_HANDLE
    assert works(machine.host)


def test_a_traces_handle_is_nothing_else(machine, trace):
    for kind, body in (
        (wire.KB_KICK, struct("kb_handle", handle=trace)),
        (wire.KB_CREATE_VCPU, struct("kb_create", parent=trace)),
        (wire.KB_READ_REGION, struct("kb_range", handle=trace, length_bytes=8)),
        (wire.KB_EXECUTE, struct("kb_execute", vcpu=trace)),
        (wire.KB_READ_STATS, struct("kb_range", handle=trace, length_bytes=8)),
    ):
        assert ask(machine.host, message(kind, body))[0] == wire.KB_BAD_HANDLE


def test_texts_refuse_what_cannot_be(machine, trace):
    host = machine.host
    for what in (0, 5, BIG):
        assert text(host, what=what)[0] == wire.KB_BAD_VALUE
    assert text(host, what=wire.KB_TRACE_FORMAT)[0] == wire.KB_NOT_ALLOWED
    for name_bytes in (1, BIG):
        assert text(host, what=wire.KB_TRACE_FORMAT, name_bytes=name_bytes)[0] == wire.KB_BAD_LENGTH
    # It has no ring, so it has no statistics of one.
    for index in (0, 1, BIG):
        assert text(host, what=wire.KB_TRACE_STATS, handle=trace, index=index)[0] == wire.KB_BAD_RANGE
    status, reply = text(host, b"ftrace/print", what=wire.KB_TRACE_FORMAT)
    assert status == 0
    assert reply[16:].startswith(b"name: print\n")
    assert works(host)


def test_switches_and_marks_refuse_what_cannot_be(machine, trace):
    host = machine.host
    for on in (2, BIG):
        assert ask(host, message(wire.KB_TRACE_SET, struct("kb_trace_set", handle=trace, on=on)))[0] == (
            wire.KB_BAD_VALUE
        )
    for told, sent in ((1, 0), (0, 1), (5, 4), (BIG, 4), (1025, 1025)):
        body = struct("kb_trace_mark", handle=trace, text_bytes=told) + b"x" * sent
        assert ask(host, message(wire.KB_TRACE_MARK, body))[0] == wire.KB_BAD_LENGTH
    status, raw = ask(host, message(wire.KB_TRACE_MARK, struct("kb_trace_mark", handle=trace, text_bytes=0)))
    assert status == 0
    reply = ffi.cast("struct kb_trace_mark_reply *", ffi.from_buffer(raw))
    assert reply.events_status == -errno.ENOENT, "there are no events to write it among"
    assert 0 < reply.before_ns <= reply.after_ns


@pytest.mark.parametrize("max_bytes", [0, 1, 31, 32, 56, 87, 88, 89, 200, BIG])
def test_readings_keep_to_their_room(machine, trace, max_bytes):
    machine.load_asm("mov ecx, 9\n0: out 0x99, al\nloop 0b\nhlt", at=0x1000)
    machine.cpu.run(deadline_s=30)
    body = struct("kb_trace_read", handle=trace, max_bytes=max_bytes)
    status, raw = ask(machine.host, message(wire.KB_TRACE_READ, body))
    assert status == 0
    reply = ffi.cast("struct kb_trace_read_reply *", ffi.from_buffer(raw))
    head, row = ffi.sizeof("struct kb_trace_read_reply"), ffi.sizeof("struct kb_log_row")
    assert len(raw) <= head + max_bytes
    chunk_head = ffi.sizeof("struct kb_trace_chunk")
    if max_bytes < chunk_head + row:
        assert (reply.n_chunks, reply.more, len(raw)) == (0, 1, head)
        return
    chunk = ffi.from_buffer("struct kb_trace_chunk *", memoryview(raw)[head : head + chunk_head])
    assert chunk.sort == wire.KB_TRACE_CHUNK_LOG
    assert chunk.index == machine.cpu.vcpu.handle
    assert 0 < chunk.bytes <= max_bytes - chunk_head
    assert chunk.bytes % row == 0
    assert len(raw) == head + chunk_head + chunk.bytes
    assert reply.more == (max_bytes != BIG)


def test_rows_are_lost_behind_the_one_that_is_told(machine, trace):
    # 26 OUTs, 4, and 4 more, each with a number of its own, and a HLT behind each lot.
    machine.load_asm(
        "xor eax, eax\n"
        + "".join(f"mov ecx, {n}\n{k}: inc al\nout 0x99, al\nloop {k}b\nhlt\n" for k, n in enumerate((26, 4, 4))),
        at=0x1000,
    )
    core = machine.host.core
    row, head = ffi.sizeof("struct kb_log_row"), ffi.sizeof("struct kb_trace_chunk")

    def take(rows: int) -> tuple[list[int], int]:
        (chunk,) = trace_messages.trace_read(core, trace, head + rows * row)[0]
        return np.frombuffer(chunk.data, ROW)["value"].tolist(), chunk.lost

    machine.cpu.run(deadline_s=30)
    # There is room again, but of those behind the hole none may come before it is told.
    assert take(8) == (list(range(1, 9)), 0)
    machine.cpu.run(deadline_s=30)
    values, lost = take(100)
    assert values == list(range(9, 17))
    assert lost == 26 - 16 + 1 + 4 + 1
    machine.cpu.run(deadline_s=30)
    assert take(100) == ([31, 32, 33, 34, 0], 0)


def test_a_kvm_run_under_way_is_told_once(machine, trace):
    machine.load_asm("again: inc qword ptr [0x3000]\njmp again", at=0x1000)
    thread = threading.Thread(target=machine.cpu.run, kwargs={"deadline_s": 100})
    thread.start()
    begun: list[int] = []
    ended: list[int] = []
    try:
        while len(begun) < 4 or len(ended) < 4:
            assert thread.is_alive()
            # Has it leave KVM_RUN and enter anew.
            trace_messages.trace_set(machine.host.core, trace, True)
            for chunk in trace_messages.trace_read(machine.host.core, trace, 10_000)[0]:
                rows = np.frombuffer(chunk.data, ROW)
                begun += rows["enter_ns"][rows["leave_ns"] == 0].tolist()
                ended += rows["enter_ns"][rows["leave_ns"] != 0].tolist()
                assert (rows["leave_ns"][:-1] != 0).all(), "it is behind the others"
                assert (rows["thread"] > 0).all()
    finally:
        while thread.is_alive():
            machine.cpu.interrupt()
            thread.join(0.01)
    assert len(set(begun)) == len(begun)
    assert len(set(ended)) == len(ended)
    assert set(begun[:-1]) <= set(ended), "its row follows"


def test_random_trace_messages_never_stop_the_core(machine, trace):
    rng = random.Random(4)
    kinds = range(wire.KB_TRACE_OPEN, wire.KB_TRACE_MARK + 1)
    for n in range(200):
        body = bytearray(rng.randbytes(rng.randrange(0, 60)))
        if n % 2 and len(body) >= 4:
            body[:4] = (trace if rng.random() < 0.8 else machine.vm.handle).to_bytes(4, "little")
        if len(body) >= 16:
            body[12:16] = (16).to_bytes(4, "little")  # no log of a gigabyte, nor a ring
            body[8:12] = (64).to_bytes(4, "little")
        ask(machine.host, message(rng.choice(kinds), bytes(body)))
    assert works(machine.host)


def test_the_kernel_leaves_out_what_other_processes_do(host, need):
    if host.name != "local":
        pytest.skip("one process is enough")
    name = "kvm/kvm_cpuid"
    try:
        there = trace_messages.available_events(host.core)
    except errors.KvmIoctlError as error:
        need("tracing", f"tracefs cannot be had: {error}")
    assert name in there
    described = parse_format(trace_messages.event_format(host.core, name), system="kvm")
    with kb.connect("local", agent=True, quiet=True) as elsewhere, contextlib.ExitStack() as stack:
        machines = [stack.enter_context(kb.Machine(each, memory="2M")) for each in (host, elsewhere)]
        threads = {}
        for own_only in (True, False):
            opened = trace_messages.trace_open(
                host.core, machines[0].vm.handle, [name], log_rows=0, buffer_kb=256, own_only=own_only
            )
            if own_only and not opened.filtered:
                host.core.close_handle(opened.handle)
                pytest.skip("in a process namespace of its own the kernel cannot tell processes apart")
            assert opened.filtered == own_only
            trace_messages.trace_set(host.core, opened.handle, True)
            for machine in machines:
                machine.load_asm("xor eax, eax\ncpuid\nhlt", at=0x1000)
                assert machine.cpu.run(deadline_s=30).cause is kb.Cause.HALT
            trace_messages.trace_set(host.core, opened.handle, False)
            chunks, _ = trace_messages.trace_read(host.core, opened.handle, 1 << 20)
            found = [piece for chunk in chunks for piece in decode(chunk.data, {described.id: described})]
            rows = [piece.rows[described.id].data for piece in found if described.id in piece.rows]
            threads[own_only] = {int(tid) for data in rows for tid in data["common_pid"]}
            host.core.close_handle(opened.handle)
        assert len(threads[True]) == 1
        assert threads[True] < threads[False], "the other's is there where all are traced"
