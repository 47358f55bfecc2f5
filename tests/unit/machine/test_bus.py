"""The bus: who answers, who may not attach, and what nobody claimed."""

from __future__ import annotations

import pytest

from kvmbench.errors import AddressError, MisuseError
from kvmbench.machine.bus import Bus
from kvmbench.machine.debug_exit import DebugExit
from kvmbench.machine.debugcon import DebugConsole
from kvmbench.machine.device import Device, StopRequest


class Latch(Device):
    """Keeps what is written; gives it back with all high bits set."""

    def __init__(self, name: str, ports: list[range], mmio: list[range] | None = None) -> None:
        self.name = name
        self.ports = ports
        self.mmio = mmio or []
        self.log: list[tuple[int, int, int]] = []

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        self.log.append((port, value, size_bytes))
        return StopRequest("full", len(self.log)) if value == 0xEE else None

    def port_in(self, port: int, size_bytes: int) -> int:
        return -1 ^ 0x0F

    def mmio_write(self, gpa: int, value: int, size_bytes: int) -> StopRequest | None:
        self.log.append((gpa, value, size_bytes))
        return None

    def mmio_read(self, gpa: int, size_bytes: int) -> int:
        return gpa | 1 << 80

    def reset(self) -> None:
        self.log.clear()


def test_ports_lead_to_their_device_and_nowhere_else() -> None:
    bus = Bus()
    one, two = Latch("one", [range(0x10, 0x12)]), Latch("two", [range(0x12, 0x14), range(0x80, 0x81)])
    bus.attach(one)
    bus.attach(two)
    bus.port_out[0x11](0x11, 5, 1)
    bus.port_out[0x80](0x80, 6, 4)
    assert (one.log, two.log) == ([(0x11, 5, 1)], [(0x80, 6, 4)])
    assert bus.owner(0x13) is two
    assert bus.owner(0x14) is None
    assert one.bus is bus


def test_unclaimed_ports_read_all_ones_and_are_counted() -> None:
    bus = Bus()
    assert bus.in_string(0x60, 1) == b"\xff"
    assert bus.in_string(0x60, 4) == b"\xff\xff\xff\xff"
    assert bus.out_string(0x61, b"\x01", 1) is None
    assert bus.mmio_read(0xFEE00000, 4) == 0xFFFF_FFFF
    assert bus.mmio_write(0xFEE00000, 1, 4) is None
    assert bus.unclaimed == {
        ("in", 0x60): 2, ("out", 0x61): 1, ("mmio read", 0xFEE00000): 1, ("mmio write", 0xFEE00000): 1,
    }  # fmt: skip
    assert not dict(bus.port_out), "asking for a port claims nothing"


def test_a_guest_that_sweeps_memory_does_not_fill_ours() -> None:
    bus = Bus()
    for page in range(10_000):
        bus.mmio_read(page << 12, 8)
    assert len(bus.unclaimed) <= 4097
    assert sum(bus.unclaimed.values()) == 10_000


def test_rep_outs_delivers_every_element_and_returns_the_first_wish() -> None:
    bus = Bus()
    latch = Latch("latch", [range(0x20, 0x21)])
    bus.attach(latch)
    stop = bus.out_string(0x20, bytes([1, 0, 0xEE, 0, 0xEE, 0, 2, 0]), 2)
    assert latch.log == [(0x20, 1, 2), (0x20, 0xEE, 2), (0x20, 0xEE, 2), (0x20, 2, 2)]
    assert stop == StopRequest("full", 2)


def test_values_from_devices_are_cut_to_the_access() -> None:
    bus = Bus()
    bus.attach(Latch("latch", [range(0x20, 0x21)], [range(0xD000, 0xE000)]))
    assert bus.in_string(0x20, 2, 3) == b"\xf0\xff" * 3
    assert bus.mmio_read(0xD010, 2) == 0xD010


def test_mmio_goes_to_the_device_of_the_range() -> None:
    bus = Bus()
    low, high = Latch("low", [], [range(0xD000, 0xD100)]), Latch("high", [], [range(0xD100, 0xE000)])
    bus.attach(high)
    bus.attach(low)
    bus.mmio_write(0xD0FF, 1, 1)
    bus.mmio_write(0xD100, 2, 8)
    assert (low.log, high.log) == ([(0xD0FF, 1, 1)], [(0xD100, 2, 8)])
    assert bus.owner_mmio(0xCFFF) is None
    assert bus.owner_mmio(0xE000) is None


def test_overlaps_are_refused_and_leave_the_bus_as_it_was() -> None:
    bus = Bus()
    bus.attach(Latch("first", [range(0x20, 0x24)], [range(0xD000, 0xE000)]))
    with pytest.raises(AddressError, match="port 0x23 of second is claimed by first"):
        bus.attach(Latch("second", [range(0x40, 0x44), range(0x23, 0x25)]))
    assert bus.owner(0x40) is None
    with pytest.raises(AddressError, match="0xdfff to 0xe0ff of third overlaps 0xd000 to 0xdfff of first"):
        bus.attach(Latch("third", [], [range(0xDFFF, 0xE100)]))
    assert len(bus.devices) == 1


@pytest.mark.parametrize("ports", [range(0x10000, 0x10001), range(-1, 4), range(0, 8, 2), range(5, 5)])
def test_claims_that_are_no_ports_are_refused(ports: range) -> None:
    with pytest.raises(MisuseError, match="claims range"):
        Bus().attach(Latch("odd", [ports]))


def test_a_detached_device_hears_nothing_more() -> None:
    bus = Bus()
    latch = Latch("latch", [range(0x20, 0x21)], [range(0xD000, 0xE000)])
    bus.attach(latch)
    with pytest.raises(MisuseError, match="attached already"):
        bus.attach(latch)
    bus.detach(latch)
    bus.out_string(0x20, b"\1", 1)
    bus.mmio_write(0xD000, 1, 1)
    assert latch.log == []
    assert latch.bus is None
    with pytest.raises(MisuseError, match="not attached"):
        bus.detach(latch)


def test_reset_reaches_every_device() -> None:
    bus = Bus()
    latch = Latch("latch", [range(0x20, 0x21)])
    bus.attach(latch)
    bus.out_string(0x20, b"\1", 1)
    bus.in_string(0x99, 1)
    bus.reset()
    assert latch.log == []
    assert bus.unclaimed == {}


def test_the_debug_exit_port_asks_for_a_stop_with_an_odd_code() -> None:
    bus = Bus()
    device = DebugExit()
    bus.attach(device)
    assert bus.out_string(0xF4, b"\x10", 1) == StopRequest("debug-exit", 0x21)
    assert device.code == 0x21
    device.reset()
    assert device.code is None


def test_the_debug_console_keeps_bytes_and_says_that_it_is_there() -> None:
    bus = Bus()
    console = DebugConsole()
    bus.attach(console)
    bus.out_string(0xE9, b"hi\n", 1)
    assert console.text == "hi\n"
    assert bus.in_string(0xE9, 1) == b"\xe9"
