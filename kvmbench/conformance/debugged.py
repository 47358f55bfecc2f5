"""A machine as its user debugs it, with its stops told in a few words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmbench.conformance.prepared import Prepared, place
from kvmbench.debug.machine import Machine
from kvmbench.debug.stop import Cause, Stop
from kvmbench.uapi.vectors import vector_name

DEADLINE_S = 2.0


class Debugged(Prepared[Machine]):
    """A `kvmbench.Machine` with one program, told with its labels. Takes what `Prepared` takes."""

    def __init__(self, host: Any, source: str, *, handlers: dict[int, str] | None = None, **options: Any) -> None:
        super().__init__(Machine, host, source, handlers, options)
        self.cpu = self.machine.cpu
        if handlers:  # the table was loaded behind the back of `cpu`
            self.cpu.state.current = None

    def tell(self, stop: Stop) -> str:
        """``step at loop``, ``step at handler, entered 6 (#UD)``, ``breakpoint at f``, ``shutdown``."""
        cause = str(stop.cause)
        if stop.cause is Cause.SHUTDOWN:
            return cause  # where, differs: kvm_amd has reset the vcpu
        mode = stop.mode
        told = f"{cause} at {place(self.program, stop.rip if mode is None else mode.linear(stop.rip))}"
        if stop.entered_vector is not None:
            told += f", entered {vector_name(stop.entered_vector)}"
        if stop.tainted:
            told += ", tainted"
        return told

    def step(self) -> str:
        """One step."""
        return self.tell(self.cpu.step(deadline_s=DEADLINE_S))

    def steps(self, count: int) -> Iterator[str]:
        """So many, one call each; ends after one that is no step."""
        for _ in range(count):
            told = self.step()
            yield told
            if not told.startswith("step"):
                return

    def run(self) -> str:
        """Runs to the next stop."""
        return self.tell(self.cpu.run(deadline_s=DEADLINE_S))

    def runs(self, most: int) -> Iterator[str]:
        """Runs on until the guest halts or dies, at most so often."""
        for _ in range(most):
            told = self.run()
            yield told
            if not told.startswith(("breakpoint", "watchpoint")):
                return
