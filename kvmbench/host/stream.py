"""The channel to an agent elsewhere: messages over a byte stream.

Facts first:
  - A call is short (150 us on the appliance), and most programs have one thread
    that calls. A reader thread would add two thread switches to each call.
  - KeyboardInterrupt can come after any call of a C function has returned, and
    so between `recv()` having taken bytes off the socket and their being stored.
    From then on the stream would make no sense.

So there is no reader thread: of the threads that wait for replies, one reads,
hands the others theirs, and passes the reading on when it has its own. And bytes
go from the socket into the buffer, and counts of bytes sent into their list,
within one C call (`map` feeding `extend`), where no interrupt can come between.
A message is taken out of the buffer only after its reply is delivered; delivering
it again, if an interrupt came in between, does nothing.

The other side may hang without ending (an emulator can: docs/facts.md). The agent
answers KB_HELLO at any time, also while guests run; so whoever reads and hears
nothing for a while says hello, and after a few of these without a byte in return
the other side counts as gone.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

from kvmbench.core import wire
from kvmbench.errors import ClosedError, HostLost, HostUnavailable, InternalError

_HEADER = struct.Struct("<IIIi")  # kb_header: size_bytes, id, kind, status
_HELLO_REPLY = struct.Struct("<IIIiIIiIII")  # kb_hello_reply
_RECEIVE_BYTES = 1 << 18
# This long without a byte, and the other side is asked whether it is there; this often, and it is gone.
_QUIET_S = 5.0
_MOST_UNANSWERED = 5
# No call has this number.
_PING_ID = 0
# This many Ctrl-C during one wait, and the wait is given up.
_PATIENCE = 2
# A request half sent is finished first; unless that takes longer than this after the first Ctrl-C.
_FINISH_SEND_S = 1.0
# How long one that cannot send waits before it looks whether the reader has left.
_READER_CHECK_MS = 20


class _Waiter:
    """A call under way."""

    __slots__ = ("caller_id", "reply", "sent", "thread", "wake")

    def __init__(self, caller_id: bytes) -> None:
        self.caller_id = caller_id
        self.sent: list[int] = []  # bytes, by each send()
        self.thread = threading.get_ident()
        self.reply: bytes | None = None
        # Locked while there is nothing to do: released by a delivery, a promotion to reader, or the end.
        self.wake = threading.Lock()
        self.wake.acquire()

    def rouse(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is awake already
            self.wake.release()


class StreamChannel:
    """Requests and replies over a connected stream socket; implements `kvmbench.host.channel.Channel`.

    Any number of threads may call at once.

    Args:
        stream: the socket; the channel owns it from here on.
        peer: what is at the other end, for messages: "the appliance".
        describe_end: asked once, when the stream has ended, for the reason in
            words (exit status, last console lines).
        quiet_s: seconds without a byte after which a waiting call asks whether
            the other side is there; after six times that it counts as gone.
    """

    def __init__(
        self,
        stream: socket.socket,
        *,
        peer: str,
        describe_end: Callable[[], str] | None = None,
        quiet_s: float = _QUIET_S,
    ) -> None:
        stream.settimeout(None)
        # The kernel's own limit costs a call nothing; Python's would cost it a poll().
        limit = struct.pack("ll", int(quiet_s), int(quiet_s % 1 * 1e6))
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._gone_s = (_MOST_UNANSWERED + 1) * quiet_s
        self._unanswered = 0
        self._stream = stream
        self._peer = peer
        self._describe_end = describe_end
        self._lock = threading.Lock()  # _reader, _closed, _lost, and waking
        self._sending = threading.RLock()  # again in _release, when closed while sending
        self._ids = itertools.count(1)
        self._waiters: dict[int, _Waiter] = {}
        self._reader: _Waiter | None = None
        self._received = bytearray()
        self._closed = False
        self._lost: str | None = None
        self._own = threading.local()  # .interrupted: see take_interrupt; .waiter: see take_reply

    @property
    def lost(self) -> str | None:
        """Why the other side is gone, or None while it is there; notices an end that no call has met yet."""
        if self._lost is None and not self._closed:
            with self._lock:
                idle = self._reader is None and not self._closed
                ended = idle and self._has_ended()
            if ended:
                self._end(None)
        return self._lost

    def call(self, request: bytes, *, on_interrupt: Callable[[], None] | None = None) -> bytes:
        """Sends one request and waits for its reply.

        The first Ctrl-C during the wait calls `on_interrupt`, which is to make the
        reply come soon, and the reply is then returned as usual: ask
        `take_interrupt`. Without `on_interrupt` the reply, which is due in a moment
        anyway, is awaited and KeyboardInterrupt raised then. The second Ctrl-C
        gives the wait up and is raised at once; the channel stays usable.

        Raises:
            HostLost: the other side is gone; on every thread that waits.
            ClosedError: this channel was closed.
            KeyboardInterrupt: see above.
        """
        number = next(self._ids) & 0xFFFFFFFF or next(self._ids)
        view = memoryview(b"".join((request[:4], struct.pack("<I", number), memoryview(request)[8:])))
        waiter = _Waiter(request[4:8])
        if on_interrupt is not None:  # and so not what `on_interrupt` calls
            self._own.waiter = waiter
        interrupts, told = 0, False
        self._waiters[number] = waiter
        try:
            while True:
                # Ctrl-C may come after any call, also between these: what has been done is not done again.
                try:
                    interrupts += self._send(view, waiter)
                    if interrupts and on_interrupt is not None and not told:
                        told = True
                        on_interrupt()
                    reply = self._wait(waiter)
                    break
                except KeyboardInterrupt:
                    interrupts += 1
                    if interrupts >= _PATIENCE:
                        raise
        finally:
            self._waiters.pop(number, None)
            if self._reader is waiter:
                self._stop_reading()
            if self._waiters and self._reader is None:
                self._rouse(everyone=False)  # this call may have been chosen to read, and given up
        if interrupts:
            if on_interrupt is None:
                raise KeyboardInterrupt
            self._own.interrupted = True
        return reply

    def take_reply(self) -> bytes | None:
        """The reply to this thread's last `call` with an `on_interrupt`, if it came before a Ctrl-C that `call` raised.

        None, once taken.
        """
        waiter: _Waiter | None = getattr(self._own, "waiter", None)
        self._own.waiter = None
        return None if waiter is None else waiter.reply

    def take_interrupt(self) -> bool:
        """True once after a Ctrl-C came during a `call` of this thread that had an `on_interrupt`."""
        if getattr(self._own, "interrupted", False):
            self._own.interrupted = False
            return True
        return False

    def close(self) -> None:
        """Ends the stream, upon which the agent ends; calls under way raise ClosedError. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(OSError):  # the other side was first
                self._stream.shutdown(socket.SHUT_RDWR)
            idle = self._reader is None
        if idle:
            self._release()
        self._rouse(everyone=True)

    # Sending.

    def _send(self, view: memoryview, waiter: _Waiter) -> int:
        # Sends what is not sent yet. Returns how many Ctrl-C came: half a message cannot stay half, so they
        # wait for its end.
        if sum(waiter.sent) == len(view):
            return 0
        with self._sending:
            self._check()
            return self._send_whole(view, waiter)

    def _send_whole(self, view: memoryview, waiter: _Waiter) -> int:
        sent = waiter.sent
        interrupts = 0
        limit = float("inf")
        stuck_since = 0.0
        while True:
            try:
                while (done := sum(sent)) < len(view):
                    try:
                        sent.extend(map(self._stream.send, (view[done:],), (socket.MSG_DONTWAIT,)))
                        stuck_since = 0.0
                    except BlockingIOError:
                        self._check()
                        now = time.monotonic()
                        stuck_since = stuck_since or now
                        if now - stuck_since > self._gone_s:
                            self._end(f"it has taken nothing for {self._gone_s:g} seconds: it hangs")
                            self._check()
                        self._wait_for_room(waiter)
                return interrupts
            except KeyboardInterrupt:
                interrupts += 1
                limit = min(limit, time.monotonic() + _FINISH_SEND_S)
                if time.monotonic() > limit:
                    self._end("a request was cut short by Ctrl-C")
                    raise
            except (HostLost, ClosedError):
                raise
            except OSError:
                self._end(None)
                self._check()
            except BaseException as error:  # raised by a signal handler, such as a test's time limit
                self._end(f"a request was cut short by {type(error).__name__}")
                raise

    def _wait_for_room(self, waiter: _Waiter) -> None:
        # The other side may not take more before somebody takes what it sends: the reply to a call that was
        # given up. So whoever cannot send reads.
        reads = self._start_reading(waiter)
        try:
            poll = select.poll()
            poll.register(self._stream, select.POLLOUT | (select.POLLIN if reads else 0))
            events = poll.poll(_READER_CHECK_MS)
            if reads and any(event & ~select.POLLOUT for _, event in events):
                self._receive()
        finally:
            if self._reader is waiter:
                self._stop_reading()

    # Receiving.

    def _wait(self, waiter: _Waiter) -> bytes:
        try:
            while waiter.reply is None:
                if self._start_reading(waiter):
                    self._read_for(waiter)
                elif waiter.reply is None:
                    self._check()
                    waiter.wake.acquire()
            return waiter.reply
        finally:
            # Here and not around the reading, so that an interrupt just before it finds no reader left behind.
            if self._reader is waiter:
                self._stop_reading()

    def _start_reading(self, waiter: _Waiter) -> bool:
        with self._lock:
            reader = self._reader
            # A call of this very thread does not read any more: a Ctrl-C came just before it said so.
            if reader is not None and reader.thread == waiter.thread:
                reader = None
            if reader is not None or self._lost is not None or self._closed:
                return False
            self._reader = waiter
            return True

    def _read_for(self, waiter: _Waiter) -> None:
        self._deliver()  # an interrupted reader may have left whole messages
        while waiter.reply is None and self._lost is None and not self._closed:
            self._receive()
        if self._closed or self._lost is not None:
            self._stop_reading()

    def _receive(self) -> None:
        # Blocks until there is something.
        before = len(self._received)
        try:
            deque(map(self._received.extend, map(self._stream.recv, (_RECEIVE_BYTES,))), maxlen=0)
            ended = len(self._received) == before
            self._unanswered = 0
        except BlockingIOError:
            self._ask()
            return
        except OSError:  # reset by the other side
            ended = True
        if ended:
            self._end(None)
        else:
            self._deliver()

    def _ask(self) -> None:
        # Nothing came for a while: says hello, or gives the other side up.
        if self._unanswered >= _MOST_UNANSWERED:
            self._end(f"it has not answered for {self._gone_s:g} seconds: it hangs")
            return
        self._unanswered += 1
        # If another thread is sending, its own message does as well.
        if self._sending.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    hello = _HEADER.pack(_HEADER.size, _PING_ID, wire.KB_HELLO, 0)
                    self._stream.send(hello, socket.MSG_DONTWAIT)
            finally:
                self._sending.release()

    def _stop_reading(self) -> None:
        with self._lock:
            self._reader = None
            closed = self._closed
        if closed:
            self._release()
        self._rouse(everyone=closed)

    def _rouse(self, *, everyone: bool) -> None:
        # One that still waits will take over the reading; one too many looks, and waits again.
        for waiter in list(self._waiters.values()):
            if waiter.reply is None or everyone:
                waiter.rouse()
                if not everyone:
                    break

    def _deliver(self) -> None:
        # Hands every whole message in the buffer to its waiter.
        received = self._received
        while len(received) >= _HEADER.size:
            size, number, _, _ = _HEADER.unpack_from(received)
            if not _HEADER.size <= size <= wire.KB_MAX_MESSAGE_BYTES:
                self._end(f"it sent a message of {size} bytes, which cannot be")
                return
            if len(received) < size:
                return
            waiter = self._waiters.get(number)
            if waiter is not None and waiter.reply is None:
                with memoryview(received) as view:
                    waiter.reply = b"".join((view[:4], waiter.caller_id, view[8:size]))
            # A reply nobody waits for is of a call that was given up.
            if waiter is not None and waiter is not self._reader:
                waiter.rouse()
            del received[:size]

    # The end.

    def _has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            return not self._stream.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _end(self, reason: str | None) -> None:
        if self._closed:
            return
        if reason is None:
            reason = self._describe_end() if self._describe_end is not None else "the stream ended"
        with self._lock:
            if self._lost is None:
                self._lost = f"{self._peer} is gone: {reason}"
        self._rouse(everyone=True)

    def _check(self) -> None:
        if self._closed:
            raise ClosedError("the host is closed")
        if self._lost is not None:
            raise HostLost(f"{self._lost}; connect again for a new host")

    def _release(self) -> None:
        # Not while a thread is inside send(): the number could be another file's a moment later.
        with self._sending:
            self._stream.close()


