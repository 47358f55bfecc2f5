"""The registers of a stopped vcpu, as attributes that can be read and written.

Facts this rests on: the state at a stop comes with the stop (KVM_CAP_SYNC_REGS),
so reading costs no ioctl; writing does (KVM_SET_REGS, KVM_SET_SREGS), and KVM
then no longer knows which single step it was about to report, which is why
writes go through the source, where stepping re-arms itself.
"""

from __future__ import annotations

from typing import Any, Protocol

from kvmbench.arguments import nearest
from kvmbench.debug.control import CONTROL_CLASSES
from kvmbench.debug.flags import Flags
from kvmbench.debug.mode import CodeMode
from kvmbench.debug.register_file import RegisterFile
from kvmbench.debug.register_table import (
    CONTROL,
    GENERAL,
    INTEGER,
    SEGMENTS,
    SUBREGISTERS,
    TABLES,
    SubRegister,
)
from kvmbench.debug.register_view import as_html, as_text
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError
from kvmbench.kvm.segment import DescriptorTable, Segment
from kvmbench.uapi import ffi


class StateSource(Protocol):
    """Where `Registers` takes a vcpu's state from: the copies kept since its last stop.

    The get methods return ``struct kvm_regs`` and ``struct kvm_sregs`` (cffi
    pointers), asking KVM only if there is no copy yet. The set methods write
    to the vcpu and make the struct they are given the new copy.
    """

    def get_regs(self) -> Any: ...
    def get_sregs(self) -> Any: ...
    def set_regs(self, regs: Any) -> None: ...
    def set_sregs(self, sregs: Any) -> None: ...
    def get_previous(self) -> RegisterFile | None:
        """The registers at the stop before this one, or None at the first."""


