"""Running a vcpu: one request buffer and one reply buffer, used again and again.

A single step costs a few microseconds in KVM, so nothing is allocated for it:
the caller fills in `request`, calls `send()`, and reads `stop`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from kvmbench.core import wire
from kvmbench.core._wire import ffi
from kvmbench.errors import InternalError
from kvmbench.host.channel import LocalChannel
from kvmbench.host.client import Core, raise_status

REQUEST_BYTES: int = ffi.sizeof("struct kb_execute")
STOP_BYTES: int = ffi.sizeof("struct kb_stop")
ROW_BYTES: int = ffi.sizeof("struct kb_row")
HISTORY_BYTES: int = ffi.sizeof("struct kb_history")
# Room for KVM_EXIT_IO data, at most a page, and the padding of packed rows.
IO_BYTES = 4104


class Execution:
    """Sends KB_EXECUTE for one vcpu.

    Attributes:
        request: cffi ``struct kb_execute *``, to be filled in before `send`.
        attached: bytes of addresses behind it, see `attach`.
        stop: cffi ``struct kb_stop *``, valid after `send` until the next.
        rows_bytes: room for recorded rows in the reply.
    """

    def __init__(self, core: Core, vcpu: int, *, rows: int = 0) -> None:
        self._core = core
        self.channel: Any = core.channel
        self._vcpu = vcpu
        self._request_buffer: Any = ffi.new("char[]", REQUEST_BYTES + 8 * wire.KB_MAX_STOPS)
        self._reply_bytes = STOP_BYTES + rows * max(ROW_BYTES, wire.KB_PACKED_ROW_BYTES) + IO_BYTES + HISTORY_BYTES
        # Not cleared but for the stop: a recording's buffer is megabytes, written by the core.
        self._reply_buffer: Any = _allocate("char[]", self._reply_bytes)
        ffi.memmove(self._reply_buffer, bytes(STOP_BYTES), STOP_BYTES)
        self.request: Any = ffi.cast("struct kb_execute *", self._request_buffer)
        self.stop: Any = ffi.cast("struct kb_stop *", self._reply_buffer)
        self.request.header.kind = wire.KB_EXECUTE
        self.request.header.size_bytes = REQUEST_BYTES
        self.request.vcpu = vcpu
        self.request.max_rows = rows
        self._got: Any = ffi.new("size_t *")
        self.attached = 0
        self._local = core.channel if isinstance(core.channel, LocalChannel) else None

    @cached_property
    def again(self) -> Any:
        """What `LocalChannel.core_again` takes to send `request` with nothing but what is attached."""
        request, reply = (int(ffi.cast("uintptr_t", each)) for each in (self.request, self.stop))
        return self.channel.prepare(request, REQUEST_BYTES, reply, self._reply_bytes)

    def attach(self, stops: bytes) -> None:
        """Puts addresses for the stepping loop behind `request`, so that `send` and `again` need no payload."""
        self.attached = (
            -1
        )  # until it is done: a Ctrl-C may come in between, and whoever fills in the request next looks
        self.request.n_stops = len(stops) // 8
        self.request.header.size_bytes = size = REQUEST_BYTES + len(stops)
        ffi.memmove(self._request_buffer + REQUEST_BYTES, stops, len(stops))
        if self._local is not None:
            self.again.request_bytes = size
        self.attached = len(stops)

    def check(self) -> None:
        """Raises what the status of the reply says, if it is not 0."""
        if self.stop.header.status:
            self._fail()

    def send(self) -> None:
        """Runs the vcpu as `request` says, with no payload but what is attached.

        Raises:
            BusyError: another thread is running this vcpu.
            HostLost, ClosedError: as everywhere.
            KeyboardInterrupt: Ctrl-C, after the vcpu has stopped; `stop` holds where.
        """
        local = self._local
        if local is not None:
            local.call_into(self.request, REQUEST_BYTES + self.attached, self.stop, self._reply_bytes, self._got)
            if self.stop.header.status:
                self._fail()
        else:
            self._send_bytes(b"")

    def send_payload(self, payload: bytes) -> None:
        """`send`, with the payload that `request`'s io_bytes, n_stops and n_watches announce; nothing is attached."""
        if not payload:
            self.send()
        else:
            self._send_bytes(payload)

    def _send_bytes(self, payload: bytes) -> None:
        size = REQUEST_BYTES + self.attached
        self.request.header.size_bytes = size + len(payload)
        message = bytes(ffi.buffer(self._request_buffer, size)) + payload
        self.request.header.size_bytes = size
        if self._local is not None:
            data = ffi.from_buffer(message)
            self._local.call_into(data, len(message), self.stop, self._reply_bytes, self._got)
        else:
            self.channel.take_reply()
            try:
                self._keep(self.channel.call(message, on_interrupt=self._kick))
            except KeyboardInterrupt:
                # It may have come just behind the reply, which says where the guest is.
                reply = self.channel.take_reply()
                self.channel.take_interrupt()
                if reply is not None:
                    self._keep(reply)
                raise
        if self.stop.header.status:
            self._fail()
        if self.channel.take_interrupt():
            raise KeyboardInterrupt

    def _keep(self, reply: bytes) -> None:
        if len(reply) > self._reply_bytes:
            raise InternalError(f"a reply of {len(reply)} bytes for a buffer of {self._reply_bytes}")
        ffi.memmove(self.stop, reply, len(reply))

    def _kick(self) -> None:
        self._core.kick(self._vcpu)

    def _fail(self) -> None:
        raise_status(self.stop.header.status, "the vcpu", "KVM_SET_GUEST_DEBUG")

    def rows(self) -> Any:
        """The rows of the last `send` as a buffer, valid until the next."""
        start = self.stop.rows_offset
        size = self.stop.rows_bytes
        return memoryview(ffi.buffer(self._reply_buffer))[start : start + size]

    def history(self) -> Any:
        """What led to a stop at which the guest has died, ``struct kb_history *``, or None; valid until the next."""
        at = self.stop.history_offset
        return ffi.cast("struct kb_history *", self._reply_buffer + at) if at else None

    def io_data(self) -> bytes:
        """The data of a KVM_EXIT_IO stop, size times count bytes."""
        start = self.stop.io_offset
        return bytes(ffi.buffer(self._reply_buffer)[start : start + self.stop.io_bytes])


_allocate = ffi.new_allocator(should_clear_after_alloc=False)
