"""The bytes that breakpoints write over instructions, for all vcpus of a machine: there while one runs, hidden always.

Facts that shape it. A vcpu runs into the byte of another's breakpoint, too, so the table is the machine's, a byte stays
until the last vcpu that wants it has stopped, and whoever comes to one that is not his steps over it. A HLT exit
comes with rip behind the HLT, an INT3 exit with rip on it (`test_a_breakpoint_stops_before_...`): both are told alike.
A guest may write over the byte; what it wrote is what the instruction is from then on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from kvmbench.core import wire
from kvmbench.core._wire import ffi as wire_ffi
from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.mechanism import OPCODES, Mechanism
from kvmbench.debug.overlay import Byte, Overlay
from kvmbench.errors import ClosedError, HostLost
from kvmbench.uapi import constants as c
from kvmbench.uapi import ffi

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu
    from kvmbench.machine.memory import Memory

_PAGE = 0xFFF
_HLT, _INT3 = OPCODES[Mechanism.HLT], OPCODES[Mechanism.INT3]
_CODE_BYTES = 16


class WrittenBytes:
    """``machine.written``.

    Attributes:
        version: changes whenever a vcpu that runs has to be told of a change.
        found: gpa of the byte that each vcpu came to with its last exit, by its index.
    """

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self._memory: Memory = machine.memory
        self._lock = threading.RLock()
        self._there: dict[int, Byte] = {}
        self._pages: dict[int, tuple[int, ...]] = {}  # offset in a page to gpas
        # None: a Ctrl-C came while its bytes were being put or taken away.
        self._wants: dict[int, tuple[Breakpoint, ...] | None] = {}
        self.version = 0
        self.found: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._there)

    @property
    def control(self) -> int:
        """KVM_GUESTDBG_* bits that every vcpu needs while they are there."""
        return int(c.KVM_GUESTDBG_USE_SW_BP) if any(one.opcode == _INT3 for one in self._there.values()) else 0

    def addresses(self, cpu: Cpu) -> set[int]:
        """Linear addresses of those that are there for others only."""
        return {one.address for one in list(self._there.values()) if cpu.index not in one.users}

    def at(self, address: int) -> Byte | None:
        """The byte written for a breakpoint at a linear address."""
        for gpa in self._pages.get(address & _PAGE, ()):
            one = self._there.get(gpa)
            if one is not None and one.address == address:
                return one
        return None

    def mechanism_at(self, gpa: int) -> Mechanism | None:
        """What breakpoints there use, enabled or not, of any vcpu; None if none writes a byte there."""
        for cpu in self._machine.cpus:
            for one in cpu.breakpoints:
                if one.gpa == gpa and one.mechanism in OPCODES:
                    return Mechanism(one.mechanism)
        return None

    def arm(self, cpu: Cpu, wanted: tuple[Breakpoint, ...]) -> None:
        """Puts the bytes of these breakpoints of a vcpu in place, and takes away those that it wanted before."""
        if self._wants.get(cpu.index, ()) is wanted:
            return
        places = {one.gpa: one for one in wanted if one.gpa is not None}
        with self._lock:
            if self._wants.get(cpu.index, ()) is None:
                self._publish()
            self._wants[cpu.index] = None
            new = [one for gpa, one in places.items() if gpa not in self._there]
            gone = [one for one in self._there.values() if one.gpa not in places and one.users == {cpu.index}]
            for byte in self._there.values():
                if byte.gpa in places:
                    byte.users.add(cpu.index)
                elif byte not in gone:
                    byte.users.discard(cpu.index)
            self._mend(cpu, gone)
        if not new and not gone:
            self._wants[cpu.index] = wanted
            return
        # Not under the lock: others need it to get out.
        with self._alone(cpu), self._lock:
            self._take_away([one for one in gone if one.users == {cpu.index}], cpu)
            for byte in gone:  # those that another has come to want meanwhile
                byte.users.discard(cpu.index)
            self._write([one for one in new if one.gpa not in self._there], cpu)
            for one in new:
                assert one.gpa is not None
                self._there[one.gpa].users.add(cpu.index)
            self._mend(cpu, [])
        self._wants[cpu.index] = wanted

    def disarm(self, cpu: Cpu) -> None:
        """Takes away the bytes that only this vcpu wanted; also of a machine that is gone."""
        self.found.pop(cpu.index, None)
        try:
            self.arm(cpu, ())
        except (ClosedError, HostLost):
            self._there.clear()
            self._wants.clear()
            self._publish()

    def _alone(self, cpu: Cpu) -> contextlib.AbstractContextManager[None]:
        gate = self._machine.gate
        return gate.hold(cpu) if len(self._machine.cpus) > 1 else contextlib.nullcontext()

    def _write(self, breakpoints: list[Breakpoint], cpu: Cpu) -> None:
        before = self._raw([one.gpa for one in breakpoints if one.gpa is not None])
        for one in breakpoints:
            assert one.gpa is not None
            byte = Byte(one.gpa, OPCODES[one.mechanism], before[one.gpa], one.address)
            byte.users.add(cpu.index)  # before it is there: Ctrl-C may come between any two lines
            byte.lifted_for = cpu.index
            self._there[one.gpa] = byte
        self._publish()
        for one in breakpoints:
            assert one.gpa is not None
            byte = self._there[one.gpa]
            self._put(one.gpa, byte.opcode)
            byte.lifted_for = None

    def _mend(self, cpu: Cpu, gone: list[Byte]) -> None:
        # What a Ctrl-C left away, of those that stay.
        for byte in self._there.values():
            if byte.lifted_for == cpu.index and byte not in gone:
                now = self._raw([byte.gpa])[byte.gpa]
                if now != byte.opcode:
                    byte.original = now
                    self._put(byte.gpa, byte.opcode)
                byte.lifted_for = None

    def _take_away(self, gone: list[Byte], cpu: Cpu) -> None:
        now = self._raw([one.gpa for one in gone])
        lost = []
        for one in gone:
            if now[one.gpa] == one.opcode:
                one.lifted_for = cpu.index  # before it is away, as a Ctrl-C may come: see `_mend`
                self._put(one.gpa, one.original)
            elif one.lifted_for is None:
                lost.append(one)
            del self._there[one.gpa]
        self._publish()
        self._tell(lost)

    def _publish(self) -> None:
        pages: dict[int, tuple[int, ...]] = {}
        for gpa in self._there:
            pages[gpa & _PAGE] = (*pages.get(gpa & _PAGE, ()), gpa)
        self._pages = pages
        self.version += 1
        self._memory.hide(Overlay(dict(self._there), self._lock) if self._there else None)

    def renew(self, cpu: Cpu) -> bool:
        """Writes again what the guest wrote over; True if some breakpoint has moved to another mechanism."""
        with self._lock:
            mine = [one for one in self._there.values() if cpu.index in one.users and one.lifted_for is None]
            now = self._raw([one.gpa for one in mine])
            lost = [one for one in mine if now[one.gpa] != one.opcode]
            for one in lost:
                one.original = now[one.gpa]
                self._put(one.gpa, one.opcode)
        return self._tell(lost)

    def _tell(self, lost: list[Byte]) -> bool:
        moved = False
        for byte in lost:
            for index in byte.users:
                moved |= self._machine.cpus[index].breakpoints.overwritten(byte.gpa)
        return moved

    @contextlib.contextmanager
    def lifted(self, cpu: Cpu, address: int) -> Iterator[None]:
        """Lets one vcpu past the byte that it is on, with the others held."""
        gpa = self.found.pop(cpu.index, None)
        byte = self.at(address) if gpa is None else self._there.get(gpa)
        if byte is None:
            yield
            return
        # A HLT of the guest's own may wait in the kernel, for one of the others.
        alone = contextlib.nullcontext() if byte.original == _HLT and self._machine.irqchip else self._alone(cpu)
        with alone:
            with self._lock:
                if gpa is None:  # else the vcpu has just run it
                    now = self._raw([byte.gpa])[byte.gpa]
                    if now != byte.opcode:
                        byte.original = now
                byte.lifted_for = cpu.index
                self._put(byte.gpa, byte.original)
            try:
                yield
            finally:
                with self._lock:
                    # A condition may have stepped the vcpu, and so put it or taken it away.
                    if byte.lifted_for == cpu.index and self._there.get(byte.gpa) is byte:
                        byte.original = self._raw([byte.gpa])[byte.gpa]
                        self._put(byte.gpa, byte.opcode)
                        byte.lifted_for = None  # last: what a Ctrl-C leaves away is not overwritten

    # --- what comes back from the core

    def claim(self, cpu: Cpu, reply: Any) -> None:
        """Makes a reply say what it would without our bytes.

        A HLT exit of ours becomes the debug exit of an INT3, with rip on the byte; `code` shows what is beneath.
        May be called again for the same reply, as a Ctrl-C may end the first call anywhere.
        """
        self.found.pop(cpu.index, None)
        if not reply.valid & wire.KB_VALID_REGS or not reply.valid & wire.KB_VALID_SREGS:
            return
        halted = reply.cause == wire.KB_CAUSE_HLT or (
            reply.cause == wire.KB_CAUSE_EXIT and reply.exit_reason == c.KVM_EXIT_HLT
        )
        trapped = reply.cause == wire.KB_CAUSE_DEBUG and reply.debug_exception == 3
        pc = linear_pc(reply)
        if halted or trapped:
            byte = self._byte_at(cpu, reply, pc - 1 if halted else pc, _HLT if halted else _INT3)
            if byte is not None and byte.lifted_for != cpu.index:  # else it is the guest's own
                self.found[cpu.index] = byte.gpa
                if halted:
                    pc -= 1
                    self._step_back(cpu, reply, pc)
        self._show_code(cpu, reply, pc)

    def _byte_at(self, cpu: Cpu, reply: Any, pc: int, opcode: int) -> Byte | None:
        near = [one for gpa in self._pages.get(pc & _PAGE, ()) if (one := self._there.get(gpa)) is not None]
        cr3 = int(ffi.cast("struct kvm_sregs *", reply.sregs).cr3)
        gpa = None
        for one in near:
            if one.opcode != opcode:
                continue
            if one.address == pc and one.cr3 == cr3:
                return one
            gpa = cpu.translate(pc) if gpa is None else gpa
            if one.gpa == gpa:
                if one.address == pc:
                    one.cr3 = cr3
                return one
        return None

    def _step_back(self, cpu: Cpu, reply: Any, pc: int) -> None:
        # Changed at once, behind everything that a Ctrl-C may end.
        changed = wire_ffi.new("struct kb_stop *", reply[0])
        regs = ffi.cast("struct kvm_regs *", changed.regs)
        regs.rip = (regs.rip - 1) & (1 << 64) - 1
        changed.cause = wire.KB_CAUSE_DEBUG
        changed.debug_exception, changed.debug_pc = 3, pc
        code = bytes((_HLT, *ffi.buffer(reply.code)[: reply.code_bytes]))[:_CODE_BYTES]
        ffi.memmove(changed.code, code, len(code))
        changed.code_bytes = len(code)
        cpu.vcpu.set_regs(regs)
        ffi.memmove(reply, changed, wire_ffi.sizeof("struct kb_stop"))

    def _show_code(self, cpu: Cpu, reply: Any, pc: int) -> None:
        code = reply.code
        for n in range(min(int(reply.code_bytes), _CODE_BYTES)):
            if code[n] in (_HLT, _INT3):
                byte = self._byte_at(cpu, reply, pc + n, code[n])
                if byte is not None:
                    code[n] = byte.original

    # --- memory as it is

    def _raw(self, gpas: Iterable[int]) -> dict[int, int]:
        """Bytes of memory by address, read a page at a time: each is a message on some hosts."""
        found: dict[int, int] = {}
        pages: dict[int, list[int]] = {}
        for gpa in gpas:
            pages.setdefault(gpa & ~_PAGE, []).append(gpa)
        for inside in pages.values():
            first, last = min(inside), max(inside)
            region, offset = self._memory.find(first, last + 1 - first)
            if region.view is not None:
                data: Any = region.view[offset : offset + last + 1 - first]
            else:
                data = region.read(offset, last + 1 - first)
            found.update((gpa, data[gpa - first]) for gpa in inside)
        return found

    def _put(self, gpa: int, value: int) -> None:
        region, offset = self._memory.find(gpa, 1)
        if region.view is not None:
            region.view[offset] = value
        else:
            region.write(offset, bytes((value,)))


def linear_pc(reply: Any) -> int:
    """The linear address of the instruction at rip; the reply must have sregs."""
    rip = int(ffi.cast("struct kvm_regs *", reply.regs).rip)
    sregs = ffi.cast("struct kvm_sregs *", reply.sregs)
    if sregs.efer & 1 << 10 and sregs.cs.l:
        return rip
    return int(sregs.cs.base) + rip & 0xFFFF_FFFF
