"""Malformed messages: each gets an error reply, and the core goes on.

The requests are made by hand, as a broken or hostile client would.
"""

from __future__ import annotations

import random

import pytest

from kvmbench.core import wire
from kvmbench.core._wire import ffi


def message(kind: int, body: bytes = b"", *, size: int | None = None) -> bytes:
    whole = 16 + len(body) if size is None else size
    return bytes(ffi.buffer(ffi.new("struct kb_header *", [whole, 7, kind, 0]))) + body


def ask(host, request: bytes) -> tuple[int, bytes]:
    reply = host.core.channel.call(request)
    header = ffi.cast("struct kb_header *", ffi.from_buffer(reply))
    assert header.size_bytes == len(reply)
    return header.status, reply


def struct(name: str, **fields: int) -> bytes:
    value = ffi.new(f"struct {name} *", fields)
    return bytes(ffi.buffer(value))[16:]


def works(host) -> bool:
    return ask(host, message(wire.KB_HELLO))[0] == 0


@pytest.mark.parametrize("kind", [0, wire.KB_KIND_END, 99, 0xFFFF_FFFF])
def test_an_unknown_kind_is_answered(host, kind):
    assert ask(host, message(kind))[0] == wire.KB_BAD_KIND
    assert works(host)


@pytest.mark.parametrize("kind", range(1, wire.KB_KIND_END))
def test_a_request_that_is_too_short_or_too_long_is_answered(host, kind):
    if kind not in (wire.KB_HELLO, wire.KB_HOST_INFO, wire.KB_KERNEL_OPEN):
        assert ask(host, message(kind))[0] == wire.KB_BAD_LENGTH
    status, _ = ask(host, message(kind, bytes(999)))
    assert status > 0
    assert works(host)


@pytest.mark.parametrize("handle", [0, 1, 2, 0xFFFF, 0x10002, 0xFFFF_FFFF])
def test_a_handle_that_is_none_is_answered(host, handle):
    requests = [
        message(wire.KB_CLOSE, struct("kb_handle", handle=handle)),
        message(wire.KB_KICK, struct("kb_handle", handle=handle)),
        message(wire.KB_DIRTY_LOG, struct("kb_handle", handle=handle)),
        message(wire.KB_READ_REGION, struct("kb_range", handle=handle, length_bytes=8)),
        message(wire.KB_EXECUTE, struct("kb_execute", vcpu=handle)),
        message(wire.KB_RAW_LOOP, struct("kb_raw_loop", vcpu=handle, sort=1, count=1)),
        message(wire.KB_ADD_REGION, struct("kb_add_region", vm=handle, size_bytes=4096)),
        message(wire.KB_CREATE_VCPU, struct("kb_create", parent=handle)),
    ]
    for request in requests:
        assert ask(host, request)[0] == wire.KB_BAD_HANDLE
    assert works(host)


def test_offsets_and_lengths_that_overflow_are_answered(machine):
    host, region = machine.host, machine.memory.regions[0].handle
    top = (1 << 64) - 1
    for offset, length in ((top, 1), (top, top), (0, top), (1, top), (0x20_0000, 1), (0x1F_F000, 0x2000)):
        body = struct("kb_range", handle=region, offset=offset, length_bytes=length)
        assert ask(host, message(wire.KB_READ_REGION, body))[0] in (wire.KB_BAD_RANGE, wire.KB_TOO_LARGE)
        body = struct("kb_fill", handle=region, offset=offset, length_bytes=length)
        assert ask(host, message(wire.KB_FILL_REGION, body))[0] == wire.KB_BAD_RANGE
        body = struct("kb_protect", handle=region, offset=offset & ~0xFFF, length_bytes=(length & ~0xFFF) or 4096)
        assert ask(host, message(wire.KB_PROTECT, body))[0] in (wire.KB_BAD_RANGE, wire.KB_BAD_ALIGNMENT)
    assert machine.memory.read(0, 8) == bytes(8)


def test_execute_refuses_counts_and_flags_that_lie(machine):
    host, vcpu = machine.host, machine.cpu.vcpu.handle
    machine.load_asm("nop\nnop\nhlt", at=0x1000)
    big = 0xFFFF_FFFF
    lies = [
        {"io_bytes": 8},
        {"io_bytes": big, "n_stops": big, "n_watches": big},
        {"n_stops": 1},
        {"n_watches": 1},
        {"mode": 2},
        {"flags": 0x8000_0000},
        {"debug_control": 1},
        {"flags": wire.KB_RECORD, "mode": wire.KB_RUN, "max_rows": 1},
        {"flags": wire.KB_RECORD, "mode": wire.KB_STEP, "max_rows": 0},
        {"flags": wire.KB_RECORD, "mode": wire.KB_STEP, "max_rows": big},
    ]
    for fields in lies:
        status, _ = ask(host, message(wire.KB_EXECUTE, struct("kb_execute", vcpu=vcpu, **fields)))
        assert status in (wire.KB_BAD_LENGTH, wire.KB_BAD_VALUE, wire.KB_TOO_LARGE), fields
    assert machine.cpu.step().rip == 0x1001


def test_an_ioctl_that_is_not_in_the_table_is_refused(machine):
    host, vm = machine.host, machine.vm.handle
    for number in (0, 0xAE80, 0x4020AE46, 0x5401, 0xC0000000 | 0xFFFF):
        body = struct("kb_ioctl", handle=vm, request=number)
        assert ask(host, message(wire.KB_IOCTL, body))[0] == wire.KB_NOT_ALLOWED


def test_random_bytes_never_stop_the_core(host):
    rng = random.Random(1)
    for _ in range(300):
        body = rng.randbytes(rng.randrange(0, 120))
        ask(host, message(rng.choice([*range(1, 16), 17, 18]), body))
    assert works(host)
