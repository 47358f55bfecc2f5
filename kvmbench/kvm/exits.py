"""Why a vcpu left the guest: one class an exit reason, decoded from kvm_run at once.

`decode_exit` is the one way from bytes to an exit. The first bytes of ``struct kvm_run``, up to the end of
its exit union, say everything but the data of port I/O, which lies elsewhere and is handed over beside
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvmbench import errors
from kvmbench.core.wire import KB_RUN_BYTES
from kvmbench.uapi import ExitReason, ffi
from kvmbench.uapi import constants as c


@dataclass(frozen=True, slots=True)
class Exit:
    """A reason for which KVM_RUN returned."""

    @property
    def reason(self) -> int:
        """KVM_EXIT_*, as an `ExitReason` where it has a name."""
        return _REASONS[type(self)]

    def __str__(self) -> str:
        names = [field.name for field in dataclasses.fields(self)]
        values = ", ".join(f"{name}={_show(name, getattr(self, name))}" for name in names)
        return f"{type(self).__name__}({values})"


@dataclass(frozen=True, slots=True)
class UnknownExit(Exit):
    """A reason that this library has no class for.

    Attributes:
        number: kvm_run.exit_reason.
        raw: the exit union, 256 bytes.
    """

    number: int
    raw: bytes = dataclasses.field(default=b"", repr=False)

    @property
    def reason(self) -> int:
        """KVM_EXIT_*."""
        return self.number

    def __str__(self) -> str:
        known = {int(reason): reason.name for reason in ExitReason}
        return f"UnknownExit({known.get(self.number, self.number)})"


@dataclass(frozen=True, slots=True)
class HardwareExit(Exit):
    """KVM_EXIT_UNKNOWN: the processor left the guest for a reason that KVM does not handle.

    Attributes:
        hardware_exit_reason: the vendor's number for it.
    """

    hardware_exit_reason: int


@dataclass(frozen=True, slots=True)
class GuestException(Exit):
    """KVM_EXIT_EXCEPTION; no x86 kernel makes it today."""

    vector: int
    error_code: int


@dataclass(frozen=True, slots=True)
class IoOut(Exit):
    """The guest writes to a port.

    Attributes:
        port: I/O port.
        data: what it writes: size_bytes times count bytes.
        size_bytes: of one access: 1, 2 or 4.
        count: accesses in this exit; more than 1 for REP OUTS.
    """

    port: int
    data: bytes
    size_bytes: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class IoIn(Exit):
    """The guest reads a port, and waits for size_bytes times count bytes.

    Attributes:
        port: I/O port.
        size_bytes: of one access: 1, 2 or 4.
        count: accesses in this exit; more than 1 for REP INS.
    """

    port: int
    size_bytes: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class MmioRead(Exit):
    """The guest reads where there is no memory, and waits for size_bytes bytes."""

    gpa: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MmioWrite(Exit):
    """The guest writes where there is no memory, or only readable memory."""

    gpa: int
    data: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Hypercall(Exit):
    """A hypercall that was asked to leave to user space (KVM_CAP_EXIT_HYPERCALL).

    Attributes:
        nr: KVM_HC_*.
        args: its six arguments.
        long_mode: whether the guest made it in 64-bit mode.
    """

    nr: int
    args: tuple[int, ...]
    long_mode: bool


@dataclass(frozen=True, slots=True)
class Debug(Exit):
    """A debug event that KVM_SET_GUEST_DEBUG asked for.

    Attributes:
        vector: 1 for #DB (a step, a debug register), 3 for INT3.
        pc: linear address of the instruction: behind it for a step or a data access, on it for a breakpoint.
        dr6: what happened, whose inactive bits differ between vendors and kernels.
        dr7: the debug control register at that time.
    """

    vector: int
    pc: int
    dr6: int
    dr7: int


@dataclass(frozen=True, slots=True)
class Hlt(Exit):
    """The guest halted, and there is no in-kernel interrupt controller that could wake it."""


@dataclass(frozen=True, slots=True)
class IrqWindowOpen(Exit):
    """The guest is ready for an interrupt, as kvm_run.request_interrupt_window asked to be told."""


@dataclass(frozen=True, slots=True)
class Shutdown(Exit):
    """The vcpu has shut down, as after a triple fault."""


@dataclass(frozen=True, slots=True)
class FailEntry(Exit):
    """The processor refused to enter the guest: its state is impossible.

    Attributes:
        hardware_entry_failure_reason: the vendor's number.
        cpu: the host processor that refused, or 2**32 - 1 when KVM does not know.
    """

    hardware_entry_failure_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class Interrupted(Exit):
    """A signal came, or kvm_run.immediate_exit was set."""


@dataclass(frozen=True, slots=True)
class SetTpr(Exit):
    """The guest lowered its task priority (CR8) below that of a waiting interrupt."""

    cr8: int


@dataclass(frozen=True, slots=True)
class TprAccess(Exit):
    """The guest touched the task priority register, as KVM_TPR_ACCESS_REPORTING asked to be told."""

    rip: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class InternalError(Exit):
    """KVM could not go on, most often because it cannot emulate an instruction.

    Not `kvmbench.errors.InternalError`, which is a bug of this library.

    Attributes:
        suberror: KVM_INTERNAL_ERROR_*.
        data: up to 16 numbers whose meaning is the suberror's.
        instruction: the bytes that could not be emulated, where KVM says them.
    """

    suberror: int
    data: tuple[int, ...]
    instruction: bytes = b""


@dataclass(frozen=True, slots=True)
class SystemEvent(Exit):
    """The guest asked for something that concerns the whole machine.

    Attributes:
        type: KVM_SYSTEM_EVENT_*.
        data: numbers whose meaning is the type's.
    """

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class IoapicEoi(Exit):
    """The guest ended a level-triggered interrupt, and the I/O APIC is in user space."""

    vector: int


@dataclass(frozen=True, slots=True)
class HypervSynic(Exit):
    """The guest wrote an MSR of Hyper-V's synthetic interrupt controller."""

    msr: int
    control: int
    event_page_gpa: int
    message_page_gpa: int