class Registers:
    """All registers of one vcpu: ``cpu.regs``.

    ``regs.rax``, ``regs.eax``, ``regs.al``, ``regs.rflags.ZF``, ``regs.cs.base``,
    ``regs.cr0.PG``: reading gives ints (with named bits where bits have names)
    and frozen `Segment` and `DescriptorTable` values. Assigning writes to the
    vcpu at once. As in 64-bit code, writing a 32-bit name such as ``eax``
    clears the upper half of ``rax``; writing ``ax``, ``ah`` or ``al`` leaves the rest.

    To change one bit: ``regs.rflags = regs.rflags.replace(ZF=1)``; one field of a segment:
    ``regs.ds = dataclasses.replace(regs.ds, base=0x1000)``.
    Source: KVM API, KVM_GET_REGS, KVM_SET_REGS, KVM_GET_SREGS, KVM_SET_SREGS.
    """

    __slots__ = ("_source", "_symbols")

    _source: StateSource
    _symbols: Symbols | None

    def __init__(self, source: StateSource, symbols: Symbols | None = None) -> None:
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_symbols", symbols)

    def __getattr__(self, name: str) -> Any:
        if name in _INTEGERS:
            value = int(getattr(self._source.get_regs(), name))
            return Flags(value) if name == "rflags" else value
        sub = SUBREGISTERS.get(name)
        if sub is not None:
            parent = int(getattr(self._source.get_regs(), sub.parent))
            return parent >> sub.shift_bits & ((1 << sub.width_bits) - 1)
        control = CONTROL_CLASSES.get(name)
        if control is not None:
            return control(int(getattr(self._source.get_sregs(), name)))
        if name in SEGMENTS:
            # Held by name: a cffi struct inside another does not keep the outer one alive.
            sregs = self._source.get_sregs()
            return Segment.from_kvm(getattr(sregs, name))
        if name in TABLES:
            sregs = self._source.get_sregs()
            return DescriptorTable.from_kvm(getattr(sregs, name))
        raise AttributeError(_unknown(name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _INTEGERS:
            self._write_integer(name, _fit(name, value, 64))
        elif name in SUBREGISTERS:
            self._write_sub(SUBREGISTERS[name], _fit(name, value, SUBREGISTERS[name].width_bits))
        elif name in CONTROL:
            fitted = _fit(name, value, 64)
            sregs = _copy(self._source.get_sregs())
            setattr(sregs, name, fitted)
            self._source.set_sregs(sregs)
        elif name in SEGMENTS:
            self._write_described(name, value, Segment)
        elif name in TABLES:
            self._write_described(name, value, DescriptorTable)
        else:
            raise AttributeError(_unknown(name))

    def __getitem__(self, name: str) -> Any:
        """``regs["rax"]``, for names held in a variable.

        Raises:
            MisuseError: no such register.
        """
        try:
            return getattr(self, name)
        except (AttributeError, TypeError):
            raise MisuseError(_unknown(name)) from None

    def __setitem__(self, name: str, value: Any) -> None:
        try:
            setattr(self, name, value)
        except (AttributeError, TypeError):
            raise MisuseError(_unknown(name)) from None

    def __dir__(self) -> list[str]:
        return ["mode", "set", "snapshot", *INTEGER, *SUBREGISTERS, *SEGMENTS, *TABLES, *CONTROL]

    def set(self, **values: int) -> None:
        """Writes several of rax to r15, rip, rflags with one ioctl: ``regs.set(rax=1, rip=0x1000)``.

        Raises:
            MisuseError: another register, or a value that does not fit; nothing is written then.
        """
        fitted = {}
        for name, value in values.items():
            if name not in _INTEGERS:
                raise MisuseError(f"set() takes rax to r15, rip and rflags, not {name!r}; assign it instead")
            fitted[name] = _fit(name, value, 64)
        regs = _copy(self._source.get_regs())
        for name, value in fitted.items():
            setattr(regs, name, value)
        self._source.set_regs(regs)

    def snapshot(self) -> RegisterFile:
        """A frozen copy of all registers; compare two with `RegisterFile.diff`."""
        return RegisterFile.from_kvm(self._source.get_regs(), self._source.get_sregs())

    @property
    def mode(self) -> CodeMode:
        """The mode the vcpu is in: width of code, privilege level, paging."""
        return CodeMode.from_kvm(self._source.get_sregs(), int(self._source.get_regs().rflags))

    def _write_integer(self, name: str, value: int) -> None:
        # A copy: the struct at hand may be the very one a Stop shows.
        regs = _copy(self._source.get_regs())
        setattr(regs, name, value)
        self._source.set_regs(regs)

    def _write_sub(self, sub: SubRegister, value: int) -> None:
        old = int(getattr(self._source.get_regs(), sub.parent))
        mask = ((1 << sub.width_bits) - 1) << sub.shift_bits
        kept = 0 if sub.clears_upper else old & ~mask
        self._write_integer(sub.parent, kept | value << sub.shift_bits)

    def _write_described(self, name: str, value: Any, kind: type[Segment] | type[DescriptorTable]) -> None:
        if not isinstance(value, kind):
            raise MisuseError(
                f"{name} = {value!r}: give a {kind.__name__}, such as dataclasses.replace(regs.{name}, base=0)"
            )
        sregs = _copy(self._source.get_sregs())
        value.to_kvm(getattr(sregs, name))
        self._source.set_sregs(sregs)

    def __repr__(self) -> str:
        return as_text(self.snapshot(), self._source.get_previous(), self._symbols)

    def _repr_html_(self) -> str:
        return as_html(self.snapshot(), self._source.get_previous(), self._symbols)


_INTEGERS = frozenset(INTEGER)


def _copy(struct: Any) -> Any:
    fresh = ffi.new(ffi.typeof(struct))
    fresh[0] = struct[0]
    return fresh


def _fit(name: str, value: Any, width_bits: int) -> int:
    try:
        number: int = value.__index__()
    except (AttributeError, TypeError):
        hint = f", such as m.symbols[{value!r}]" if isinstance(value, str) else ""
        raise MisuseError(f"{name} = {value!r}: a register takes an integer{hint}") from None
    if not 0 <= number < 1 << width_bits:
        mask = (1 << width_bits) - 1
        hint = f"; mask it with & {mask:#x} if its two's complement is meant" if number < 0 else ""
        raise MisuseError(f"{name} = {number:#x} does not fit its {width_bits} bits{hint}")
    return number


def _unknown(name: str) -> str:
    near = nearest(name, (*INTEGER, *SUBREGISTERS, *SEGMENTS, *TABLES, *CONTROL)) if isinstance(name, str) else []
    if near:
        return f"no register {name!r}; did you mean {' or '.join(near)}?"
    return (
        f"no register {name!r}; there are {', '.join(GENERAL[:8])}, r8 to r15, rip, rflags, "
        f"their parts (eax, ax, al, r8d, ...), {', '.join((*SEGMENTS, *TABLES, *CONTROL))}"
    )
