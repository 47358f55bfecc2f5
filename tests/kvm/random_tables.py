"""Guests with random page tables: what a probe of an address does to them, as the guest itself sees it.

A machine's first 2 MiB are mapped to themselves by 4-KiB pages for supervisors, but for one page of user code. All
else is drawn from a seed. No table is changed from outside once the guest has run: KVM's shadow paging would not see
it. What an address leads to by the way it was drawn is noted here without a look at the library's walk.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import kvmbench as kb
from kvmbench.errors import UnsupportedError
from kvmbench.kvm import System
from kvmbench.machine import segment as seg
from kvmbench.machine.boot import CODE32, CODE64, DATA, USER_CODE32, USER_CODE64, USER_DATA
from kvmbench.machine.segment import encode_gate
from kvmbench.uapi import ffi
from kvmbench.uapi.cpuid import feature_names

MODES = ("32-bit", "PAE", "4-level", "5-level")
IDT, HANDLERS, KERNEL, USER, STACK = 0x10000, 0x12000, 0x13000, 0x14000, 0x16000
TABLES, IDENTITY = 0x10_0000, 0x20_0000
DATA_GPA, DATA_END = 0x20_0000, 0x60_0000
MMIO_GPA = 0x4000_0000
# Read, write and jump; HLT ends the kernel's, INT3 the user's. The same bytes in 32 and 64 bits.
_STUBS = {"read": b"\x8b\x07", "write": b"\x89\x07", "execute": b"\xff\xe7"}
_WRPKRU = b"\x0f\x01\xef\xf4"
_NEW = 0x57A1_E000
_SHIFTS = {"32-bit": (22, 12), "PAE": (30, 21, 12), "4-level": (39, 30, 21, 12), "5-level": (48, 39, 30, 21, 12)}
_CR0_WP, _CR0_PG, _PE = 1 << 16, 1 << 31, 1
_CR4 = {"pse": 1 << 4, "pae": 1 << 5, "pge": 1 << 7, "la57": 1 << 12, "smep": 1 << 20, "smap": 1 << 21, "pku": 1 << 22}
_NXE, _AC = 1 << 11, 1 << 18


@dataclass(frozen=True)
class Features:
    """What a host's KVM offers to guests."""

    names: frozenset[str]
    physical_bits: int

    @classmethod
    def of(cls, host: kb.Host) -> Features:
        answers = System(host.core).get_supported_cpuid()
        entries = answers.entries[0 : answers.nent]
        names: set[str] = set()
        for one in entries:
            answers_of = {register: getattr(one, register) for register in ("eax", "ebx", "ecx", "edx")}
            names.update(feature_names(one.function, one.index, **answers_of))
        bits = next((one.eax & 0xFF for one in entries if one.function == 0x8000_0008), 36)
        return cls(frozenset(names), bits)


@dataclass(frozen=True)
class Controls:
    """The control bits of one guest."""

    mode: str
    wp: bool
    pge: bool
    smep: bool
    smap: bool
    nxe: bool
    pse: bool
    pku: bool
    pkru: int

    @classmethod
    def draw(cls, rng: random.Random, mode: str, has: Features) -> Controls:
        long = mode in ("4-level", "5-level")

        def maybe(name: str = "") -> bool:
            return rng.random() < 0.6 and (not name or name in has.names)

        pku = maybe("pku") and long
        return cls(
            mode,
            wp=maybe(),
            pge=maybe(),
            smep=maybe("smep"),
            smap=maybe("smap"),
            nxe=maybe("nx"),
            pse=maybe(),
            pku=pku,
            pkru=rng.getrandbits(32) & ~3 if pku else 0,
        )

    def cr4(self) -> int:
        bits = {name: getattr(self, name) for name in ("pge", "smep", "smap", "pku")}
        bits |= {"pse": self.pse, "pae": self.mode != "32-bit", "la57": self.mode == "5-level"}
        return sum(_CR4[name] for name, on in bits.items() if on)


@dataclass(frozen=True)
class Probe:
    """One access, and where its address leads by the way it was drawn (None: nobody said)."""

    gva: int
    access: str
    user: bool
    ac: bool
    gpa: int | None


@dataclass(frozen=True)
class Seen:
    """What the guest did: no fault (`vector` None), and what it read; or what was pushed, and CR2."""

    vector: int | None = None
    error_code: int = 0
    cr2: int = 0
    value: int | None = None
    mmio_gpa: int | None = None
    other: str = ""


@dataclass
class Drawn:
    """Tables as bytes by gpa, and pages (gva, shift, gpa) that were put into them."""

    root: int
    tables: dict[int, dict[int, int]] = field(default_factory=dict)
    pages: list[tuple[int, int, int]] = field(default_factory=list)