@dataclass(frozen=True, slots=True)
class HypervHypercall(Exit):
    """The guest made a Hyper-V hypercall."""

    input: int
    params: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HypervSyndbg(Exit):
    """The guest used Hyper-V's synthetic debugger."""

    msr: int
    control: int
    status: int
    send_page_gpa: int
    recv_page_gpa: int
    pending_page_gpa: int


@dataclass(frozen=True, slots=True)
class RdMsr(Exit):
    """The guest reads an MSR that was asked to leave to user space (KVM_CAP_X86_USER_SPACE_MSR).

    Attributes:
        index: of the MSR.
        why: KVM_MSR_EXIT_REASON_*.
    """

    index: int
    why: int


@dataclass(frozen=True, slots=True)
class WrMsr(Exit):
    """The guest writes an MSR that was asked to leave to user space (KVM_CAP_X86_USER_SPACE_MSR).

    Attributes:
        index: of the MSR.
        data: what it writes.
        why: KVM_MSR_EXIT_REASON_*.
    """

    index: int
    data: int
    why: int


@dataclass(frozen=True, slots=True)
class DirtyRingFull(Exit):
    """The vcpu's ring of dirty pages is full."""


@dataclass(frozen=True, slots=True)
class ApResetHold(Exit):
    """An encrypted guest's processor waits to be woken."""


@dataclass(frozen=True, slots=True)
class BusLock(Exit):
    """The guest locked the memory bus (KVM_CAP_X86_BUS_LOCK_EXIT)."""


@dataclass(frozen=True, slots=True)
class XenHypercall(Exit):
    """The guest made a Xen hypercall."""

    long_mode: bool
    cpl: int
    input: int
    params: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Notify(Exit):
    """The processor made no progress for too long (KVM_CAP_X86_NOTIFY_VMEXIT).

    Attributes:
        context_invalid: whether the vcpu's state is lost.
    """

    context_invalid: bool


