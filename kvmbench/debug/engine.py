"""The loop around KB_EXECUTE: serve devices, weigh breakpoints, mind deadlines, make the Stop.

One request runs the guest until something concerns Python.  Most of that is
devices: their exits are served and the guest goes on.  What remains is a
reason to stop, told as a `Stop`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from kvmbench.core import wire
from kvmbench.debug.arming import NOTHING, Plan
from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.device_exits import CLOCK_EVERY, SERVED, DeviceExits
from kvmbench.debug.entry import GuestEntry
from kvmbench.debug.exit_log import ExitLog
from kvmbench.debug.fault import fault_of
from kvmbench.debug.hits import Hits
from kvmbench.debug.idt import entered_vector
from kvmbench.debug.state import STATE_END, STATE_OFFSET, Stopped
from kvmbench.debug.step_rows import exit_name
from kvmbench.debug.stop import Cause, Stop
from kvmbench.errors import BusyError, KvmbenchError, MisuseError
from kvmbench.host.channel import LocalChannel
from kvmbench.kvm.exits import decode_exit
from kvmbench.uapi import constants as c
from kvmbench.uapi import ffi

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

# In this process a Ctrl-C that arrives just before a KVM_RUN is only seen when the call returns, and on every host
# a kick that comes before its request is lost: so a call returns this often. (The core keeps its timer from one call
# to the next, so it costs nothing; elsewhere it is longer, as a piece of a recording must fit into it.)
LOCAL_SLICE_S = 0.25
REMOTE_SLICE_S = 2.0
_IO = int(c.KVM_EXIT_IO)
_buffer = ffi.buffer


def check_deadline(deadline_s: Any) -> None:
    """Raises MisuseError unless it is a positive number of seconds, or None."""
    if deadline_s is not None and not (isinstance(deadline_s, (int, float)) and deadline_s > 0):
        raise MisuseError(f"a deadline is a positive number of seconds, or None for no limit; not {deadline_s!r}")


class Engine:
    """Runs one vcpu for its `Cpu`."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._execution = cpu.execution
        self._reply = cpu.execution.stop
        self._local = isinstance(cpu.machine.host.core.channel, LocalChannel)
        self._written = cpu.machine.written
        self.stop_requested = False
        #: Somebody wants the vcpu out of the guest: to stop it, or for a moment (`Gate`).
        self.attention = False
        #: Inside of `go`, and on which thread.
        self.going = False
        self.runner: int | None = None
        # The last piece ended on a breakpoint that did not stop the guest: off it before it is armed again.
        self._leave = False
        self._exits = DeviceExits(cpu, self)
        self._entry = GuestEntry(cpu, self, self._exits)
        self._hits = Hits(cpu, self._stop)
        self.fill, self.complete_exit = self._entry.fill, self._entry.complete_exit
        self.is_under_way = self._entry.is_under_way
        #: How often `interrupt` was called; for loops of several runs or steps.
        self.interrupts = 0
        self._start_ns = self._total_ns = 0

    @property
    def pending(self) -> bool:
        """Whether an exit waits to be completed."""
        return self._exits.pending

    @property
    def log(self) -> ExitLog | None:
        """Where exits are noted, or None."""
        return self._exits.log

    @log.setter
    def log(self, log: ExitLog | None) -> None:
        self._exits.log = log

    @property
    def core_ns(self) -> int:
        """Time the current or last `go` spent in the core so far, of the core's clock."""
        return self._total_ns - self._start_ns

    def interrupt(self) -> None:
        """Stops the vcpu if it is running; for other threads."""
        # Also while it is not in the guest: a condition may be asked at this moment.
        self.interrupts += 1
        self.stop_requested = True
        self.make_way()

    def make_way(self) -> None:
        """Takes the vcpu out of the guest; it goes in again at once if the `Gate` lets it. For other threads."""
        self.attention = True
        if self._cpu.running:
            self._cpu.machine.host.core.kick(self._cpu.vcpu.handle)

    def go(
        self,
        *,
        stepping: bool,
        limit: int,
        deadline_s: float | None,
        execution: Any = None,
        sink: Callable[[Any], None] | None = None,
    ) -> Stop:
        """Runs or steps until there is a reason to stop.

        Args:
            stepping: single-step, for `limit` steps (0: no limit).
            execution: another pair of buffers, one with room for rows.
            sink: called with the `Execution` after each piece of a recording.
        """
        cpu, me = self._cpu, get_ident()
        if cpu.running:
            raise BusyError(f"vcpu {cpu.index} is running; cpu.interrupt() stops it")
        cpu.running = self.going = True  # no call since the look at it, so no other thread: see `Cpu.step`
        self.runner = me
        try:
            check_deadline(deadline_s)
            cpu.machine.check_open()
            end = None if deadline_s is None else time.monotonic() + deadline_s
            cpu.state.current = before = cpu.state.read()
            # Single steps and recordings have a reply each; the vcpu's time is in the later one.
            self._start_ns = max(self._total_ns, self._reply.total_ns)
            cpu.forget_request()
            self._entry.sink = sink
            self.stop_requested = self.attention = False
            if execution is not None:
                self._use(execution)
            self._reply.cause = 0  # told already: see `interrupted`
            try:
                return self._go(stepping, limit, end, before)
            except KeyboardInterrupt:
                self._written.disarm(cpu)  # it may have come at the beginning of the other
                self.interrupted(served=self._exits.served)
                raise
        finally:
            self._entry.sink = None
            if execution is not None:
                self._use(cpu.execution)
            self.going = cpu.running = False

    def _use(self, execution: Any) -> None:
        self._execution = execution
        self._entry.execution = execution
        self._reply = execution.stop

    def _go(
        self,
        stepping: bool,
        limit: int,
        end: float | None,
        before: Stopped | bytes | None,
    ) -> Stop:
        cpu, breakpoints = self._cpu, self._cpu.breakpoints
        done = 0
        leave = not stepping or bool(self._written)
        used_registers = False
        try:
            while True:
                if leave and self._hits.is_on_one(stepping):  # once more for each that the step leads to
                    # Off the breakpoint before it is armed, or it would be hit without having moved.
                    version = breakpoints.version
                    with self._written.lifted(cpu, cpu.mode.linear(cpu.regs.rip)):
                        plan = breakpoints.plan(stepping=True)
                        stop, stepped = self._piece(plan, True, 1, end, before, version)
                    done += stepped
                    if stop is None and not self._leave:  # a byte was written here meanwhile
                        continue
                    if stop is not None and stop.cause is not Cause.STEP:
                        return stop
                    if limit and done >= limit:
                        return self._retell(Cause.STEP, done)
                else:
                    plan = breakpoints.plan(stepping=stepping)
                    used_registers |= bool(plan.registers)
                    self._written.arm(cpu, plan.written)
                    left = limit - done if limit else 0
                    step = stepping or plan.must_step
                    stop, stepped = self._piece(plan, step, left, end, before, plan.version, run=not stepping)
                    done += stepped
                    if stop is not None:
                        if stepping and done != stepped:  # in several pieces
                            cpu.last_stop = stop = stop.replace(steps=done)
                        return stop
                    # While stepping, a byte may have come to stand here meanwhile.
                    leave = self._leave or bool(stepping and self._written)
                    if not self._leave:  # to be planned anew
                        continue
                ended = self._ended(end, done)
                if ended is not None:
                    return ended
        finally:
            self._written.disarm(cpu)
            if used_registers:
                with contextlib.suppress(KvmbenchError):
                    breakpoints.look_for_conflicts()

    def _ended(self, end: float | None, done: int) -> Stop | None:
        """Where conditions are false again and again, `interrupt` and the deadline are seen between two pieces."""
        if self.stop_requested:
            return self._retell(Cause.INTERRUPTED, done)
        if end is not None and time.monotonic() >= end:
            return self._retell(Cause.DEADLINE, done)
        return None

    def _retell(self, cause: Cause, done: int) -> Stop:
        """The stop at which a condition was false, told as another; what the condition wrote stays."""
        cpu = self._cpu
        assert cpu.last_stop is not None
        cpu.last_stop = stop = cpu.last_stop.replace(cause=cause, breakpoint=None, steps=done)
        return stop

    def _piece(
        self,
        plan: Plan,
        stepping: bool,
        limit: int,
        end: float | None,
        before: Stopped | bytes | None,
        planned: tuple[int, int],
        run: bool = False,
    ) -> tuple[Stop | None, int]:
        """Runs with one plan; (None, steps) when a breakpoint let the guest go on (`_leave`) or the plan is old."""
        cpu, reply, local = self._cpu, self._reply, self._local
        mode = wire.KB_STEP if stepping else wire.KB_RUN
        flags = 0
        if self._entry.sink is not None:
            flags = wire.KB_RECORD if local else wire.KB_RECORD | wire.KB_PACK
        exits = self._exits
        done = count = 0
        if exits.pending and not exits.served:
            exits.serve()
        cpu.state.current = None
        cpu.stop_serial += 1
        refill = True
        catches = cpu.catches
        self._leave = False
        while True:
            if refill:
                seconds = None if end is None else max(end - time.monotonic(), 1e-6)
                slice_s = LOCAL_SLICE_S if local else REMOTE_SLICE_S
                seconds = slice_s if seconds is None else min(seconds, slice_s)
                # Freely running, it comes out at what was written meanwhile; stepping, it would run it.
                # Nothing of the request changes until something else than a plain exit comes.
                refill = bool(exits.answer) or stepping or bool(plan.payload)
                if not self._entry.send(
                    mode, limit - done if limit else 0, seconds, plan, flags, planned if stepping else None, run=run
                ):
                    return None, done
            else:
                sent, wanted = self._entry.again()
                if not sent:
                    refill = True
                    continue
                if wanted is not None:
                    stop = self._wanted(wanted, before, done)
                    return stop, done
            cause = reply.cause
            if cause == wire.KB_CAUSE_EXIT:
                reason = reply.exit_reason
                if reason in SERVED:
                    exits.pending = True
                    exits.holder = self._execution
                    done += reply.steps
                    self._entry.take_rows()
                    if len(catches) and catches.match(reply) is not None:
                        return self._stop(Cause.CATCH, before, done, exit=self._decode()), done
                    wanted = None if exits.served else exits.serve()
                    if exits.answer:
                        refill = True
                    count += 1
                    if wanted is not None:
                        if isinstance(wanted, list):
                            done += self._entry.finish_access(stepping, flags)
                        stop = self._wanted(wanted, before, done)
                        if stop is not None:
                            return stop, done
                        if limit and done >= limit:
                            return self._retell(Cause.STEP, done), done
                        refill = True
                    if self.stop_requested:
                        return self._stop(Cause.INTERRUPTED, before, done), done
                    if (local or count % CLOCK_EVERY == 0) and end is not None and time.monotonic() >= end:
                        return self._stop(Cause.DEADLINE, before, done), done
                    continue
                exits.pending = False
                done += reply.steps
                self._entry.take_rows()
                return self._other_exit(before, done), done
            exits.pending = False
            refill = True
            done += reply.steps
            self._entry.take_rows()
            if cause == wire.KB_CAUSE_STEPS:
                if limit and done >= limit:
                    return self._stop(Cause.STEP, before, done), done
            elif cause in (wire.KB_CAUSE_DEBUG, wire.KB_CAUSE_STOP, wire.KB_CAUSE_WATCH):
                found = self._hits.of_reply(reply, plan, before, done)
                if found is not None:
                    return found, done
                if limit and done >= limit:
                    return self._retell(Cause.STEP, done), done
                if not stepping or self._written:
                    self._leave = True
                    return None, done
                ended = self._ended(end, done)
                if ended is not None:
                    return ended, done
            elif cause == wire.KB_CAUSE_DEADLINE:
                if end is not None and time.monotonic() >= end:
                    return self._stop(Cause.DEADLINE, before, done), done
            elif cause == wire.KB_CAUSE_ERROR:
                return self._stop(Cause.ERROR, before, done, error=_run_error(reply.error)), done
            elif cause == wire.KB_CAUSE_HLT:
                return self._stop(Cause.HALT, before, done), done
            # KB_CAUSE_KICK without a request: the kick came late, for a run that is over.
            # KB_CAUSE_SIGNAL: Python has run its handlers by now, and they raised nothing.
            if self.stop_requested:
                return self._stop(Cause.INTERRUPTED, before, done), done
            if self._written:
                self._written.renew(cpu)
            if planned != cpu.breakpoints.version:
                return None, done

    def _wanted(self, wanted: Any, before: Stopped | bytes | None, done: int) -> Stop | None:
        """A device asked for a stop, or a watchpoint was hit."""
        if isinstance(wanted, list):
            return self._hits.first([(one, Cause.WATCHPOINT) for one in wanted], before, done)
        return self._stop(Cause.GUEST_EXIT, before, done, exit=wanted)

    def _decode(self) -> Any:
        return decode_exit(bytes(_buffer(self._reply.run)), self._execution.io_data())

    def _other_exit(self, before: Stopped | bytes | None, done: int) -> Stop:
        """An exit that no device can answer."""
        # Closed by another thread, the guest loses its memory a moment before its vcpu, and would seem to have died.
        self._cpu.machine.check_open()
        exit = self._decode()
        reason = self._reply.exit_reason
        if self.log is not None:
            self.log.add(exit_name(reason), None, 0, None, self._exits.rip(self._reply))
        cause = {
            c.KVM_EXIT_HLT: Cause.HALT,
            c.KVM_EXIT_SHUTDOWN: Cause.SHUTDOWN,
            c.KVM_EXIT_FAIL_ENTRY: Cause.ERROR,
            c.KVM_EXIT_INTERNAL_ERROR: Cause.ERROR,
        }.get(reason, Cause.EXIT)
        return self._stop(cause, before, done, exit=exit)

    def _stop(
        self,
        cause: Cause,
        before: Stopped | bytes | None,
        steps: int,
        *,
        exit: Any = None,
        breakpoint: Breakpoint | None = None,
        error: str = "",
    ) -> Stop:
        """The stop, from the reply at hand; also makes its state the current one."""
        cpu, reply = self._cpu, self._reply
        self._exits.deliver_coalesced()  # devices know all that the guest did; it stops anyway
        self._total_ns = int(reply.total_ns)
        if reply.valid & wire.KB_VALID_SREGS:
            after = Stopped(_buffer(reply)[STATE_OFFSET:STATE_END])
        else:  # after an I/O exit, where the state would cost two ioctls each time
            after = Stopped.pack(cpu.vcpu.get_regs(), cpu.vcpu.get_sregs())
        cpu.state.previous = before
        cpu.state.current = after
        vector = entered_vector(cpu, after, reply)
        history = self._execution.history()
        stop = Stop(
            cause,
            after.rip,
            exit,
            steps,
            self.core_ns,
            dr6=reply.debug_dr6 if reply.exit_reason == c.KVM_EXIT_DEBUG else None,
            entered_vector=vector,
            tainted="RFLAGS with our TF are in guest memory" if reply.tainted & wire.KB_TAINT_PUSHF else "",
            breakpoint=breakpoint,
            vcpu=cpu.index,
            error=error,
            fault=None if history is None else fault_of(history, cpu.symbols),
            state=after,
            before=before,
            context=cpu,
            serial=cpu.stop_serial,
        )
        cpu.last_stop = stop
        return stop

    def resume_step(self, before: Stopped | bytes | None, deadline_s: float | None) -> Stop:
        """Goes on after the quick path of `Cpu.step` met something else than a plain step."""
        reply = self._reply
        self._start_ns = reply.total_ns - reply.elapsed_ns
        if reply.cause == wire.KB_CAUSE_STEPS:
            return self._stop(Cause.STEP, before, 1)
        if reply.cause == wire.KB_CAUSE_EXIT and reply.exit_reason in SERVED:
            exits = self._exits
            exits.pending, exits.served, exits.seen = True, False, []
            exits.holder = self._execution
            catches = self._cpu.catches
            if len(catches) and catches.match(reply) is not None:
                return self._stop(Cause.CATCH, before, 0, exit=self._decode())
            wanted = self._exits.serve()
            if wanted is not None:
                steps = self._entry.finish_access(True, 0) if isinstance(wanted, list) else 0
                stop = self._wanted(wanted, before, steps)
                if stop is not None:
                    return stop
        elif reply.cause == wire.KB_CAUSE_EXIT:
            return self._other_exit(before, 0)
        elif reply.cause == wire.KB_CAUSE_STOP:
            return self._hits.of_reply(reply, NOTHING, before, 1) or self._retell(Cause.STEP, 1)
        elif reply.cause == wire.KB_CAUSE_DEADLINE:
            return self._stop(Cause.DEADLINE, before, 0)
        elif reply.cause == wire.KB_CAUSE_KICK and self.stop_requested:
            return self._stop(Cause.INTERRUPTED, before, int(reply.steps))
        elif reply.cause == wire.KB_CAUSE_HLT:
            return self._stop(Cause.HALT, before, 1)
        elif reply.cause == wire.KB_CAUSE_ERROR:
            return self._stop(Cause.ERROR, before, 0, error=_run_error(reply.error))
        elif reply.cause == wire.KB_CAUSE_DEBUG:
            return self._stop(Cause.GUEST_DEBUG, before, reply.steps)
        self._cpu.running = False  # `go` marks it anew
        stop = self.go(stepping=True, limit=1, deadline_s=deadline_s)
        # `go` knows nothing of the state before the exit.
        self._cpu.state.previous = before
        return stop.replace(before=before)

    def step_until(self, condition: Callable[[Cpu], Any], *, deadline_s: float | None) -> Stop:
        """Single-steps until the condition holds or something else stops the guest."""
        cpu = self._cpu
        end = None if deadline_s is None else time.monotonic() + deadline_s
        interrupts = self.interrupts
        steps = 0
        while True:
            stop = cpu.step()
            steps += 1
            if stop.cause is not Cause.STEP:
                return stop
            if condition(cpu):
                cause = Cause.UNTIL
            elif self.interrupts != interrupts:
                cause = Cause.INTERRUPTED
            elif end is not None and time.monotonic() >= end:
                cause = Cause.DEADLINE
            else:
                continue
            cpu.last_stop = found = stop.replace(cause=cause, steps=steps)
            return found

    def leave_exit(self, execution: Any) -> None:
        """After a KeyboardInterrupt: the exit in a reply that nobody looked at waits for its device, if it has one."""
        exits, reply = self._exits, execution.stop
        if reply.cause == wire.KB_CAUSE_EXIT and reply.exit_reason in SERVED:
            exits.pending, exits.served, exits.seen, exits.holder = True, False, [], execution

    def interrupted(self, *, served: bool = False) -> None:
        """After a KeyboardInterrupt: what is known now, so that nothing is lost or done twice.

        Args:
            served: whether a device has seen the exit in the reply.
        """
        cpu, reply = self._cpu, self._reply
        cpu.forget_request()
        if reply.cause == wire.KB_CAUSE_STEPS and not reply.plain and not reply.tainted:
            reply.cause = 0  # the reply of the step before: `Cpu.step` had not called yet
        if reply.exit_reason == _IO and reply.io_count == 1 and not reply.quick:
            reply.cause = 0  # the exit before, served: `_serve_quickly` had not called yet
        if reply.cause == wire.KB_CAUSE_EXIT and reply.exit_reason in SERVED:
            if not self._exits.pending:
                self._exits.pending, self._exits.served, self._exits.seen = True, served, []
                self._exits.holder = self._execution
        elif reply.cause:
            self._exits.pending = False
        if reply.cause and reply.header.status == 0:
            self._entry.take_rows()
            self._stop(Cause.INTERRUPTED, cpu.state.previous, reply.steps)
        else:
            cpu.state.current = None


def _run_error(errno: int) -> str:
    return f"KVM_RUN failed: {os.strerror(errno)} (errno {errno})"
