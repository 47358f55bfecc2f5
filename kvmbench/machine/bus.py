"""Which device answers at a port or address, quickly.

A port costs one look-up in a flat dict of bound methods:
``bus.port_out[port](port, value, size_bytes)``. That matters because an exit
handled in Python has about a microsecond before it shows in the guest's speed
(benchmarks/).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

from kvmbench.errors import AddressError, MisuseError
from kvmbench.machine.device import Device, StopRequest

PortOut = Callable[[int, int, int], StopRequest | None]
PortIn = Callable[[int, int], int]

# Different addresses counted one by one; a guest that sweeps all memory must not fill ours.
_COUNTED = 4096


class _Ports(dict[int, Callable[..., object]]):
    # A dict whose missing keys give one handler and stay missing.

    def __init__(self, fallback: Callable[..., object]) -> None:
        super().__init__()
        self._fallback = fallback

    def __missing__(self, port: int) -> Callable[..., object]:
        return self._fallback


class Bus:
    """The ports and MMIO addresses of one machine.

    Attributes:
        port_out: port to ``handler(port, value, size_bytes)``; any port may be asked for.
        port_in: port to ``handler(port, size_bytes)``; any port may be asked for.
        unclaimed: (kind, address) to how often the guest used it with no device there; kind is ``out``,
            ``in``, ``mmio write`` or ``mmio read``. Beyond 4096 addresses the rest is counted at address -1.
        devices: all attached devices, in that order.
        changes: how often a device was attached or detached, for whoever remembers a handler.
    """

    def __init__(self) -> None:
        self.port_out: dict[int, PortOut] = _Ports(self._no_port_out)  # type: ignore[assignment]
        self.port_in: dict[int, PortIn] = _Ports(self._no_port_in)  # type: ignore[assignment]
        self.unclaimed: dict[tuple[str, int], int] = {}
        self.devices: list[Device] = []
        self.changes = 0
        # Sorted first and last addresses of MMIO ranges, and whose they are.
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        self._owners: list[Device] = []

    def attach(self, device: Device) -> None:
        """Puts a device on the bus.

        Raises:
            AddressError: another device claims one of its ports or addresses.
            MisuseError: it is attached already, or claims something that is no port or address.
        """
        if device in self.devices:
            raise MisuseError(f"{device.name} is attached already")
        for ports in device.ports:
            if ports.step != 1 or not len(ports) or ports.start < 0 or ports.stop > 0x10000:
                raise MisuseError(f"{device.name} claims {ports}: ports are 0 to 0xffff, in ranges of step 1")
            for port in ports:
                owner = self.owner(port)
                if owner is not None:
                    raise AddressError(f"port {port:#x} of {device.name} is claimed by {owner.name}")
        for space in device.mmio:
            if space.step != 1 or not len(space) or space.start < 0 or space.stop > 1 << 64:
                raise MisuseError(f"{device.name} claims {space}: MMIO is a range of addresses, step 1")
            for first, last, owner in zip(self._firsts, self._lasts, self._owners, strict=True):
                if space.start <= last and first < space.stop:
                    raise AddressError(
                        f"MMIO {space.start:#x} to {space.stop - 1:#x} of {device.name} overlaps "
                        f"{first:#x} to {last:#x} of {owner.name}"
                    )
        for ports in device.ports:
            for port in ports:
                self.port_out[port] = device.port_out
                self.port_in[port] = device.port_in
        for space in device.mmio:
            place = bisect.bisect(self._firsts, space.start)
            self._firsts.insert(place, space.start)
            self._lasts.insert(place, space.stop - 1)
            self._owners.insert(place, device)
        self.changes += 1
        self.devices.append(device)
        device.attach(self)

    def detach(self, device: Device) -> None:
        """Takes a device off the bus; its ports and addresses are free again.

        Raises:
            MisuseError: it is not attached here.
        """
        if device not in self.devices:
            raise MisuseError(f"{device.name} is not attached")
        self.devices.remove(device)
        for ports in device.ports:
            for port in ports:
                del self.port_out[port], self.port_in[port]
        keep = [n for n, owner in enumerate(self._owners) if owner is not device]
        self._firsts = [self._firsts[n] for n in keep]
        self._lasts = [self._lasts[n] for n in keep]
        self._owners = [self._owners[n] for n in keep]
        device.bus = None
        self.changes += 1

    def owner(self, port: int) -> Device | None:
        """The device that claims a port."""
        return next((device for device in self.devices if any(port in ports for ports in device.ports)), None)

    def owner_mmio(self, gpa: int) -> Device | None:
        """The device that claims an address."""
        place = bisect.bisect(self._firsts, gpa) - 1
        return self._owners[place] if place >= 0 and gpa <= self._lasts[place] else None

    def reset(self) -> None:
        """Resets every device and forgets the unclaimed accesses."""
        self.unclaimed.clear()
        for device in self.devices:
            device.reset()

    def out_string(self, port: int, data: bytes, size_bytes: int, seen: list[Any] | None = None) -> StopRequest | None:
        """All accesses of one exit, as REP OUTS makes them: each `size_bytes` of data in turn.

        Every byte is delivered, since the guest has retired them all; the first `StopRequest` is returned.

        Args:
            seen: what the device said to the first of them already. Each answer is put there as soon as it is known,
                so that after a Ctrl-C none of them has to be made again.
        """
        handler = self.port_out[port]
        seen = [] if seen is None else seen
        while (first := size_bytes * len(seen)) < len(data):
            value = int.from_bytes(data[first : first + size_bytes], "little")
            seen.append(handler(port, value, size_bytes))
        return next((wish for wish in seen if wish is not None), None)

    def in_string(self, port: int, size_bytes: int, count: int = 1, seen: list[int] | None = None) -> bytes:
        """The `size_bytes * count` bytes that complete an IN, or REP INS, exit; `seen` as in `out_string`."""
        handler = self.port_in[port]
        mask = (1 << 8 * size_bytes) - 1
        seen = [] if seen is None else seen
        while len(seen) < count:
            seen.append(handler(port, size_bytes))
        return b"".join((value & mask).to_bytes(size_bytes, "little") for value in seen)

    def mmio_write(self, gpa: int, value: int, size_bytes: int) -> StopRequest | None:
        """Hands a write to the device at the address, or counts it."""
        device = self.owner_mmio(gpa)
        if device is not None:
            return device.mmio_write(gpa, value, size_bytes)
        self._count("mmio write", gpa)
        return None

    def mmio_read(self, gpa: int, size_bytes: int) -> int:
        """Asks the device at the address; all ones where there is none."""
        mask = (1 << 8 * size_bytes) - 1
        device = self.owner_mmio(gpa)
        if device is not None:
            return device.mmio_read(gpa, size_bytes) & mask
        self._count("mmio read", gpa)
        return mask

    def _no_port_out(self, port: int, value: int, size_bytes: int) -> None:
        self._count("out", port)

    def _no_port_in(self, port: int, size_bytes: int) -> int:
        self._count("in", port)
        return (1 << 8 * size_bytes) - 1

    def _count(self, kind: str, address: int) -> None:
        key = (kind, address)
        if key not in self.unclaimed and len(self.unclaimed) >= _COUNTED:
            key = (kind, -1)
        self.unclaimed[key] = self.unclaimed.get(key, 0) + 1

    def __repr__(self) -> str:
        return f"Bus({', '.join(device.name for device in self.devices) or 'empty'})"
