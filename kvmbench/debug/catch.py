"""Exit kinds at which `run()` stops before a device sees them."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvmbench.arguments import instead, integer, spelled_out
from kvmbench.errors import MisuseError
from kvmbench.uapi import ExitReason


@dataclasses.dataclass(eq=False)
class Catch:
    """One exit kind to stop at.

    Attributes:
        reason: the KVM_EXIT_* reason.
        port: for IO, only this port; None: any.
        hits: how often it stopped the guest.
    """

    reason: ExitReason
    port: int | None = None
    hits: int = 0

    def __repr__(self) -> str:
        port = f" port {self.port:#x}" if self.port is not None else ""
        return f"<catch {self.reason.name}{port}; {self.hits} hits>"


class Catches:
    """``cpu.catches``: ``add("io", port=0x3f8)``, ``add("mmio")``, ``clear()``."""

    def __init__(self) -> None:
        self._all: list[Catch] = []

    @spelled_out
    def add(self, kind: str | ExitReason, *, port: int | None = None) -> Catch:
        """Stops at exits of one kind, named as in KVM_EXIT_*: "io", "mmio", "hlt", "hypercall", ...

        Args:
            port: for "io", stop only at this port.

        Raises:
            MisuseError: no such exit kind, or a port with another kind than "io".
        """
        try:
            reason = ExitReason[kind.upper()] if isinstance(kind, str) else ExitReason(kind)
        except (KeyError, ValueError):
            names = [one.name.lower() for one in ExitReason]
            raise MisuseError(f"no exit kind {kind!r}; {instead(kind, names)}") from None  # type: ignore[arg-type]
        if port is not None and reason is not ExitReason.IO:
            raise MisuseError(f"a port goes with 'io', not with {reason.name.lower()!r}")
        if port is not None:
            port = integer(port, "port", 0, 0xFFFF)
        catch = Catch(reason, port)
        self._all.append(catch)
        return catch

    def clear(self) -> None:
        """Forgets all of them."""
        self._all.clear()

    def __len__(self) -> int:
        return len(self._all)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._all)) or "nothing is caught"

    def match(self, reply: Any) -> Catch | None:
        """The first that an exit (``struct kb_stop``) meets, counted; None for the usual case."""
        for one in self._all:
            if one.reason == reply.exit_reason and (one.port is None or one.port == reply.io_port):
                one.hits += 1
                return one
        return None
