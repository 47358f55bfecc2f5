"""QEMU's firmware configuration device: named blobs that the guest reads through ports.

Layout and selectors as in QEMU's documentation, "QEMU Firmware Configuration
(fw_cfg) Device": a selector register at 0x510, a data register at 0x511, and
an address register for DMA at 0x514.
"""

from __future__ import annotations

import struct
from typing import Protocol

from kvmbench.errors import AddressError, MisuseError
from kvmbench.machine.device import Device, StopRequest

_SIGNATURE, _ID, _RAM_SIZE, _NB_CPUS, _MAX_CPUS, _FILE_DIR = 0x00, 0x01, 0x03, 0x05, 0x0F, 0x19
_FILE_FIRST = 0x20
_FILES_MAX = 0x1000
_NAME_BYTES = 56
_ID_TRADITIONAL, _ID_DMA = 1, 2
_DMA_ERROR, _DMA_READ, _DMA_SKIP, _DMA_SELECT, _DMA_WRITE = 1, 2, 4, 8, 16
_DMA_SIGNATURE = b"QEMU CFG"


class GuestMemory(Protocol):
    """What DMA needs (`kvmbench.machine.Memory` has it)."""

    def read(self, gpa: int, size_bytes: int) -> bytes: ...
    def write(self, gpa: int, data: bytes) -> None: ...


class FwCfg(Device):
    """The device with the items every QEMU has, and files of your own.

    Args:
        memory: of the machine; DMA is offered where it is given.
        memory_bytes: told to the guest as the RAM size.
        vcpus: told to the guest as the number of processors.
    """

    name = "fw_cfg"

    def __init__(self, memory: GuestMemory | None = None, *, memory_bytes: int = 0, vcpus: int = 1) -> None:
        self.ports = [range(0x510, 0x512)]
        if memory is not None:
            self.ports.append(range(0x514, 0x51C))
        self._memory = memory
        self._items: dict[int, bytes] = {
            _SIGNATURE: b"QEMU",
            _ID: struct.pack("<I", _ID_TRADITIONAL | (_ID_DMA if memory is not None else 0)),
            _RAM_SIZE: struct.pack("<Q", memory_bytes),
            _NB_CPUS: struct.pack("<H", vcpus),
            _MAX_CPUS: struct.pack("<H", vcpus),
        }
        self._names: dict[str, int] = {}
        self._directory()
        self.reset()

    def reset(self) -> None:
        """Selects the signature; the files stay."""
        self._selector = 0
        self._offset = 0
        self._dma_high = 0

    def add_file(self, name: str, data: bytes) -> None:
        """Offers a blob under a name such as ``opt/org.example/config``; a second one replaces the first.

        Raises:
            MisuseError: the name is empty, not ASCII or above 55 characters, or there are too many files.
        """
        if not isinstance(name, str) or not name or not name.isascii() or "\0" in name or len(name) >= _NAME_BYTES:
            raise MisuseError(f"fw_cfg file name {name!r}: ASCII, 1 to {_NAME_BYTES - 1} characters")
        if not isinstance(data, bytes | bytearray | memoryview):
            # bytes(5) would be five zeros.
            raise MisuseError(f"fw_cfg file {name!r} takes bytes, not {data!r}")
        key = self._names.get(name)
        if key is None:
            if len(self._names) >= _FILES_MAX:
                raise MisuseError(f"fw_cfg holds at most {_FILES_MAX} files")
            key = self._names[name] = _FILE_FIRST + len(self._names)
        self._items[key] = bytes(data)
        self._directory()

    @property
    def files(self) -> dict[str, bytes]:
        """Name to contents."""
        return {name: self._items[key] for name, key in self._names.items()}

    def _directory(self) -> None:
        # Big-endian, sorted by name; the selectors need not be in order.
        entries = b"".join(
            struct.pack(f">IHH{_NAME_BYTES}s", len(self._items[key]), key, 0, name.encode())
            for name, key in sorted(self._names.items())
        )
        self._items[_FILE_DIR] = struct.pack(">I", len(self._names)) + entries

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        """Selects an item, or starts a DMA transfer; writes to the data register are ignored."""
        if port == 0x510 and size_bytes == 2:
            self._select(value)
        elif port == 0x514 and size_bytes == 4:
            self._dma_high = _swap32(value)
        elif port == 0x518 and size_bytes == 4:
            address, self._dma_high = self._dma_high << 32 | _swap32(value), 0
            self._transfer(address)
        return None

    def port_in(self, port: int, size_bytes: int) -> int:
        """The next byte of the selected item (0 past its end), or the DMA signature."""
        if port == 0x511 and size_bytes == 1:
            return int.from_bytes(self._take(1), "little")
        if port >= 0x514:
            first = port - 0x514
            return int.from_bytes(_DMA_SIGNATURE[first : first + size_bytes], "little")
        return 0

    def _select(self, key: int) -> None:
        self._selector, self._offset = key & 0xFFFF, 0

    def _take(self, size: int) -> bytes:
        item = self._items.get(self._selector, b"")
        data = item[self._offset : self._offset + size]
        self._offset = min(self._offset + size, len(item))
        return data.ljust(size, b"\0")

    def _transfer(self, address: int) -> None:
        memory = self._memory
        assert memory is not None  # without memory the port is not claimed
        try:
            control, length, target = struct.unpack(">IIQ", memory.read(address, 16))
        except AddressError:
            return  # there is nowhere to say so
        result = 0
        try:
            if control & _DMA_SELECT:
                self._select(control >> 16)
            if control & _DMA_READ:
                # Zeros past the end, which the length may be far beyond.
                for first in range(0, length, 1 << 20):
                    memory.write(target + first, self._take(min(1 << 20, length - first)))
            elif control & _DMA_WRITE:
                result = _DMA_ERROR  # every item is read-only
            elif control & _DMA_SKIP:
                self._offset = min(self._offset + length, len(self._items.get(self._selector, b"")))
        except AddressError:
            result = _DMA_ERROR
        memory.write(address, struct.pack(">I", result))

    def __repr__(self) -> str:
        return f"FwCfg({len(self._names)} files, item {self._selector:#x} selected)"


def _swap32(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little"), "big")
