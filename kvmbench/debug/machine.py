"""`kb.Machine`: a virtual machine with vcpus that can be debugged."""

from __future__ import annotations

import threading
from typing import Any

from kvmbench.arguments import spelled_out
from kvmbench.debug.cpu import Cpu
from kvmbench.debug.stop import Stop
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import BusyError, ClosedError
from kvmbench.machine import Machine as BareMachine
from kvmbench.machine import Program
from kvmbench.uapi import constants as c


class Machine(BareMachine):
    """A virtual machine: memory, devices, and vcpus to step, run and look into.

    Takes what `kvmbench.machine.Machine` takes: ``Machine(host, memory="16M", mode="long", vcpus=1)``.

    Attributes:
        symbols: names and source lines of everything loaded.
        cpus: a `Cpu` for each vcpu.
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
            self.cpus = tuple(Cpu(self, vcpu, index) for index, vcpu in enumerate(self.vcpus))
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

    def run(self, *, deadline_s: float | None = None) -> list[Stop]:
        """Runs all vcpus at once, a thread each, until one stops; then stops the others.

        Args:
            deadline_s: stop all after this long, in seconds.

        Returns:
            A stop for each vcpu, in their order; those that were held have cause "interrupted".

        Raises:
            The first error of any vcpu, after all have stopped.
        """
        stops: list[Stop | None] = [None] * len(self.cpus)
        failures: list[BaseException] = []
        one_stopped = threading.Event()

        def drive(cpu: Cpu) -> None:
            try:
                stops[cpu.index] = cpu.run(deadline_s=deadline_s)
            except BaseException as error:
                failures.append(error)
            finally:
                one_stopped.set()

        threads = [
            threading.Thread(target=drive, args=(cpu,), name=f"vcpu {cpu.index}", daemon=True) for cpu in self.cpus
        ]
        for thread in threads:
            thread.start()
        try:
            one_stopped.wait()
        finally:
            # Again and again: a vcpu that is just about to start does not hear the first call.
            for cpu, thread in zip(self.cpus, threads, strict=True):
                while thread.is_alive():
                    cpu.interrupt()
                    thread.join(0.01)
        if failures:
            raise failures[0]
        return [stop for stop in stops if stop is not None]

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
