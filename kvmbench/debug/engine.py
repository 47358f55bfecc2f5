"""The loop around KB_EXECUTE: serve devices, weigh breakpoints, mind deadlines, make the Stop.

One request runs the guest until something concerns Python.  Most of that is
devices: their exits are served and the guest goes on.  What remains is a
reason to stop, told as a `Stop`.

Longer than a file should be: an exit that is pending, whether its device has seen
it and the answer on its way are one state, touched by every path through the loop
(a run, a step, a recording, a Ctrl-C, a register write, a reset), and each bug
found here so far was two of these paths that did not know of each other.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import TYPE_CHECKING, Any

from kvmbench.core import wire
from kvmbench.core._wire import ffi as wire_ffi
from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.breakpoints import Plan
from kvmbench.debug.exit_log import ExitLog
from kvmbench.debug.idt import entered_vector
from kvmbench.debug.state import STATE_END, STATE_OFFSET, Stopped
from kvmbench.debug.stop import Cause, Stop
from kvmbench.errors import BusyError, KvmbenchError, MisuseError
from kvmbench.host.channel import LocalChannel
from kvmbench.kvm.exits import decode_exit
from kvmbench.uapi import constants as c
from kvmbench.uapi import ffi
from kvmbench.uapi.exit_reasons import ExitReason

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

# In this process a Ctrl-C that arrives just before a KVM_RUN is only seen when the call returns, and on every host
# a kick that comes before its request is lost: so a call returns this often. (The core keeps its timer from one call
# to the next, so it costs nothing; elsewhere it is longer, as a piece of a recording must fit into it.)
LOCAL_SLICE_S = 0.25
REMOTE_SLICE_S = 2.0
# How many exits may pass before the clock is looked at.
_CLOCK_EVERY = 256
_INT3 = b"\xcc"
# A deadline this far away (32 years, or infinity) is none; its nanoseconds need not fit 64 bits.
_NEVER_S = 1e9
NOTHING = Plan(0, (), (), (), (), (), b"")

# struct kb_stop's quick, for one OUT: bits 31 and 30.
_QUICK_OUT = 3 << 30
_QUICK, _VALUE = (
    slice(offset := wire_ffi.offsetof("struct kb_stop", name), offset + size_bytes)
    for name, size_bytes in (("quick", 4), ("value", 8))
)

_RIP_AT = wire_ffi.offsetof("struct kb_stop", "regs") + ffi.offsetof("struct kvm_regs", "rip")
_U64 = struct.Struct("<Q")

_IO = int(c.KVM_EXIT_IO)
_MMIO = int(c.KVM_EXIT_MMIO)
_SERVED = frozenset({_IO, _MMIO})


def check_deadline(deadline_s: Any) -> None:
    """Raises MisuseError unless it is a positive number of seconds, or None."""
    if deadline_s is not None and not (isinstance(deadline_s, (int, float)) and deadline_s > 0):
        raise MisuseError(f"a deadline is a positive number of seconds, or None for no limit; not {deadline_s!r}")


class Engine:
    """Runs one vcpu for its `Cpu`."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._execution = cpu.execution
        self._request = cpu.execution.request
        self._reply = cpu.execution.stop
        self._bus = cpu.machine.bus
        self._memory = cpu.machine.memory
        self._local = isinstance(cpu.machine.host.core.channel, LocalChannel)
        self._filled: tuple[Any, ...] | None = None
        self._stop_requested = False
        # An I/O exit that KVM waits to have completed, and whether a device has seen it yet.
        self.pending = False
        self._served = True
        # Whose reply holds that exit: a recording has a reply of its own, and the exit may outlive it.
        self._exit = cpu.execution
        self._answer = b""
        #: How often `interrupt` was called; for loops of several runs or steps.
        self.interrupts = 0
        self._start_ns = self._total_ns = 0
        #: Where exits are noted, or None.
        self.log: ExitLog | None = None
        # Takes the rows of a recording, and whether it has those of the last reply.
        self._sink: Callable[[Any], None] | None = None
        self._rows_taken = True

    @property
    def core_ns(self) -> int:
        """Time the current or last `go` spent in the core so far, of the core's clock."""
        return self._total_ns - self._start_ns

    def interrupt(self) -> None:
        """Stops the vcpu if it is running; for other threads."""
        # Also while it is not in the guest: a condition may be asked at this moment.
        self.interrupts += 1
        self._stop_requested = True
        if self._cpu.running:
            self._cpu.machine.host.core.kick(self._cpu.vcpu.handle)

    def fill(
        self, *, mode: int, steps: int, deadline_s: float | None, control: int, debugreg: Any = None, flags: int = 0
    ) -> None:
        """Fills in the request; what has not changed since the last time is left alone."""
        request = self._request
        request.mode = mode
        request.steps = steps
        never = deadline_s is None or deadline_s >= _NEVER_S
        request.deadline_ns = 0 if never else max(1, int(deadline_s * 1e9))  # type: ignore[operator]
        request.flags = flags
        request.debug_control = control
        if debugreg is not None or self._filled is not None:
            for n, value in enumerate(debugreg or (0,) * 8):
                request.debugreg[n] = value
            self._filled = debugreg
        request.io_bytes = request.n_stops = request.n_watches = 0

    def complete_exit(self, *, discard: bool = False) -> None:
        """Completes a pending I/O exit, so that registers can be written.

        KVM keeps the unfinished instruction and would apply its result to whatever
        registers it finds when it runs next.

        Args:
            discard: no device is asked: the guest that made the exit is to be started anew.
        """
        while self.pending:
            if discard:
                self._answer = b""
            elif not self._served:
                self._serve()
            self._send(wire.KB_RUN, 0, 1.0, NOTHING, wire.KB_COMPLETE)
            self._cpu.state.current = None
            self._complete_sent()

    def _complete_sent(self) -> None:
        # An access that crosses a boundary goes on with another exit (test_both_halves_of_an_access_...).
        self._answer = b""
        self.pending = self._reply.cause == wire.KB_CAUSE_EXIT and self._reply.exit_reason in _SERVED
        self._exit = self._execution

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
        cpu = self._cpu
        if cpu.running:
            raise BusyError(f"vcpu {cpu.index} is running; cpu.interrupt() stops it")
        cpu.running = True  # no call since the look at it, so no other thread: see `Cpu.step`
        try:
            check_deadline(deadline_s)
            cpu.machine.check_open()
            end = None if deadline_s is None else time.monotonic() + deadline_s
            before = cpu.state.read()
            # Single steps and recordings have a reply each; the vcpu's time is in the later one.
            self._start_ns = max(self._total_ns, self._reply.total_ns)
            cpu.forget_request()
            self._sink = sink
            self._stop_requested = False
            if execution is not None:
                self._use(execution)
            try:
                return self._go(stepping, limit, end, before)
            except KeyboardInterrupt:
                self.interrupted(served=self._served)
                raise
        finally:
            cpu.running = False
            self._sink = None
            if execution is not None:
                self._use(cpu.execution)

    def _use(self, execution: Any) -> None:
        self._execution = execution
        self._request = execution.request
        self._reply = execution.stop

    def _go(
        self,
        stepping: bool,
        limit: int,
        end: float | None,
        before: Stopped | bytes | None,
    ) -> Stop:
        done = 0
        first = not stepping
        while True:
            if first and self._on_breakpoint():  # once more for each that the step leads to
                # Off the breakpoint before it is armed, or it would be hit without having moved.
                plan = self._cpu.breakpoints.plan(stepping=True)
                stop, stepped = self._piece(plan, True, 1, end, before)
                done += stepped
                if stop is not None and stop.cause is not Cause.STEP:
                    return stop
                ended = self._ended(end, done)
                if ended is not None:
                    return ended
                continue
            plan = self._cpu.breakpoints.plan(stepping=stepping)
            with self._int3(plan.int3):
                stop, stepped = self._piece(plan, stepping or plan.must_step, limit - done if limit else 0, end, before)
            done += stepped
            if stop is not None:
                return stop
            # A condition was false: off this breakpoint and on.
            first = not (stepping or plan.must_step)
            ended = self._ended(end, done)
            if ended is not None:
                return ended

    def _ended(self, end: float | None, done: int) -> Stop | None:
        """Where conditions are false again and again, `interrupt` and the deadline are seen between two pieces."""
        if self._stop_requested:
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

    def _on_breakpoint(self) -> bool:
        cpu = self._cpu
        if not any(one.kind == "x" and one.enabled for one in cpu.breakpoints):
            return False
        return cpu.breakpoints.at(cpu.mode.linear(cpu.regs.rip)) is not None

    @contextlib.contextmanager
    def _int3(self, breakpoints: tuple[Breakpoint, ...]) -> Iterator[None]:
        """INT3 bytes in guest memory while the guest runs; never while anybody else looks."""
        saved: list[tuple[int, bytes]] = []
        try:
            for one in breakpoints:
                assert one.gpa is not None
                saved.append((one.gpa, self._memory.read(one.gpa, 1)))
                self._memory.write(one.gpa, _INT3)
            yield
        finally:
            for gpa, byte in reversed(saved):
                # A byte that is no INT3 any more was overwritten by the guest: leave it.
                if self._memory.read(gpa, 1) == _INT3:
                    self._memory.write(gpa, byte)

    def _send(self, mode: int, steps: int, seconds: float | None, plan: Plan, flags: int) -> None:
        request = self._request
        control = plan.control
        if mode == wire.KB_STEP:
            control |= self._cpu.step_control
        self.fill(
            mode=mode, steps=steps, deadline_s=seconds, control=control, debugreg=plan.debugreg or None, flags=flags
        )
        request.io_bytes = len(self._answer)
        request.n_stops = len(plan.stops)
        request.n_watches = len(plan.watches)
        payload = self._answer + plan.payload
        self._reply.cause = 0
        self._served = False
        self._rows_taken = False
        self._execution.send_payload(payload)

    def _piece(
        self,
        plan: Plan,
        stepping: bool,
        limit: int,
        end: float | None,
        before: Stopped | bytes | None,
    ) -> tuple[Stop | None, int]:
        """Runs with one plan; (None, steps) when only a breakpoint's false condition stopped it."""
        cpu, reply, local = self._cpu, self._reply, self._local
        mode = wire.KB_STEP if stepping else wire.KB_RUN
        flags = 0
        if self._sink is not None:
            flags = wire.KB_RECORD if local else wire.KB_RECORD | wire.KB_PACK
        done = exits = 0
        if self.pending and not self._served:
            self._serve()
        cpu.state.current = None
        cpu.stop_serial += 1
        refill = True
        catches = cpu.catches
        while True:
            if refill:
                seconds = None if end is None else max(end - time.monotonic(), 1e-6)
                slice_s = LOCAL_SLICE_S if local else REMOTE_SLICE_S
                seconds = slice_s if seconds is None else min(seconds, slice_s)
                self._send(mode, limit - done if limit else 0, seconds, plan, flags)
                # Nothing of the request changes until something else than a plain exit comes.
                refill = bool(self._answer) or stepping or bool(plan.payload)
                self._answer = b""
            elif local and not len(catches):
                # The common exit, an OUT to one port, kept short: see benchmarks/exit_roundtrip.py.
                wanted = self._serve_quickly()
                if wanted is not None:
                    stop = self._wanted(wanted, before, done)
                    return stop, done
            else:
                reply.cause = 0
                self._served = False
                self._execution.send()
            cause = reply.cause
            if cause == wire.KB_CAUSE_EXIT:
                reason = reply.exit_reason
                if reason in _SERVED:
                    self.pending = True
                    self._exit = self._execution
                    done += reply.steps
                    self._take_rows()
                    if len(catches) and catches.match(reply) is not None:
                        return self._stop(Cause.CATCH, before, done, exit=self._decode()), done
                    wanted = None if self._served else self._serve()
                    if self._answer:
                        refill = True
                    exits += 1
                    if wanted is not None:
                        if isinstance(wanted, list):
                            done += self._finish_access(stepping, flags)
                        stop = self._wanted(wanted, before, done)
                        if stop is not None:
                            return stop, done
                        if limit and done >= limit:
                            return self._retell(Cause.STEP, done), done
                        refill = True
                    if self._stop_requested:
                        return self._stop(Cause.INTERRUPTED, before, done), done
                    if (local or exits % _CLOCK_EVERY == 0) and end is not None and time.monotonic() >= end:
                        return self._stop(Cause.DEADLINE, before, done), done
                    continue
                self.pending = False
                done += reply.steps
                self._take_rows()
                return self._other_exit(before, done), done
            self.pending = False
            refill = True
            done += reply.steps
            self._take_rows()
            if cause == wire.KB_CAUSE_STEPS:
                if limit and done >= limit:
                    return self._stop(Cause.STEP, before, done), done
            elif cause in (wire.KB_CAUSE_DEBUG, wire.KB_CAUSE_STOP, wire.KB_CAUSE_WATCH):
                found = self._at_breakpoint(plan, before, done)
                if found is not None:
                    return found, done
                if not stepping:
                    return None, done
                if limit and done >= limit:
                    return self._retell(Cause.STEP, done), done
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
            if self._stop_requested:
                return self._stop(Cause.INTERRUPTED, before, done), done

    def _take_rows(self) -> None:
        # Marked first: a Ctrl-C in the middle may cost the end of a recording, never double a part of it.
        if self._sink is not None and not self._rows_taken:
            self._rows_taken = True
            self._sink(self._execution)

    def _serve_quickly(self) -> Any:
        """Runs on, serving single OUTs, until something else comes or a device wants a stop (returned).

        What comes is left in the reply for the caller.
        """
        reply, execution = self._reply, self._execution
        again = execution.again
        bus = self._bus
        port_out = bus.port_out
        # The port that was written last, which mostly is the next, too.
        last, changes, port, size_bytes, handler = 0, bus.changes, 0, 0, port_out[0]
        # Two views of the reply, which Python reads quicker than cffi's struct.
        view = memoryview(wire_ffi.buffer(reply))
        quick_at, value_at = view[_QUICK].cast("I"), view[_VALUE].cast("Q")
        channel = execution.channel
        log = self.log
        thread = get_ident()
        try:
            core_again = channel.hold()
            try:
                for _ in range(_CLOCK_EVERY):
                    self._served = False
                    quick_at[0] = 0  # also tells a reply that came from one that did not: see `interrupted`
                    core_again(again)
                    quick = quick_at[0]
                    if quick < _QUICK_OUT:
                        break
                    if quick != last or bus.changes != changes:
                        last, changes = quick, bus.changes
                        port, size_bytes = quick & 0xFFFF, quick >> 16 & 7
                        handler = port_out[port]
                    if log is not None:
                        log.add("out", port, size_bytes, value_at[0], self._rip())
                    wanted = handler(port, value_at[0], size_bytes)
                    self._served = True
                    if wanted is not None:
                        self.pending = True
                        return wanted
                    if self._stop_requested:
                        break
            except Exception:  # from the device, which has seen the exit: it does not see it again
                self.pending = self._served = True
                raise
        finally:
            channel.held.discard(thread)
            if channel.doomed is not None:
                channel.bury(thread)
        execution.check()
        return None

    def _serve(self) -> Any:
        """Lets a device, or memory that left the guest, answer the exit; returns what it wants stopped, or None."""
        reply = self._exit.stop
        wanted: Any = None
        if self.log is not None:
            self._note(reply)
        try:
            if reply.exit_reason == _IO:
                data = self._exit.io_data()
                if reply.io_is_out:
                    wanted = self._bus.out_string(reply.io_port, data, reply.io_size)
                else:
                    self._answer = self._bus.in_string(reply.io_port, reply.io_size, reply.io_count)
            else:
                gpa, size = reply.mmio_gpa, reply.mmio_size
                if self._is_memory(gpa, bool(reply.mmio_is_write)):
                    wanted = self._access_memory(gpa, size)
                elif reply.mmio_is_write:
                    wanted = self._bus.mmio_write(gpa, reply.value & (1 << 8 * size) - 1, size)
                else:
                    self._answer = self._bus.mmio_read(gpa, size).to_bytes(size, "little")
        except Exception:
            # The device has seen the exit: it does not see it again, or no run would get past it.
            self._served = True
            raise
        self._served = True
        return wanted

    def _note(self, reply: Any) -> None:
        """Puts the exit that is about to be served into the log; string I/O is one exit."""
        assert self.log is not None
        if reply.exit_reason == _IO:
            kind, where, size = ("out" if reply.io_is_out else "in"), int(reply.io_port), int(reply.io_size)
        else:
            kind, where = ("mmio write" if reply.mmio_is_write else "mmio read"), int(reply.mmio_gpa)
            size = int(reply.mmio_size)
        value = int(reply.value) & (1 << 8 * size) - 1 if kind in ("out", "mmio write") else None
        self.log.add(kind, where, size, value, self._rip())

    def _rip(self) -> int | None:
        # The registers come with an I/O exit where KVM has KVM_CAP_SYNC_REGS; asking for them would cost an ioctl.
        stop = self._exit.stop if self.pending else self._reply
        return int(_U64.unpack_from(wire_ffi.buffer(stop), _RIP_AT)[0]) if stop.valid & wire.KB_VALID_REGS else None

    def _is_memory(self, gpa: int, is_write: bool) -> bool:
        # A watchpoint, of any vcpu, takes its page out of the guest, and setting one takes away the whole region for a
        # moment. What the guest may not write is left to the bus. KVM cuts accesses at pages.
        for region in self._memory.regions:
            if region.gpa <= gpa < region.end:
                return not (is_write and region.readonly)
        return False

    def _access_memory(self, gpa: int, size: int) -> list[Breakpoint] | None:
        """Does what the guest would have done to a page that a watchpoint protects; the watchpoints it meets."""
        reply = self._exit.stop
        is_write = bool(reply.mmio_is_write)
        if is_write:
            self._memory.write(gpa, reply.value.to_bytes(8, "little")[:size])
        else:
            self._answer = self._memory.read(gpa, size)
        return self._cpu.breakpoints.met_by_access(gpa, size, is_write) or None

    def _wanted(self, wanted: Any, before: Stopped | bytes | None, done: int) -> Stop | None:
        """A device asked for a stop, or a watchpoint was hit."""
        if isinstance(wanted, list):
            return self._hit_first(wanted, Cause.WATCHPOINT, before, done)
        return self._stop(Cause.GUEST_EXIT, before, done, exit=wanted)

    def _finish_access(self, stepping: bool, flags: int) -> int:
        """Ends the instruction whose access hit a watchpoint, as a watchpoint reports after it; steps made."""
        steps = 0
        while True:
            if stepping:
                self._send(wire.KB_STEP, 1, 1.0, NOTHING, flags)
            else:
                self._send(wire.KB_RUN, 0, 1.0, NOTHING, wire.KB_COMPLETE)
            steps += int(self._reply.steps)
            self._take_rows()
            self._complete_sent()
            if not self.pending:
                return steps
            self._serve()

    def _hit(self, one: Breakpoint, cause: Cause, before: Stopped | bytes | None, done: int) -> Stop | None:
        """Weighs the condition; None lets the guest go on."""
        stop = self._stop(cause, before, done, breakpoint=one)  # first, so that the condition sees the state
        if one.condition is not None:
            was_running, self._cpu.running = self._cpu.running, False
            try:
                holds = one.condition(self._cpu)
            except KvmbenchError:
                raise
            except Exception as error:
                raise MisuseError(f"the condition of {one} failed: {error!r}") from error
            finally:
                self._cpu.running = was_running
            if not holds:
                one.passes += 1
                return None
        one.hits += 1
        if one.temporary and one in list(self._cpu.breakpoints):
            self._cpu.breakpoints.remove(one)
        # Not made anew: the condition may have written registers.
        self._cpu.last_stop = stop
        return stop

    def _hit_first(
        self, reached: list[Breakpoint], cause: Cause, before: Stopped | bytes | None, done: int
    ) -> Stop | None:
        """Weighs all that were reached at once until one stops the guest."""
        for one in reached:
            stop = self._hit(one, cause, before, done)
            if stop is not None:
                return stop
        return None

    def _at_breakpoint(self, plan: Plan, before: Stopped | bytes | None, done: int) -> Stop | None:
        reply = self._reply
        if reply.cause == wire.KB_CAUSE_WATCH:
            return self._hit(plan.watches[reply.index], Cause.WATCHPOINT, before, done)
        if reply.cause == wire.KB_CAUSE_STOP:
            address = plan.stops[reply.index].address
            reached = [one for one in plan.stops if one.address == address]
        elif reply.debug_exception == 3:
            reached = [one for one in plan.int3 if one.address == reply.debug_pc]
        else:
            reached = [one for n, one in enumerate(plan.registers) if reply.debug_dr6 >> n & 1]
        if not reached:
            return self._stop(Cause.GUEST_DEBUG, before, done)
        cause = Cause.WATCHPOINT if reached[0].is_watchpoint else Cause.BREAKPOINT
        return self._hit_first(reached, cause, before, done)

    def _decode(self) -> Any:
        return decode_exit(bytes(_buffer(self._reply.run)), self._execution.io_data())

    def _other_exit(self, before: Stopped | bytes | None, done: int) -> Stop:
        """An exit that no device can answer."""
        # Closed by another thread, the guest loses its memory a moment before its vcpu, and would seem to have died.
        self._cpu.machine.check_open()
        exit = self._decode()
        reason = self._reply.exit_reason
        if self.log is not None:
            self.log.add(_reason_name(reason), None, 0, None, self._rip())
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
        self._total_ns = int(reply.total_ns)
        if reply.valid & wire.KB_VALID_SREGS:
            after = Stopped(_buffer(reply)[STATE_OFFSET:STATE_END])
        else:  # after an I/O exit, where the state would cost two ioctls each time
            after = Stopped.pack(cpu.vcpu.get_regs(), cpu.vcpu.get_sregs())
        cpu.state.previous = before
        cpu.state.current = after
        vector = None
        if reply.tainted & wire.KB_TAINT_JUMPED:
            vector = entered_vector(cpu, after)
        stop = Stop(
            cause,
            after.rip,
            exit,
            steps,
            self.core_ns,
            dr6=reply.debug_dr6 if reply.exit_reason == c.KVM_EXIT_DEBUG else None,
            entered_vector=vector,
            tainted="PUSHF put our TF on the stack" if reply.tainted & wire.KB_TAINT_PUSHF else "",
            breakpoint=breakpoint,
            vcpu=cpu.index,
            error=error,
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
        if reply.cause == wire.KB_CAUSE_EXIT and reply.exit_reason in _SERVED:
            self.pending = True
            self._served = False
            self._exit = self._execution
            catches = self._cpu.catches
            if len(catches) and catches.match(reply) is not None:
                return self._stop(Cause.CATCH, before, 0, exit=self._decode())
            wanted = self._serve()
            if wanted is not None:
                steps = self._finish_access(True, 0) if isinstance(wanted, list) else 0
                stop = self._wanted(wanted, before, steps)
                if stop is not None:
                    return stop
        elif reply.cause == wire.KB_CAUSE_EXIT:
            return self._other_exit(before, 0)
        elif reply.cause == wire.KB_CAUSE_DEADLINE:
            return self._stop(Cause.DEADLINE, before, 0)
        elif reply.cause == wire.KB_CAUSE_KICK and self._stop_requested:
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
            elif len(cpu.breakpoints) and (hit := self._hit_here(steps)) is not None:
                return hit
            else:
                continue
            cpu.last_stop = found = stop.replace(cause=cause, steps=steps)
            return found

    def _hit_here(self, steps: int) -> Stop | None:
        """Weighs the execute breakpoints that a single step has led to."""
        here = self._cpu.mode.linear(self._cpu.regs.rip)
        reached = [one for one in self._cpu.breakpoints if one.kind == "x" and one.enabled and one.address == here]
        return self._hit_first(reached, Cause.BREAKPOINT, self._cpu.state.previous, steps)

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
        if reply.cause == wire.KB_CAUSE_EXIT and reply.exit_reason in _SERVED:
            if not self.pending:
                self.pending, self._served, self._exit = True, served, self._execution
        elif reply.cause:
            self.pending = False
        if reply.cause and reply.header.status == 0:
            self._take_rows()
            self._stop(Cause.INTERRUPTED, cpu.state.previous, reply.steps)
        else:
            cpu.state.current = None


def _reason_name(reason: int) -> str:
    try:
        return ExitReason(reason).name
    except ValueError:
        return f"exit {reason}"


def _buffer(reply: Any) -> Any:
    return ffi.buffer(reply)


def _run_error(errno: int) -> str:
    import os

    return f"KVM_RUN failed: {os.strerror(errno)} (errno {errno})"
