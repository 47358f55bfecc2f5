"""Vcpus that run at once, a thread each: the first that stops has all others held.

Facts: a kick that comes before its vcpu has entered the core is lost (`core/vcpu.c`), and `Engine.go` starts with a
clean flag, so whoever wants a vcpu out asks until it is out (`test_a_vcpu_that_is_about_to_start_is_held_too`).
The thread whose vcpu stopped first kicks the others itself: to wake another thread for it would cost as long again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmbench.debug.stop import Cause, Stop
from kvmbench.debug.stops import Stops, what_happened
from kvmbench.errors import KvmbenchError
from kvmbench.uapi import constants as c

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

# Between two kicks; doubled up to the second.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.001, 0.02
_WAITING = {
    int(c.KVM_MP_STATE_UNINITIALIZED): "it waits for INIT",
    int(c.KVM_MP_STATE_INIT_RECEIVED): "it waits for SIPI",
    int(c.KVM_MP_STATE_HALTED): "it waits for an interrupt",
}


def waiting_for(cpu: Cpu) -> str:
    """What a vcpu waits for in the kernel, in words; "" if it waits for nothing, or that cannot be asked."""
    if not cpu.machine.irqchip:
        return ""  # a HLT is an exit then
    with contextlib.suppress(KvmbenchError):
        return _WAITING.get(cpu.vcpu.get_mp_state(), "")
    return ""


class Together:
    """One run of several vcpus at once.

    Attributes:
        stopped: set once one of them has stopped, or `hold` was called.
    """

    def __init__(self, cpus: Sequence[Cpu], *, deadline_s: float | None = None, beside: Cpu | None = None) -> None:
        """Starts nothing yet.

        Args:
            beside: a vcpu that is moved by the caller meanwhile; it is interrupted as well when one of them stops.
        """
        self._cpus = tuple(cpus)
        self._deadline_s = deadline_s
        self._beside = beside
        self._lock = threading.Lock()
        self._stops: dict[int, Stop] = {}
        self._failures: dict[int, BaseException] = {}
        self._first: Cpu | None = None
        self._began_ns = self._ended_ns = 0  # of the holding
        self._because = ""
        self.stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._drive, args=(cpu,), name=f"vcpu {cpu.index}", daemon=True) for cpu in cpus
        ]

    def start(self) -> None:
        """Lets all of them go. After a Ctrl-C within it `hold` is due all the same."""
        for thread in self._threads:
            thread.start()

    def _drive(self, cpu: Cpu) -> None:
        try:
            if self.stopped.is_set():
                self._stops[cpu.index] = _not_run(cpu)
            else:
                self._stops[cpu.index] = cpu.run(deadline_s=self._deadline_s)
        except BaseException as error:
            self._failures[cpu.index] = error
        finally:
            self._ended(cpu)

    def _ended(self, cpu: Cpu) -> None:
        now = time.monotonic_ns()
        with self._lock:
            self._ended_ns = max(self._ended_ns, now)
            is_first = not self.stopped.is_set()
            if is_first:
                self._first, self._began_ns = cpu, now
                self.stopped.set()
        if is_first:
            self._kick([*self._cpus, *([self._beside] if self._beside is not None else [])])

    def _kick(self, cpus: Sequence[Cpu]) -> None:
        for cpu in cpus:
            # A host that is lost or closed has ended the run already, and tells the thread that runs it.
            if cpu.running:
                with contextlib.suppress(KvmbenchError):
                    cpu.interrupt()

    def hold(self, because: str) -> Stops:
        """Takes all that still run out of the guest, and waits until they are; may be called again.

        Args:
            because: why, if none of them has stopped by itself.

        Raises:
            The first error of any vcpu.
            KeyboardInterrupt: Ctrl-C meanwhile; all are out by then.
        """
        pressed: KeyboardInterrupt | None = None
        while True:
            try:
                self._hold(because)
                break
            except KeyboardInterrupt as again:
                pressed = again
        stops = self._told()
        if pressed is not None:
            raise pressed
        for error in self._failures.values():
            raise error
        return stops

    def _hold(self, because: str) -> None:
        with self._lock:
            if not self.stopped.is_set():
                self._began_ns, self._because = time.monotonic_ns(), because
                self.stopped.set()
        pause_s = _FIRST_PAUSE_S
        # A thread that was started and has not begun is not alive yet; when it begins, it sees that all are stopped.
        while alive := [pair for pair in zip(self._cpus, self._threads, strict=True) if pair[1].is_alive()]:
            self._kick([cpu for cpu, _ in alive])
            for _, thread in alive:
                thread.join(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def _told(self) -> Stops:
        """Writes into each stop of a held vcpu why it was held."""
        first = None
        because = self._because
        if self._first is not None:
            first = self._stops.get(self._first.index)
            if first is not None:
                because = what_happened(first)
            else:
                because = f"vcpu {self._first.index} failed: {self._failures[self._first.index]}"
        stops = []
        for cpu in self._cpus:
            stop = self._stops.get(cpu.index)
            if stop is None:
                continue
            if stop is not first and stop.cause is Cause.INTERRUPTED:
                words = "; ".join(each for each in (because, waiting_for(cpu)) if each)
                cpu.last_stop = stop = stop.replace(held=words)
            stops.append(stop)
        held_s = max(0, self._ended_ns - self._began_ns) * 1e-9 if self._began_ns else 0.0
        return Stops(stops, first=first, because=because, held_s=held_s)


def _not_run(cpu: Cpu) -> Stop:
    """The stop of a vcpu that was held before it had begun."""
    state = cpu.state.read()
    cpu.last_stop = stop = Stop(
        Cause.INTERRUPTED,
        state.rip,
        vcpu=cpu.index,
        state=state,
        before=state,
        context=cpu,
        serial=cpu.stop_serial,
    )
    return stop


def why_over(cpu: Cpu) -> str:
    """Whether a vcpu halted with nothing to wake it, or shut down, and was not moved since; in words, or "".

    It would run past its end, or die again.
    """
    stop = cpu.last_stop
    if stop is None or not stop.is_current or stop.cause not in (Cause.HALT, Cause.SHUTDOWN):
        return ""
    if cpu.running or cpu.regs.rip != stop.rip:
        return ""
    return "has halted" if stop.cause is Cause.HALT else "has shut down"


def why_idle(cpu: Cpu) -> str:
    """Why a vcpu is not run with the others unless it is named, in words; "" if it is."""
    return "is held" if cpu.held else why_over(cpu)


class OthersRunning(Together):
    """The vcpus that run while `Machine.others_running` moves another.

    Attributes:
        stops: their stops, once the block has ended; None before.
    """

    stops: Stops | None = None

    def end(self) -> Stops:
        """Holds them; to be called once."""
        self.stops = self.hold("others_running ended")
        return self.stops

    def __repr__(self) -> str:
        return repr(self.stops) if self.stops is not None else "the other vcpus run"
