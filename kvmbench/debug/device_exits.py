"""The exit that a vcpu waits in until somebody answers it: a device, or memory that left the guest.

An exit that is pending, whether its device has seen it and the answer on its way are
one state, touched by every path through the engine (a run, a step, a recording, a
Ctrl-C, a register write, a reset), and each bug found here so far was two of these
paths that did not know of each other.
"""

from __future__ import annotations

import struct
from threading import get_ident
from typing import TYPE_CHECKING, Any

from kvmbench.core import wire
from kvmbench.core._wire import ffi as wire_ffi
from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.exit_log import ExitLog
from kvmbench.uapi import constants as c
from kvmbench.uapi import ffi

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu
    from kvmbench.debug.engine import Engine

# How many exits may pass before the clock is looked at.
CLOCK_EVERY = 256

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
SERVED = frozenset({_IO, _MMIO})


class DeviceExits:
    """Serves the I/O and MMIO exits of one vcpu.

    Attributes:
        pending: an exit waits in KVM to be completed.
        served: a device has seen it.
        seen: what the device has said to its accesses so far, one but for string I/O.
        holder: whose reply holds it: a recording has a reply of its own, and the exit may outlive it.
        answer: the bytes that complete it, for the next request.
        log: where exits are noted, or None.
    """

    def __init__(self, cpu: Cpu, engine: Engine) -> None:
        self._cpu = cpu
        self._engine = engine
        self._bus = cpu.machine.bus
        self._memory = cpu.machine.memory
        self.pending = False
        self.served = True
        self.seen: list[Any] = []
        self.holder = cpu.execution
        self.answer = b""
        self.log: ExitLog | None = None

    def serve_quickly(self, execution: Any) -> Any:
        """Runs on, serving single OUTs, until something else comes or a device wants a stop (returned).

        What comes is left in the reply for the caller.
        """
        reply, engine = execution.stop, self._engine
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
                for _ in range(CLOCK_EVERY):
                    self.served = False
                    quick_at[0] = 0  # also tells a reply that came from one that did not: see `Engine.interrupted`
                    core_again(again)
                    quick = quick_at[0]
                    if quick < _QUICK_OUT:
                        break
                    if quick != last or bus.changes != changes:
                        last, changes = quick, bus.changes
                        port, size_bytes = quick & 0xFFFF, quick >> 16 & 7
                        handler = port_out[port]
                    if log is not None:
                        log.add("out", port, size_bytes, value_at[0], self.rip(reply))
                    wanted = handler(port, value_at[0], size_bytes)
                    self.served = True
                    if wanted is not None:
                        self.pending = True
                        return wanted
                    if engine.attention:
                        break
            except Exception:  # from the device, which has seen the exit: it does not see it again
                self.pending = self.served = True
                raise
        finally:
            channel.held.discard(thread)
            if channel.doomed is not None:
                channel.bury(thread)
        execution.check()
        return None

    def serve(self) -> Any:
        """Lets a device, or memory that left the guest, answer the exit; returns what it wants stopped, or None.

        String I/O is delivered to its end, since the guest has retired it all; the first wish counts. A device that is
        itself cut short by Ctrl-C is asked again.
        """
        reply = self.holder.stop
        wanted: Any = None
        earlier = self.deliver_coalesced()
        if self.log is not None:
            self._note(reply)
        try:
            if reply.exit_reason == _IO:
                data = self.holder.io_data()
                if reply.io_is_out:
                    wanted = self._bus.out_string(reply.io_port, data, reply.io_size, self.seen)
                else:
                    self.answer = self._bus.in_string(reply.io_port, reply.io_size, reply.io_count, self.seen)
            else:
                gpa, size = reply.mmio_gpa, reply.mmio_size
                if self._is_memory(gpa, bool(reply.mmio_is_write)):
                    wanted = self._access_memory(gpa, size)
                elif reply.mmio_is_write:
                    if not self.seen:
                        self.seen.append(self._bus.mmio_write(gpa, reply.value & (1 << 8 * size) - 1, size))
                    wanted = self.seen[0]
                else:
                    if not self.seen:
                        self.seen.append(self._bus.mmio_read(gpa, size))
                    self.answer = self.seen[0].to_bytes(size, "little")
        except Exception:
            # The device has seen the exit: it does not see it again, or no run would get past it.
            self.served = True
            raise
        self.served = True
        return earlier if wanted is None else wanted

    def deliver_coalesced(self) -> Any:
        """Hands the devices what the guest wrote before, and KVM kept back; returns what one wants stopped, or None."""
        coalesced = self._cpu.machine.coalesced
        return None if coalesced is None else coalesced.deliver(self._cpu.vcpu)

    def _note(self, reply: Any) -> None:
        """Puts the exit that is about to be served into the log; string I/O is one exit."""
        assert self.log is not None
        if reply.exit_reason == _IO:
            kind, where, size = ("out" if reply.io_is_out else "in"), int(reply.io_port), int(reply.io_size)
        else:
            kind, where = ("mmio write" if reply.mmio_is_write else "mmio read"), int(reply.mmio_gpa)
            size = int(reply.mmio_size)
        value = int(reply.value) & (1 << 8 * size) - 1 if kind in ("out", "mmio write") else None
        self.log.add(kind, where, size, value, self.rip(reply))

    @staticmethod
    def rip(reply: Any) -> int | None:
        """Where an exit came from, or None: KVM_CAP_SYNC_REGS brings it; to ask for it would cost an ioctl."""
        return int(_U64.unpack_from(wire_ffi.buffer(reply), _RIP_AT)[0]) if reply.valid & wire.KB_VALID_REGS else None

    def _is_memory(self, gpa: int, is_write: bool) -> bool:
        # A watchpoint, of any vcpu, takes its page out of the guest, and setting one takes away the whole region for a
        # moment. What the guest may not write is left to the bus. KVM cuts accesses at pages.
        for region in self._memory.regions:
            if region.gpa <= gpa < region.end:
                return not (is_write and region.readonly)
        return False

    def _access_memory(self, gpa: int, size: int) -> list[Breakpoint] | None:
        """Does what the guest would have done to a page that a watchpoint protects; the watchpoints it meets."""
        reply = self.holder.stop
        is_write = bool(reply.mmio_is_write)
        if is_write:
            self._memory.write(gpa, reply.value.to_bytes(8, "little")[:size])
        else:
            self.answer = self._memory.read(gpa, size)
        return self._cpu.breakpoints.met_by_access(gpa, size, is_write) or None
