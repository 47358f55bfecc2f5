"""`kb.Machine`: a virtual machine with vcpus that can be debugged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kvmbench.arguments import integer, spelled_out
from kvmbench.debug.coalesced import CoalescedWrites
from kvmbench.debug.cpu import Cpu
from kvmbench.debug.engine import check_deadline
from kvmbench.debug.gate import Gate
from kvmbench.debug.lockstep import Lockstep, schedule_for
from kvmbench.debug.lockstep_record import LockstepRecord
from kvmbench.debug.machine_breakpoints import MachineBreakpoints
from kvmbench.debug.schedule import Schedule
from kvmbench.debug.stops import Stops
from kvmbench.debug.symbols import Symbols
from kvmbench.debug.together import OthersRunning, Together, why_idle, why_over
from kvmbench.debug.written import WrittenBytes
from kvmbench.errors import BusyError, ClosedError, KvmbenchError, MisuseError
from kvmbench.machine import Machine as BareMachine
from kvmbench.machine import Program
from kvmbench.uapi import constants as c

if TYPE_CHECKING:
    from kvmbench.mmu.xray import Xray

# How soon a Ctrl-C is heard at the latest.
_HEAR_S = 0.1


class Machine(BareMachine):
    """A virtual machine: memory, devices, and vcpus to step, run and look into.

    Takes what `kvmbench.machine.Machine` takes: ``Machine(host, memory="16M", mode="long", vcpus=1)``.

    Attributes:
        symbols: names and source lines of everything loaded.
        cpus: a `Cpu` for each vcpu.
        breakpoints: breakpoints and watchpoints for all vcpus.
    """

    @spelled_out
    def __init__(self, host: Any, **options: Any) -> None:
        spelled_out(BareMachine.__init__)(self, host, **options)
        try:
            self.symbols = Symbols()
            #: Page number to enum kb_protection: what watchpoints of all vcpus took out of the guest.
            self.protected: dict[int, int] = {}
            supported = self.vm.check_extension(c.KVM_CAP_SET_GUEST_DEBUG2)
            self.can_hold_interrupts = bool(supported & c.KVM_GUESTDBG_BLOCKIRQ)
            #: Takes writes out of KVM's ring, once there is something to take (`coalesce`).
            self.coalesced: CoalescedWrites | None = None
            self.gate = Gate(self)
            self.written = WrittenBytes(self)
            self.cpus = tuple(Cpu(self, vcpu, index) for index, vcpu in enumerate(self.vcpus))
            self.breakpoints = MachineBreakpoints(self)
        except BaseException:
            self.close()
            raise

    @property
    def cpu(self) -> Cpu:
        """The first vcpu."""
        return self.cpus[0]

    def check_open(self) -> None:
        """Raises ClosedError if the machine or its host was closed."""
        if self.closed:
            raise ClosedError("the machine is closed; make a new one with kvmbench.Machine(host)")

    @spelled_out
    def run(self, *, cpus: Iterable[int | Cpu] | None = None, deadline_s: float | None = None) -> Stops:
        """Runs vcpus at once, a thread each, until one stops; then holds the others.

        Args:
            cpus: those to run, by index or as `Cpu`; None: all but those that are `Cpu.held`, have halted or shut down.
            deadline_s: stop all after this long, in seconds.

        Returns:
            A stop for each vcpu that ran, in their order; those that were held have cause "interrupted", and
            `Stop.held` says for what.

        Raises:
            MisuseError: no such vcpu, or none that could run.
            BusyError, HostLost: as `Cpu.run`; the first error of any vcpu, after all have stopped.
            KeyboardInterrupt: Ctrl-C, after all have stopped.
        """
        check_deadline(deadline_s)
        together = Together(self._to_run(cpus), deadline_s=deadline_s)
        try:
            together.start()
            # With an end: a Ctrl-C that comes just before the thread sleeps is seen only when it wakes.
            while not together.stopped.wait(_HEAR_S):
                pass
            return together.hold("")
        except KeyboardInterrupt:
            together.hold("Ctrl-C")
            raise

    def xray(self) -> Xray:
        """KVM's own page tables of this machine, out of the host kernel's memory, with the vcpus held meanwhile.

        Raises:
            UnsupportedError: the host's kernel cannot be read: not root, no /proc/kcore, no BTF, drgn missing.
            HostError: the VM was not found there.
        """
        from kvmbench.mmu.xray import take

        self.check_open()
        kernel = self.host.host_kernel
        kernel.load()  # may take seconds, and needs no vcpu to wait
        with self.gate.hold():
            return take(kernel, self.vm.handle, [cpu.vcpu.handle for cpu in self.cpus])

    @contextlib.contextmanager
    def others_running(self, cpu: int | Cpu, *, cpus: Iterable[int | Cpu] | None = None) -> Iterator[OthersRunning]:
        """Lets other vcpus run freely while one is stepped: ``with m.others_running(cpu): cpu.step()``.

        What gdb calls ``set scheduler-locking off``; without it a step moves its vcpu only (``on``). When one of the
        others stops by itself all are held, and `cpu` is interrupted if it runs; `OthersRunning.stopped` tells.

        Args:
            cpu: the one that the caller moves.
            cpus: those that run, as for `run`; None: all others but those held, halted or shut down.

        Raises:
            MisuseError, BusyError: as `run`.
            The first error of any vcpu, at the end of the block, unless the block raised one itself.
        """
        mine = self._named([cpu])[0]
        group = OthersRunning(self._to_run(cpus, without=mine), beside=mine)
        try:
            group.start()
            yield group
        except BaseException:
            with contextlib.suppress(KvmbenchError):
                group.end()
            raise
        group.end()

    @spelled_out
    def lockstep(
        self,
        steps: int | None = None,
        *,
        order: str | Iterable[int] | Schedule | None = None,
        seed: int | None = None,
        cpus: Iterable[int | Cpu] | None = None,
        at_halt: str = "skip",
        deadline_s: float | None = None,
        progress: bool | None = None,
    ) -> LockstepRecord:
        """Steps vcpus one instruction at a time in a chosen order, and keeps every step.

        The same order from the same state gives the same steps: only one vcpu is in the guest at a time. What the
        guest takes from outside (the TSC, timers, devices that answer differently) is not in the order.

        A turn is one instruction with all its exits. A vcpu that halted, or waits in the kernel for an interrupt, INIT
        or SIPI, is passed over in its turns, and the record says so. Anything else than a plain step (a breakpoint, the
        guest's exit, an error, a triple fault) ends it for all.

        Args:
            steps: how many turns; None: those of `order`.
            order: "round-robin" (what None means), vcpus such as ``[0, 1, 1, 0]`` or ``"0 1*2 0"``, repeated until
                `steps`, or a `Schedule`, such as that of an earlier recording.
            seed: draw the order from a generator; see `Schedule.random`.
            cpus: those that take part in round-robin and with a seed; None: all but those that are `Cpu.held`.
            at_halt: "skip" passes over a vcpu that halted, "end" ends at the first that does.
            deadline_s: end after this long, in seconds.
            progress: show a progress bar; None: when it takes over a second.

        Returns:
            A `LockstepRecord`. After Ctrl-C or an error the steps so far are in `last_lockstep`.

        Raises:
            MisuseError: no such vcpu, an empty order, or none that could take a turn.
            BusyError, HostLost, KeyboardInterrupt: as `Cpu.step`.
        """
        self.last_lockstep = None
        self.check_open()
        if at_halt not in ("skip", "end"):
            raise MisuseError(f"at_halt={at_halt!r}: give 'skip' or 'end'")
        if cpus is not None and not (order is None or (isinstance(order, str) and order == "round-robin")):
            raise MisuseError("an order names its vcpus itself; give cpus with round-robin or a seed")
        among = [cpu for cpu in self.cpus if not cpu.held] if cpus is None else self._named(cpus)
        if not among and (order is None or isinstance(order, str)):
            raise MisuseError("no vcpu to step: all are held. Name those that are to step all the same: cpus=[...]")
        schedule = schedule_for(order, steps, seed, [cpu.index for cpu in among])
        named = self._named(schedule.vcpus)
        over = {cpu.index: why for cpu in named if (why := why_over(cpu))}
        if len(over) == len(named):
            said = "; ".join(f"vcpu {index} {why}" for index, why in over.items())
            raise MisuseError(f"no vcpu to step: {said}. m.reset() starts anew, and so does writing its rip")
        lockstep = Lockstep(named, schedule, end_at_halt=at_halt == "end", over=over, progress=progress)
        try:
            lockstep.run(deadline_s)
        finally:
            if lockstep.begun:
                self.last_lockstep = lockstep.record()
        assert self.last_lockstep is not None
        return self.last_lockstep

    #: What the last `lockstep()` kept, even if it was interrupted.
    last_lockstep: LockstepRecord | None = None

    @spelled_out
    def coalesce(self, addr: int, size_bytes: int, *, pio: bool = False) -> None:
        """Has KVM keep the guest's writes to a range back, so that they cost no exit each.

        Devices get them before the next exit is served, and before a run or step returns; a `StopRequest` counts in
        the first case only. They are no exits: no catch and no log of exits sees them.
        ``m.vm.unregister_coalesced_mmio`` ends it.
        Capability: COALESCED_MMIO; COALESCED_PIO for ports. Source: KVM API, KVM_REGISTER_COALESCED_MMIO.

        Args:
            addr: guest-physical address, or the first port.
            size_bytes: of the range.
            pio: these are ports.

        Raises:
            BusyError: a vcpu is running.
            MisuseError: a number does not fit, or this is no range.
        """
        self.check_open()
        for cpu in self.cpus:
            if cpu.running:
                raise BusyError(f"vcpu {cpu.index} is running; cpu.interrupt() stops it")
        self.vm.register_coalesced_mmio(addr, size_bytes, pio=pio)
        self.coalesced = self.coalesced or CoalescedWrites(self.bus)
        for cpu in self.cpus:
            cpu.forget_request()

    def interrupt(self) -> None:
        """Stops all vcpus that are running; for other threads."""
        for cpu in self.cpus:
            if cpu.running:
                cpu.interrupt()

    def _named(self, cpus: Iterable[int | Cpu]) -> list[Cpu]:
        """The vcpus that a caller named, in their order."""
        try:
            named = list(cpus)
        except TypeError:
            raise MisuseError(f"cpus={cpus!r}: give a list of vcpus, such as [0, 1]") from None
        found = set()
        for each in named:
            index = each.index if isinstance(each, Cpu) and each.machine is self else each
            if isinstance(index, Cpu):
                raise MisuseError(f"{index!r} is a vcpu of another machine")
            index = integer(index, "vcpu")
            if not 0 <= index < len(self.cpus):
                raise MisuseError(f"there is no vcpu {index}; there are 0 to {len(self.cpus) - 1}")
            if index in found:
                raise MisuseError(f"vcpu {index} is named twice")
            found.add(index)
        return [self.cpus[index] for index in sorted(found)]

    def _to_run(self, cpus: Iterable[int | Cpu] | None, *, without: Cpu | None = None) -> list[Cpu]:
        self.check_open()
        if cpus is not None:
            chosen = self._named(cpus)
            if not chosen or without in chosen:
                raise MisuseError(
                    f"cpus={cpus!r}: name at least one vcpu"
                    if not chosen
                    else f"vcpu {without!r} is moved by the caller"
                )
        else:
            idle = {cpu.index: why_idle(cpu) for cpu in self.cpus if cpu is not without}
            chosen = [self.cpus[index] for index, why in idle.items() if not why]
            if not chosen:
                said = "; ".join(f"vcpu {index} {why}" for index, why in idle.items()) or "there is no other"
                raise MisuseError(f"no vcpu to run: {said}. Name those that are to run all the same: cpus=[...]")
        for cpu in chosen:
            if cpu.running:
                raise BusyError(f"vcpu {cpu.index} is running; cpu.interrupt() stops it")
        return chosen

    def _loaded(self, program: Program) -> None:
        # Programs that this one overwrote are gone from the list, and their symbols with them.
        self.symbols.clear()
        for each in self.programs:
            self.symbols.add(each)
        for cpu in self.cpus:
            cpu.stop_serial += 1

    def _check_idle(self) -> None:
        for cpu in self.cpus:
            if cpu.running:
                raise BusyError(f"vcpu {cpu.index} is running; cpu.interrupt() stops it")

    def _start(self) -> None:
        cpus = getattr(self, "cpus", ())
        for cpu in cpus:
            # KVM would apply an unfinished IN to the registers of the new start.
            cpu.engine.complete_exit(discard=True)
        super()._start()
        for cpu in cpus:
            cpu.state.current = cpu.state.previous = None
            cpu.stop_serial += 1
