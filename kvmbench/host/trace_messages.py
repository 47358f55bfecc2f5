"""The messages of a trace: what `Core` is for the rest of `core/wire.h`.

A trace belongs to a VM. It has a log of every KVM_RUN, and events, which the kernel's own tracing writes where the
core may use it. `kvmbench.traces` makes sense of what comes out of here.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvmbench.core import wire
from kvmbench.core._wire import ffi
from kvmbench.errors import InternalError, KvmIoctlError
from kvmbench.host.client import HEADER_BYTES, Core

_CHUNK_BYTES: int = ffi.sizeof("struct kb_trace_chunk")
_described: weakref.WeakKeyDictionary[Core, dict[tuple[int, str], str]] = weakref.WeakKeyDictionary()
_STEPS = {
    wire.KB_TRACE_STEP_MOUNT: "tracefs is not there and cannot be mounted",
    wire.KB_TRACE_STEP_CREATE: "no directory can be made in its instances/",
    wire.KB_TRACE_STEP_CLOCK: "it has no trace clock 'mono'",
    wire.KB_TRACE_STEP_BUFFER: "the kernel gives no ring buffer of that size",
    wire.KB_TRACE_STEP_EVENT: "the kernel has no event {event}",
    wire.KB_TRACE_STEP_PIPE: "a processor's ring buffer cannot be opened",
}


@dataclass(frozen=True)
class Chunk:
    """A piece of what a trace has written.

    Attributes:
        sort: `wire.KB_TRACE_CHUNK_PAGE` or `KB_TRACE_CHUNK_LOG`.
        index: the processor, or the vcpu's handle.
        data: pages of the ring buffer, or `struct kb_log_row`s.
        lost: rows for which the log had no room, behind those of this chunk.
    """

    sort: int
    index: int
    data: memoryview
    lost: int


@dataclass(frozen=True)
class Opened:
    """What opening a trace came to.

    Attributes:
        handle: the trace's number in the core.
        cpus: processors with a ring buffer of events; 0: there are no events.
        page_bytes: of a page of that buffer.
        filtered: the kernel leaves out what other processes do.
        trouble: why there are no events, in words; "" if there are or none were wanted.
        error_number: errno of the trouble, or 0.
    """

    handle: int
    cpus: int
    page_bytes: int
    filtered: bool
    trouble: str
    error_number: int


def trace_open(core: Core, vm: int, events: Sequence[str], *, log_rows: int, buffer_kb: int, own_only: bool) -> Opened:
    """Makes a trace of a VM, switched off.

    Args:
        core: the host's.
        vm: its handle.
        events: as "kvm/kvm_exit"; none: only the log.
        log_rows: room of each vcpu's log, a power of two; 0: no log.
        buffer_kb: room of each processor's ring buffer, in KiB.
        own_only: leave out what other processes of the host do, where the kernel can tell.

    Raises:
        BusyError: the VM has a trace already.
        MisuseError: a name that is none, or of events that may not be traced.
    """
    names = "".join(f"{name}\n" for name in events).encode()
    flags = (wire.KB_TRACE_LOG if log_rows else 0) | (wire.KB_TRACE_EVENTS if names else 0)
    flags |= wire.KB_TRACE_OWN if own_only and names else 0
    request = ffi.new(
        "struct kb_trace_open *",
        {
            "vm": vm,
            "flags": flags,
            "buffer_kb": buffer_kb if names else 0,
            "log_rows": log_rows,
            "names_bytes": len(names),
        },
    )
    request.header.kind = wire.KB_TRACE_OPEN
    raw = core._send(request, names, what="the trace")
    reply = ffi.cast("struct kb_trace_open_reply *", ffi.from_buffer(raw))
    error = -int(reply.events_status)
    trouble = ""
    if error:
        event = events[reply.cpus] if reply.cpus < len(events) else ""
        step = _STEPS.get(int(reply.step), "tracefs").format(event=event)
        trouble = f"{step}: {os.strerror(error)}"
    return Opened(
        int(reply.handle),
        0 if error else int(reply.cpus),
        int(reply.page_bytes),
        bool(reply.filtered),
        trouble,
        error,
    )


def _text(core: Core, what: int, *, handle: int = 0, index: int = 0, name: str = "", said: str) -> str:
    # What describes events cannot change while the core has /dev/kvm open, for KVM's modules stay; and over a serial
    # channel a file takes 50 ms.
    known = _described.setdefault(core, {})
    if not handle and (what, name) in known:
        return known[what, name]
    data = name.encode()
    request = ffi.new(
        "struct kb_trace_text *", {"handle": handle, "what": what, "index": index, "name_bytes": len(data)}
    )
    request.header.kind = wire.KB_TRACE_TEXT
    text = core._send(request, data, what=said)[HEADER_BYTES:].decode("utf-8", "replace")
    if not handle:
        known[what, name] = text
    return text


def available_events(core: Core) -> list[str]:
    """Events that may be traced there, as "kvm/kvm_exit".

    Raises:
        KvmIoctlError: tracefs cannot be had; its errno says why.
    """
    return _text(core, wire.KB_TRACE_AVAILABLE, said="the list of events").split()


def event_format(core: Core, name: str) -> str:
    """The kernel's description of an event's bytes, of "kvm/kvm_exit"."""
    return _text(core, wire.KB_TRACE_FORMAT, name=name, said=f"the format of {name}")


def header_page(core: Core) -> str:
    """The kernel's description of a page of the ring buffer."""
    return _text(core, wire.KB_TRACE_HEADER, said="events/header_page")


