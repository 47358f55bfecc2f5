"""`m.cpu`: one vcpu as a person debugs it: step, run, stop, look, change."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any

from kvmbench.arguments import instead, integer, spelled_out
from kvmbench.core import wire
from kvmbench.core._wire import ffi as wire_ffi
from kvmbench.debug.breakpoint import Breakpoint, check_flag
from kvmbench.debug.breakpoints import Breakpoints
from kvmbench.debug.catch import Catches
from kvmbench.debug.disassembly import Disassembly, disassemble
from kvmbench.debug.engine import Engine, check_deadline
from kvmbench.debug.exit_log import CAPACITY, ExitLog
from kvmbench.debug.mode import CodeMode
from kvmbench.debug.record import StepRecord
from kvmbench.debug.recorder import Recorder
from kvmbench.debug.registers import Registers
from kvmbench.debug.state import STATE_END, STATE_OFFSET, VcpuState
from kvmbench.debug.stop import Cause, Stop, stop_of_step
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import BusyError, ClosedError, HostLost, MisuseError
from kvmbench.host.channel import LocalChannel
from kvmbench.host.execution import Execution
from kvmbench.kvm import VCPU
from kvmbench.machine.segment import wants_available_tss
from kvmbench.uapi import constants as c

if TYPE_CHECKING:
    from kvmbench.debug.machine import Machine
    from kvmbench.mmu.address_space import AddressSpace
    from kvmbench.mmu.guest_walk import GuestWalk

# A guest that neither steps nor exits (HLT with an in-kernel irqchip, a REP over memory) must not hang a notebook.
STEP_DEADLINE_S = 5.0
_INSIDE = frozenset(
    {"engine", "execution", "forget_request", "read_code", "state", "step_control", "step_flags", "stop_serial"}
)
PLAIN_OFFSET: int = wire_ffi.offsetof("struct kb_stop", "plain")
# Differs from every deadline.
_OVER: int = wire.KB_OVER_HANDLERS
_NOT_READY = math.nan


class Cpu:
    """A vcpu under debugging.

    Attributes:
        machine: the machine it belongs to.
        vcpu: the KVM object below, one method an ioctl.
        index: which of the machine's vcpus it is.
        regs: its registers, to read and to write.
        breakpoints: breakpoints and watchpoints.
        catches: exit kinds that stop the guest before a device sees them.
        last_stop: the latest `Stop`, or None.
        held: whether `Machine.run`, `others_running` and `lockstep` leave it out, unless it is named; may be assigned.
        hold_interrupts: whether single steps hold interrupts off (KVM_GUESTDBG_BLOCKIRQ), where KVM can; runs
            do not, also where a breakpoint has them made of steps.
        handlers: what a step does that raises an exception or meets an interrupt: "enter" stops at the handler's
            first instruction, "over" runs the handler to its end as a part of the step.
        rep: a REP string instruction is a step each "iteration", or one step as a "whole".
        last_record: what the last `record()` kept, even if it was interrupted.
    """

    # So that cpu.handler = "over" is an AttributeError; a __setattr__ would cost a step a tenth of its time.
    __slots__ = (
        *("__weakref__", "_direct", "_handlers", "_held", "_hold_interrupts", "_plain", "_ready_for", "_rep"),
        *("_reply", "_request", "_take_state", "breakpoints", "catches", "engine", "execution", "index"),
        *("last_record", "last_stop", "machine", "regs", "running", "state", "step_flags", "stop_serial", "vcpu"),
    )

    def __init__(self, machine: Machine, vcpu: VCPU, index: int) -> None:
        self.machine = machine
        self.vcpu = vcpu
        self.index = index
        self.execution = Execution(machine.host.core, vcpu.handle)
        self._request = self.execution.request
        self._reply = self.execution.stop
        # Two views of the reply, which Python reads quicker than cffi's struct.
        reply = memoryview(wire_ffi.buffer(self._reply))
        self._plain = reply[PLAIN_OFFSET : PLAIN_OFFSET + 4].cast("I")
        self._take_state = reply[STATE_OFFSET:STATE_END].tobytes
        # Of the channel within this process, which a step calls without detour.
        channel = machine.host.core.channel
        self._direct: Any = None
        if isinstance(channel, LocalChannel):
            self._direct = (channel, channel.busy, channel.core_again, self.execution.again)
        self.engine = Engine(self)
        self.state = VcpuState(
            vcpu,
            self.engine.complete_exit,
            self.engine.is_under_way,
            wants_available_tss=wants_available_tss(machine.host.info.module),
        )
        self.regs = Registers(self.state, machine.symbols)
        self.breakpoints = Breakpoints(self)
        self.catches = Catches()
        self.last_stop: Stop | None = None
        self.last_record: StepRecord | None = None
        self.stop_serial = 0
        self.running = False
        self._held = False
        self._hold_interrupts = machine.can_hold_interrupts
        self._handlers = "enter"
        self._rep = "iteration"
        #: KB_* flags for single steps.
        self.step_flags: int = wire.KB_HANDLERS
        # Whether `_request` is filled in for one plain step, and with which deadline.
        self._ready_for: float | None = _NOT_READY

    @property
    def held(self) -> bool:
        return self._held

    @held.setter
    def held(self, value: bool) -> None:
        self._held = check_flag(value, "held")

    @property
    def hold_interrupts(self) -> bool:
        return self._hold_interrupts

    @hold_interrupts.setter
    def hold_interrupts(self, value: bool) -> None:
        if check_flag(value, "hold_interrupts") and not self.machine.can_hold_interrupts:
            raise MisuseError("KVM on this host has no KVM_GUESTDBG_BLOCKIRQ (KVM_CAP_SET_GUEST_DEBUG2)")
        self._hold_interrupts = value
        self._ready_for = _NOT_READY

    @property
    def handlers(self) -> str:
        return self._handlers

    @handlers.setter
    def handlers(self, value: str) -> None:
        self._choose("handlers", value, {"enter": 0, "over": wire.KB_OVER_HANDLERS})

    @property
    def rep(self) -> str:
        return self._rep

    @rep.setter
    def rep(self, value: str) -> None:
        self._choose("rep", value, {"iteration": 0, "whole": wire.KB_WHOLE_REP})

    def _choose(self, name: str, value: str, flags: dict[str, int]) -> None:
        if not isinstance(value, str) or value not in flags:
            raise MisuseError(f"cpu.{name} = {value!r}: {instead(value, list(flags))}")
        setattr(self, f"_{name}", value)
        self.step_flags = self.step_flags & ~sum(flags.values()) | flags[value]
        self._ready_for = _NOT_READY

    @property
    def symbols(self) -> Symbols:
        """Names and source lines of what is loaded in the machine."""
        return self.machine.symbols

    # One step costs about what KVM makes it cost, so this path does the least: one call into the core, one copy of the
    # state, one Stop that decodes nothing. Whatever is out of the ordinary goes through the engine.
    def step(self, count: int = 1, *, deadline_s: float | None = STEP_DEADLINE_S) -> Stop:
        """Executes `count` instructions; less if something stops the guest before.

        Exits to devices on the way are served and belong to their instruction. A step that raises an exception or
        meets an interrupt ends at the first instruction of the handler (`stop.entered_vector`); `handlers` and
        `rep` say what else is one step.

        Args:
            deadline_s: stop after this long, in seconds (of the host's clock); None: wait for ever.

        Returns:
            A `Stop`, with cause "step" if all went as asked.

        Raises:
            BusyError: the vcpu is running in another thread.
            HostLost: the host is gone.
            KeyboardInterrupt: Ctrl-C; the vcpu has stopped, see `last_stop`.
        """
        thread = get_ident()
        state, plain = self.state, self._plain
        direct = self._direct
        if self._ready_for != deadline_s or count != 1 or self.running:
            # With `handlers` or `rep` a step may last as long as the guest likes: the engine hears a Ctrl-C meanwhile.
            whole = self.step_flags != wire.KB_HANDLERS
            whole = whole or self.machine.coalesced is not None
            if count != 1 or whole or not self.breakpoints.quiet or self.engine.pending:
                return self._step_many(count, deadline_s)
            self._make_ready(deadline_s)
            return self.step(deadline_s=deadline_s)
        # Another thread, or Ctrl-C, may come after any call. There is none between the look at `running` and this mark,
        # so only one thread gets by, and none between it and the `try`, so the mark does not stay.
        self.running = True
        try:
            before = state.latest
            if before is None:  # a special register was written
                before = state.read()
            state.latest = None
            serial = self.stop_serial + 1
            self.stop_serial = serial
            plain[0] = 0
            try:
                if direct is not None:  # LocalChannel.call_into, written out
                    local, busy, core_again, again = direct
                    try:
                        busy.add(thread)
                        if local.core is None:
                            raise ClosedError("the host is closed")
                        core_again(again)
                    finally:
                        busy.discard(thread)
                        if local.doomed is not None:
                            local.bury(thread)
                else:
                    self.execution.send()
                if plain[0]:
                    state.before = before
                    state.latest = after = self._take_state()
                    self.last_stop = stop = stop_of_step(after, before, self, serial)
                    return stop
                # Still marked: another thread must not step while an exit waits in the reply.
                self._ready_for = _NOT_READY
                self.execution.check()
                return self.engine.resume_step(before, deadline_s)
            except KeyboardInterrupt:
                self.engine.interrupted()
                raise
        finally:
            self.running = False

    def _make_ready(self, deadline_s: float | None) -> None:
        if self.running:
            raise BusyError(f"vcpu {self.index} is running; cpu.interrupt() stops it")
        self.running = True  # as in `step`
        self._ready_for = _NOT_READY  # not for what it was ready for before, if this is cut short
        try:
            check_deadline(deadline_s)
            if self.state.current is None:
                self.state.read()
            plan = self.breakpoints.plan(stepping=True)
            self.engine.fill(
                mode=wire.KB_STEP, steps=1, deadline_s=deadline_s, control=self.step_control, flags=self.step_flags
            )
            if plan.stops:
                self.execution.attach(plan.payload)
            self._reply.cause = 0  # told already: see `Engine.interrupted`
            self._ready_for = deadline_s
            if self.machine.gate.is_held or self.machine.written or plan.version != self.breakpoints.version:
                self._ready_for = _NOT_READY  # another vcpu's thread must be able to rely on it: see `Gate.hold`
        finally:
            self.running = False

    def forget_request(self) -> None:
        """Called by whoever else fills in the request."""
        self._ready_for = _NOT_READY

    @property
    def step_control(self) -> int:
        """KVM_GUESTDBG_* bits for single steps."""
        return int(c.KVM_GUESTDBG_BLOCKIRQ) if self._hold_interrupts else 0

    def _step_many(self, count: int, deadline_s: float | None) -> Stop:
        try:
            count = integer(count, "count", 1, (1 << 64) - 1)
        except MisuseError:
            raise MisuseError(f"cannot step {count!r} instructions; give a positive number") from None
        return self.engine.go(stepping=True, limit=count, deadline_s=deadline_s)

    @spelled_out
    def run(self, *, deadline_s: float | None = None) -> Stop:
        """Runs until a breakpoint, a caught or unhandled exit, the deadline, `interrupt()` or Ctrl-C.

        Starting on a breakpoint does not hit it again.

        Args:
            deadline_s: stop after this long, in seconds (of the host's clock); None: run on.

        Raises:
            BusyError, HostLost, KeyboardInterrupt: as `step`.
        """
        return self.engine.go(stepping=False, limit=0, deadline_s=deadline_s)

    @spelled_out
    def run_until(self, where: int | str | Callable[[Cpu], Any], *, deadline_s: float | None = None) -> Stop:
        """Runs until rip is at an address or symbol, or a condition of the `Cpu` holds.

        A condition is asked after every single step, which costs a call into Python each.

        Raises:
            AddressError: nothing is mapped at that address.
            BusyError, HostLost, KeyboardInterrupt: as `step`.
        """
        if callable(where):
            # It is a run, and may wait for an interrupt. Not by the setter, which a Ctrl-C might cut short.
            held, self._hold_interrupts, self._ready_for = self._hold_interrupts, False, _NOT_READY
            try:
                return self.engine.step_until(where, deadline_s=deadline_s)
            finally:
                self._hold_interrupts, self._ready_for = held, _NOT_READY
        temporary = self.breakpoints.add(where, temporary=True)
        try:
            stop = self.run(deadline_s=deadline_s)
        finally:
            if temporary in self.breakpoints:
                self.breakpoints.remove(temporary)
        return self._retold(stop, temporary)

    def _retold(self, stop: Stop, temporary: Breakpoint) -> Stop:
        """The stop at our own temporary breakpoint, told as what the caller asked for."""
        if stop.breakpoint is not temporary:
            return stop
        stop = stop.replace(cause=Cause.UNTIL, breakpoint=None)
        self.last_stop = stop
        return stop

    @spelled_out
    def step_over(self, *, deadline_s: float | None = None) -> Stop:
        """Steps, but runs a CALL, a REP instruction or a software interrupt to its end, and what handlers it meets.

        A recursive call that comes back to the same address deeper in the stack does not count.
        """
        here = self._instruction_here()
        if here is None or not (here.is_call or here.is_rep or here.is_interrupt):
            # The flags and not `handlers`, whose setter a Ctrl-C might cut short.
            flags, self.step_flags, self._ready_for = self.step_flags, self.step_flags | _OVER, _NOT_READY
            try:
                return self.step(deadline_s=STEP_DEADLINE_S if deadline_s is None else deadline_s)
            finally:
                self.step_flags, self._ready_for = flags, _NOT_READY
        stack, after = self.regs.rsp, self.mode.linear(here.address + here.size_bytes)
        temporary = self.breakpoints.add(
            after, temporary=True, condition=None if here.is_rep else lambda cpu: cpu.regs.rsp >= stack
        )
        try:
            stop = self.run(deadline_s=deadline_s)
        finally:
            if temporary in self.breakpoints:
                self.breakpoints.remove(temporary)
        if stop.breakpoint is not temporary:
            return stop
        stop = stop.replace(cause=Cause.STEP, breakpoint=None)
        self.last_stop = stop
        return stop

    @spelled_out
    def step_out(self, *, deadline_s: float | None = None, limit: int = 100_000) -> Stop:
        """Runs to the RET of the current function and steps it; calls on the way are stepped over.

        Args:
            limit: give up after so many instructions of this function.
        """
        limit = integer(limit, "limit", 1)
        stack, interrupts = self.regs.rsp, self.engine.interrupts
        for _ in range(limit):
            here = self._instruction_here()
            leaving = here is not None and here.is_ret and self.regs.rsp >= stack
            stop = self.step() if leaving else self.step_over(deadline_s=deadline_s)
            if leaving or stop.cause is not Cause.STEP:
                return stop
            if self.engine.interrupts != interrupts:
                self.last_stop = stop = stop.replace(cause=Cause.INTERRUPTED)
                return stop
        raise MisuseError(f"no RET within {limit:,} instructions of this function; give a larger limit")

    @spelled_out
    def record(self, steps: int, *, deadline_s: float | None = None, progress: bool | None = None) -> StepRecord:
        """Single-steps and keeps every step: the registers after it, and the exit it made.

        The loop runs in the core.  A breakpoint, an unhandled exit or the deadline ends it early;
        `last_stop` says which.  After Ctrl-C the steps so far are in `last_record`.

        Args:
            steps: at most this many.
            deadline_s: end after this long, in seconds.
            progress: show a progress bar; None: when it takes over a second.

        Returns:
            A `StepRecord` of 152 bytes a step.

        Raises:
            MisuseError: `steps` is not positive, or does not fit memory.
            BusyError, HostLost, KeyboardInterrupt: as `step`.
        """
        recorder = Recorder(self, steps, progress=progress)
        try:
            recorder.run(deadline_s)
        finally:
            self.last_record = recorder.record()
        return self.last_record

    @property
    def exit_log(self) -> ExitLog | None:
        """The log that `log_exits` started, or None."""
        return self.engine.log

    def log_exits(self, capacity: int = CAPACITY) -> ExitLog:
        """From now on notes every exit to user space; a second call starts a new log.

        Costs a fraction of a microsecond an exit (benchmarks/exit_roundtrip.py). String I/O of many units is one exit.

        Args:
            capacity: how many of the latest exits are kept in full; all are counted.

        Raises:
            MisuseError: not 1 to 10,000,000.
        """
        self.engine.log = ExitLog(capacity)
        return self.engine.log

    def interrupt(self) -> None:
        """Stops the vcpu if it is running; for other threads."""
        self.engine.interrupt()

    @spelled_out
    def watch(self, where: int | str, size_bytes: int = 8, kind: str = "w", **options: Any) -> Breakpoint:
        """Short for `breakpoints.watch`."""
        return self.breakpoints.watch(where, size_bytes, kind, **options)

    @property
    def mode(self) -> CodeMode:
        """The mode the vcpu is in: width of code, privilege level, paging."""
        return self.regs.mode

    @spelled_out
    def translate(self, gva: int) -> int | None:
        """Guest physical address of a linear address under the current page tables, or None if unmapped.

        Source: KVM_TRANSLATE, which says nothing of rights.
        """
        answer = self.vcpu.translate(integer(gva, "gva", 0, (1 << 64) - 1))
        return int(answer.physical_address) if answer.valid else None

    @spelled_out
    def walk(
        self, gva: int | str, access: str | None = None, *, user: bool | None = None, cr3: int | None = None
    ) -> GuestWalk:
        """The guest's tables on the way of a linear address (or symbol): each entry, where they lead, who may go.

        `access`, "read", "write" or "execute", asks what becomes of it, made at CPL 3 or not (`user`; None: as the vcpu
        is now); `cr3` is that of another address space. AddressError if that is no memory.
        """
        from kvmbench.mmu.guest_walk import walk_of

        return walk_of(self, self.symbols.resolve(gva), access, user=user, cr3=cr3)

    @spelled_out
    def address_space(self, cr3: int | None = None) -> AddressSpace:
        """All that the guest's tables map, in ranges; MisuseError if paging is off."""
        from kvmbench.mmu.address_space import address_space_of

        return address_space_of(self, cr3)

    @spelled_out
    def read(self, gva: int | str, length_bytes: int) -> bytes:
        """Bytes at a linear address, page by page; as many as are mapped to memory."""
        gva = self.symbols.resolve(gva)
        length_bytes = integer(length_bytes, "length_bytes", 0)
        found = b""
        while length_bytes > len(found):
            at = (gva + len(found)) & (1 << 64) - 1
            size = min(length_bytes - len(found), 4096 - at % 4096)
            gpa = self.translate(at)
            if gpa is None or not self.machine.memory.holds(gpa, size):
                break
            found += self.machine.memory.read(gpa, size)
        return found

    def read_code(self, gva: int, length_bytes: int) -> bytes:
        """`read`, for stops and records, which outlive the host: nothing once that is gone."""
        try:
            return self.read(gva, length_bytes)
        except (ClosedError, HostLost):
            return b""

    @spelled_out
    def disassemble(self, where: int | str | None = None, count: int = 8) -> Disassembly:
        """The next `count` instructions from rip, or from an address or symbol, in the current mode."""
        mode = self.mode
        address = self.regs.rip if where is None else self.symbols.resolve(where) - mode.code_base
        marked = [one.address - mode.code_base for one in self.breakpoints if not one.is_watchpoint]
        base, rip = mode.code_base, self.regs.rip
        return disassemble(
            self.read, address=address, bits=mode.bits, count=count, symbols=self.symbols, code_base=base, rip=rip,
            breakpoints=marked,
        )  # fmt: skip

    def _instruction_here(self) -> Any:
        listing = self.disassemble(count=1)
        return listing[0] if len(listing) else None

    def __dir__(self) -> list[str]:
        # What a person types; the rest is for the other files of this package.
        return [name for name in super().__dir__() if not name.startswith("_") and name not in _INSIDE]

    def __repr__(self) -> str:
        if self.running:
            return f"<Cpu {self.index} running>"
        return f"<Cpu {self.index} {self.last_stop!r}>" if self.last_stop else f"<Cpu {self.index} not started>"
