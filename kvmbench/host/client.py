"""The typed face of the core: one method a message of `core/wire.h`.

Everything above this file speaks Python values; everything below speaks bytes.
"""

from __future__ import annotations

import errno
import itertools
import weakref
from typing import Any, Protocol

from kvmbench import errors
from kvmbench.core import wire
from kvmbench.core._wire import ffi
from kvmbench.host.channel import Channel
from kvmbench.host.hints import hint_for
from kvmbench.uapi import IOCTLS

HEADER_BYTES: int = ffi.sizeof("struct kb_header")

# One transfer stays well under KB_MAX_MESSAGE_BYTES.
CHUNK_BYTES = 16 << 20

_ids = itertools.count(1)


def next_id() -> int:
    """A number for the next request; repeats after 2**32."""
    return next(_ids) & 0xFFFFFFFF


def raise_status(status: int, what: str, ioctl: str | None = None) -> None:
    """Turns a reply's status into the exception that says what to do.

    Args:
        status: `kb_header.status`, not 0.
        what: the thing and its values, in words, for the message.
        ioctl: the ioctl's name where one was asked for.
    """
    if status < 0:
        name = ioctl or what
        raise errors.KvmIoctlError(name, -status, hint_for(name, -status))
    text = {
        wire.KB_BAD_HANDLE: (errors.ClosedError, "is closed, or was never there"),
        wire.KB_BAD_RANGE: (errors.AddressError, "lies outside its object"),
        wire.KB_BAD_ALIGNMENT: (errors.MisuseError, "is not a multiple of the 4096-byte page"),
        wire.KB_BAD_VALUE: (errors.MisuseError, "holds a value that is not defined"),
        wire.KB_BAD_LENGTH: (errors.MisuseError, "has the wrong length for this request"),
        wire.KB_NOT_ALLOWED: (errors.MisuseError, "is not an ioctl of this object in the core's table"),
        wire.KB_BUSY: (errors.BusyError, "is running; interrupt it or wait for its stop"),
        wire.KB_OVERLAP: (errors.AddressError, "overlaps memory that is there already"),
        wire.KB_TOO_LARGE: (errors.MisuseError, "is too large for one reply"),
        wire.KB_NO_MEMORY: (errors.HostError, "does not fit: the host is out of memory, handles or slots"),
    }.get(status)
    if text is None:
        raise errors.InternalError(f"{what}: the core answered with unknown status {status}")
    raise text[0](f"{what} {text[1]}")


class CloseListener(Protocol):
    """What wants to know when the host closes, because it can do something without asking it."""

    def host_closed(self) -> None: ...