def greet(stream: socket.socket, *, timeout_s: float) -> int:
    """Sends the first KB_HELLO over a new stream and waits until the agent answers.

    Args:
        stream: connected, before a `StreamChannel` owns it.
        timeout_s: seconds until the wait is given up.

    Returns:
        KVM_GET_API_VERSION of the host, or -errno of opening /dev/kvm there.

    Raises:
        TimeoutError: no answer in time.
        EOFError: the stream ended first.
        HostUnavailable: the agent speaks another version of the messages.
        InternalError: the answer makes no sense.
    """
    stream.settimeout(timeout_s)
    try:
        stream.sendall(_HEADER.pack(_HEADER.size, 0, wire.KB_HELLO, 0))
        answer = b""
        while len(answer) < _HELLO_REPLY.size:
            piece = stream.recv(_HELLO_REPLY.size - len(answer))
            if not piece:
                raise EOFError
            answer += piece
            if len(answer) >= _HEADER.size and _HEADER.unpack_from(answer)[0] != _HELLO_REPLY.size:
                raise InternalError(f"the agent's first answer makes no sense: {answer[:64].hex(' ')}")
    except (BrokenPipeError, ConnectionResetError):
        raise EOFError from None
    version, _, kvm_api_version, _, _, _ = _HELLO_REPLY.unpack(answer)[4:]
    if version != wire.KB_WIRE_VERSION:
        raise HostUnavailable(
            f"the agent speaks version {version} of the messages, this library {wire.KB_WIRE_VERSION}; "
            "`kvmbench appliance clear` and `kvmbench appliance build` make a new one"
        )
    return int(kvm_api_version)
