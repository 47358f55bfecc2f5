"""The debug console at port 0xe9 that Bochs and QEMU have: every byte written is kept."""

from __future__ import annotations

from kvmbench.machine.device import Device, StopRequest


class DebugConsole(Device):
    """Write-only console; reading its port gives the port's number, which says that it is there.

    Attributes:
        output: everything the guest has written, in bytes.
    """

    name = "debug console"

    def __init__(self, port: int = 0xE9) -> None:
        self.port = port
        self.ports = [range(port, port + 1)]
        self.output = bytearray()

    def reset(self) -> None:
        """Forgets the output."""
        self.output.clear()

    @property
    def text(self) -> str:
        """What the guest has written, as UTF-8; bytes that are none become U+FFFD."""
        return self.output.decode("utf-8", "replace")

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        """Keeps the low byte."""
        self.output.append(value & 0xFF)
        return None

    def port_in(self, port: int, size_bytes: int) -> int:
        """0xe9 on the usual port: how software finds the console."""
        return self.port

    def __repr__(self) -> str:
        return f"DebugConsole({self.port:#x}, {len(self.output)} bytes)"
