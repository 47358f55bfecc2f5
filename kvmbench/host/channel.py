"""How requests reach the core: the protocol, and the channel inside this process.

`LocalChannel` calls the C core where it is, as a library.  The channel to an
agent elsewhere is `kvmbench.host.stream.StreamChannel`.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from kvmbench.errors import ClosedError, HostUnavailable, InternalError

_get_ident = threading.get_ident


class Channel(Protocol):
    """A way to the core: bytes of one request in, bytes of its reply out.

    Any number of threads may call at once.  `call` raises `HostLost` when the
    other side is gone, at once and on every thread that waits.
    """

    @property
    def lost(self) -> str | None:
        """Why the other side is gone, or None while it is there."""

    def call(self, request: bytes, *, on_interrupt: Callable[[], None] | None = None) -> bytes:
        """Sends one request and waits for its reply (`core/wire.h`).

        Args:
            on_interrupt: called when Ctrl-C arrives during the wait; it is to
                make the reply come soon (a kick).  The reply is then awaited
                and returned, and the interrupt raised by the caller of
                `take_interrupt`.
        """

    def take_reply(self) -> bytes | None:
        """The reply to this thread's last `call`, if it came before a Ctrl-C that `call` raised; None, once taken."""

    def take_interrupt(self) -> bool:
        """True once after a Ctrl-C arrived during a `call` with `on_interrupt`."""

    def close(self) -> None:
        """Ends the other side's service to us; idempotent."""