def ring_statistics(core: Core, handle: int, cpu: int) -> dict[str, float]:
    """What the kernel says of one processor's ring buffer: "overrun", "dropped events", ..."""
    try:
        text = _text(core, wire.KB_TRACE_STATS, handle=handle, index=cpu, said=f"statistics of processor {cpu}")
    except KvmIoctlError:
        return {}
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            continue
    return found


def trace_set(core: Core, handle: int, on: bool) -> None:
    """Starts or stops writing."""
    request: Any = ffi.new("struct kb_trace_set *", {"handle": handle, "on": int(on)})
    request.header.kind = wire.KB_TRACE_SET
    core._send(request, what="the trace")


def trace_read(core: Core, handle: int, max_bytes: int) -> tuple[list[Chunk], bool]:
    """Takes what was written, and whether there was more than fits.

    Raises:
        InternalError: the reply makes no sense.
    """
    request: Any = ffi.new("struct kb_trace_read *", {"handle": handle, "max_bytes": max_bytes})
    request.header.kind = wire.KB_TRACE_READ
    raw = core._send(request, what="the trace")
    reply = ffi.cast("struct kb_trace_read_reply *", ffi.from_buffer(raw))
    at = ffi.sizeof("struct kb_trace_read_reply")
    view = memoryview(raw)
    chunks = []
    for _ in range(reply.n_chunks):
        if at + _CHUNK_BYTES > len(raw):
            raise InternalError("a reading of the trace ends inside a chunk's head")
        chunk = ffi.cast("struct kb_trace_chunk *", ffi.from_buffer(raw) + at)
        at += _CHUNK_BYTES
        if chunk.bytes > len(raw) - at:
            raise InternalError(f"a chunk of {chunk.bytes} bytes of the trace exceeds its reading")
        chunks.append(Chunk(int(chunk.sort), int(chunk.index), view[at : at + chunk.bytes], int(chunk.lost)))
        at += int(chunk.bytes) + 7 & ~7
    return chunks, bool(reply.more)


def trace_mark(core: Core, handle: int, text: str) -> tuple[int, int, bool]:
    """Writes a mark into the trace.

    Returns:
        CLOCK_MONOTONIC of the host before and after, in nanoseconds, and whether the kernel took it.
    """
    data = text.encode()
    request: Any = ffi.new("struct kb_trace_mark *", {"handle": handle, "text_bytes": len(data)})
    request.header.kind = wire.KB_TRACE_MARK
    raw = core._send(request, data, what="the mark")
    reply = ffi.cast("struct kb_trace_mark_reply *", ffi.from_buffer(raw))
    return int(reply.before_ns), int(reply.after_ns), reply.events_status == 0
