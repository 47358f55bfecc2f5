"""The stops of vcpus that ran at once, and why those that were held were held."""

from __future__ import annotations

import html
from collections.abc import Iterable

from kvmbench.debug.stop import Cause, Stop

_DID = {
    Cause.HALT: "halted",
    Cause.SHUTDOWN: "shut down",
    Cause.GUEST_DEBUG: "took a debug trap of the guest's own",
    Cause.INTERRUPTED: "was interrupted",
    Cause.UNTIL: "came to where it was to run",
    Cause.STEP: "made its last step",
}


def what_happened(stop: Stop) -> str:
    """What a vcpu did that stopped it, for those that are held for it: ``vcpu 1 hit breakpoint 2 at loop``."""
    who = f"vcpu {stop.vcpu}"
    if stop.cause is Cause.DEADLINE:
        return "the deadline passed"
    if stop.breakpoint is not None:
        return f"{who} hit {stop.breakpoint}"
    if stop.cause is Cause.ERROR:
        return f"{who} failed: {stop.error or stop.exit}"
    if stop.cause in _DID:
        return f"{who} {_DID[stop.cause]}"
    return f"{who} stopped for {stop.cause}: {stop.exit}" if stop.exit is not None else f"{who}: {stop.cause}"


class Stops(list[Stop]):
    """A stop for each vcpu that ran, by ascending vcpu.

    Attributes:
        first: the stop that ended the run for all, one of the list; None if nothing in the guest did.
        because: why the others were held, in words.
        held_s: seconds from that stop, as this process saw it, until the last of the others was out of the guest.
    """

    def __init__(self, stops: Iterable[Stop], *, first: Stop | None, because: str, held_s: float) -> None:
        super().__init__(stops)
        self.first = first
        self.because = because
        self.held_s = held_s

    def of(self, vcpu: int) -> Stop | None:
        """The stop of a vcpu, by its index; None if it did not run."""
        return next((stop for stop in self if stop.vcpu == vcpu), None)

    def __repr__(self) -> str:
        return "\n".join(f"vcpu {stop.vcpu}: {stop!r}" for stop in self)

    def _repr_html_(self) -> str:
        rows = (
            f"<tr><td>vcpu {stop.vcpu}{' *' if stop is self.first else ''}</td>"
            f"<td style='text-align:left'>{stop._repr_html_()}</td></tr>"
            for stop in self
        )
        return f"<table>{''.join(rows)}</table><div>* {html.escape(self.because)}</div>"
