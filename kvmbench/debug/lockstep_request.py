"""KB_LOCKSTEP: thousands of turns of several vcpus in one exchange with the core.

The reply holds for each vcpu what a KB_EXECUTE of its own would have brought, so a turn that ended in something else
than a plain step is handed to the vcpu's `Engine` as if that had asked for it (`Lane`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvmbench.core import wire
from kvmbench.core._wire import ffi
from kvmbench.debug.packed_rows import unpack
from kvmbench.debug.state import STATE_END, STATE_OFFSET
from kvmbench.debug.step_rows import ROW, Rows
from kvmbench.host.channel import LocalChannel
from kvmbench.host.client import next_id, raise_status
from kvmbench.host.execution import REQUEST_BYTES, STOP_BYTES, Execution

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

_HEAD_BYTES: int = ffi.sizeof("struct kb_lockstep")
_REPLY_BYTES: int = ffi.sizeof("struct kb_lockstep_reply")


class Lane(Execution):
    """The buffers of one vcpu in lock-step; a reply can be put in, which the next `send` then "receives".

    Attributes:
        in_hand: the part of a lock-step reply in which this vcpu's turn ended, until it is received, and how many steps
            that turn made, 0 or 1; its row has been taken already.
    """

    def __init__(self, cpu: Cpu) -> None:
        super().__init__(cpu.machine.host.core, cpu.vcpu.handle, rows=1)
        self.cpu = cpu
        self.in_hand: tuple[bytes, int] | None = None

    @property
    def room_bytes(self) -> int:
        """What a reply with one row may take, and what brings it to a multiple of 8 bytes."""
        return self._reply_bytes + 8

    def settle(self) -> None:
        """After a Ctrl-C: leaves the exit in hand to the vcpu's `Engine`, which serves it before the vcpu goes on."""
        if self._receive():
            self.cpu.engine.leave_exit(self)

    def send(self) -> None:
        """As `Execution.send`, or nothing if the reply is there already."""
        if not self._receive():
            super().send()

    def send_payload(self, payload: bytes) -> None:
        """Likewise."""
        if not self._receive():
            super().send_payload(payload)

    def _receive(self) -> bool:
        if self.in_hand is None:
            return False
        try:
            self._copy(*self.in_hand)
        except KeyboardInterrupt:
            self._copy(*self.in_hand)  # whole, or the engine would take half a reply for one
            self.in_hand = None
            raise
        self.in_hand = None
        return True

    def _copy(self, message: bytes, steps: int) -> None:
        # Between the stop and what follows lie the rows, which are taken already and may not fit here.
        ffi.memmove(self.stop, message[:STOP_BYTES], STOP_BYTES)
        rows_bytes = self.stop.rows_bytes
        rest = message[STOP_BYTES + rows_bytes :]
        ffi.memmove(ffi.cast("char *", self.stop) + STOP_BYTES, rest, len(rest))
        for name in ("io_offset", "history_offset"):
            if getattr(self.stop, name):
                setattr(self.stop, name, getattr(self.stop, name) - rows_bytes)
        self.stop.steps = steps
        self.stop.n_rows = self.stop.rows_bytes = 0


@dataclass(frozen=True)
class Answer:
    """What one exchange brought.

    Attributes:
        made: for each turn gone through, 1 if its vcpu made a step, 0 if it waits in the kernel.
        rows: the rows of each lane.
        states: for each lane that ran its state, as `Stopped` takes it; else None.
        last: the lane whose turn was the last.
        message: its part of the reply.
        completed: how many steps that turn made, 0 or 1.
        cause: ``KB_CAUSE_*`` of it.
    """

    made: npt.NDArray[np.uint8]
    rows: tuple[Rows, ...]
    states: tuple[bytes | None, ...]
    last: int
    message: bytes
    completed: int
    cause: int


