"""The registers of a vcpu as of its last stop, and how they are written.

A stop brings the registers with it, so looking at them costs nothing; writing
one is an ioctl, after which the copy here is the new truth.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from kvmbench.core._wire import ffi as wire_ffi
from kvmbench.debug.register_file import RegisterFile
from kvmbench.kvm import VCPU
from kvmbench.machine.segment import available_tss
from kvmbench.uapi import ffi

REGS_BYTES: int = ffi.sizeof("struct kvm_regs")
SREGS_BYTES: int = ffi.sizeof("struct kvm_sregs")
CODE_BYTES = 16
# Everything a Stop may be asked for later lies together in struct kb_stop: one slice takes it all.
STATE_OFFSET: int = wire_ffi.offsetof("struct kb_stop", "elapsed_ns")
STATE_END: int = wire_ffi.offsetof("struct kb_stop", "code") + CODE_BYTES
_REGS_FIELDS = tuple(name for name, _ in ffi.typeof("struct kvm_regs").fields)


def _at(field: str) -> int:
    return int(wire_ffi.offsetof("struct kb_stop", field)) - STATE_OFFSET


_REGS_AT, _SREGS_AT, _CODE_AT = _at("regs"), _at("sregs"), _at("code")
_RIP_AT = _REGS_AT + ffi.offsetof("struct kvm_regs", "rip")
_U64, _U32 = struct.Struct("<Q"), struct.Struct("<I")
_DR6_AT, _CODE_BYTES_AT = _at("debug_dr6"), _at("code_bytes")


class Stopped:
    """A vcpu's state as it was at one stop: bytes copied out, decoded when looked at."""

    __slots__ = ("_raw",)

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    @property
    def rip(self) -> int:
        """Offset of the next instruction."""
        return int(_U64.unpack_from(self._raw, _RIP_AT)[0])

    @property
    def elapsed_ns(self) -> int:
        """Time in the core of the request that ended here."""
        return int(_U64.unpack_from(self._raw)[0])

    @property
    def dr6(self) -> int:
        """The debug status of a debug exit."""
        return int(_U64.unpack_from(self._raw, _DR6_AT)[0])

    @property
    def regs(self) -> Any:
        """``struct kvm_regs *``; not to be written."""
        return ffi.from_buffer("struct kvm_regs *", self._raw[_REGS_AT:])

    @property
    def sregs(self) -> Any:
        """``struct kvm_sregs *``; not to be written."""
        return ffi.from_buffer("struct kvm_sregs *", self._raw[_SREGS_AT:])

    @property
    def code(self) -> bytes:
        """What memory held at rip, up to 16 bytes; empty where it could not be read."""
        return self._raw[_CODE_AT : _CODE_AT + _U32.unpack_from(self._raw, _CODE_BYTES_AT)[0]]

    @classmethod
    def pack(cls, regs: Any, sregs: Any) -> Stopped:
        """From the two structs, for a state that did not come with a stop."""
        head = bytes(_REGS_AT)
        return cls(head + bytes(ffi.buffer(regs)) + bytes(ffi.buffer(sregs)) + bytes(CODE_BYTES))


class VcpuState:
    """What `Registers` reads and writes (`kvmbench.debug.registers.StateSource`).

    Attributes:
        latest: the state now, or None if it must be asked for; bytes where nobody has looked at it yet.
        before: likewise the state at the stop before.
    """

    __slots__ = ("_available_tss", "_before_write", "_is_under_way", "_vcpu", "before", "latest")

    def __init__(
        self,
        vcpu: VCPU,
        before_write: Callable[[], None],
        is_under_way: Callable[[], bool],
        *,
        wants_available_tss: bool = False,
    ) -> None:
        self._vcpu = vcpu
        # Whether the guest is to go on without asking: what a device is told is not what the next one is to be told.
        self._is_under_way = is_under_way
        self._available_tss = wants_available_tss
        # Called before registers are written: an I/O exit under way must be completed first,
        # or KVM would apply its result to the registers written.
        self._before_write = before_write
        self.latest: Stopped | bytes | None = None
        self.before: Stopped | bytes | None = None

    @property
    def current(self) -> Stopped | None:
        """The state now, or None if it must be asked for."""
        latest = self.latest
        if isinstance(latest, bytes):
            self.latest = latest = Stopped(latest)
        return latest

    @current.setter
    def current(self, state: Stopped | None) -> None:
        self.latest = state

    @property
    def previous(self) -> Stopped | None:
        """The state at the stop before."""
        before = self.before
        if isinstance(before, bytes):
            self.before = before = Stopped(before)
        return before

    @previous.setter
    def previous(self, state: Stopped | bytes | None) -> None:
        self.before = state

    def read(self) -> Stopped:
        """The state now, from KVM if no stop brought it."""
        current = self.current
        if current is None:
            current = Stopped.pack(self._vcpu.get_regs(), self._vcpu.get_sregs())
            # Or another thread's step has ended meanwhile, and its state is newer.
            if self.latest is None and not self._is_under_way():
                self.latest = current
        return current

    def get_regs(self) -> Any:
        """``struct kvm_regs *``."""
        return self.read().regs

    def get_sregs(self) -> Any:
        """``struct kvm_sregs *``."""
        return self.read().sregs

    def get_previous(self) -> RegisterFile | None:
        """The registers at the stop before, or None before the first."""
        previous = self.previous
        return None if previous is None else RegisterFile.from_kvm(previous.regs, previous.sregs)

    def set_regs(self, regs: Any) -> None:
        """KVM_SET_REGS."""
        before = self.get_regs()
        self._before_write()
        if self.current is None:
            # An exit was completed meanwhile and may have changed registers: keep those, write only what is new.
            now = self.get_regs()
            for name in _REGS_FIELDS:
                if getattr(regs, name) == getattr(before, name):
                    setattr(regs, name, getattr(now, name))
        sregs = self.get_sregs()
        self._vcpu.set_regs(regs)
        self.current = Stopped.pack(regs, sregs)

    def set_sregs(self, sregs: Any) -> None:
        """KVM_SET_SREGS; read back, as KVM may normalise what it is given."""
        self._before_write()
        if self._available_tss:
            sregs.tr.type = available_tss(sregs.tr.type)
        self._vcpu.set_sregs(sregs)
        self.current = None