class LocalChannel:
    """The core loaded into this process: a call costs about a microsecond.

    Raises:
        HostUnavailable: the extension was not built (no compiler, not Linux on x86-64).
    """

    def __init__(self) -> None:
        try:
            _core = importlib.import_module("kvmbench.core._core")
        except ImportError as error:
            raise HostUnavailable(
                f"the C core is not built into this installation ({error}); "
                "on Linux x86-64 run `pip install -e .` with gcc and linux-libc-dev installed"
            ) from error
        self._ffi: Any = _core.ffi
        self._lib: Any = _core.lib
        holder = self._ffi.new("struct core **")
        if self._lib.core_create(holder) != 0:
            raise InternalError("core_create failed: out of memory")
        #: The C core, None once closed.
        self.core: Any = holder[0]
        self._busy: set[int] = set()  # threads inside the core
        #: These, `core`, `doomed` and `bury` are for `Cpu.step`, which does what `call_into` does without the cost of
        #: its call.
        self.busy, self.core_again = self._busy, self._lib.core_again
        self.held: set[int] = set()  #: threads in a loop of calls, see `hold`
        self._burial, self._grave = threading.RLock(), list[Any]()
        self.doomed: Any = None  #: the core once it is closed: who leaves it looks whether it was the last

    @property
    def lost(self) -> str | None:
        """None: this process cannot lose itself."""
        return None

    def call(self, request: bytes, *, on_interrupt: Callable[[], None] | None = None) -> bytes:
        """See `Channel.call`; a Ctrl-C ends KVM_RUN by itself here."""
        thread = _get_ident()
        try:
            self._busy.add(thread)
            core = self.core
            if core is None:
                raise ClosedError("the host is closed")
            size = len(request)
            data = self._ffi.from_buffer(request)
            got = self._ffi.new("size_t *")
            capacity = max(self._lib.core_reply_bytes(core, data, size), 16)
            reply = self._ffi.new("char[]", capacity)
            self._lib.core_call(core, data, size, reply, capacity, got)
            return bytes(self._ffi.buffer(reply, got[0]))
        finally:
            self._busy.discard(thread)
            if self.doomed is not None:
                self.bury(thread)

    def take_reply(self) -> None:
        """None: a Ctrl-C comes behind the call into the core, and `call_into` has its reply in the caller's buffer."""

    def take_interrupt(self) -> bool:
        """False: Python raises KeyboardInterrupt itself once the call is back."""
        return False

    def call_into(self, request: Any, size: int, reply: Any, capacity: int, got: Any) -> None:
        """`call` for hot loops: the caller keeps the cffi buffers, and one thread uses them.

        Counting calls under a lock would cost as much as the call.  A thread marks
        itself in `_busy` before it looks at `core`; `close` clears `core` before
        it looks at `_busy`; so one of the two sees the other.
        """
        thread = _get_ident()
        try:
            # Inside, for Ctrl-C may come after any call; and no `leave()` below, for it may come before that has begun.
            self._busy.add(thread)
            core = self.core
            if core is None:
                raise ClosedError("the host is closed")
            self._lib.core_call(core, request, size, reply, capacity, got)
        finally:
            self._busy.discard(thread)
            if self.doomed is not None:
                self.bury(thread)

    def prepare(self, request: int, size: int, reply: int, capacity: int) -> Any:
        """The argument of `core_again` for a request that is made again and again; the caller keeps the buffers.

        `request` and `reply` are the buffers' addresses.

        It is only valid while the channel is: to be used within `hold`, or as `Cpu.step` does.
        """
        again = self._ffi.new("struct core_again *")
        again.core = self.core if self.core is not None else self._ffi.NULL
        again.request = self._ffi.cast("void *", request)
        again.request_bytes = size
        again.reply = self._ffi.cast("void *", reply)
        again.reply_capacity = capacity
        return again

    def hold(self) -> Any:
        """Keeps the core alive for a loop of calls by this thread.

        To be called within a `try` that ends as `call_into` does, but for `held` in place of `busy`; a function that
        ends it might, for a Ctrl-C, not begin. A `close` that this thread calls meanwhile takes effect then.

        Returns:
            A function of what `prepare` returned, which makes the call.
        """
        self.held.add(_get_ident())
        if self.core is None:
            raise ClosedError("the host is closed")
        return self.core_again

    def bury(self, thread: int) -> None:
        """Ends a core that was closed while this thread, or another, was inside, once all are out."""
        with self._burial:
            if self._busy or self.held:
                return
            # Taken in one step: a signal handler in this very thread may get here in between, and find nothing.
            with contextlib.suppress(IndexError):
                self._lib.core_destroy(self._grave.pop())

    def map_region(self, region: int) -> memoryview | None:
        """The bytes of a region, writable and without a copy; None if it is gone.

        The mapping stays as long as the memoryview, or anything made from it, lives.
        """
        if self.core is None:
            raise ClosedError("the host is closed")
        address = self._ffi.new("void **")
        size = self._ffi.new("size_t *")
        token = self._ffi.new("void **")
        if self._lib.core_map(self.core, region, address, size, token) != 0:
            return None
        # The buffer keeps `kept` alive, and `kept` the mapping.
        unmap, mapping = self._lib.core_unmap, token[0]
        kept = self._ffi.gc(self._ffi.cast("char *", address[0]), lambda _: unmap(mapping))
        return memoryview(self._ffi.buffer(kept, size[0])).cast("B")

    def close(self) -> None:
        """Ends the core; calls under way on other threads are kicked out first.

        A Ctrl-C during that wait is raised once all is over. The second one gives the wait up: the last thread
        that leaves the core ends it then.
        """
        core, self.core = self.core, None
        if core is None:
            return
        mine = threading.get_ident()
        interrupt: KeyboardInterrupt | None = None
        try:
            while (self._busy | self.held) - {mine}:
                try:
                    self._lib.core_interrupt(core)
                    time.sleep(0.001)
                except KeyboardInterrupt as pressed:
                    if interrupt is not None:
                        raise
                    interrupt = pressed
        finally:
            # Others are inside only if the wait was given up; this thread is if a device, or a signal handler, closes.
            self._grave.append(core)
            self.doomed = core
            self.bury(mine)
        if interrupt is not None:
            raise interrupt
