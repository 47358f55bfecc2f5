"""The state a vcpu starts in, and the tables that this state points to.

Pure functions: nothing here touches a host, so all of it can be checked by
decoding the bytes. `plan_boot` decides where things lie, `BootPlan.state`
gives the registers of one vcpu.

Guest-physical memory of a machine, unless a program lays it out otherwise:

    0x00000 - 0x003ff  interrupt vectors of real mode (zero)
    0x01000 - ...      programs (the default load address); 0x7c00 for boot sectors
    ...     - 0x0fff0  real mode: stacks, growing down, 1 KiB a vcpu
    ...     - 0x80000  other modes: stacks, growing down, 8 KiB a vcpu (less above 56 vcpus);
                       the lower half is the stack for entries from CPL 3 (in the TSS)
    0x80000 - 0x9ffff  other modes: a GDT and a TSS for each vcpu (256 bytes), at CPL 3 the I/O permission
                       bitmap they share (12 KiB), then the page tables
    0x100000 - ...     free

The block at 0x80000 lies at the end of memory instead where it does not fit:
in memories below 640 KiB, and with very many page tables. There is no IDT: a
fault in a fresh guest is a triple fault until the program loads one. Real mode
needs no tables, so there the block does not exist.

Every GDT holds the same (the null descriptor first):

    0x08 code32  0x10 code64  0x18 data  0x20 user code32  0x28 user data  0x30 user code64
    0x38 TSS (two slots)  0x48 code16  0x50 data16

which is the order that SYSCALL and SYSRET want.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvmbench.errors import AddressError, MisuseError
from kvmbench.kvm.region import PAGE_BYTES
from kvmbench.kvm.segment import DescriptorTable, Segment
from kvmbench.machine import segment as seg
from kvmbench.machine.page_tables import LARGE_PAGE_BYTES, PageTables, identity_tables

Mode = Literal["real", "protected", "pae", "long"]
MODES: tuple[Mode, ...] = ("real", "protected", "pae", "long")

TABLES_GPA = 0x80000
TABLES_END_GPA = 0xA0000
REAL_STACK_GPA = 0xFFF0
REAL_STACK_BYTES = 0x400
STACK_BYTES = 0x2000
_STACKS_FLOOR_GPA = 0x10000
_VCPU_BLOCK_BYTES = 0x100
_TSS_OFFSET = 0x80
_TSS_BYTES = 104
_IO_MAP_BYTES = 0x10000 // 8 + 1

CODE32, CODE64, DATA, USER_CODE32, USER_DATA, USER_CODE64, TSS, CODE16, DATA16 = (
    0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x48, 0x50,
)  # fmt: skip
_GDT_BYTES = 0x58

# SDM volume 3, "Control Registers" and "IA32_EFER".
_CR0_PE, _CR0_MP, _CR0_ET, _CR0_NE, _CR0_WP, _CR0_PG = 1, 1 << 1, 1 << 4, 1 << 5, 1 << 16, 1 << 31
_CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_RFLAGS_ONE, _RFLAGS_IOPL3 = 1 << 1, 3 << 12

# Widths of code that each mode can start in, the usual one first.
_WIDTHS: dict[Mode, tuple[int, ...]] = {
    "real": (16,),
    "protected": (32, 16),
    "pae": (32, 16),
    "long": (64, 32),
}


def check_mode(mode: str) -> Mode:
    """The mode, if there is such.

    Raises:
        MisuseError: there is not.
    """
    if mode not in MODES:
        raise MisuseError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    return mode


def default_bits(mode: Mode) -> int:
    """Width of the code that a mode starts in: 16, 32 or 64."""
    return _WIDTHS[mode][0]


@dataclass(frozen=True, slots=True)
class BootState:
    """Registers of one vcpu at its first instruction; all not named here are zero.

    Attributes:
        registers: general registers that are not zero, beside rip, rsp and rflags, as ``rax`` to value.
    """

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable
    idt: DescriptorTable
    cr0: int
    cr3: int
    cr4: int
    efer: int
    rip: int
    rsp: int
    rflags: int
    registers: Mapping[str, int] = field(default_factory=dict)

    def apply_sregs(self, sregs: Any) -> None:
        """Writes into a ``struct kvm_sregs`` that KVM_GET_SREGS filled: the APIC base and CR8 stay."""
        for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
            getattr(self, name).to_kvm(getattr(sregs, name))
        self.gdt.to_kvm(sregs.gdt)
        self.idt.to_kvm(sregs.idt)
        sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4 = self.cr0, 0, self.cr3, self.cr4
        sregs.efer = self.efer

    def apply_regs(self, regs: Any) -> None:
        """Writes into a zeroed ``struct kvm_regs``."""
        for name, value in self.registers.items():
            setattr(regs, name, value)
        regs.rip, regs.rsp, regs.rflags = self.rip, self.rsp, self.rflags


@dataclass(frozen=True, slots=True)
class BootPlan:
    """Where the tables of a machine lie, and what is in them.

    Attributes:
        mode: real, protected, pae or long.
        memory_bytes: size of the memory that starts at gpa 0.
        vcpus: how many have a stack, GDT and TSS here.
        cpl: privilege level of the first instruction.
        tables: (gpa, size in bytes) of the GDTs, TSSs and page tables; size 0 in real mode.
        stack_gpa: top of vcpu 0's stack.
        stack_bytes: from one vcpu's stack to the next.
        pages: the page tables, where the mode has paging on.
        io_map: gpa of the I/O permission bitmap, in plans for CPL 3.
    """

    mode: Mode
    memory_bytes: int
    vcpus: int
    cpl: int
    tables: tuple[int, int]
    stack_gpa: int
    stack_bytes: int
    pages: PageTables | None
    io_map: int | None = None

    @property
    def placements(self) -> tuple[tuple[int, bytes], ...]:
        """Pairs of (gpa, bytes) to write into memory that is zero in `tables`."""
        if self.mode == "real":
            return ()
        blocks = [(self._block(index), self._gdt_and_tss(index)) for index in range(self.vcpus)]
        # One write for all: a message each would cost a round trip on a remote host.
        first = blocks[0][0]
        joined = b"".join(data.ljust(_VCPU_BLOCK_BYTES, b"\0") for _, data in blocks)
        # The bitmap itself is zeros: every port is allowed. The processor wants a byte of ones behind it.
        bitmap = [] if self.io_map is None else [(self.io_map + _IO_MAP_BYTES - 1, b"\xff")]
        return ((first, joined), *bitmap, *(self.pages.placements() if self.pages else ()))

    def stack(self, vcpu: int) -> int:
        """Initial stack pointer of a vcpu; what is pushed goes below."""
        return self.stack_gpa - vcpu * self.stack_bytes

    def overlaps(self, gpa: int, size_bytes: int) -> bool:
        """True if a range touches the tables."""
        first, size = self.tables
        return gpa < first + size and first < gpa + size_bytes

    def state(self, entry: int, *, vcpu: int = 0, bits: int | None = None) -> BootState:
        """The registers with which a vcpu starts at `entry`.

        Args:
            bits: width of the code there: 16, 32 or 64; that of the mode unless given.

        Raises:
            MisuseError: the mode cannot start in code of that width, or cannot reach the entry.
        """
        width = default_bits(self.mode) if bits is None else bits
        if width not in _WIDTHS[self.mode]:
            raise MisuseError(
                f"{self.mode} mode cannot start in {width}-bit code; make a Machine of another mode, or load "
                "this with start=False and jump to it"
            )
        reach = {"real": 1 << 16, "protected": 1 << 32, "pae": 1 << 32, "long": 1 << 47}[self.mode]
        reach = 1 << 16 if width == 16 else min(reach, 1 << 32) if width == 32 else reach
        if not 0 <= entry < reach:
            raise MisuseError(
                f"entry {entry:#x} is out of reach of {width}-bit code in {self.mode} mode, "
                f"which ends at {reach:#x}"
            )
        if self.mode == "real":
            return self._real(entry, vcpu)
        return self._protected(entry, vcpu, width)

    def _real(self, entry: int, vcpu: int) -> BootState:
        data = seg.real_segment(0)
        return BootState(
            cs=seg.real_segment(0, code=True),
            ds=data, es=data, fs=data, gs=data, ss=data,
            # VMX wants a usable TR even here; this is what a processor has after reset.
            tr=Segment(0, 0, 0xFFFF, seg.TYPE_TSS_BUSY, s=0),
            ldt=Segment(0, 0, 0xFFFF, seg.TYPE_LDT, s=0),
            gdt=DescriptorTable(0, 0xFFFF),
            idt=DescriptorTable(0, 0x3FF),
            cr0=_CR0_ET, cr3=0, cr4=0, efer=0,
            rip=entry, rsp=self.stack(vcpu), rflags=_RFLAGS_ONE,
        )  # fmt: skip

    def _protected(self, entry: int, vcpu: int, width: int) -> BootState:
        cpl, long, paged = self.cpl, self.mode == "long", self.pages is not None
        if cpl:
            selector = USER_CODE64 if width == 64 else USER_CODE32
            if width == 16:
                raise MisuseError("16-bit code cannot start at CPL 3: the GDT has no such descriptor")
            code, data = seg.flat_code(selector | 3, 3, bits=width), seg.flat_data(USER_DATA | 3, 3)
        else:
            selector = {16: CODE16, 32: CODE32, 64: CODE64}[width]
            code = seg.flat_code(selector, bits=width)
            data = seg.flat_data(DATA16, bits=16) if width == 16 else seg.flat_data(DATA)
        stack = REAL_STACK_GPA - vcpu * REAL_STACK_BYTES if width == 16 else self.stack(vcpu)
        cr0 = _CR0_PE | _CR0_MP | _CR0_ET | _CR0_NE
        cr4 = _CR4_OSFXSR | _CR4_OSXMMEXCPT
        return BootState(
            cs=code, ds=data, es=data, fs=data, gs=data, ss=data,
            tr=self._tss(vcpu),
            ldt=seg.no_ldt(),
            gdt=DescriptorTable(self._block(vcpu), _GDT_BYTES - 1),
            idt=DescriptorTable(0, 0),
            cr0=cr0 | _CR0_WP | _CR0_PG if paged else cr0,
            cr3=self.pages.root if self.pages else 0,
            cr4=cr4 | _CR4_PAE if paged else cr4,
            efer=_EFER_LME | _EFER_LMA if long else 0,
            rip=entry,
            rsp=stack,
            # IOPL 3 lets user code use IN and OUT, which a first guest prints with. kvm_pvm looks at the I/O
            # bitmap in spite of it (test_user_code_may_use_ports), so there is one that allows all.
            rflags=_RFLAGS_ONE | (_RFLAGS_IOPL3 if cpl else 0),
        )  # fmt: skip

    def _block(self, vcpu: int) -> int:
        return self.tables[0] + vcpu * _VCPU_BLOCK_BYTES

    def _tss(self, vcpu: int) -> Segment:
        # Busy, as after LTR; VMX takes no other type in IA-32e mode (SDM volume 3, "Checks on Guest Segment
        # Registers").
        base = self._block(vcpu) + _TSS_OFFSET
        end = base + _TSS_BYTES if self.io_map is None else self.io_map + _IO_MAP_BYTES
        return Segment(TSS, base, end - base - 1, seg.TYPE_TSS_BUSY, s=0)

    def _gdt_and_tss(self, vcpu: int) -> bytes:
        long = self.mode == "long"
        gdt = bytes(8) + b"".join(
            seg.encode_descriptor(entry)
            for entry in (
                seg.flat_code(CODE32, bits=32),
                seg.flat_code(CODE64, bits=64),
                seg.flat_data(DATA),
                seg.flat_code(USER_CODE32 | 3, 3, bits=32),
                seg.flat_data(USER_DATA | 3, 3),
                seg.flat_code(USER_CODE64 | 3, 3, bits=64),
            )
        )
        gdt += seg.encode_descriptor(self._tss(vcpu), long=long).ljust(16, b"\0")
        gdt += seg.encode_descriptor(seg.flat_code(CODE16, bits=16))
        gdt += seg.encode_descriptor(seg.flat_data(DATA16, bits=16))
        inner_stack = self.stack(vcpu) - self.stack_bytes // 2
        tss = self._block(vcpu) + _TSS_OFFSET
        io_map_offset = _TSS_BYTES if self.io_map is None else self.io_map - tss
        return gdt.ljust(_TSS_OFFSET, b"\0") + _task_state(inner_stack, io_map_offset, long=long)


def plan_boot(
    mode: str,
    memory_bytes: int,
    *,
    vcpus: int = 1,
    user: bool = False,
    cpl: int | None = None,
    page_bytes: int = LARGE_PAGE_BYTES,
    mapped: Iterable[tuple[int, int]] = (),
) -> BootPlan:
    """Decides where stacks and tables lie for a machine.

    Args:
        mode: ``real``, ``protected`` (paging off), ``pae`` or ``long`` (paging on, identity mapped).
        memory_bytes: size of the memory that starts at gpa 0.
        user: set the user bit in all page tables.
        cpl: privilege level to start at, 0 or 3; 3 with `user`, else 0.
        page_bytes: size of the mapped pages, 4096 or 2 MiB.
        mapped: further (gpa, size in bytes) to map, such as devices beyond the memory.

    Raises:
        MisuseError: options that contradict one another.
        AddressError: the tables or stacks do not fit the memory, or a range cannot be mapped.
    """
    checked = check_mode(mode)
    level = (3 if user else 0) if cpl is None else cpl
    if level not in (0, 3):
        raise MisuseError(f"cpl={level!r}: a machine starts at CPL 0 or 3")
    if checked == "real" and (level or user):
        raise MisuseError("real mode has no user code and no page tables; choose protected, pae or long")
    if checked in ("pae", "long") and level and not user:
        raise MisuseError("cpl=3 without user=True: the first instruction fetch would fault; add user=True")
    if not 1 <= vcpus <= 4096:
        raise MisuseError(f"vcpus={vcpus!r}: a machine has 1 to 4096")
    if checked == "real":
        if REAL_STACK_GPA - vcpus * REAL_STACK_BYTES < 0x1000 or memory_bytes < 1 << 16:
            raise AddressError(
                f"{vcpus} vcpu(s) and {memory_bytes:#x} bytes of memory leave no room for real-mode stacks; "
                "take at least 64K and at most 59 vcpus"
            )
        return BootPlan(checked, memory_bytes, vcpus, 0, (0, 0), REAL_STACK_GPA, REAL_STACK_BYTES, None)
    return _plan_protected(checked, memory_bytes, vcpus, user, level, page_bytes, tuple(mapped))


def _plan_protected(
    mode: Mode,
    memory_bytes: int,
    vcpus: int,
    user: bool,
    cpl: int,
    page_bytes: int,
    mapped: tuple[tuple[int, int], ...],
) -> BootPlan:
    io_map_offset = -(-vcpus * _VCPU_BLOCK_BYTES // PAGE_BYTES) * PAGE_BYTES
    # A TSS points to its bitmap with 16 bits; above 240 vcpus the first would not reach it.
    has_io_map = cpl == 3 and io_map_offset < 1 << 16
    blocks_bytes = io_map_offset + (-(-_IO_MAP_BYTES // PAGE_BYTES) * PAGE_BYTES if has_io_map else 0)

    def tables_at(gpa: int) -> tuple[PageTables | None, int]:
        if mode == "protected":
            return None, blocks_bytes
        # PAE reaches 4 GiB: what lies above is not mapped.
        reach = memory_bytes if mode == "long" else min(memory_bytes, 1 << 32)
        pages = identity_tables(
            gpa + blocks_bytes,
            ((0, reach), *mapped),
            long=mode == "long",
            user=user,
            page_bytes=page_bytes,
        )
        return pages, blocks_bytes + pages.size_bytes

    base = TABLES_GPA
    pages, size = tables_at(base)
    if base + size > min(memory_bytes, TABLES_END_GPA):
        # CR3 has 32 bits in PAE, and so has the base of a GDT outside long mode.
        top = memory_bytes if mode == "long" else min(memory_bytes, 1 << 32)
        base = (top - size) // PAGE_BYTES * PAGE_BYTES
        if base >= _STACKS_FLOOR_GPA:
            pages, size = tables_at(base)
    stack_gpa = min(TABLES_GPA, base)
    stack_bytes = min(STACK_BYTES, (stack_gpa - _STACKS_FLOOR_GPA) // vcpus & ~0xF)
    if stack_bytes < 0x200:
        raise AddressError(
            f"{memory_bytes:#x} bytes of memory do not hold the tables ({size:#x} bytes) and stacks of "
            f"{vcpus} vcpu(s) in {mode} mode; give the machine more memory"
        )
    io_map = base + io_map_offset if has_io_map else None
    return BootPlan(mode, memory_bytes, vcpus, cpl, (base, size), stack_gpa, stack_bytes, pages, io_map)


def _task_state(stack: int, io_map_offset: int, *, long: bool) -> bytes:
    # SDM volume 3, "32-Bit Task-State Segment (TSS)" and "TSS Format in 64-bit Mode". An I/O map base past
    # the limit means that there is no bitmap.
    tss = bytearray(_TSS_BYTES)
    if long:
        tss[4:12] = stack.to_bytes(8, "little")
    else:
        tss[4:8] = stack.to_bytes(4, "little")
        tss[8:10] = DATA.to_bytes(2, "little")
    tss[102:104] = io_map_offset.to_bytes(2, "little")
    return bytes(tss)