class Core:
    """A core, wherever it runs.

    Raises (every method):
        ClosedError: the host or the object was closed.
        HostLost: the agent, emulator or ssh is gone.
        KvmIoctlError: the kernel refused.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._closed = False
        self._listeners: weakref.WeakSet[CloseListener] = weakref.WeakSet()

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self._closed

    def _send(self, request: Any, payload: bytes = b"", *, what: str, ioctl: str | None = None) -> bytes:
        """Fills in the header, sends, checks the status; returns the whole reply."""
        if self._closed:
            raise errors.ClosedError("the host is closed")
        size = ffi.sizeof(request[0])
        header = ffi.cast("struct kb_header *", request)
        header.size_bytes = size + len(payload)
        header.id = next_id()
        reply = self.channel.call(bytes(ffi.buffer(request, size)) + payload)
        status = ffi.cast("struct kb_header *", ffi.from_buffer(reply)).status
        if status != 0:
            raise_status(status, what, ioctl)
        return reply

    def _bare(self, kind: int, what: str) -> bytes:
        request = ffi.new("struct kb_header *")
        request.kind = kind
        return self._send(request, what=what)

    def hello(self) -> dict[str, int]:
        """Versions and sizes: wire_version, page_bytes, kvm_api_version (or -errno), ..."""
        raw = self._bare(wire.KB_HELLO, "hello")
        reply = ffi.cast("struct kb_hello_reply *", ffi.from_buffer(raw))
        if len(raw) < ffi.sizeof("struct kb_hello_reply") or reply.wire_version != wire.KB_WIRE_VERSION:
            raise errors.InternalError(
                f"the agent speaks wire version {reply.wire_version}, this library "
                f"{wire.KB_WIRE_VERSION}; run `kvmbench appliance build`"
            )
        names = ("wire_version", "page_bytes", "kvm_api_version", "row_bytes", "agent_pid", "agent_uid")
        return {name: int(getattr(reply, name)) for name in names}

    def host_info(self) -> dict[str, str]:
        """What the host says of itself, such as ``kernel.release`` and ``parameter.kvm_amd.npt``."""
        text = self._bare(wire.KB_HOST_INFO, "host info")[HEADER_BYTES:].decode("utf-8", "replace")
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def _create(self, kind: int, parent: int, type: int, flags: int, what: str) -> int:
        request = ffi.new("struct kb_create *", {"parent": parent, "type": type, "flags": flags})
        request.header.kind = kind
        raw = self._send(request, what=what)
        return int(ffi.cast("struct kb_handle_reply *", ffi.from_buffer(raw)).handle)

    def create_vm(self, type: int = 0) -> int:
        """KVM_CREATE_VM; returns a handle."""
        return self._create(wire.KB_CREATE_VM, wire.KB_SYSTEM_HANDLE, type, 0, "KVM_CREATE_VM")

    def create_vcpu(self, vm: int, id: int) -> int:
        """KVM_CREATE_VCPU; returns a handle."""
        return self._create(wire.KB_CREATE_VCPU, vm, id, 0, "KVM_CREATE_VCPU")

    def create_device(self, vm: int, type: int, flags: int = 0) -> int:
        """KVM_CREATE_DEVICE; returns a handle (0 for a mere test)."""
        return self._create(wire.KB_CREATE_DEVICE, vm, type, flags, "KVM_CREATE_DEVICE")

    def open_stats(self, parent: int) -> int:
        """KVM_GET_STATS_FD of a VM or vcpu; returns a handle."""
        return self._create(wire.KB_OPEN_STATS, parent, 0, 0, "KVM_GET_STATS_FD")

    def create_eventfd(self, vm: int) -> int:
        """An eventfd for a VM; returns a handle."""
        return self._create(wire.KB_CREATE_EVENTFD, vm, 0, 0, "eventfd")

    def read_eventfd(self, handle: int) -> int:
        """The count since the last reading, or 0."""
        raw = self._handle(wire.KB_READ_EVENTFD, handle, "eventfd")
        return int(ffi.cast("struct kb_eventfd_reply *", ffi.from_buffer(raw)).count)

    def write_eventfd(self, handle: int, add: int) -> None:
        """Raises the count.

        Raises:
            MisuseError: beyond 2**64 - 2.
        """
        request = ffi.new("struct kb_eventfd *", {"handle": handle, "add": add})
        request.header.kind = wire.KB_WRITE_EVENTFD
        try:
            self._send(request, what="eventfd")
        except errors.KvmIoctlError as error:
            if error.errno != errno.EAGAIN:
                raise
            raise errors.MisuseError(
                f"the eventfd's count would pass 2**64 - 2 with {add} more: read it first"
            ) from None

    def take_coalesced(self, vcpu: int) -> bytes:
        """The writes that KVM kept back in the ring of the vcpu's VM: ``struct kvm_coalesced_mmio`` each."""
        raw = self._handle(wire.KB_TAKE_COALESCED, vcpu, "ring of coalesced writes")
        return raw[ffi.sizeof("struct kb_coalesced_reply") :]

    def _range(self, kind: int, handle: int, offset: int, length: int, what: str, data: bytes = b"") -> bytes:
        request = ffi.new("struct kb_range *", {"handle": handle, "offset": offset, "length_bytes": length})
        request.header.kind = kind
        return self._send(request, data, what=what)

    def read_stats(self, handle: int, offset: int, length: int) -> bytes:
        """Bytes of a statistics file; shorter at its end."""
        return self._range(wire.KB_READ_STATS, handle, offset, length, "statistics file")[HEADER_BYTES:]

    def _handle(self, kind: int, handle: int, what: str) -> bytes:
        request = ffi.new("struct kb_handle *", {"handle": handle})
        request.header.kind = kind
        return self._send(request, what=what)

    def close_handle(self, handle: int) -> None:
        """Closes an object; a VM takes its vcpus, regions and devices with it."""
        self._handle(wire.KB_CLOSE, handle, f"handle {handle:#x}")

    def kick(self, vcpu: int) -> None:
        """Takes a running vcpu out of the guest; no effect on one that is not running."""
        self._handle(wire.KB_KICK, vcpu, "vcpu")

    def ioctl(
        self, handle: int, name: str, data: bytes = b"", *, value: int = 0, out_bytes: int = 0
    ) -> tuple[int, bytes]:
        """One ioctl by its name in `<linux/kvm.h>`.

        Args:
            handle: of the system (`wire.KB_SYSTEM_HANDLE`), a VM, vcpu or device.
            data: the struct it reads, with its array where it has one.
            value: the number, for ioctls that take one.
            out_bytes: room for what it writes, where that varies.

        Returns:
            What ioctl() returned, and the bytes it wrote.
        """
        number = IOCTLS[name].number
        request = ffi.new(
            "struct kb_ioctl *",
            {"handle": handle, "request": number, "value": value, "out_bytes": out_bytes},
        )
        request.header.kind = wire.KB_IOCTL
        raw = self._send(request, data, what=name, ioctl=name)
        reply = ffi.cast("struct kb_ioctl_reply *", ffi.from_buffer(raw))
        return int(reply.result), raw[ffi.sizeof("struct kb_ioctl_reply") :]

    def add_region(self, vm: int, gpa: int, size_bytes: int, flags: int = 0) -> int:
        """Guest memory at gpa; returns a handle.

        Raises:
            AddressError: it overlaps other memory of the VM.
            MisuseError: gpa or size is no multiple of the page.
        """
        what = f"memory at gpa {gpa:#x} of {size_bytes:#x} bytes"
        _check_u64(gpa=gpa, size_bytes=size_bytes)
        request = ffi.new("struct kb_add_region *", {"vm": vm, "gpa": gpa, "size_bytes": size_bytes, "flags": flags})
        request.header.kind = wire.KB_ADD_REGION
        raw = self._send(request, what=what, ioctl="KVM_SET_USER_MEMORY_REGION")
        return int(ffi.cast("struct kb_handle_reply *", ffi.from_buffer(raw)).handle)

    def set_region(self, handle: int, gpa: int, flags: int) -> None:
        """Moves a region or changes its KVM_MEM_* flags; its bytes stay."""
        _check_u64(gpa=gpa)
        request = ffi.new("struct kb_set_region *", {"handle": handle, "gpa": gpa, "flags": flags})
        request.header.kind = wire.KB_SET_REGION
        self._send(request, what=f"memory moved to gpa {gpa:#x}", ioctl="KVM_SET_USER_MEMORY_REGION")

    def read_region(self, handle: int, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of a region, in pieces of 16 MiB."""
        _check_u64(offset=offset, length=length)
        pieces = []
        what = f"region bytes {offset:#x} + {length:#x}"
        for start in range(0, length, CHUNK_BYTES) or (0,):
            size = min(CHUNK_BYTES, length - start)
            raw = self._range(wire.KB_READ_REGION, handle, offset + start, size, what)
            pieces.append(raw[HEADER_BYTES:])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def write_region(self, handle: int, offset: int, data: bytes) -> None:
        """Writes bytes into a region, in pieces of 16 MiB."""
        _check_u64(offset=offset)
        view = memoryview(data).cast("B")
        what = f"region bytes {offset:#x} + {len(view):#x}"
        for start in range(0, len(view), CHUNK_BYTES) or (0,):
            piece = bytes(view[start : start + CHUNK_BYTES])
            self._range(wire.KB_WRITE_REGION, handle, offset + start, len(piece), what, piece)

    def fill_region(self, handle: int, offset: int, length: int, byte: int = 0) -> None:
        """Fills a range with one byte, without sending it over the channel."""
        _check_u64(offset=offset, length=length)
        request = ffi.new(
            "struct kb_fill *",
            {"handle": handle, "byte": byte, "offset": offset, "length_bytes": length},
        )
        request.header.kind = wire.KB_FILL_REGION
        self._send(request, what=f"region bytes {offset:#x} + {length:#x}")

    def dirty_log(self, handle: int) -> bytes:
        """KVM_GET_DIRTY_LOG of a region: one bit a page, least significant first."""
        request = ffi.new("struct kb_handle *", {"handle": handle})
        request.header.kind = wire.KB_DIRTY_LOG
        return self._send(request, what="region", ioctl="KVM_GET_DIRTY_LOG")[HEADER_BYTES:]

    def protect(self, handle: int, offset: int, length: int, protection: int) -> None:
        """Makes accesses to pages leave the guest as MMIO exits (`enum kb_protection`)."""
        _check_u64(offset=offset, length=length)
        request = ffi.new(
            "struct kb_protect *",
            {"handle": handle, "protection": protection, "offset": offset, "length_bytes": length},
        )
        request.header.kind = wire.KB_PROTECT
        what = f"region bytes {offset:#x} + {length:#x}"
        self._send(request, what=what, ioctl="KVM_SET_USER_MEMORY_REGION")

    def raw_loop(self, vcpu: int, sort: int, count: int) -> tuple[int, int]:
        """The plain loop that benchmarks compare with; returns (steps or exits done, ns)."""
        request = ffi.new("struct kb_raw_loop *", {"vcpu": vcpu, "sort": sort, "count": count})
        request.header.kind = wire.KB_RAW_LOOP
        raw = self._send(request, what="vcpu", ioctl="KVM_RUN")
        reply = ffi.cast("struct kb_raw_loop_reply *", ffi.from_buffer(raw))
        return int(reply.count), int(reply.elapsed_ns)

    def map_region(self, handle: int) -> memoryview | None:
        """The region's bytes, writable and not copied; None where the core is elsewhere."""
        mapper = getattr(self.channel, "map_region", None)
        return None if mapper is None else mapper(handle)

    def close(self) -> None:
        """Closes the channel and everything in the core; idempotent."""
        if not self._closed:
            self._closed = True
            for listener in list(self._listeners):
                listener.host_closed()
            self.channel.close()

    def when_closed(self, listener: CloseListener) -> None:
        """Has `close()` call ``listener.host_closed()``, unless the listener is gone by then."""
        self._listeners.add(listener)


def _check_u64(**values: int) -> None:
    for name, value in values.items():
        if not 0 <= value < 1 << 64:
            raise errors.AddressError(f"{name} {value:#x} is no 64-bit address or size")
