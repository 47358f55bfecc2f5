"""Stepping several vcpus turn by turn, and recording what they did.

The core goes through thousands of turns by itself and comes back at the first that is no plain step. That turn is then
ended by the vcpu's own `Engine`, which serves devices, weighs conditions and tells the stop, exactly as for
`Cpu.step`; it gets the core's reply as if it had asked for one step (`Lane.deliver`).

A piece of the recording is appended whole, by one call, so a Ctrl-C finds all of it there or nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmbench.core import wire
from kvmbench.debug.engine import LOCAL_SLICE_S, REMOTE_SLICE_S, check_deadline
from kvmbench.debug.lockstep_record import LockstepRecord
from kvmbench.debug.lockstep_request import Answer, Lane, LockstepRequest
from kvmbench.debug.packed_rows import unpack
from kvmbench.debug.record import StepRecord
from kvmbench.debug.recorder import LOCAL_ROWS, REMOTE_ROWS, progress_bar
from kvmbench.debug.schedule import Schedule, Turns
from kvmbench.debug.state import Stopped
from kvmbench.debug.step_rows import ROW, RowBuilder, Rows, row_of
from kvmbench.debug.stop import Cause, Stop
from kvmbench.debug.stops import Stops, what_happened
from kvmbench.errors import BusyError, KvmbenchError, MisuseError
from kvmbench.host.channel import LocalChannel

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

# Turns of the shortest request.
_LEAST_ASKED = 64
# How a request ends whose last turn needs no more: it is done, or somebody may have asked for an end.
_WENT_ON = (wire.KB_CAUSE_STEPS, wire.KB_CAUSE_KICK, wire.KB_CAUSE_DEADLINE, wire.KB_CAUSE_SIGNAL, 0)
_WAITS = "all vcpus wait in the kernel (HLT, INIT or SIPI), and nothing would wake them"


@dataclass(frozen=True)
class _Piece:
    order: Turns  # lanes, by place
    rows: tuple[Rows, ...]  # of each lane
    end: int  # turns of the schedule gone through so far
    made: tuple[int, ...]  # steps of each lane so far


class Lockstep:
    """One recording of several vcpus, kept even if it ends early."""

    def __init__(
        self, cpus: Sequence[Cpu], schedule: Schedule, *, end_at_halt: bool, over: dict[int, str], progress: bool | None
    ) -> None:
        """Runs nothing yet.

        Args:
            cpus: all that have a turn.
            over: why those vcpus take no turns that halted or died before.
        """
        self._cpus = list(cpus)
        self._machine = self._cpus[0].machine
        self._schedule = schedule
        self._end_at_halt = end_at_halt
        self._progress = progress
        self._over = {place: over[cpu.index] for place, cpu in enumerate(cpus) if cpu.index in over}
        self._local = isinstance(self._machine.host.core.channel, LocalChannel)
        place_of = bytearray(256)
        for place, cpu in enumerate(cpus):
            place_of[cpu.index] = place
        self._turns: Turns = np.frombuffer(schedule.turns.tobytes().translate(place_of), np.uint8)
        self._lanes = [Lane(cpu) for cpu in cpus]
        self._room = min(len(schedule), LOCAL_ROWS if self._local else REMOTE_ROWS)
        self._request = LockstepRequest(self._lanes, room=self._room)
        # How many turns are asked for at once: fewer while exits end the requests early.
        self._ask = self._room
        # Whether the lane that ended the last request has its reply.
        self._handed = False
        self._pieces: list[_Piece] = []
        # How many pieces there were before it.
        self._before_request = 0
        self._stops: dict[int, Stop] = {}
        self._waiting: set[int] = set()
        self._ended = ""
        self._first: Stop | None = None
        self._held_s = 0.0
        self._bar: Any = None
        #: Whether `run` came so far that there is something to record.
        self.begun = False

    @property
    def _gone(self) -> int:
        return self._pieces[-1].end if self._pieces else 0

    def run(self, deadline_s: float | None) -> None:
        """Goes through the schedule until its end or until something stops a vcpu."""
        check_deadline(deadline_s)
        self._machine.check_open()
        marked: list[Cpu] = []
        try:
            self._run_marked(marked, deadline_s)
        except KeyboardInterrupt:
            self._unmark(marked)  # it may have come at the beginning of the other
            raise

    def _run_marked(self, marked: list[Cpu], deadline_s: float | None) -> None:
        try:
            for cpu in self._cpus:
                if cpu.running:
                    raise BusyError(f"vcpu {cpu.index} is running; cpu.interrupt() stops it")
                # `going`: the gate does not wait for a vcpu because it runs; the first one stands for all there.
                # No call before it is among the marked: see `Cpu.step`.
                cpu.running = cpu.engine.going = True
                marked.append(cpu)
                cpu.engine.runner = get_ident()
            self._before = [cpu.state.read() for cpu in self._cpus]
            for cpu, before in zip(self._cpus, self._before, strict=True):
                cpu.state.current = before
            self._modes = [cpu.mode for cpu in self._cpus]
            self._starts = [row_of(cpu.state.get_regs()) for cpu in self._cpus]
            self._interrupts = [cpu.engine.interrupts for cpu in self._cpus]
            self.begun = True
            end = None if deadline_s is None else time.monotonic() + deadline_s
            with contextlib.ExitStack() as stack:
                if self._progress is not False:
                    self._bar = stack.enter_context(progress_bar(len(self._schedule), always=bool(self._progress)))
                self._go(end)
        except KeyboardInterrupt:
            self._ended = self._ended or "Ctrl-C"
            raise
        except KvmbenchError as error:
            self._ended = self._ended or str(error)
            raise
        finally:
            self._unmark(marked)

    @staticmethod
    def _unmark(marked: list[Cpu]) -> None:
        for cpu in marked:
            cpu.running = cpu.engine.going = False

    def _go(self, end: float | None) -> None:
        # An exit that waits for its answer is ended by the engine, in the vcpu's first turn.
        while not self._ended:
            ahead = self._ahead()
            if not len(ahead):
                self._ended = self._why_over()
            elif any(cpu.engine.interrupts != n for cpu, n in zip(self._cpus, self._interrupts, strict=True)):
                self._end(Cause.INTERRUPTED, "interrupted")
            elif end is not None and time.monotonic() >= end:
                self._end(Cause.DEADLINE, "the deadline passed")
            else:
                self._some(ahead, end)

    def _ahead(self) -> Any:
        """Places in the schedule of the next turns that will be taken, as many as one request has room for."""
        at = self._gone
        while at < len(self._turns):
            window = self._turns[at : at + 4 * self._ask]
            open_ = ~np.isin(window, list(self._over)) if self._over else np.ones(len(window), bool)
            found = np.flatnonzero(open_)[: self._ask]
            if len(found):
                return found + at
            at += len(window)
        return np.empty(0, np.intp)

    def _why_over(self) -> str:
        if self._over and self._gone < len(self._turns) and not len(self._ahead()):
            return "; ".join(f"vcpu {self._cpus[place].index} {why}" for place, why in self._over.items())
        return "the schedule is done"

    def _some(self, ahead: Any, end: float | None) -> None:
        turns = self._turns[ahead]
        pending = [place for place, cpu in enumerate(self._cpus) if cpu.engine.pending]
        if self._machine.written:  # for a vcpu that runs elsewhere; the engine knows how to step over them
            self._slow_turn(int(turns[0]), int(ahead[0]), end)
            return
        if pending:
            before = np.flatnonzero(np.isin(turns, pending))
            if len(before) and before[0] == 0:
                self._slow_turn(int(turns[0]), int(ahead[0]), end)
                return
            turns = turns[: before[0]] if len(before) else turns
        seconds = LOCAL_SLICE_S if self._local else REMOTE_SLICE_S
        if end is not None:
            seconds = max(min(seconds, end - time.monotonic()), 1e-6)
        for place in set(turns.tolist()):
            cpu = self._cpus[place]
            cpu.state.current = None
            cpu.stop_serial += 1
            cpu.forget_request()
        self._handed, self._before_request = False, len(self._pieces)
        self._request.forget()
        try:
            self._exchange(turns, ahead, seconds, end)
        except KeyboardInterrupt:
            self._settle(turns, ahead)
            raise

    def _exchange(self, turns: Turns, ahead: Any, seconds: float, end: float | None) -> None:
        gate, first = self._machine.gate, self._cpus[0]
        gate.enter(first)
        try:
            self._request.send(turns, seconds)
        finally:
            gate.leave(first)
        answer = self._request.answer()
        self._ask = min(self._room, max(_LEAST_ASKED, 4 * len(answer.made)))
        self._take(answer, turns, ahead)
        if answer.cause in _WENT_ON:
            return  # `_go` looks whether somebody asked for it
        at = self._gone - 1 if answer.completed else int(ahead[len(answer.made)])
        lane = self._lanes[answer.last]
        lane.in_hand, self._handed = (answer.message, answer.completed), True
        try:
            self._slow_turn(answer.last, at, end)
        except Exception:
            lane.in_hand = None
            raise

    def _settle(self, turns: Turns, ahead: Any) -> None:
        """After a Ctrl-C at any point of `_exchange`: what the core did is kept, and nothing of it done again."""
        self._machine.gate.leave(self._cpus[0])
        if self._request.late() is None:
            return
        answer = self._request.answer()
        lane = self._lanes[answer.last]
        if not self._handed:
            self._take(answer, turns, ahead)
            if answer.cause not in _WENT_ON:
                lane.in_hand = answer.message, answer.completed
        lane.settle()

    def _take(self, answer: Answer, turns: Turns, ahead: Any) -> None:
        gone = len(answer.made)
        for place, state in enumerate(answer.states):
            if state is not None:
                self._cpus[place].state.current = Stopped(state)
                self._cpus[place].state.previous = self._before[place]
        if not gone:
            return
        made = answer.made.astype(bool)
        if len(self._pieces) > self._before_request:
            return  # once more, after a Ctrl-C
        self._append(turns[:gone][made], answer.rows, int(ahead[gone - 1]) + 1)
        if self._bar is not None:
            self._bar.update(gone)
        last = int(np.flatnonzero(made)[-1]) + 1 if made.any() else 0
        if last:
            self._waiting.clear()
        self._waiting.update(turns[last:gone].tolist())
        if self._waiting and self._waiting >= set(range(len(self._cpus))) - self._over.keys():
            self._ended = _WAITS

    def _slow_turn(self, place: int, at: int, end: float | None) -> None:
        """One turn by the vcpu's engine: from its exit on, or from the start.

        Args:
            at: its place in the schedule.
        """
        cpu = self._cpus[place]

        def take(lane: Any) -> None:
            count = int(lane.stop.n_rows)
            if count:
                data = lane.rows()
                rows = np.frombuffer(bytes(data), ROW) if self._local else unpack(data, count)
                none = np.empty(0, ROW)
                each = tuple(rows if n == place else none for n in range(len(self._cpus)))
                self._append(np.full(count, place, np.uint8), each, at + 1)

        seconds = None if end is None else max(end - time.monotonic(), 1e-6)
        cpu.running = cpu.engine.going = False  # `go` marks it anew
        try:
            stop = cpu.engine.go(stepping=True, limit=1, deadline_s=seconds, execution=self._lanes[place], sink=take)
        finally:
            cpu.running = cpu.engine.going = True
            cpu.engine.runner = get_ident()
        if stop.cause is Cause.STEP:
            return
        stop = stop.replace(steps=self._made[place])
        if stop.cause is Cause.HALT and not self._end_at_halt:
            self._over[place] = f"halted after {stop.steps:,} steps"
            self._stops[place] = stop
        elif stop.cause is Cause.DEADLINE:
            pass  # `_go` sees it
        elif stop.cause is Cause.INTERRUPTED:
            self._end(Cause.INTERRUPTED, "interrupted")
        else:
            self._first = self._stops[place] = stop
            self._ended = what_happened(stop)

    def _end(self, cause: Cause, why: str) -> None:
        self._ended = why
        for place, cpu in enumerate(self._cpus):
            if place not in self._stops:
                self._stops[place] = self._stop(cpu, place, cause, "")

    def _append(self, order: Turns, rows: tuple[Rows, ...], end: int) -> None:
        made = tuple(before + len(each) for before, each in zip(self._made, rows, strict=True))
        self._pieces.append(_Piece(order, rows, end, made))

    @property
    def _made(self) -> tuple[int, ...]:
        """Steps of each lane so far."""
        return self._pieces[-1].made if self._pieces else (0,) * len(self._cpus)

    def _stop(self, cpu: Cpu, place: int, cause: Cause, held: str) -> Stop:
        state = cpu.state.read()
        return Stop(
            cause,
            state.rip,
            steps=self._made[place],
            vcpu=cpu.index,
            held=held,
            state=state,
            before=self._before[place],
            context=cpu,
            serial=cpu.stop_serial,
        )

    def record(self) -> LockstepRecord:
        """What has been recorded so far; also gives each vcpu its stop."""
        none = np.empty(0, np.uint8)
        order = np.concatenate([none, *(piece.order for piece in self._pieces)])
        records = {}
        for place, cpu in enumerate(self._cpus):
            rows = RowBuilder(steps=self._made[place])
            for piece in self._pieces:
                rows.append(piece.rows[place].view("u1"))
            records[cpu.index] = record = StepRecord(
                rows.finish(),
                self._starts[place],
                bits=self._modes[place].bits,
                code_base=self._modes[place].code_base,
                symbols=cpu.symbols,
                code=cpu.read_code,
                provenance=self._machine.host.provenance,
                vcpu=cpu.index,
            )
            with contextlib.suppress(KvmbenchError):
                record.sample_code()
        return LockstepRecord(
            np.array([cpu.index for cpu in self._cpus], np.uint8)[order],
            records,
            ended=self._ended,
            notes=self._notes(order),
            stops=self._all_stops(),
        )

    def _notes(self, order: Turns) -> tuple[str, ...]:
        gone = np.bincount(self._turns[: self._gone], minlength=len(self._cpus))
        made = np.bincount(order, minlength=len(self._cpus))
        notes = []
        for place, cpu in enumerate(self._cpus):
            passed = int(gone[place] - made[place])
            left = len(self._turns) - self._gone if place in self._over else 0
            if place in self._over:
                left = int(np.count_nonzero(self._turns[self._gone :] == place))
                notes.append(f"vcpu {cpu.index} {self._over[place]}; {passed + left:,} turns of it were passed over")
            elif passed > 0:
                notes.append(
                    f"vcpu {cpu.index} waited in the kernel in {passed:,} of its turns, which were passed over"
                )
        return tuple(notes)

    def _all_stops(self) -> Stops:
        stops = []
        for place, cpu in enumerate(self._cpus):
            stop = self._stops.get(place)
            if stop is None and place in self._over:
                stop = cpu.last_stop  # it had halted before
            if stop is None:
                held = self._ended if self._first is not None else ""
                with contextlib.suppress(KvmbenchError):  # a host that is lost
                    stop = self._stop(cpu, place, Cause.STEP, held)
            if stop is not None:
                cpu.last_stop = stop
                stops.append(stop)
        return Stops(stops, first=self._first, because=self._ended, held_s=0.0)


def schedule_for(order: Any, steps: int | None, seed: int | None, vcpus: Sequence[int]) -> Schedule:
    """The schedule that a caller of `Machine.lockstep` means.

    Args:
        vcpus: those that take part where the order names none.
    """
    if seed is not None:
        if order is not None:
            raise MisuseError("give an order or a seed, not both")
        if steps is None:
            raise MisuseError("with a seed, say how many steps")
        return Schedule.random(vcpus, steps, seed)
    if order is None or order == "round-robin":
        if steps is None:
            raise MisuseError("say how many steps, or give an order such as [0, 1, 1, 0]")
        return Schedule.round_robin(vcpus, steps)
    schedule = order if isinstance(order, Schedule) else Schedule(order)
    return schedule if steps is None else schedule.repeated(steps)
