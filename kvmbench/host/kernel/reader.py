"""The messages that read the host kernel's memory: what `Core` is for another part of `core/wire.h`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmbench.core import wire
from kvmbench.core._wire import ffi
from kvmbench.host.client import HEADER_BYTES, Core

_GOT_BYTES: int = ffi.sizeof("struct kb_kernel_got")
_RANGE = np.dtype([("address", "<u8"), ("bytes", "<u4"), ("reserved", "<u4")])
_GOT = np.dtype([("there", "<u4"), ("bytes", "<u4")])
# Of memory in one message, and of BTF.
_BATCH_BYTES = 512 << 10
_BTF_BYTES = 1 << 20
# Of a list's objects at first.
_LEAST_BYTES = 64 << 10


@dataclass(frozen=True)
class Objects:
    """What a list in the kernel leads to.

    Attributes:
        addresses: of the objects, shape (n,).
        data: their bytes, shape (n, size).
        whole: the list came back to its head.
        broken: it led where nothing can be read; else, if it is not whole, it is longer than was asked for.
    """

    addresses: npt.NDArray[np.uint64]
    data: npt.NDArray[np.uint8]
    whole: bool
    broken: bool


class KernelReader:
    """Reads the memory of the kernel below a core; only root may.

    Raises (every method):
        KvmIoctlError: the kernel refused, with errno: ENOENT where there is no /proc/kcore, EACCES or EPERM without
            the privilege.
        HostLost, ClosedError: as everywhere.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        request = ffi.new("struct kb_header *")
        request.kind = wire.KB_KERNEL_OPEN
        raw = core._send(request, what="/proc/kcore", ioctl="open /proc/kcore")
        self._handle = int(ffi.cast("struct kb_handle_reply *", ffi.from_buffer(raw)).handle)

    def close(self) -> None:
        """Lets go of the file."""
        self._core.close_handle(self._handle)

    def _text(self, what: int, name: str, offset: int = 0, max_bytes: int = 0, *, path: str) -> bytes:
        data = name.encode()
        request = ffi.new(
            "struct kb_kernel_text *",
            {"handle": self._handle, "what": what, "name_bytes": len(data), "offset": offset, "max_bytes": max_bytes},
        )
        request.header.kind = wire.KB_KERNEL_TEXT
        return self._core._send(request, data, what=path, ioctl=f"read {path}")[HEADER_BYTES:]

    def btf(self, module: str) -> bytes:
        """``/sys/kernel/btf/MODULE``; that of the kernel itself is "vmlinux"."""
        pieces: list[bytes] = []
        while not pieces or len(pieces[-1]) == _BTF_BYTES:
            at = sum(map(len, pieces))
            pieces.append(self._text(wire.KB_KERNEL_BTF, module, at, _BTF_BYTES, path=f"/sys/kernel/btf/{module}"))
        return b"".join(pieces)

    def symbols(self, names: Sequence[str]) -> dict[tuple[str, str], int]:
        """Addresses by (name, module) of the symbols of these names; the kernel's own have module "".

        Empty where the kernel hides them (kptr_restrict).
        """
        text = self._text(
            wire.KB_KERNEL_SYMBOLS, "\n".join(names), 0, wire.KB_MAX_TRACE_TEXT, path="/proc/kallsyms"
        ).decode()
        found = {}
        for line in text.splitlines():
            address, _, name, *module = line.split()
            if int(address, 16):
                found[name, module[0].strip("[]") if module else ""] = int(address, 16)
        return found

    def notes(self) -> bytes:
        """The notes of /proc/kcore, as ELF has them."""
        return self._text(wire.KB_KERNEL_NOTES, "", path="/proc/kcore")

    def descriptor(self, handle: int) -> tuple[int, int]:
        """The process and the number of its descriptor that is a VM or vcpu, given by handle."""
        raw = self._core._handle(wire.KB_KERNEL_DESCRIPTOR, handle, "VM or vcpu")
        reply = ffi.cast("struct kb_kernel_descriptor_reply *", ffi.from_buffer(raw))
        return int(reply.pid), int(reply.fd)

    def read(self, address: int, size: int) -> bytes | None:
        """Bytes at an address, or None where there are none."""
        return self.read_many([address], size)[0]

    def read_many(self, addresses: Sequence[int] | npt.NDArray[np.uint64], size: int) -> list[bytes | None]:
        """Bytes at each address, or None where there are none; few exchanges however many there are."""
        found: list[bytes | None] = []
        for got, data in self._batches(np.asarray(addresses, np.uint64), size, 0):
            at = 0
            for there, length in got.tolist():
                found.append(bytes(data[at : at + length]) if there else None)
                at += length + 7 & ~7
        return found

    def read_words(self, addresses: npt.NDArray[np.uint64], words: int) -> tuple[npt.NDArray[np.uint64], Any]:
        """Tables of 64-bit words, most of which are 0.

        Returns:
            The tables, shape (n, words), and for each whether it could be read.
        """
        tables = np.zeros((len(addresses), words), np.uint64)
        there = np.zeros(len(addresses), bool)
        row = 0
        for got, data in self._batches(addresses, 8 * words, wire.KB_KERNEL_SPARSE):
            values, at = np.frombuffer(data, np.uint64), 0
            masks = (words + 63) // 64
            for present, length in got.tolist():
                if present:
                    bits = np.unpackbits(values[at : at + masks].view(np.uint8), bitorder="little")[:words].view(bool)
                    tables[row, bits] = values[at + masks : at + length // 8]
                    there[row] = True
                    at += length // 8
                row += 1
        return tables, there

    def _batches(self, addresses: npt.NDArray[np.uint64], size: int, flags: int) -> Any:
        each = max(1, _BATCH_BYTES // max(size, 1))
        for first in range(0, len(addresses), each):
            part = addresses[first : first + each]
            ranges = np.zeros(len(part), _RANGE)
            ranges["address"], ranges["bytes"] = part, size
            request = ffi.new(
                "struct kb_kernel_read *", {"handle": self._handle, "flags": flags, "n_ranges": len(part)}
            )
            request.header.kind = wire.KB_KERNEL_READ
            raw = self._core._send(request, ranges.tobytes(), what="kernel memory")
            got = np.frombuffer(raw, _GOT, len(part), HEADER_BYTES)
            yield got, memoryview(raw)[HEADER_BYTES + _GOT_BYTES * len(part) :]

    def list_objects(self, head: int, size: int, node_offset: int, most: int) -> Objects:
        """Follows a ``struct list_head`` (or ``hlist_head``).

        Args:
            head: its address.
            size: bytes of each object that it leads to.
            node_offset: of the list's node in an object.
            most: objects at most.
        """
        # Room for all there could be would be megabytes; a small host then moves memory about, and with it the guest's,
        # which KVM has to forget first.
        asked = max(1, _LEAST_BYTES // (size + 8))
        while True:
            objects = self._list(head, size, node_offset, min(asked, most))
            if objects.whole or objects.broken or asked >= most:
                return objects
            asked *= 4

    def _list(self, head: int, size: int, node_offset: int, most: int) -> Objects:
        each = 8 + (size + 7 & ~7)
        most = min(most, wire.KB_MAX_KERNEL_BYTES // each)
        request = ffi.new(
            "struct kb_kernel_list *",
            {
                "handle": self._handle,
                "node_offset": node_offset,
                "head": head,
                "object_bytes": size,
                "max_objects": most,
            },
        )
        request.header.kind = wire.KB_KERNEL_LIST
        raw = self._core._send(request, what=f"list at {head:#x}")
        reply = ffi.cast("struct kb_kernel_list_reply *", ffi.from_buffer(raw))
        start = ffi.sizeof("struct kb_kernel_list_reply")
        rows = np.frombuffer(raw, np.uint8, int(reply.n_objects) * each, start).reshape(-1, each)
        return Objects(
            addresses=rows[:, :8].copy().view(np.uint64).reshape(-1),
            data=rows[:, 8 : 8 + size],
            whole=reply.end == wire.KB_KERNEL_LIST_WHOLE,
            broken=reply.end == wire.KB_KERNEL_LIST_BROKEN,
        )