class Draw:
    """Draws tables for one guest."""

    def __init__(self, rng: random.Random, controls: Controls, has: Features, *, paths: int = 12) -> None:
        self._rng, self._controls, self._has = rng, controls, has
        self._shifts = _SHIFTS[controls.mode]
        self._wide = controls.mode != "32-bit"
        self._next = TABLES
        self._below: dict[tuple[int, int], int] = {}
        self.drawn = Drawn(self._table())
        self._identity()
        for _ in range(paths):
            self._path()

    def _table(self) -> int:
        gpa, self._next = self._next, self._next + 0x1000
        assert gpa < IDENTITY
        if hasattr(self, "drawn"):
            self.drawn.tables[gpa] = {}
        return gpa

    def _slots(self, depth: int) -> int:
        return 4 if self._controls.mode == "PAE" and depth == 0 else 512 if self._wide else 1024

    def _put(self, table: int, slot: int, entry: int) -> None:
        self.drawn.tables.setdefault(table, {})[slot] = entry

    def _identity(self) -> None:
        table = self.drawn.root
        for depth in range(len(self._shifts) - 1):
            below = self._table()
            rights = 1 if self._controls.mode == "PAE" and depth == 0 else 7
            self._put(table, 0, below | rights)
            # Nothing else goes into the last one, which is full.
            if depth + 2 < len(self._shifts):
                self._below[table, 0] = below
            table = below
        for page in range(IDENTITY >> 12):
            self._put(table, page, page << 12 | (5 if page << 12 == USER else 3))

    def _entry(self, target: int, depth: int, *, leaf: bool) -> int:
        rng, controls = self._rng, self._controls
        if controls.mode == "PAE" and depth == 0:
            return target | 1 if rng.random() < 0.95 else target
        large = leaf and depth < len(self._shifts) - 1
        entry = target | (rng.random() < 0.93) | (rng.random() < 0.75) << 1 | (rng.random() < 0.75) << 2
        entry |= rng.getrandbits(2) << 3 | rng.getrandbits(2) << 5
        entry |= large << 7
        if leaf:
            entry |= rng.getrandbits(1) << 8 | (rng.random() < 0.3) << (12 if large else 7)
        entry |= rng.getrandbits(3) << 9
        if not self._wide:
            # Bit 7 without PSE means nothing; with it, it would lead elsewhere.
            flips = [21] if large else [] if leaf else [8] if controls.pse else [7, 8]
        else:
            entry |= (rng.random() < 0.2 and (controls.nxe or rng.random() < 0.2)) << 63
            if controls.mode != "PAE":
                entry |= rng.getrandbits(7) << 52
                entry |= (rng.getrandbits(4) if leaf else 0) << 59
            flips = [*range(self._has.physical_bits, 63), 63]
            flips += [*range(13, self._shifts[depth])] * 2 if large else []
            flips += [8] * 6 if not leaf else []
            flips += [7] * 6 if not leaf and depth == 0 else []
        if flips and rng.random() < 0.06:
            entry |= 1 << rng.choice(flips)
        return entry

    def lead(self, gva: int, gpa: int, *, change: dict[int, int] | None = None) -> None:
        """Maps a page of 4 KiB with all rights; `change` are bits to flip, by level from the top."""
        table = self.drawn.root
        for depth, shift in enumerate(self._shifts):
            last = depth == len(self._shifts) - 1
            slot = gva >> shift & self._slots(depth) - 1
            below = gpa if last else self._below.get((table, slot)) or self._table()
            rights = 1 if self._controls.mode == "PAE" and depth == 0 else 0x27
            self._put(table, slot, (below | rights) ^ (change or {}).get(depth, 0))
            if not last:
                self._below[table, slot] = below
            table = below

    def _path(self) -> None:
        rng = self._rng
        table, gva = self.drawn.root, 0
        # Half of the paths share tables with an earlier one as far as they like.
        share = rng.random() < 0.7
        for depth, shift in enumerate(self._shifts):
            last = depth == len(self._shifts) - 1
            known = [slot for at, slot in self._below if at == table]
            if share and known and not last and rng.random() < 0.6:
                slot = rng.choice(known)
            else:
                slot = rng.randrange(self._slots(depth))
            while slot in self.drawn.tables.setdefault(table, {}) and (last or (table, slot) not in self._below):
                slot = rng.randrange(self._slots(depth))
            gva |= slot << shift
            if (table, slot) in self._below:
                table = self._below[table, slot]
                continue
            if last or (self._may_be_large(shift) and rng.random() < 0.4):
                gpa = self._page(shift)
                leads = (gpa & 0xFFC0_0000 | gpa >> 32 << 13) if shift == 22 else gpa
                self._put(table, slot, self._entry(leads, depth, leaf=True))
                self.drawn.pages.append((gva, shift, gpa))
                return
            # KVM's shadow paging ends a guest one of whose PDPTEs leads outside of memory: a test of its own.
            if rng.random() < 0.03 and not (depth == 0 and self._controls.mode == "PAE"):
                self._put(table, slot, self._entry(MMIO_GPA + rng.randrange(64) * 0x1000, depth, leaf=False))
                return
            below = self._table()
            self._put(table, slot, self._entry(below, depth, leaf=False))
            self._below[table, slot] = below
            table = below

    def _may_be_large(self, shift: int) -> bool:
        return shift == 21 or (shift == 22 and self._controls.pse) or (shift == 30 and self._controls.mode != "PAE")

    def _page(self, shift: int) -> int:
        rng = self._rng
        if shift == 12:
            return MMIO_GPA + 0x1000 * rng.randrange(16) if rng.random() < 0.05 else rng.randrange(512, 1536) << 12
        if shift == 30:
            return rng.choice((0, 0, MMIO_GPA))
        if shift == 22:
            return rng.choice((0x40_0000, 0x40_0000, 0x40_0000, MMIO_GPA, 0x3_4000_0000, 0x30_4000_0000))
        return rng.choice((0x20_0000, 0x40_0000, 0x40_0000, MMIO_GPA))

    def probes(self, count: int) -> Iterator[Probe]:
        """Accesses to what was drawn, and some elsewhere."""
        rng = self._rng
        for _ in range(count):
            access, user, ac = rng.choice(("read", "write", "execute")), rng.random() < 0.5, rng.random() < 0.5
            kind = rng.random()
            if kind < 0.04:
                gva, gpa = self._signed(rng.randrange(16, 256) << 12 | 0x40), None
                access = "read"
                # The tables and the code are there: only to be read, and by supervisors.
                gpa = gva
            elif kind < 0.08:
                gva, gpa = self._signed(rng.getrandbits(self._linear_bits()) & ~0xF), None
                if gva < IDENTITY:
                    gva += IDENTITY
            elif kind < 0.11 and self._linear_bits() > 32:
                gva, gpa = 1 << rng.randrange(self._linear_bits(), 63) | 0x4000, None
            elif self.drawn.pages:
                first, shift, page = rng.choice(self.drawn.pages)
                offset = rng.randrange(1 << shift) & ~0xF
                if shift == 30 and not page:
                    offset = rng.randrange(DATA_GPA, DATA_END) & ~0xF
                gva, gpa = self._signed(first | offset), page + offset
                if access == "execute" and not DATA_GPA <= gpa < DATA_END:
                    access = "read"
            else:
                continue
            inside = 0 if access == "execute" else 4
            yield Probe(gva + inside, access, user, ac, None if gpa is None else gpa + inside)

    def _linear_bits(self) -> int:
        return {"4-level": 48, "5-level": 57}.get(self._controls.mode, 32)

    def _signed(self, gva: int) -> int:
        bits = self._linear_bits()
        return gva | (1 << 64) - (1 << bits) if bits > 32 and gva >> (bits - 1) & 1 else gva


