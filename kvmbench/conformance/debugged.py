"""A machine as its user debugs it, with its stops told in a few words."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from kvmbench.conformance.bare import place, write_idt
from kvmbench.conformance.point import CannotTry
from kvmbench.debug.machine import Machine
from kvmbench.debug.stop import Cause, Stop
from kvmbench.debug.vectors import vector_name
from kvmbench.errors import UnsupportedError

DEADLINE_S = 2.0


class Debugged:
    """A `kvmbench.Machine` with one program; what happens to it is told with the program's labels.

    A context manager.

    Args:
        host: where it runs.
        source: assembly source.
        handlers: vector to label, for an IDT.
        options: those of `kvmbench.Machine`.

    Raises:
        CannotTry: KVM does not run that mode there.
    """

    def __init__(self, host: Any, source: str, *, handlers: dict[int, str] | None = None, **options: Any) -> None:
        try:
            self.machine = Machine(host, memory=options.pop("memory", "1M"), **options)
        except UnsupportedError as error:
            raise CannotTry(str(error)) from error
        try:
            self.program = self.machine.load_asm(source)
            if handlers:
                write_idt(self.machine, {vector: self.at(label) for vector, label in handlers.items()})
                # The table was loaded behind the back of `cpu`.
                self.machine.cpu.state.current = None
        except BaseException:
            self.machine.close()
            raise
        self.cpu = self.machine.cpu

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.machine.close()

    def at(self, label: str) -> int:
        """Address of a label."""
        return self.program.symbols[label]

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
