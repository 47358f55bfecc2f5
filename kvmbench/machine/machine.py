"""A PC around the vcpus of one VM: memory, boot state, loaders and devices.

`kvmbench.Machine` adds debugging to this class; alone it needs nothing but a
host's core and `kvmbench.kvm`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from kvmbench.arguments import integer, spelled_out
from kvmbench.errors import AddressError, ClosedError, LoadError, MisuseError, UnsupportedError
from kvmbench.kvm import VCPU, VM, System
from kvmbench.machine.assembly import assemble
from kvmbench.machine.boot import BootPlan, BootState, Mode, default_bits, plan_boot
from kvmbench.machine.bus import Bus
from kvmbench.machine.cpuid import identify
from kvmbench.machine.debug_exit import DebugExit
from kvmbench.machine.debugcon import DebugConsole
from kvmbench.machine.device import Device, check_device
from kvmbench.machine.elf import load_elf
from kvmbench.machine.flat import load_flat
from kvmbench.machine.fw_cfg import FwCfg
from kvmbench.machine.memory import Memory
from kvmbench.machine.multiboot import load_multiboot, multiboot_plan
from kvmbench.machine.page_tables import LARGE_PAGE_BYTES
from kvmbench.machine.program import Program
from kvmbench.machine.segment import available_tss, wants_available_tss
from kvmbench.machine.serial import Serial
from kvmbench.machine.size import page_multiple, show_size
from kvmbench.uapi import constants, ffi

PROGRAM_GPA = 0x1000
# Memory above this continues at 4 GiB: the interrupt controllers and KVM's own pages lie between.
LOW_MEMORY_BYTES = 3 << 30
HIGH_MEMORY_GPA = 4 << 30
# Page tables for more would take minutes and gigabytes to make.
MOST_MEMORY_BYTES = 1 << 40
# I/O APIC and local APICs.
INTERRUPT_GPA, INTERRUPT_BYTES = 0xFEC0_0000, 0x40_0000
# What KVM on Intel needs for real mode without unrestricted guests (KVM API, KVM_SET_TSS_ADDR): 4 pages.
_IDENTITY_MAP_GPA, _TSS_GPA = 0xFFFB_C000, 0xFFFB_D000
_SERIAL_IRQ = 4
# SYSENTER_CS, _ESP, _EIP; STAR, LSTAR, CSTAR, FMASK; KERNEL_GS_BASE.
_CALL_MSRS = (0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102)

Source = str | os.PathLike[str] | bytes | bytearray | memoryview


class Machine:
    """A virtual machine: memory from gpa 0, vcpus in a boot mode, devices on a bus.

    A context manager. Where tables and stacks lie is said in `kvmbench.machine.boot`.

    Args:
        host: from `kvmbench.connect()`.
        memory: size in bytes or as "16M"; whole pages. What exceeds 3 GiB lies from 4 GiB on.
        mode: ``real``, ``protected`` (paging off), ``pae`` or ``long`` (paging on, identity mapped).
        vcpus: how many; all start at the program's entry, each with its own stack.
        user: page tables with the user bit, and a start at CPL 3 (with IOPL 3, so that IN and OUT work).
        cpl: privilege level at the start, where it is not to follow `user`.
        page_bytes: size of the mapped pages, 4096 or 2 MiB.
        irqchip: interrupt controllers in the kernel; `irq` needs them, and serial input then interrupts.
        pit: the i8254 timer in the kernel; needs `irqchip`.
        waiting: vcpus other than the first wait for INIT and SIPI; needs `irqchip`.
        devices: further devices; their MMIO ranges are put into the identity map.
        mapped: further (gpa, size in bytes) for the identity map.

    Attributes:
        host: where it runs.
        vm: its `kvm.VM`.
        vcpus: its `kvm.VCPU` objects.
        memory: its guest-physical memory.
        bus: its ports and MMIO ranges.
        serial, debugcon, debug_exit, fw_cfg: the devices every machine has.
        mode: the boot mode.

    Raises:
        MisuseError: options that cannot be right, before anything is made.
        AddressError: the tables do not fit the memory, or devices and memory overlap.
        KvmIoctlError: the host refused.
    """

    def __init__(
        self,
        host: Any,
        *,
        memory: int | str = "16M",
        mode: str = "long",
        vcpus: int = 1,
        user: bool = False,
        cpl: int | None = None,
        page_bytes: int = LARGE_PAGE_BYTES,
        irqchip: bool = False,
        pit: bool = False,
        waiting: bool = False,
        devices: Sequence[Device] = (),
        mapped: Iterable[tuple[int, int]] = (),
    ) -> None:
        if not hasattr(host, "core"):
            raise MisuseError(f"a machine needs a host from kvmbench.connect(), not {host!r}")
        size_bytes = page_multiple(memory, "memory")
        vcpus = integer(vcpus, "vcpus")
        try:
            devices = tuple(devices)
            mapped = [(integer(gpa, "mapped gpa", 0), integer(size, "mapped size")) for gpa, size in mapped]
        except TypeError:
            raise MisuseError(
                f"devices={devices!r}, mapped={mapped!r}: give a list of devices, and one of (gpa, size in bytes)"
            ) from None
        for device in devices:
            check_device(device)
        if size_bytes > MOST_MEMORY_BYTES:
            raise MisuseError(f"memory={memory!r}: a machine has at most {show_size(MOST_MEMORY_BYTES)}")
        if (pit or waiting) and not irqchip:
            raise MisuseError(f"{'pit' if pit else 'waiting'}=True needs irqchip=True")
        low_bytes = min(size_bytes, LOW_MEMORY_BYTES)
        ranges = [*mapped, *((space.start, len(space)) for device in devices for space in device.mmio)]
        if irqchip:
            ranges.append((INTERRUPT_GPA, INTERRUPT_BYTES))
        if size_bytes > low_bytes and mode == "long":
            ranges.append((HIGH_MEMORY_GPA, size_bytes - low_bytes))
        # Everything that can be refused without a host is refused before one is used.
        self._plan = plan_boot(mode, low_bytes, vcpus=vcpus, user=user, cpl=cpl, page_bytes=page_bytes, mapped=ranges)
        self._own_plan = self._plan
        self.host = host
        self.irqchip = irqchip
        self._programs: list[Program] = []
        self._boot: Callable[[int], BootState] = lambda vcpu: self._plan.state(PROGRAM_GPA, vcpu=vcpu)
        self._waiting = waiting
        self._closed = False
        self.vm: VM = System(host.core).create_vm()
        try:
            self._build(size_bytes, low_bytes, vcpus, pit, devices)
        except BaseException:
            self.close()
            raise

    def _build(self, size_bytes: int, low_bytes: int, vcpus: int, pit: bool, devices: Sequence[Device]) -> None:
        self.memory = Memory(self.vm)
        self.memory.map(0, low_bytes, name="RAM")
        if size_bytes > low_bytes:
            self.memory.map(HIGH_MEMORY_GPA, size_bytes - low_bytes, name="RAM above 4 GiB")
        if self.host.info.module != "kvm_amd":
            # kvm_amd accepts and ignores both; each is a round trip on a remote host.
            self.vm.set_identity_map_addr(_IDENTITY_MAP_GPA)
            self.vm.set_tss_addr(_TSS_GPA)
        if self.irqchip:
            self.vm.create_irqchip()
            if pit:
                self.vm.create_pit2()
        self.vcpus: tuple[VCPU, ...] = tuple(self.vm.create_vcpu(index) for index in range(vcpus))
        self._identify()
        # The APIC base in them is KVM's to choose, so each state is written over what is there.
        self._sregs = [vcpu.get_sregs() for vcpu in self.vcpus]
        self._place_tables()
        self._start()
        self._check_mode()

        self.bus = Bus()
        line = (lambda level: self.irq(_SERIAL_IRQ, level)) if self.irqchip else None
        self.serial = Serial(irq=line)
        self.debugcon = DebugConsole()
        self.debug_exit = DebugExit()
        self.fw_cfg = FwCfg(self.memory, memory_bytes=size_bytes, vcpus=vcpus)
        for device in (self.serial, self.debugcon, self.debug_exit, self.fw_cfg, *devices):
            self.attach(device)

    def _check_mode(self) -> None:
        # kvm_pvm takes the state of a mode it cannot run without a word, and keeps paging off.
        wanted, got = self._boot(0), self.vcpus[0].get_sregs()
        for name, mask in (("cr0", 0x8000_0001), ("cr4", 0x20), ("efer", 0x500)):
            if (int(getattr(got, name)) ^ int(getattr(wanted, name))) & mask:
                raise UnsupportedError(
                    f"{self.host.info.module} does not run {self.mode} mode: it made {name} "
                    f"{int(getattr(got, name)):#x} of {int(getattr(wanted, name)):#x}; use another mode, "
                    "or connect('appliance')"
                )

    def _identify(self) -> None:
        supported = System(self.host.core).get_supported_cpuid()
        for index, vcpu in enumerate(self.vcpus):
            identify(supported.entries[0 : supported.nent], index, len(self.vcpus))
            vcpu.set_cpuid2(supported)

    # --- programs

    @spelled_out
    def load_asm(
        self,
        source: str | os.PathLike[str],
        at: int = PROGRAM_GPA,
        entry: int | str | None = None,
        bits: int | None = None,
        *,
        symbols: Mapping[str, int] | None = None,
        name: str | None = None,
        start: bool = True,
        over_tables: bool = False,
    ) -> Program:
        """Assembles a source (`kvmbench.machine.assembly.assemble`), places it and starts there.

        Args:
            source: GNU as, Intel syntax; the text, or a `Path`.
            at: gpa of the first byte.
            entry: address or label of the first instruction; ``_start`` or `at` unless given.
            bits: 16, 32 or 64; that of the machine's mode unless given.
            symbols: further names for the source, such as those of another program.
            start: put all vcpus into their boot state at the entry; else only place the bytes.
            over_tables: allow the program to overwrite the machine's own tables.

        Raises:
            AssemblyError: the assembler refused; each line is named.
            AddressError: it does not fit the memory, or overlaps the machine's tables.
            MisuseError: the mode cannot start there.
        """
        width = default_bits(self._own_plan.mode) if bits is None else bits
        program = assemble(source, at, width, entry=entry, symbols=symbols, name=name)
        return self._load(program, start=start, over_tables=over_tables, misfit=AddressError)

    @spelled_out
    def load_elf(
        self, source: Source, *, name: str | None = None, start: bool = True, over_tables: bool = False
    ) -> Program:
        """Places a static ELF executable, 32 or 64 bits, by its physical addresses and starts at its entry.

        Raises:
            LoadError: damaged, of another machine, or outside the memory.
            AddressError: it overlaps the machine's tables.
            MisuseError: the mode cannot start in code of its width.
        """
        program = load_elf(source, name=name)
        return self._load(program, start=start, over_tables=over_tables, misfit=LoadError)

    @spelled_out
    def load_flat(
        self,
        source: Source,
        at: int = PROGRAM_GPA,
        *,
        entry: int | None = None,
        bits: int | None = None,
        name: str | None = None,
        start: bool = True,
        over_tables: bool = False,
    ) -> Program:
        """Places bare code, a path or bytes, and starts at its first byte or `entry`.

        Raises:
            LoadError: unreadable or empty.
            AddressError: it does not fit the memory, or overlaps the machine's tables.
            MisuseError: the mode cannot start there.
        """
        width = default_bits(self._own_plan.mode) if bits is None else bits
        program = load_flat(source, at, entry=entry, bits=width, name=name)
        return self._load(program, start=start, over_tables=over_tables, misfit=AddressError)

    @spelled_out
    def load_multiboot(
        self,
        source: Source,
        *,
        command_line: str = "",
        modules: Sequence[tuple[bytes, str]] = (),
        name: str | None = None,
    ) -> Program:
        """Places a Multiboot 1 kernel with its modules, and starts it as the specification says.

        The vcpus then are in flat 32-bit protected mode, whatever the machine's mode is, and the machine's
        tables are not needed: the kernel may lie anywhere.

        Raises:
            LoadError: no such kernel, damaged, or too large for the memory.
        """
        image = load_multiboot(
            source, self._own_plan.memory_bytes, command_line=command_line, modules=modules, name=name
        )
        self._check_idle()
        plan = multiboot_plan(self._own_plan.memory_bytes, vcpus=len(self.vcpus))
        self._place(image.program, LoadError)
        self._plan = plan
        self._boot = lambda vcpu: image.state(plan)
        self._start()
        self._loaded(image.program)
        return image.program

    def _load(
        self, program: Program, *, start: bool, over_tables: bool, misfit: type[AddressError | LoadError]
    ) -> Program:
        plan = self._own_plan
        if start:
            plan.state(program.entry, bits=program.bits)  # refuses before anything is written
            self._check_idle()
        if not over_tables:
            for gpa, length in program.ranges:
                if plan.overlaps(gpa, length):
                    first, size = plan.tables
                    raise AddressError(
                        f"{program.name}: {length:#x} bytes at {gpa:#x} overlap the machine's own tables at "
                        f"{first:#x} to {first + size - 1:#x}; load it elsewhere, or with over_tables=True"
                    )
        self._place(program, misfit)
        if start:
            if self._plan is not plan:
                self._plan = plan
                self._place_tables()
            self._boot = lambda vcpu: plan.state(program.entry, vcpu=vcpu, bits=program.bits)
            self._start()
        self._loaded(program)
        return program

    def _place(self, program: Program, misfit: type[AddressError | LoadError]) -> None:
        self.check_open()
        for gpa, length in program.ranges:
            if not self.memory.holds(gpa, length):
                raise misfit(
                    f"{program.name}: {length:#x} bytes at {gpa:#x} do not lie in the machine's memory "
                    f"({', '.join(str(region) for region in self.memory.regions)}); "
                    "load it elsewhere, or make the machine with more memory"
                )
        self._write(program)
        # A program that is overwritten is gone: cells of a notebook run many times.
        self._programs = [each for each in self._programs if not _overlap(each, program)]
        self._programs.append(program)

    def _write(self, program: Program) -> None:
        for gpa, data in program.segments:
            self.memory.write(gpa, data)
        for gpa, length in program.blank:
            self.memory.fill(gpa, length)

    def _loaded(self, program: Program) -> None:
        """Hook: a program was placed, and the vcpus sent to its entry if it was to start."""

    def _check_idle(self) -> None:
        """Hook: raises BusyError if a vcpu that is about to be started anew is running."""

    @property
    def programs(self) -> tuple[Program, ...]:
        """What is loaded, in that order; programs overwritten by later ones are left out."""
        return tuple(self._programs)

    # --- vcpus

    def _place_tables(self) -> None:
        for gpa, data in self._plan.placements:
            self.memory.write(gpa, data)

    def _start(self) -> None:
        # Puts every vcpu into its boot state.
        for index, (vcpu, sregs) in enumerate(zip(self.vcpus, self._sregs, strict=True)):
            if self._waiting and index:
                continue
            state = self._boot(index)
            state.apply_sregs(sregs)
            if wants_available_tss(self.host.info.module):
                sregs.tr.type = available_tss(sregs.tr.type)
            vcpu.set_sregs(sregs)
            regs = ffi.new("struct kvm_regs *")
            state.apply_regs(regs)
            vcpu.set_regs(regs)
            # A guest that died may have left an exception or NMI about to be delivered.
            vcpu.set_vcpu_events(
                ffi.new(
                    "struct kvm_vcpu_events *",
                    {"flags": constants.KVM_VCPUEVENT_VALID_NMI_PENDING | constants.KVM_VCPUEVENT_VALID_SHADOW},
                )
            )
            if self.irqchip:
                # With controllers in the kernel KVM has the others wait for INIT and SIPI, and a HLT wait for ever.
                vcpu.set_mp_state(constants.KVM_MP_STATE_RUNNABLE)

    @property
    def mode(self) -> Mode:
        """The boot mode: that of the constructor, or protected after `load_multiboot`."""
        return self._plan.mode

    @property
    def boot_plan(self) -> BootPlan:
        """Where the machine's tables and stacks lie."""
        return self._plan

    # --- devices

    @spelled_out
    def attach(self, device: Device) -> None:
        """Puts a device on the bus.

        In a paging mode the identity map has the MMIO of devices given to the constructor; for one attached
        later the guest must map the range itself, or it lies in ``mapped=``.

        Raises:
            AddressError: a port or address is taken, or the MMIO lies in memory.
        """
        check_device(device)
        for space in device.mmio:
            for region in self.memory.regions:
                if space.start < region.end and region.gpa < space.stop:
                    raise AddressError(
                        f"MMIO {space.start:#x} to {space.stop - 1:#x} of {device.name} lies in memory at {region}"
                    )
        self.bus.attach(device)

    @spelled_out
    def irq(self, line: int, level: int) -> None:
        """Raises (1) or lowers (0) a line of the in-kernel interrupt controllers (KVM_IRQ_LINE).

        Raises:
            MisuseError: the machine has no irqchip, or there is no such line or level.
        """
        self.check_open()
        if not self.irqchip:
            raise MisuseError("irq() needs a machine made with irqchip=True")
        if not 0 <= line < 24 or level not in (0, 1):
            raise MisuseError(f"irq({line}, {level}): lines are 0 to 23, levels 0 and 1")
        self.vm.irq_line(line, bool(level))

    # --- life

    def reset(self) -> None:
        """As after power-on with the same programs loaded: memory is zero but for them, devices are reset.

        The vcpus are at the entry of the program started last. Of their MSRs those of SYSCALL and SYSENTER
        are cleared; the others and the TSC stay.
        """
        self.check_open()
        self._check_idle()
        for region in self.memory.regions:
            self.memory.fill(region.gpa, region.size_bytes)
        self._place_tables()
        for program in self._programs:
            self._write(program)
        self.bus.reset()
        self._start()
        for vcpu in self.vcpus:
            vcpu.set_debugregs(ffi.new("struct kvm_debugregs *", {"dr6": 0xFFFF_0FF0, "dr7": 0x400}))
            vcpu.set_fpu(ffi.new("struct kvm_fpu *", {"fcw": 0x37F, "mxcsr": 0x1F80}))
            vcpu.set_msrs(dict.fromkeys(_CALL_MSRS, 0))

    @property
    def closed(self) -> bool:
        """True after `close()`, or when the host is closed."""
        return self._closed or bool(self.host.closed)

    def check_open(self) -> None:
        """Raises ClosedError if the machine or its host was closed."""
        if self.closed:
            raise ClosedError("the machine is closed; make a new one with kvmbench.Machine(host)")

    def close(self) -> None:
        """Ends the VM with all its vcpus and memory; idempotent."""
        if self._closed:
            return
        self._closed = True
        memory = getattr(self, "memory", None)
        if memory is not None:
            memory.close()
        self.vm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else ""
        size = show_size(self._own_plan.memory_bytes if self._closed else self.memory.size_bytes)
        vcpus = f"{self._own_plan.vcpus} vcpu{'s' if self._own_plan.vcpus > 1 else ''}"
        programs = f"{len(self._programs)} program{'' if len(self._programs) == 1 else 's'}"
        return f"<{type(self).__name__} {self.mode} mode, {size}, {vcpus}, {programs}{state}>"


def _overlap(one: Program, other: Program) -> bool:
    return any(a < b + size_b and b < a + size_a for a, size_a in one.ranges for b, size_b in other.ranges)
