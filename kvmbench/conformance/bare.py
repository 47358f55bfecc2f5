"""A vcpu with nothing of ours between KVM_SET_GUEST_DEBUG and KVM_RUN.

`Bare.run` is one KVM_RUN: no step is repeated, no exit completed, TF renewed
only when asked. What comes back is told in a few words, with labels of the
guest for addresses, so that lists of them compare by eye and by program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from kvmbench.conformance.prepared import Prepared, place
from kvmbench.core import wire
from kvmbench.host.execution import Execution
from kvmbench.machine import Machine
from kvmbench.uapi import ExitReason, ffi
from kvmbench.uapi import constants as c

DEADLINE_NS = 1_000_000_000
DONE_PORT = 0xF4
#: What a guest does at its end: it leaves through a port that nothing else uses.
DONE = f"done: out {DONE_PORT:#x}, al\n"

ENABLE: int = c.KVM_GUESTDBG_ENABLE
STEP: int = c.KVM_GUESTDBG_SINGLESTEP
SW_BP: int = c.KVM_GUESTDBG_USE_SW_BP
HW_BP: int = c.KVM_GUESTDBG_USE_HW_BP
BLOCKIRQ: int = c.KVM_GUESTDBG_BLOCKIRQ
INJECT_DB: int = c.KVM_GUESTDBG_INJECT_DB
INJECT_BP: int = c.KVM_GUESTDBG_INJECT_BP


class Bare(Prepared[Machine]):
    """A machine with one vcpu, a program in it, and KVM_RUN. Takes what `Prepared` takes."""

    def __init__(self, host: Any, source: str, *, handlers: dict[int, str] | None = None, **options: Any) -> None:
        super().__init__(Machine, host, source, handlers, options)
        try:
            self.vcpu = self.machine.vcpus[0]
            self.execution = Execution(host.core, self.vcpu.handle)
            self.execution.request.mode = wire.KB_RUN
            self.execution.request.deadline_ns = DEADLINE_NS
            self.execution.request.flags = wire.KB_FULL_SYNC | wire.KB_BARE
        except BaseException:
            self.machine.close()
            raise

    # --- what is debugged

    def debug(self, control: int = 0, debugreg: Iterable[int] = ()) -> None:
        """KVM_SET_GUEST_DEBUG with these from the next `run` on, called once."""
        request = self.execution.request
        request.debug_control = control
        registers = list(debugreg)
        for n in range(8):
            request.debugreg[n] = registers[n] if n < len(registers) else 0

    def renew(self) -> None:
        """Has the next `run` call KVM_SET_GUEST_DEBUG again though nothing changed."""
        # The core calls it when it does not know what is set; this says that it does not.
        self.vcpu.set_guest_debug(ENABLE)

    def arm(self) -> None:
        """KVM_SET_GUEST_DEBUG now, without a run."""
        self.execution.request.flags |= wire.KB_COMPLETE
        try:
            self.execution.send()
        finally:
            self.execution.request.flags &= ~wire.KB_COMPLETE

    def breakpoint(self, n: int, label: str, *, kind: int = 0, size_bytes: int = 1) -> None:
        """USE_HW_BP with one debug register; kind 0 is execute, 1 write, 3 read or write."""
        length = {1: 0, 2: 1, 4: 3, 8: 2}[size_bytes]
        registers = [0] * 8
        registers[n] = self.at(label)
        registers[7] = 0x400 | 2 << 2 * n | (kind | length << 2) << (16 + 4 * n)
        self.debug(HW_BP, registers)

    # --- the vcpu

    def go_to(self, label: str) -> None:
        """Writes rip, with KVM_SET_REGS."""
        self.vcpu.set_regs(rip=self.at(label))

    @property
    def regs(self) -> Any:
        """``struct kvm_regs`` of the last `run`."""
        return ffi.cast("struct kvm_regs *", self.execution.stop.regs)

    @property
    def sregs(self) -> Any:
        """``struct kvm_sregs`` of the last `run`."""
        return ffi.cast("struct kvm_sregs *", self.execution.stop.sregs)

    @property
    def events(self) -> Any:
        """``struct kvm_vcpu_events`` of the last `run`."""
        return ffi.cast("struct kvm_vcpu_events *", self.execution.stop.events)

    def where(self, address: int | None = None) -> str:
        """A linear address, that of rip unless given, as label."""
        if address is None:
            regs, sregs = self.regs, self.sregs
            address = int(regs.rip) + (0 if sregs.efer & 1 << 10 and sregs.cs.l else int(sregs.cs.base))
        return place(self.program, address)

    def run(self, answer: bytes = b"") -> str:
        """One KVM_RUN, and what came of it.

        Args:
            answer: completes an IN or an MMIO read that the last run left with.
        """
        self.execution.request.io_bytes = len(answer)
        try:
            self.execution.send_payload(answer)
        finally:
            self.execution.request.io_bytes = 0
        return self._told()

    def step(self, control: int = 0) -> str:
        """KVM_SET_GUEST_DEBUG with SINGLESTEP, then one KVM_RUN, as the kernel's selftest does it."""
        if self.execution.request.debug_control == STEP | control:
            self.renew()
        self.debug(STEP | control)
        return self.run()

    def steps(self, count: int, control: int = 0) -> Iterator[str]:
        """`step` so often; ends at the first that brings something else."""
        for _ in range(count):
            told = self.step(control)
            yield told
            if not told.startswith("#DB"):
                return

    def _dr6(self) -> int:
        # SDM volume 3, "Debug Status Register (DR6)": B0 to B3 may be set for breakpoints that are not enabled.
        # QEMU does so, also for addresses that another guest left in DR0 to DR3.
        request, dr6 = self.execution.request, int(self.execution.stop.debug_dr6)
        dr7 = request.debugreg[7] if request.debug_control & HW_BP else 0
        return dr6 & ~sum(1 << n for n in range(4) if not dr7 >> 2 * n & 3)

    def _told(self) -> str:
        stop = self.execution.stop
        if stop.cause == wire.KB_CAUSE_DEBUG:
            where = self.where(int(stop.debug_pc))
            vector = f"#{ {1: 'DB', 3: 'BP'}.get(stop.debug_exception, stop.debug_exception) }"
            elsewhere = "" if self.where() == where else f", rip at {self.where()}"
            dr6 = f", dr6 {self._dr6():#x}" if stop.debug_exception == 1 else ""
            return f"{vector} at {where}{dr6}{elsewhere}"
        if stop.cause == wire.KB_CAUSE_DEADLINE:
            return f"no exit, rip at {self.where()}"
        if stop.cause == wire.KB_CAUSE_ERROR:
            return f"KVM_RUN failed with errno {stop.error}"
        reason = int(stop.exit_reason)
        if reason == c.KVM_EXIT_IO and stop.io_port == DONE_PORT:
            return "done"  # where rip is then, has a point of its own
        if reason == c.KVM_EXIT_IO:
            return f"{'OUT' if stop.io_is_out else 'IN'} {stop.io_port:#x} at {self.where()}"
        if reason == c.KVM_EXIT_MMIO:
            return f"MMIO {'write' if stop.mmio_is_write else 'read'} {stop.mmio_gpa:#x} at {self.where()}"
        if reason == c.KVM_EXIT_SHUTDOWN:
            return "SHUTDOWN"  # where, differs: kvm_amd has reset the vcpu
        name = ExitReason(reason).name if reason in set(ExitReason) else f"exit {reason}"
        return f"{name} at {self.where()}"