def decode_exit(run: bytes, io_data: bytes = b"") -> Exit:
    """Decodes why KVM_RUN returned.

    Args:
        run: the first KB_RUN_BYTES bytes of ``struct kvm_run``, or more.
        io_data: for KVM_EXIT_IO the data that kvm_run.io.data_offset points to.

    Raises:
        kvmbench.errors.InternalError: fewer bytes than that.

    Source: KVM API, section 5, "The kvm_run structure".
    """
    if len(run) < KB_RUN_BYTES:
        raise errors.InternalError(f"{len(run)} bytes of kvm_run are too few to decode an exit")
    buffer = ffi.from_buffer(run)  # keeps `run` alive as long as `state` is used
    state = ffi.cast("struct kvm_run *", buffer)
    decoder = _DECODERS.get(state.exit_reason)
    if decoder is None:
        return UnknownExit(state.exit_reason, run[_UNION : _UNION + 256])
    return decoder(state, io_data)


_UNION: int = ffi.offsetof("struct kvm_run", "hw")


def _io(run: Any, io_data: bytes) -> Exit:
    io = run.io
    if io.direction == c.KVM_EXIT_IO_OUT:
        return IoOut(io.port, io_data[: io.size * io.count], io.size, io.count)
    return IoIn(io.port, io.size, io.count)


def _mmio(run: Any, _: bytes) -> Exit:
    mmio = run.mmio
    # Data has 8 bytes: a wider access comes as several exits. The guard is against a corrupt reply.
    size = min(mmio.len, len(mmio.data))
    if mmio.is_write:
        return MmioWrite(mmio.phys_addr, bytes(mmio.data)[:size], size)
    return MmioRead(mmio.phys_addr, size)


def _internal_error(run: Any, _: bytes) -> Exit:
    internal = run.internal
    data = tuple(internal.data[0 : min(internal.ndata, len(internal.data))])
    instruction = b""
    if internal.suberror == c.KVM_INTERNAL_ERROR_EMULATION and internal.ndata >= 3:
        failure = run.emulation_failure
        if failure.flags & c.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            instruction = bytes(failure.insn_bytes)[: failure.insn_size]
    return InternalError(internal.suberror, data, instruction)


def _system_event(run: Any, _: bytes) -> Exit:
    event = run.system_event
    # Before KVM_CAP_SYSTEM_EVENT_DATA ndata was not there: padding, and so 0.
    return SystemEvent(event.type, tuple(event.data[0 : min(event.ndata, len(event.data))]))


def _hyperv(run: Any, _: bytes) -> Exit:
    u = run.hyperv.u
    match run.hyperv.type:
        case c.KVM_EXIT_HYPERV_SYNIC:
            return HypervSynic(u.synic.msr, u.synic.control, u.synic.evt_page, u.synic.msg_page)
        case c.KVM_EXIT_HYPERV_HCALL:
            return HypervHypercall(u.hcall.input, tuple(u.hcall.params))
        case c.KVM_EXIT_HYPERV_SYNDBG:
            d = u.syndbg
            return HypervSyndbg(d.msr, d.control, d.status, d.send_page, d.recv_page, d.pending_page)
    return UnknownExit(run.exit_reason)


def _xen(run: Any, _: bytes) -> Exit:
    if run.xen.type != c.KVM_EXIT_XEN_HCALL:
        return UnknownExit(run.exit_reason)
    call = run.xen.u.hcall
    return XenHypercall(bool(call.longmode), call.cpl, call.input, tuple(call.params))


def _debug(run: Any, _: bytes) -> Exit:
    arch = run.debug.arch
    return Debug(arch.exception, arch.pc, arch.dr6, arch.dr7)


def _hypercall(run: Any, _: bytes) -> Exit:
    return Hypercall(run.hypercall.nr, tuple(run.hypercall.args), bool(run.hypercall.longmode & 1))


def _fail_entry(run: Any, _: bytes) -> Exit:
    return FailEntry(run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu)