class Guest:
    """A machine with drawn tables, whose vcpu is put to each probe anew."""

    def __init__(self, host: kb.Host, controls: Controls, drawn: Drawn) -> None:
        self.controls = controls
        self.long = controls.mode in ("4-level", "5-level")
        self.machine = kb.Machine(host, memory="6M", mode="long" if self.long else "protected")
        self.machine.cpu.catches.add("mmio")
        self._place(drawn)
        self._sregs(drawn.root)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *error: object) -> None:
        self.machine.close()

    def _place(self, drawn: Drawn) -> None:
        memory, bits = self.machine.memory, 64 if self.long else 32
        selector = CODE64 if self.long else CODE32
        memory.write(IDT, b"".join(encode_gate(HANDLERS + n, selector, bits=bits, dpl=3) for n in range(32)))
        memory.write(HANDLERS, b"\xf4" * 32)
        for page, end in ((KERNEL, b"\xf4"), (USER, b"\xcc")):
            code = b"".join((stub + end).ljust(16, b"\x90") for stub in _STUBS.values())
            memory.write(page, code + (_WRPKRU if page == KERNEL else b""))
        width, entries = (4, 1024) if self.controls.mode == "32-bit" else (8, 512)
        image = bytearray(max(drawn.tables, default=TABLES) + 0x1000 - TABLES)
        for gpa, slots in drawn.tables.items():
            for slot, entry in slots.items():
                assert slot < entries
                at = gpa - TABLES + slot * width
                image[at : at + width] = entry.to_bytes(width, "little")
        memory.write(TABLES, image)

    def _sregs(self, root: int) -> None:
        state, controls = self.machine.cpu.state, self.controls
        sregs = _copy(state.get_sregs())
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
        sregs.cr3 = root
        sregs.cr0 = int(sregs.cr0) & ~_CR0_WP | (_CR0_WP if controls.wp else 0) | _CR0_PG
        sregs.cr4 = int(sregs.cr4) & ~sum(_CR4.values()) | controls.cr4()
        sregs.efer = int(sregs.efer) & ~_NXE | (_NXE if controls.nxe else 0)
        state.set_sregs(sregs)
        if not int(state.get_sregs().cr0) & _CR0_PG:
            module = self.machine.host.info.module
            self.machine.close()
            raise UnsupportedError(f"{module} does not run {controls.mode} paging")
        if controls.pku:
            self._level(user=False)
            self._go(rip=KERNEL + 48, rax=controls.pkru)

    def _level(self, *, user: bool) -> None:
        state = self.machine.cpu.state
        sregs = _copy(state.get_sregs())
        if self.long:
            code = seg.flat_code(USER_CODE64 | 3, 3, bits=64) if user else seg.flat_code(CODE64, bits=64)
        else:
            code = seg.flat_code(USER_CODE32 | 3, 3, bits=32) if user else seg.flat_code(CODE32, bits=32)
        data = seg.flat_data(USER_DATA | 3, 3) if user else seg.flat_data(DATA)
        code.to_kvm(sregs.cs)
        for name in ("ss", "ds", "es"):
            data.to_kvm(getattr(sregs, name))
        sregs.cr2 = 0
        state.set_sregs(sregs)

    def _go(self, **registers: int) -> kb.Stop:
        state = self.machine.cpu.state
        regs = _copy(state.get_regs())
        for name in ("rax", "rcx", "rdx", "rdi"):
            setattr(regs, name, 0)
        regs.rsp, regs.rflags = STACK, 2
        for name, value in registers.items():
            setattr(regs, name, value)
        state.set_regs(regs)
        return self.machine.cpu.run(deadline_s=20)

    def prepare(self, probe: Probe) -> None:
        """Puts the vcpu before the access, and something to read and to run where it leads."""
        self._level(user=probe.user)
        cell = None if probe.gpa is None else probe.gpa & ~0xF
        if cell is not None and DATA_GPA <= cell < DATA_END:
            # KVM's instruction emulator, which runs CPL 0 on kvm_pvm, has no INT3; CPL 3 may not HLT.
            code = b"\xcc" if probe.user else b"\xf4"
            self.machine.memory.write(cell, code * 4 + cell.to_bytes(4, "little"))
        state = self.machine.cpu.state
        regs = _copy(state.get_regs())
        regs.rflags = 2 | (_AC if probe.ac else 0)
        state.set_regs(regs)

    def make(self, probe: Probe) -> Seen:
        """Has the guest make the access."""
        stub = (USER if probe.user else KERNEL) + list(_STUBS).index(probe.access) * 16
        stop = self._go(rip=stub, rdi=probe.gva, rax=_NEW, rflags=2 | (_AC if probe.ac else 0))
        if getattr(stop.exit, "gpa", None) is not None:
            return Seen(mmio_gpa=stop.exit.gpa)
        if stop.cause is not kb.Cause.HALT:
            return Seen(other=str(stop))
        cpu = self.machine.cpu
        at = stop.rip - 1
        # Without nrips kvm_amd finds the length of a HLT by a walk of its own, and leaves rip on it if that faults.
        if not probe.user and at in ((probe.gva, probe.gva - 1) if probe.access == "execute" else (stub + 2,)):
            return Seen(value=cpu.regs.rax & 0xFFFF_FFFF)
        vector = at - HANDLERS
        pointer = cpu.regs.rsp
        words = 8 if self.long else 4
        frame = self.machine.memory.read(pointer, 3 * words)
        first, second = (int.from_bytes(frame[n * words : (n + 1) * words], "little") for n in range(2))
        if vector == 3 and first == (probe.gva + 1 if probe.access == "execute" else stub + 3):
            return Seen(value=cpu.regs.rax & 0xFFFF_FFFF)
        if vector in (12, 13, 14):
            # A jump that is not canonical faults itself on some processors, its target on others.
            pushed = (probe.gva, stub) if probe.access == "execute" else (stub,)
            other = "" if second in pushed else f"rip {second:#x} in the frame"
            return Seen(vector, first, int(cpu.regs.cr2) if vector == 14 else 0, other=other)
        return Seen(vector, other=f"vector {vector} at {first:#x}")


def _copy(registers: Any) -> Any:
    # What a state hands out points into the bytes of a stop.
    kind = ffi.typeof(registers)
    made = ffi.new(kind)
    ffi.memmove(made, registers, ffi.sizeof(kind.item))
    return made


#: What a write writes.
NEW_VALUE = _NEW
