"""The base of all devices: port and MMIO ranges, and four methods for the accesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmbench.errors import MisuseError

if TYPE_CHECKING:
    from kvmbench.machine.bus import Bus


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A device's wish that the run ends here; handlers of writes return it.

    Attributes:
        reason: in words, such as ``debug-exit``.
        code: a number for the caller, such as an exit status, or None.
    """

    reason: str
    code: int | None = None


def check_device(device: object) -> None:
    """Raises MisuseError if it is no `Device`, or a class of devices instead of one."""
    if not isinstance(device, Device):
        made = " (a class: make one of it, with parentheses)" if isinstance(device, type) else ""
        raise MisuseError(f"{device!r} is no device{made}; derive it from kvmbench.machine.Device")


class Device:
    """A device on the machine's bus; override what it answers to.

    A device is called on the thread that runs the vcpu, between two entries of
    the guest, and an exception from it ends the run and reaches the caller. The
    guest can go on: that access is over, and a read that was not answered gives ones.

    Attributes:
        name: shown in messages.
        ports: I/O ports it claims, such as ``[range(0x3f8, 0x400)]``.
        mmio: guest-physical ranges it claims; no memory may lie there.
        bus: where it is attached, or None.
    """

    name: str = "device"
    ports: Sequence[range] = ()
    mmio: Sequence[range] = ()
    bus: Bus | None = None

    def attach(self, bus: Bus) -> None:
        """Called once when the device is put on a bus."""
        self.bus = bus

    def reset(self) -> None:
        """Back to the state after power-on; what was recorded for the user is dropped too."""

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        """The guest wrote `value` (1, 2 or 4 bytes) to a port."""
        return None

    def port_in(self, port: int, size_bytes: int) -> int:
        """The guest reads 1, 2 or 4 bytes from a port; surplus high bits are cut off."""
        return (1 << 8 * size_bytes) - 1

    def mmio_write(self, gpa: int, value: int, size_bytes: int) -> StopRequest | None:
        """The guest wrote `value` (1 to 8 bytes) to an address."""
        return None

    def mmio_read(self, gpa: int, size_bytes: int) -> int:
        """The guest reads 1 to 8 bytes from an address; surplus high bits are cut off."""
        return (1 << 8 * size_bytes) - 1