class LockstepRequest:
    """The message for some lanes, sent again and again.

    Attributes:
        reply: the core's to the last message, or None.
    """

    def __init__(self, lanes: list[Lane], *, room: int) -> None:
        """Keeps buffers for at most `room` turns a request."""
        self._lanes = lanes
        self._core = lanes[0].cpu.machine.host.core
        self._channel: Any = self._core.channel
        self._local = isinstance(self._channel, LocalChannel)
        self._got: Any = ffi.new("size_t *")
        self._capacity = (
            _REPLY_BYTES
            + sum(lane.room_bytes for lane in lanes)
            + room * (max(ROW.itemsize, wire.KB_PACKED_ROW_BYTES) + 1)
        )
        self._buffer: Any = ffi.new_allocator(should_clear_after_alloc=False)("char[]", self._capacity)
        self._number: int | None = None
        self.reply: bytes | None = None

    def forget(self) -> None:
        """Before `send`: so that nobody takes the last reply for the next."""
        self.reply = self._number = None
        self._channel.take_reply()

    def send(self, turns: npt.NDArray[np.uint8], seconds: float) -> None:
        """Has the core go through turns, and keeps its reply.

        Args:
            turns: places in the list of lanes.
            seconds: come back after so long.

        Raises:
            BusyError, HostLost, ClosedError: as everywhere.
            KeyboardInterrupt: the vcpus have stopped; see `late`.
        """
        parts = [self._part(lane, int(np.count_nonzero(turns == place))) for place, lane in enumerate(self._lanes)]
        size = _HEAD_BYTES + sum(map(len, parts)) + len(turns)
        number = next_id()
        head = ffi.new(
            "struct kb_lockstep *",
            {
                "header": {"size_bytes": size, "id": number, "kind": wire.KB_LOCKSTEP},
                "vcpu": self._lanes[0].cpu.vcpu.handle,
                "n_vcpus": len(parts),
                "n_turns": len(turns),
                "deadline_ns": max(1, int(seconds * 1e9)),
            },
        )
        message = b"".join([bytes(ffi.buffer(head)), *parts, turns.tobytes()])
        header = ffi.cast("struct kb_header *", self._buffer)
        if self._local:
            header.id, self._number = 0, number
            self._channel.call_into(ffi.from_buffer(message), size, self._buffer, self._capacity, self._got)
            self.reply = bytes(ffi.buffer(self._buffer, header.size_bytes))
        else:
            self.reply = self._channel.call(message, on_interrupt=self._kick)
        status = ffi.from_buffer("struct kb_header *", self.reply).status
        if status:
            self.reply = None
            raise_status(status, "a vcpu", "KVM_SET_GUEST_DEBUG")
        if self._channel.take_interrupt():
            raise KeyboardInterrupt

    def late(self) -> bytes | None:
        """After a Ctrl-C came out of `send`, or behind it: the reply, if the core gave one."""
        if self.reply is None and self._local:
            header = ffi.cast("struct kb_header *", self._buffer)
            if header.id == self._number and not header.status:
                self.reply = bytes(ffi.buffer(self._buffer, header.size_bytes))
        elif self.reply is None:
            reply = self._channel.take_reply()
            if reply is not None and not ffi.from_buffer("struct kb_header *", reply).status:
                self.reply = reply
        self._channel.take_interrupt()
        return self.reply

    def _kick(self) -> None:
        self._core.kick(self._lanes[0].cpu.vcpu.handle)

    def _part(self, lane: Lane, turns: int) -> bytes:
        cpu = lane.cpu
        plan = cpu.breakpoints.plan(stepping=True)
        request = ffi.new("struct kb_execute *")
        request.header.size_bytes = REQUEST_BYTES + len(plan.payload)
        request.header.kind = wire.KB_EXECUTE
        request.vcpu = cpu.vcpu.handle
        request.mode = wire.KB_STEP
        # Full: or the engine, which is to end a turn from its exit on, would ask for the state in two requests.
        request.flags = cpu.step_flags | wire.KB_RECORD | wire.KB_FULL_SYNC | (0 if self._local else wire.KB_PACK)
        request.debug_control = plan.control | cpu.step_control
        for n, value in enumerate(plan.debugreg):
            request.debugreg[n] = value
        request.n_stops = len(plan.stops)
        request.n_watches = len(plan.watches)
        request.max_rows = max(turns, 1)
        part = bytes(ffi.buffer(request)) + plan.payload
        return part + bytes(-len(part) % 8)

    def answer(self) -> Answer:
        """What `reply` says."""
        reply = self.reply
        assert reply is not None
        head = ffi.from_buffer("struct kb_lockstep_reply *", reply)
        at = _REPLY_BYTES
        messages, rows, states = [], [], []
        for _ in self._lanes:
            stop = ffi.cast("struct kb_stop *", ffi.from_buffer(reply) + at)
            end = at + stop.header.size_bytes
            messages.append((at, end))
            data = memoryview(reply)[at + stop.rows_offset : at + stop.rows_offset + stop.rows_bytes]
            count = int(stop.n_rows)
            if not count:
                rows.append(np.empty(0, ROW))
            elif self._local:
                rows.append(np.frombuffer(data, ROW))
            else:
                rows.append(unpack(data, count))
            full = stop.valid & wire.KB_VALID_REGS and stop.valid & wire.KB_VALID_SREGS
            states.append(bytes(reply[at + STATE_OFFSET : at + STATE_END]) if full else None)
            at = end + -end % 8
        first, after = messages[head.last]
        last = ffi.cast("struct kb_stop *", ffi.from_buffer(reply) + first)
        return Answer(
            made=np.frombuffer(reply, np.uint8, int(head.turns), at),
            rows=tuple(rows),
            states=tuple(states),
            last=int(head.last),
            message=reply[first:after],
            completed=int(head.completed),
            cause=int(last.cause),
        )
