"""Entering the guest: KB_EXECUTE filled in, sent through the `Gate`, and its reply cleaned of our bytes."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from kvmbench.core import wire
from kvmbench.debug.arming import NOTHING, Plan
from kvmbench.debug.device_exits import SERVED, DeviceExits
from kvmbench.errors import BusyError, MisuseError
from kvmbench.host.channel import LocalChannel

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu
    from kvmbench.debug.engine import Engine

# A deadline this far away (32 years, or infinity) is none; its nanoseconds need not fit 64 bits.
_NEVER_S = 1e9


class GuestEntry:
    """Sends the requests of one vcpu.

    Attributes:
        execution: the pair of buffers at hand; a recording has one with room for rows.
        sink: takes the rows of a recording, or None.
    """

    def __init__(self, cpu: Cpu, engine: Engine, exits: DeviceExits) -> None:
        self._cpu = cpu
        self._engine = engine
        self._exits = exits
        self._written = cpu.machine.written
        # Which of its changes the request at hand knows.
        self._version = 0
        self._gate = cpu.machine.gate if len(cpu.machine.vcpus) > 1 else None
        self._local = isinstance(cpu.machine.host.core.channel, LocalChannel)
        self._filled: tuple[Any, ...] | None = None
        self.execution = cpu.execution
        self.sink: Callable[[Any], None] | None = None
        # Whether `sink` has those of the last reply.
        self._rows_taken = True

    def fill(
        self, *, mode: int, steps: int, deadline_s: float | None, control: int, debugreg: Any = None, flags: int = 0
    ) -> None:
        """Fills in the request; what has not changed since the last time is left alone."""
        request = self.execution.request
        if self.execution.attached:
            self.execution.attach(b"")
        request.mode = mode
        request.steps = steps
        never = deadline_s is None or deadline_s >= _NEVER_S
        request.deadline_ns = 0 if never else max(1, int(deadline_s * 1e9))  # type: ignore[operator]
        request.flags = flags
        request.debug_control = control
        if debugreg is not None or self._filled is not None:
            self._filled = ()  # a Ctrl-C may come in between
            for n, value in enumerate(debugreg or (0,) * 8):
                request.debugreg[n] = value
            self._filled = debugreg
        request.io_bytes = request.n_stops = request.n_watches = 0

    def send(
        self,
        mode: int,
        steps: int,
        seconds: float | None,
        plan: Plan,
        flags: int,
        planned: tuple[int, int] | None = None,
        *,
        run: bool = False,
    ) -> bool:
        """Runs or steps with a plan.

        Args:
            planned: which `Breakpoints.version` it must still be.
            run: the steps are a run: interrupts come, and no handler is a part of a step.

        Returns:
            False, and nothing was sent, if it is another by now.
        """
        execution, exits = self.execution, self._exits
        sent, answered = False, (exits.served, exits.seen)
        try:
            try:
                self._enter()
                if planned is not None and planned != self._cpu.breakpoints.version:
                    return False
                self._version = self._written.version
                control = plan.control | self._written.control
                if mode == wire.KB_STEP and run:
                    flags |= wire.KB_HANDLERS
                elif mode == wire.KB_STEP:
                    control |= self._cpu.step_control
                    flags |= self._cpu.step_flags
                self.fill(
                    mode=mode,
                    steps=steps,
                    deadline_s=seconds,
                    control=control,
                    debugreg=plan.debugreg or None,
                    flags=flags,
                )
                request = execution.request
                request.io_bytes = len(exits.answer)
                request.n_stops = len(plan.stops)
                request.n_watches = len(plan.watches)
                payload = exits.answer + plan.payload
                execution.stop.cause = 0
                exits.served, exits.seen = False, []
                self._rows_taken = False
                sent = True
                execution.send_payload(payload)
                exits.answer = b""
                return True
            finally:
                self._out(sent)
        except KeyboardInterrupt:
            self._cut_short(sent, answered)
            raise

    def again(self) -> tuple[bool, Any]:
        """Sends the request as it is; (False, None) if it is not right any more, else what a device wants stopped."""
        execution, exits = self.execution, self._exits
        sent, answered = False, (exits.served, exits.seen)
        try:
            try:
                self._enter()
                if self._version != self._written.version:
                    return False, None
                sent = True
                if self._local and not len(self._cpu.catches) and self._cpu.machine.coalesced is None:
                    # The common exit, an OUT to one port, kept short: see benchmarks/exit_roundtrip.py.
                    exits.seen = []
                    return True, exits.serve_quickly(execution)
                execution.stop.cause = 0
                exits.served, exits.seen = False, []
                execution.send()
                return True, None
            finally:
                self._out(sent)
        except KeyboardInterrupt:
            self._cut_short(sent, answered)
            raise

    def _cut_short(self, sent: bool, answered: tuple[bool, list[Any]]) -> None:
        # A Ctrl-C. It may have come before the core was called, or behind its reply, which nobody has looked at then.
        if sent and self.execution.stop.cause:
            self._exits.answer = b""
        elif sent:
            self._exits.served, self._exits.seen = answered
        self._out(sent)  # once more: it may have come at its beginning

    def _enter(self) -> None:
        if self._gate is not None:
            self._gate.enter(self._cpu)
            self._engine.attention = self._engine.stop_requested

    def _out(self, sent: bool) -> None:
        # However it ended. Before the others may change the bytes again: see `WrittenBytes.claim`.
        try:
            if sent and self._written:
                self._written.claim(self._cpu, self.execution.stop)
        finally:
            if self._gate is not None:
                self._gate.leave(self._cpu)

    def take_rows(self) -> None:
        """Hands on the rows of the last reply, once."""
        # Marked first: a Ctrl-C in the middle may cost the end of a recording, never double a part of it.
        if self.sink is not None and not self._rows_taken:
            self._rows_taken = True
            self.sink(self.execution)

    def is_under_way(self) -> bool:
        """Whether this is asked inside of `Engine.go`, by a device or a condition.

        Raises:
            BusyError: another thread runs the vcpu, though it may be out of the guest at the moment.
        """
        if self._engine.going and self._engine.runner != get_ident():
            raise BusyError(f"vcpu {self._cpu.index} is running; cpu.interrupt() stops it")
        return self._engine.going

    def complete_exit(self, *, discard: bool = False) -> None:
        """Completes a pending I/O exit, so that registers can be written.

        KVM keeps the unfinished instruction and would apply its result to whatever
        registers it finds when it runs next.

        Args:
            discard: no device is asked: the guest that made the exit is to be started anew.

        Raises:
            BusyError: as `is_under_way`.
            MisuseError: a device is being asked; it would be asked again.
        """
        exits = self._exits
        self.is_under_way()
        if self._cpu.running and exits.pending and not exits.served:
            raise MisuseError(
                f"a device answers an exit of vcpu {self._cpu.index}; its registers can be written when it has: "
                "let the device return a StopRequest"
            )
        while exits.pending:
            if discard:
                exits.answer = b""
            elif not exits.served:
                exits.serve()
            self.send(wire.KB_RUN, 0, 1.0, NOTHING, wire.KB_COMPLETE)
            self._cpu.state.current = None
            self._complete_sent()

    def _complete_sent(self) -> None:
        # An access that crosses a boundary goes on with another exit (test_both_halves_of_an_access_...).
        exits, reply = self._exits, self.execution.stop
        exits.pending = reply.cause == wire.KB_CAUSE_EXIT and reply.exit_reason in SERVED
        exits.holder = self.execution

    def finish_access(self, stepping: bool, flags: int) -> int:
        """Ends the instruction whose access hit a watchpoint, as a watchpoint reports after it; steps made."""
        steps = 0
        while True:
            if stepping:
                self.send(wire.KB_STEP, 1, 1.0, NOTHING, flags)
            else:
                self.send(wire.KB_RUN, 0, 1.0, NOTHING, wire.KB_COMPLETE)
            steps += int(self.execution.stop.steps)
            self.take_rows()
            self._complete_sent()
            if not self._exits.pending:
                return steps
            self._exits.serve()
