"""A port that ends the run with a code, as QEMU's isa-debug-exit ends QEMU."""

from __future__ import annotations

from kvmbench.machine.device import Device, StopRequest


class DebugExit(Device):
    """Stops the run when the guest writes to it; the code is ``value << 1 | 1``, never 0.

    Attributes:
        code: of the last write, or None.
    """

    name = "debug exit"

    def __init__(self, port: int = 0xF4) -> None:
        self.ports = [range(port, port + 4)]
        self.code: int | None = None

    def reset(self) -> None:
        """Forgets the code."""
        self.code = None

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        """Asks for the stop."""
        self.code = value << 1 | 1
        return StopRequest("debug-exit", self.code)

    def port_in(self, port: int, size_bytes: int) -> int:
        """0, as in QEMU."""
        return 0

    def __repr__(self) -> str:
        return f"DebugExit({self.ports[0].start:#x}, code {self.code})"