_DECODERS: dict[int, Callable[[Any, bytes], Exit]] = {
    c.KVM_EXIT_UNKNOWN: lambda run, _: HardwareExit(run.hw.hardware_exit_reason),
    c.KVM_EXIT_EXCEPTION: lambda run, _: GuestException(run.ex.exception, run.ex.error_code),
    c.KVM_EXIT_IO: _io,
    c.KVM_EXIT_HYPERCALL: _hypercall,
    c.KVM_EXIT_DEBUG: _debug,
    c.KVM_EXIT_HLT: lambda run, _: Hlt(),
    c.KVM_EXIT_MMIO: _mmio,
    c.KVM_EXIT_IRQ_WINDOW_OPEN: lambda run, _: IrqWindowOpen(),
    c.KVM_EXIT_SHUTDOWN: lambda run, _: Shutdown(),
    c.KVM_EXIT_FAIL_ENTRY: _fail_entry,
    c.KVM_EXIT_INTR: lambda run, _: Interrupted(),
    c.KVM_EXIT_SET_TPR: lambda run, _: SetTpr(run.cr8),
    c.KVM_EXIT_TPR_ACCESS: lambda run, _: TprAccess(run.tpr_access.rip, bool(run.tpr_access.is_write)),
    c.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    c.KVM_EXIT_SYSTEM_EVENT: _system_event,
    c.KVM_EXIT_IOAPIC_EOI: lambda run, _: IoapicEoi(run.eoi.vector),
    c.KVM_EXIT_HYPERV: _hyperv,
    c.KVM_EXIT_X86_RDMSR: lambda run, _: RdMsr(run.msr.index, run.msr.reason),
    c.KVM_EXIT_X86_WRMSR: lambda run, _: WrMsr(run.msr.index, run.msr.data, run.msr.reason),
    c.KVM_EXIT_DIRTY_RING_FULL: lambda run, _: DirtyRingFull(),
    c.KVM_EXIT_AP_RESET_HOLD: lambda run, _: ApResetHold(),
    c.KVM_EXIT_X86_BUS_LOCK: lambda run, _: BusLock(),
    c.KVM_EXIT_XEN: _xen,
    c.KVM_EXIT_NOTIFY: lambda run, _: Notify(bool(run.notify.flags & c.KVM_NOTIFY_CONTEXT_INVALID)),
}

_REASONS: dict[type[Exit], ExitReason] = {
    HardwareExit: ExitReason.UNKNOWN,
    GuestException: ExitReason.EXCEPTION,
    IoOut: ExitReason.IO,
    IoIn: ExitReason.IO,
    MmioRead: ExitReason.MMIO,
    MmioWrite: ExitReason.MMIO,
    Hypercall: ExitReason.HYPERCALL,
    Debug: ExitReason.DEBUG,
    Hlt: ExitReason.HLT,
    IrqWindowOpen: ExitReason.IRQ_WINDOW_OPEN,
    Shutdown: ExitReason.SHUTDOWN,
    FailEntry: ExitReason.FAIL_ENTRY,
    Interrupted: ExitReason.INTR,
    SetTpr: ExitReason.SET_TPR,
    TprAccess: ExitReason.TPR_ACCESS,
    InternalError: ExitReason.INTERNAL_ERROR,
    SystemEvent: ExitReason.SYSTEM_EVENT,
    IoapicEoi: ExitReason.IOAPIC_EOI,
    HypervSynic: ExitReason.HYPERV,
    HypervHypercall: ExitReason.HYPERV,
    HypervSyndbg: ExitReason.HYPERV,
    RdMsr: ExitReason.X86_RDMSR,
    WrMsr: ExitReason.X86_WRMSR,
    DirtyRingFull: ExitReason.DIRTY_RING_FULL,
    ApResetHold: ExitReason.AP_RESET_HOLD,
    BusLock: ExitReason.X86_BUS_LOCK,
    XenHypercall: ExitReason.XEN,
    Notify: ExitReason.NOTIFY,
}

_DECIMAL = {"size_bytes", "count", "cpl", "vector", "cpu", "suberror", "type", "nr"}


def _show(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex(" ") or "none"
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{item:#x}" for item in value) + "]"
    return str(value) if name in _DECIMAL or isinstance(value, bool) else f"{value:#x}"
