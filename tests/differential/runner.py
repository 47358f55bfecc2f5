"""Runs guests on a host: one machine a mode, kept, with memory and registers put back for each guest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import kvmbench as kb
from kvmbench.debug.recorder import Recorder
from kvmbench.debug.step_rows import Rows
from kvmbench.debug.stop import Cause
from kvmbench.kvm.segment import DescriptorTable
from kvmbench.machine import Device
from kvmbench.machine.device import StopRequest
from kvmbench.uapi import constants, ffi

from .guest import MOST_STEPS, NAMES, Guest
from .setting import CODE, END_PORT, INNER_STACK, MEMORY_BYTES, PORTS, SHORT_PORTS, WINDOW, WINDOW_BYTES, Setting
from .tables import GDT, IDT, VECTORS, fixed_block, gdt_bytes, real_vectors

_MSR_NAMES = (0x174, 0x175, 0x176)
_LONG_MSRS = (0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102)
_DEADLINE_S = 30.0


class Answers(Device):
    """Ports and a page that answer by address and by how often they were asked, and keep a log."""

    name = "answers"
    ports = (PORTS, SHORT_PORTS)

    def __init__(self, hole: int) -> None:
        self.mmio = (range(hole, hole + 0x1000),)
        self.log: list[tuple[str, int, int, int]] = []

    def _answer(self, address: int, size_bytes: int) -> int:
        word = f"{len(self.log)} {address} {size_bytes}".encode()
        return int.from_bytes(hashlib.blake2b(word, digest_size=size_bytes).digest(), "little")

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        self.log.append(("out", port, value, size_bytes))
        return None

    def port_in(self, port: int, size_bytes: int) -> int:
        value = self._answer(port, size_bytes)
        self.log.append(("in", port, value, size_bytes))
        return value

    def mmio_write(self, gpa: int, value: int, size_bytes: int) -> StopRequest | None:
        self.log.append(("write", gpa, value, size_bytes))
        return None

    def mmio_read(self, gpa: int, size_bytes: int) -> int:
        value = self._answer(gpa, size_bytes)
        self.log.append(("read", gpa, value, size_bytes))
        return value


class End(Device):
    """The port by which a guest at CPL 3 ends."""

    name = "end"
    ports = (range(END_PORT, END_PORT + 1),)

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        return StopRequest("end")


@dataclass(frozen=True)
class Outcome:
    """What a guest did on a host.

    Attributes:
        host: its name.
        start: the row before the first step.
        rows: a row a step.
        end: how it ended: a cause, and what goes with it.
        log: accesses to devices.
        window: memory from WINDOW on.
        special: control and segment registers at the end, by name.
    """

    host: str
    start: Rows
    rows: Rows
    end: str
    log: tuple[tuple[str, int, int, int], ...]
    window: bytes
    special: dict[str, int] = field(default_factory=dict)


class UnsupportedSetting(Exception):
    """The host does not run this mode, or does not step at this privilege level."""


@dataclass
class _Place:
    """A machine, and the state that each of its guests starts from."""

    machine: kb.Machine
    answers: Answers
    sregs: Any
    spoiled: bool = False


class Runner:
    """Runs guests on one host.

    Attributes:
        host: it.
        name: for reports.
        kind: what quirks are keyed by, such as ``kvm_amd npt=1``.
    """

    def __init__(self, host: kb.Host, name: str) -> None:
        self.host = host
        self.name = name
        self.kind = kind_of(host)
        self._places: dict[Setting, _Place | str] = {}

    def supports(self, setting: Setting) -> bool:
        """Whether the host runs guests of a setting."""
        return not isinstance(self._place(setting), str)

    def close(self) -> None:
        """Ends its machines; the host stays."""
        for place in self._places.values():
            if isinstance(place, _Place):
                place.machine.close()
        self._places.clear()

    def run(self, guest: Guest) -> Outcome:
        """Records a guest from its first instruction to its end.

        Raises:
            UnsupportedSetting: see there.
        """
        place = self._place(guest.setting)
        if isinstance(place, str):
            raise UnsupportedSetting(place)
        machine, cpu = place.machine, place.machine.cpu
        machine.memory.write(WINDOW, guest.window)
        self._set_state(place, guest)
        place.answers.log.clear()
        recorder = Recorder(cpu, MOST_STEPS, progress=False)
        stop = recorder.run(_DEADLINE_S)
        rows = recorder._rows.finish()
        window = machine.memory.read(WINDOW, WINDOW_BYTES)
        place.spoiled = stop.cause not in (Cause.HALT, Cause.GUEST_EXIT)
        end = str(stop.cause) if not place.spoiled else f"{stop.cause} {stop.exit or stop.error or ''}".strip()
        special = _special(cpu.state.get_sregs()) if not place.spoiled else {}
        if machine.host.lost:
            raise RuntimeError(machine.host.lost)
        return Outcome(self.name, recorder._start, rows, end, tuple(place.answers.log), window, special)

    def _set_state(self, place: _Place, guest: Guest) -> None:
        cpu, vcpu = place.machine.cpu, place.machine.vcpus[0]
        cpu.engine.complete_exit(discard=True)
        if place.spoiled:
            flags = constants.KVM_VCPUEVENT_VALID_NMI_PENDING | constants.KVM_VCPUEVENT_VALID_SHADOW
            vcpu.set_vcpu_events(ffi.new("struct kvm_vcpu_events *", {"flags": flags}))
        kinds = {piece.kind for piece in guest.pieces}
        if "machine_register" in kinds or "swap_gs" in kinds:
            vcpu.set_msrs(dict.fromkeys(_MSR_NAMES + (_LONG_MSRS if guest.setting.mode == "long" else ()), 0))
        if "debug_register" in kinds:
            vcpu.set_debugregs(ffi.new("struct kvm_debugregs *", {"dr6": 0xFFFF_0FF0, "dr7": 0x400}))
        regs = ffi.new("struct kvm_regs *")
        for name, value in zip(NAMES, guest.registers, strict=True):
            setattr(regs, name, value)
        regs.rip, regs.rflags = CODE, guest.rflags
        vcpu.set_sregs(place.sregs)
        vcpu.set_regs(regs)
        cpu.state.current = cpu.state.previous = kb.debug.state.Stopped.pack(regs, place.sregs)

    def _place(self, setting: Setting) -> _Place | str:
        if setting not in self._places:
            if setting.cpl and 3 not in self.host.mechanisms.step:
                self._places[setting] = "no single step at CPL 3"
            else:
                try:
                    self._places[setting] = self._make(setting)
                except kb.errors.UnsupportedError as error:
                    self._places[setting] = str(error)
        return self._places[setting]

    def _make(self, setting: Setting) -> _Place:
        answers = Answers(setting.hole)
        machine = kb.Machine(
            self.host,
            memory="512K" if setting.mode == "real" else MEMORY_BYTES,
            mode=setting.mode,
            user=setting.cpl == 3,
            devices=[answers, End()],
        )
        cpu = machine.cpu
        plan = machine.boot_plan
        width = 32 if (setting.mode, setting.bits) == ("long", 32) else setting.bits
        sregs = cpu.vcpu.get_sregs()
        plan.state(CODE, bits=width).apply_sregs(sregs)
        boot_gdt = bytes(0x58) if setting.mode == "real" else machine.memory.read(sregs.gdt.base, 0x58)
        machine.memory.write(0x1000, fixed_block(setting, boot_gdt))
        if setting.mode == "real":
            machine.memory.write(0, real_vectors(setting))
            for name, selector in (("fs", 4), ("gs", 8)):
                segment = getattr(sregs, name)
                segment.selector, segment.base = selector, selector << 4
        else:
            DescriptorTable(GDT, len(gdt_bytes(boot_gdt)) - 1).to_kvm(sregs.gdt)
            DescriptorTable(IDT, VECTORS * (16 if setting.mode == "long" else 8) - 1).to_kvm(sregs.idt)
            machine.memory.write(sregs.tr.base + 4, INNER_STACK.to_bytes(4, "little"))
            if setting.bits == 16:
                # Data segments reach all memory, the stack has 16 bits.
                for name in ("ds", "es"):
                    segment = getattr(sregs, name)
                    segment.selector, segment.limit, segment.g, segment.db = 0x18, 0xFFFF_FFFF, 1, 1
            if setting.cpl and setting.mode != "long" and self.kind.endswith("QEMU"):
                # QEMU 7.2 ends ("invalid tss type") when an exception from CPL 3 finds a busy TSS in TR, as VMRUN
                # loads it; it keeps the type of an idle one itself. VMX takes none but a busy one.
                sregs.tr.type = 9
            for name, selector, base in (("fs", 0x58, 0x40), ("gs", 0x60, 0x80)):
                segment = getattr(sregs, name)
                segment.base, segment.selector, segment.dpl = base, selector | 3, 3
                segment.limit, segment.g, segment.db, segment.type, segment.s = 0xFFFF_FFFF, 1, 1, 3, 1
                segment.present, segment.unusable = 1, 0
        return _Place(machine, answers, sregs)


def kind_of(host: kb.Host) -> str:
    """What quirks are keyed by: the module, its MMU, and the emulator."""
    info = host.info
    mmu = {"kvm_amd": "npt", "kvm_intel": "ept"}.get(info.module)
    words = [info.module]
    if mmu:
        value = info.parameters.get(f"{info.module}.{mmu}", "")
        words.append(f"{mmu}={'1' if value in ('1', 'Y') else '0'}")
    if info.emulator:
        words.append(info.emulator.split()[0])
    return " ".join(words)


def _special(sregs: Any) -> dict[str, int]:
    found = {name: int(getattr(sregs, name)) for name in ("cr0", "cr2", "cr3", "cr4", "efer")}
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        segment = getattr(sregs, name)
        found[name] = int(segment.selector)
        if not segment.unusable:
            found[f"{name}.base"] = int(segment.base)
    for name in ("gdt", "idt"):
        found[f"{name}.base"] = int(getattr(sregs, name).base)
        found[f"{name}.limit"] = int(getattr(sregs, name).limit)
    return found
