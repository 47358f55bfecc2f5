"""Which breakpoints a stop of the core means, and whether they stop the guest: conditions, counts, temporaries.

All that were reached at once are weighed, whatever their mechanisms are: a debug register fires before the INT3 at the
same place does, and a watchpoint is told while the next breakpoint is already at rip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvmbench.core import wire
from kvmbench.debug.arming import Plan
from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.guest_traps import BP_VECTOR, hand_on_int3
from kvmbench.debug.state import Stopped
from kvmbench.debug.stop import Cause, Stop
from kvmbench.debug.written import linear_pc
from kvmbench.errors import KvmbenchError, MisuseError

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu


class Hits:
    """Weighs the breakpoints of one vcpu.

    Args:
        make_stop: `Engine._stop`.
    """

    def __init__(self, cpu: Cpu, make_stop: Callable[..., Stop]) -> None:
        self._cpu = cpu
        self._make_stop = make_stop

    def first(self, reached: list[tuple[Breakpoint, Cause]], before: Stopped | bytes | None, done: int) -> Stop | None:
        """Weighs all that were reached at once; the stop of the first that stops the guest, or None: it goes on."""
        cpu, told = self._cpu, None
        stop: Stop | None = None
        for one, cause in reached:
            if stop is None:
                stop = self._make_stop(cause, before, done, breakpoint=one)  # first: conditions see the state
            else:  # not from the reply again: a condition may have written registers since
                cpu.last_stop = stop = stop.replace(cause=cause, breakpoint=one)
            if self._holds(one):
                told = told or stop
            if told is not None and not told.is_current:
                break  # a condition has moved the vcpu
        if told is not None:
            cpu.last_stop = told
        return told

    def _holds(self, one: Breakpoint) -> bool:
        cpu = self._cpu
        if one.cr3 is not None and not one.is_in(int(cpu.state.get_sregs().cr3)):
            one.elsewhere += 1
            return False
        if one.condition is not None:
            was_running, cpu.running = cpu.running, False
            try:
                holds = bool(one.condition(cpu))
            except KvmbenchError:
                raise
            except Exception as error:
                raise MisuseError(f"the condition of {one} failed: {error!r}") from error
            finally:
                cpu.running = was_running
            if not holds:
                one.passes += 1
                return False
        one.hits += 1
        counter = one if one.shared is None else one.shared
        if counter.ignore > 0:
            counter.ignore -= 1
            return False
        if one.temporary:
            if one.shared is not None:
                one.shared.remove()
            elif one in list(cpu.breakpoints):
                cpu.breakpoints.remove(one)
        return True

    def of_reply(self, reply: Any, plan: Plan, before: Stopped | bytes | None, done: int) -> Stop | None:
        """Finds and weighs the breakpoints for which the core came back; None lets the guest go on."""
        watches: list[Breakpoint] = []
        fired: list[Breakpoint] = []
        places = True
        if reply.cause == wire.KB_CAUSE_WATCH:
            watches = [one for n, one in enumerate(plan.watches) if reply.value >> n & 1]
        elif reply.cause == wire.KB_CAUSE_DEBUG and reply.debug_exception != 3:
            fired = [one for n, one in enumerate(plan.registers) if reply.debug_dr6 >> n & 1]
            watches = [one for one in fired if one.is_watchpoint]
            places = bool(fired)
        pc = linear_pc(reply)
        if reply.cause == wire.KB_CAUSE_DEBUG and reply.debug_exception == BP_VECTOR:
            byte = self._cpu.machine.written.at(pc)
            if byte is not None and byte.lifted_for == self._cpu.index:  # weighed before the step that met its INT3
                self._make_stop(Cause.STEP, before, done)
                hand_on_int3(self._cpu)
                return None
        reached = self._cpu.breakpoints.reached(pc) if places else []
        if not reached and not watches:
            # A byte of another vcpu's breakpoint, an address for it to compare, a breakpoint that was disabled
            # meanwhile; else a trap of the guest's own.
            if fired or reply.cause == wire.KB_CAUSE_STOP or self._cpu.index in self._cpu.machine.written.found:
                self._make_stop(Cause.STEP, before, done)  # for `Engine._retell`
                return None
            own = self._make_stop(Cause.GUEST_DEBUG, before, done)
            if reply.cause == wire.KB_CAUSE_DEBUG and reply.debug_exception == BP_VECTOR:
                hand_on_int3(self._cpu)
                return None
            return own
        all_of_them = [(one, Cause.WATCHPOINT) for one in watches] + [(one, Cause.BREAKPOINT) for one in reached]
        return self.first(all_of_them, before, done)

    def is_on_one(self, stepping: bool) -> bool:
        """On a breakpoint, or on a byte that stands there for another vcpu; while stepping only on a byte."""
        cpu, written = self._cpu, self._cpu.machine.written
        if not len(cpu.breakpoints) and not written:
            return False
        cpu.state.current = cpu.state.read()  # once for all of this
        here = cpu.mode.linear(cpu.regs.rip)
        if written and (cpu.index in written.found or written.at(here) is not None):
            return True
        return not stepping and bool(cpu.breakpoints.reached(here))
