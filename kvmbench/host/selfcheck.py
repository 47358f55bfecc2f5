"""What guest debug does on a host, found out by trying it.

Neither a kernel version nor an emulator version tells whether a breakpoint
fires: QEMU before 9.1 drops debug registers at VMRUN, some KVMs deliver INT3
to the guest.  So a few tiny guests run at CPL 0 and at CPL 3, in long mode, and each
must stop exactly where it should.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from kvmbench import errors
from kvmbench.core import wire
from kvmbench.host.client import Core
from kvmbench.host.execution import Execution
from kvmbench.uapi import constants as c
from kvmbench.uapi import ffi

# The memory of the tiny guest.
PML4, PDPT, PD, CODE, DATA, STACK_TOP = 0x1000, 0x2000, 0x3000, 0x8000, 0x9000, 0xB000
MEMORY_BYTES = 0x200000
DEADLINE_NS = 200_000_000
DONE_PORT = 0xF4

#: Each mechanism by its name in `Mechanisms`, and in words.
WORDS = {
    "step": "single step",
    "int3": "INT3",
    "hlt": "HLT in place of an instruction",
    "hw_execute": "hardware execute breakpoint",
    "hw_write": "hardware write watchpoint",
    "hw_read": "hardware read watchpoint",
    "readonly_slot": "read-only slot",
    "no_slot": "memory without a slot",
}
NAMES = tuple(WORDS)
#: The CPLs at which one could work at all, where that is not both: HLT is #GP at CPL 3.
LEVELS = {"hlt": (0,)}


@dataclasses.dataclass(frozen=True)
class Mechanisms:
    """Which ways to stop a guest work on a host, by privilege level.

    Each set holds the CPLs (0, 3) at which the mechanism was seen to work.

    Attributes:
        step: single steps reach the right addresses.
        int3: INT3 with KVM_GUESTDBG_USE_SW_BP leaves the guest.
        hlt: HLT leaves the guest, and the instruction whose byte it took can be run afterwards; CPL 0 only.
        hw_execute: a debug register stops before an instruction.
        hw_write: a debug register stops after a write.
        hw_read: a debug register stops after a read.
        readonly_slot: a write to a KVM_MEM_READONLY slot leaves the guest.
        no_slot: an access to memory without a slot leaves the guest.
        notes: what happened instead, by "name@cpl".
        elapsed_ms: how long the check took, in this process's time.
    """

    step: frozenset[int] = frozenset()
    int3: frozenset[int] = frozenset()
    hlt: frozenset[int] = frozenset()
    hw_execute: frozenset[int] = frozenset()
    hw_write: frozenset[int] = frozenset()
    hw_read: frozenset[int] = frozenset()
    readonly_slot: frozenset[int] = frozenset()
    no_slot: frozenset[int] = frozenset()
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    elapsed_ms: float = 0.0

    @property
    def complete(self) -> bool:
        """Stepping, breakpoints and write watchpoints all work at CPL 0 and CPL 3."""
        both = {0, 3}
        breakpoints = self.int3 | self.hw_execute
        watchpoints = self.hw_write | self.readonly_slot
        return self.step >= both and breakpoints >= both and watchpoints >= both

    @property
    def shortcomings(self) -> list[str]:
        """What does not work, in words, such as "INT3 at CPL 3: SHUTDOWN exit"."""
        found = []
        for name in NAMES:
            for cpl in LEVELS.get(name, (0, 3)):
                if cpl not in getattr(self, name):
                    found.append(f"{WORDS[name]} at CPL {cpl}: {self.notes.get(f'{name}@{cpl}', 'not tried')}")
        return found

    @property
    def summary(self) -> str:
        """How far guest debug goes, in one line: ``single step at CPL 0 only; no INT3``; "" if all of it works."""
        phrases = []
        for name in NAMES:
            levels = sorted(getattr(self, name))
            if not levels:
                phrases.append(f"no {WORDS[name]}")
            elif set(levels) < set(LEVELS.get(name, (0, 3))):
                phrases.append(f"{WORDS[name]} at CPL {levels[0]} only")
        return "; ".join(phrases)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the cache."""
        values: dict[str, Any] = {name: sorted(getattr(self, name)) for name in NAMES}
        return values | {"notes": dict(self.notes), "elapsed_ms": self.elapsed_ms}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Mechanisms:
        """The reverse of `to_json`.

        Raises:
            ValueError: the values are not of that form.
        """
        try:
            sets = {name: frozenset(int(cpl) for cpl in values[name]) for name in NAMES}
            notes = {str(key): str(value) for key, value in values["notes"].items()}
            return cls(**sets, notes=notes, elapsed_ms=float(values["elapsed_ms"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no self-check result: {error!r}") from error


class _Guest:
    """One VM with one vcpu that runs a few bytes of code at a chosen CPL."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.vm = core.create_vm()
        try:
            self.region = core.add_region(self.vm, 0, MEMORY_BYTES)
            self.vcpu = core.create_vcpu(self.vm, 0)
        except errors.KvmbenchError:
            core.close_handle(self.vm)
            raise
        tables = bytearray(0x3000)
        for at, entry in ((PML4, PDPT | 7), (PDPT, PD | 7), (PD, 0x87)):  # 2 MiB page, user, writable
            tables[at - PML4 : at - PML4 + 8] = entry.to_bytes(8, "little")
        core.write_region(self.region, PML4, bytes(tables))
        self.execution = Execution(core, self.vcpu)
        _, self._sregs = core.ioctl(self.vcpu, "KVM_GET_SREGS")

    def start(self, code: bytes, cpl: int) -> None:
        """Places code and puts the vcpu at its first byte."""
        self.core.write_region(self.region, CODE, code.ljust(64, b"\x90"))
        sregs = ffi.new("struct kvm_sregs *")
        ffi.memmove(sregs, self._sregs, len(self._sregs))
        sregs.cr0 = 0x80000011 | 1 << 5  # PE, ET, NE, PG
        sregs.cr3 = PML4
        sregs.cr4 = 1 << 5  # PAE
        sregs.efer = 0x500  # LME, LMA
        rpl = cpl
        for name, selector, kind in (("cs", 0x8, 11), ("ss", 0x10, 3), ("ds", 0x10, 3), ("es", 0x10, 3)):
            segment = getattr(sregs, name)
            segment.base, segment.limit, segment.selector = 0, 0xFFFFFFFF, selector | rpl
            segment.type, segment.dpl, segment.present, segment.s, segment.g = kind, cpl, 1, 1, 1
            segment.l, segment.db = (1, 0) if name == "cs" else (0, 1)
        self.core.ioctl(self.vcpu, "KVM_SET_SREGS", bytes(ffi.buffer(sregs)))
        regs = ffi.new("struct kvm_regs *")
        regs.rip, regs.rsp, regs.rflags = CODE, STACK_TOP, 0x3002  # IOPL 3: OUT at CPL 3
        self.core.ioctl(self.vcpu, "KVM_SET_REGS", bytes(ffi.buffer(regs)))

    def run(self, *, step: bool = False, control: int = 0, debugreg: tuple[int, int] | None = None) -> Any:
        """Runs or steps once; debugreg is (address, DR7)."""
        request = self.execution.request
        request.mode = wire.KB_STEP if step else wire.KB_RUN
        request.steps = 1 if step else 0
        request.deadline_ns = DEADLINE_NS
        request.debug_control = control
        for n in range(8):
            request.debugreg[n] = 0
        if debugreg is not None:
            request.debugreg[0], request.debugreg[7] = debugreg
        self.execution.send()
        return self.execution.stop

    def move(self, rip: int) -> None:
        """Lets the vcpu go on elsewhere, with the registers of the last stop."""
        regs = ffi.cast("struct kvm_regs *", self.execution.stop.regs)
        regs.rip = rip
        self.core.ioctl(self.vcpu, "KVM_SET_REGS", bytes(ffi.buffer(regs)))

    def rip(self) -> int:
        """Where the last stop left the vcpu."""
        return int(ffi.cast("struct kvm_regs *", self.execution.stop.regs).rip)

    def close(self) -> None:
        self.core.close_handle(self.vm)


_RAN_PAST = "ran past it"


def _what_happened(guest: _Guest, stop: Any) -> str:
    names = {
        c.KVM_EXIT_SHUTDOWN: "SHUTDOWN exit",
        c.KVM_EXIT_INTERNAL_ERROR: "INTERNAL_ERROR exit",
        c.KVM_EXIT_FAIL_ENTRY: "FAIL_ENTRY exit",
        c.KVM_EXIT_HLT: "HLT exit",
        c.KVM_EXIT_MMIO: "MMIO exit",
        c.KVM_EXIT_IO: _RAN_PAST,
    }
    if stop.cause == wire.KB_CAUSE_DEADLINE:
        return "never stopped"
    if stop.cause == wire.KB_CAUSE_EXIT:
        return names.get(stop.exit_reason, f"exit {stop.exit_reason}")
    if stop.cause == wire.KB_CAUSE_ERROR:
        return f"KVM_RUN failed with errno {stop.error}"
    return f"stopped at {guest.rip():#x} with dr6 {stop.debug_dr6:#x}"


# mov eax, 1; add eax, 2; nop; then OUT to DONE_PORT, which ends a guest that ran past.
_STEPS = bytes.fromhex("b801000000 83c002 90")
_DONE = bytes([0xE6, DONE_PORT])
_STEP_RIPS = (CODE + 5, CODE + 8, CODE + 9)


def _check_step(guest: _Guest, cpl: int) -> str | None:
    guest.start(_STEPS + _DONE, cpl)
    for expected in _STEP_RIPS:
        stop = guest.run(step=True)
        if stop.cause != wire.KB_CAUSE_STEPS or guest.rip() != expected:
            return _what_happened(guest, stop)
    return None


def _check_int3(guest: _Guest, cpl: int) -> str | None:
    guest.start(b"\x90\xcc" + _DONE, cpl)
    stop = guest.run(control=c.KVM_GUESTDBG_USE_SW_BP)
    good = stop.cause == wire.KB_CAUSE_DEBUG and stop.debug_exception == 3 and stop.debug_pc == CODE + 1
    return None if good else _what_happened(guest, stop)


def _check_hlt(guest: _Guest, cpl: int) -> str | None:
    guest.start(b"\x90\xf4" + _DONE[1:], cpl)  # over the first byte of the OUT
    stop = guest.run()
    halted = stop.cause == wire.KB_CAUSE_EXIT and stop.exit_reason == c.KVM_EXIT_HLT and guest.rip() == CODE + 2
    if not halted:
        return _what_happened(guest, stop)
    guest.core.write_region(guest.region, CODE + 1, _DONE[:1])
    guest.move(CODE + 1)
    stop = guest.run()
    ended = stop.exit_reason == c.KVM_EXIT_IO and stop.io_port == DONE_PORT
    return None if ended else f"the guest did not go on from it: {_what_happened(guest, stop)}"


def _check_hw_execute(guest: _Guest, cpl: int) -> str | None:
    guest.start(_STEPS + _DONE, cpl)
    stop = guest.run(control=c.KVM_GUESTDBG_USE_HW_BP, debugreg=(CODE + 8, 0x401))
    good = stop.cause == wire.KB_CAUSE_DEBUG and stop.debug_dr6 & 1 and guest.rip() == CODE + 8
    return None if good else _what_happened(guest, stop)


def _watch(guest: _Guest, cpl: int, code: bytes, dr7: int) -> str | None:
    guest.start(code + b"\x90" + _DONE, cpl)
    stop = guest.run(control=c.KVM_GUESTDBG_USE_HW_BP, debugreg=(DATA, dr7))
    good = stop.cause == wire.KB_CAUSE_DEBUG and stop.debug_dr6 & 1 and guest.rip() == CODE + len(code)
    return None if good else _what_happened(guest, stop)


_STORE = bytes.fromhex("890425") + DATA.to_bytes(4, "little")  # mov [DATA], eax
_LOAD = bytes.fromhex("8b0425") + DATA.to_bytes(4, "little")  # mov eax, [DATA]


def _check_hw_write(guest: _Guest, cpl: int) -> str | None:
    return _watch(guest, cpl, _STORE, 0x401 | 1 << 16 | 3 << 18)


def _check_hw_read(guest: _Guest, cpl: int) -> str | None:
    return _watch(guest, cpl, _LOAD, 0x401 | 3 << 16 | 3 << 18)


def _protected(guest: _Guest, cpl: int, code: bytes, protection: int, is_write: bool) -> str | None:
    guest.start(code + b"\x90" + _DONE, cpl)
    guest.core.protect(guest.region, DATA, 0x1000, protection)
    try:
        stop = guest.run()
        good = (
            stop.cause == wire.KB_CAUSE_EXIT
            and stop.exit_reason == c.KVM_EXIT_MMIO
            and stop.mmio_gpa == DATA
            and bool(stop.mmio_is_write) == is_write
        )
        if not good:
            return _what_happened(guest, stop)
    finally:
        guest.core.protect(guest.region, DATA, 0x1000, wire.KB_PROTECT_NONE)
    stop = guest.run()
    ended = stop.exit_reason == c.KVM_EXIT_IO and stop.io_port == DONE_PORT
    return None if ended else f"the access was not completed: {_what_happened(guest, stop)}"


def _check_readonly_slot(guest: _Guest, cpl: int) -> str | None:
    return _protected(guest, cpl, _STORE, wire.KB_PROTECT_WRITE, True)


def _check_no_slot(guest: _Guest, cpl: int) -> str | None:
    return _protected(guest, cpl, _LOAD, wire.KB_PROTECT_ALL, False)


_CHECKS: dict[str, Callable[[_Guest, int], str | None]] = {
    "step": _check_step,
    "int3": _check_int3,
    "hlt": _check_hlt,
    "hw_execute": _check_hw_execute,
    "hw_write": _check_hw_write,
    "hw_read": _check_hw_read,
    "readonly_slot": _check_readonly_slot,
    "no_slot": _check_no_slot,
}


def check(core: Core) -> Mechanisms:
    """Tries every mechanism at each privilege level at which it could work.

    Raises:
        KvmIoctlError: /dev/kvm is missing or refused (KVM_CREATE_VM).
    """
    start = time.perf_counter()
    works: dict[str, set[int]] = {name: set() for name in NAMES}
    notes: dict[str, str] = {}
    guest = _Guest(core)
    try:
        for name, attempt in _CHECKS.items():
            for cpl in LEVELS.get(name, (0, 3)):
                try:
                    failure = attempt(guest, cpl)
                except errors.KvmIoctlError as error:
                    failure = str(error)
                if failure is None:
                    works[name].add(cpl)
                else:
                    notes[f"{name}@{cpl}"] = failure
                    if failure != _RAN_PAST:  # a crashed guest may leave state behind
                        guest.close()
                        guest = _Guest(core)
    finally:
        guest.close()
    elapsed_ms = (time.perf_counter() - start) * 1e3
    sets = {name: frozenset(cpls) for name, cpls in works.items()}
    return Mechanisms(**sets, notes=notes, elapsed_ms=elapsed_ms)
