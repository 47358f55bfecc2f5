"""fw_cfg as a guest's firmware reads it: through the ports and by DMA."""

from __future__ import annotations

import struct

import pytest

from kvmbench.errors import AddressError, MisuseError
from kvmbench.machine.fw_cfg import FwCfg


class Ram:
    """Sixteen KiB of memory."""

    def __init__(self) -> None:
        self.data = bytearray(0x4000)

    def read(self, gpa: int, size_bytes: int) -> bytes:
        if gpa + size_bytes > len(self.data):
            raise AddressError("outside")
        return bytes(self.data[gpa : gpa + size_bytes])

    def write(self, gpa: int, data: bytes) -> None:
        if gpa + len(data) > len(self.data):
            raise AddressError("outside")
        self.data[gpa : gpa + len(data)] = data


def read_item(device: FwCfg, key: int, size: int) -> bytes:
    device.port_out(0x510, key, 2)
    return bytes(device.port_in(0x511, 1) for _ in range(size))


def directory(device: FwCfg) -> dict[str, tuple[int, int]]:
    """Name to (size, selector)."""
    (count,) = struct.unpack(">I", read_item(device, 0x19, 4))
    entries = {}
    for _ in range(count):
        raw = bytes(device.port_in(0x511, 1) for _ in range(64))
        size, key, _, name = struct.unpack(">IHH56s", raw)
        entries[name.rstrip(b"\0").decode()] = (size, key)
    return entries


def test_the_signature_and_the_machine_are_told() -> None:
    device = FwCfg(memory_bytes=16 << 20, vcpus=3)
    assert read_item(device, 0, 6) == b"QEMU\0\0", "zeros follow the end"
    assert read_item(device, 1, 4) == b"\1\0\0\0", "no DMA without memory"
    assert struct.unpack("<Q", read_item(device, 3, 8)) == (16 << 20,)
    assert struct.unpack("<H", read_item(device, 5, 2)) == (3,)
    assert read_item(device, 0x7777, 2) == b"\0\0", "an unknown item is empty"


def test_files_are_found_by_name_through_the_directory() -> None:
    device = FwCfg()
    device.add_file("opt/b", b"second")
    device.add_file("opt/a", b"first")
    device.add_file("opt/b", b"replaced")
    listed = directory(device)
    assert list(listed) == ["opt/a", "opt/b"]
    assert {name: read_item(device, key, size) for name, (size, key) in listed.items()} == {
        "opt/a": b"first",
        "opt/b": b"replaced",
    }
    assert device.files == {"opt/a": b"first", "opt/b": b"replaced"}
    device.reset()
    assert list(directory(device)) == ["opt/a", "opt/b"]


@pytest.mark.parametrize("name", ["", "x" * 56, "ü", "a\0b"])
def test_names_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(MisuseError, match="fw_cfg file name"):
        FwCfg().add_file(name, b"")


def dma(device: FwCfg, ram: Ram, control: int, length: int, target: int) -> int:
    """One transfer; returns the control field afterwards."""
    ram.write(0x100, struct.pack(">IIQ", control, length, target))
    device.port_out(0x514, 0, 4)
    device.port_out(0x518, int.from_bytes((0x100).to_bytes(4, "big"), "little"), 4)
    return int.from_bytes(ram.read(0x100, 4), "big")


def test_dma_selects_skips_and_reads() -> None:
    ram = Ram()
    device = FwCfg(ram)
    assert device.port_in(0x514, 4).to_bytes(4, "little") + device.port_in(0x518, 4).to_bytes(
        4, "little"
    ) == (b"QEMU CFG")
    device.add_file("opt/data", bytes(range(100)))
    key = directory(device)["opt/data"][1]
    assert dma(device, ram, key << 16 | 8 | 4, 10, 0) == 0
    ram.write(0x1000, b"\xaa" * 120)
    assert dma(device, ram, 2, 110, 0x1000) == 0
    assert ram.read(0x1000, 90) == bytes(range(10, 100))
    assert ram.read(0x105A, 30) == bytes(20) + b"\xaa" * 10, "zeros past the end of the file"


def test_dma_errors_are_told_to_the_guest() -> None:
    ram = Ram()
    device = FwCfg(ram)
    assert dma(device, ram, 2, 16, 0x3FF8) == 1, "outside memory"
    assert dma(device, ram, 16, 4, 0x1000) == 1, "items are read-only"
    device.port_out(0x514, 0xFFFFFFFF, 4)
    device.port_out(0x518, 0xFFFFFFFF, 4)
    assert dma(device, ram, 8, 0, 0) == 0, "and the device still works"
