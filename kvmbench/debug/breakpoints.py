"""The breakpoints of one vcpu: set, removed, listed, and moved to another mechanism where one does not hold."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvmbench.arguments import instead, integer, spelled_out
from kvmbench.core import wire
from kvmbench.debug.arming import Plan, make_plan
from kvmbench.debug.breakpoint import TABLE, Breakpoint, check_condition, check_cr3, check_flag, check_ignore
from kvmbench.debug.mechanism import BOTH, OPCODES, SLOTS, Choice, Mechanism, Place, choose
from kvmbench.debug.vital_pages import keep_off
from kvmbench.debug.walk import walk
from kvmbench.errors import AddressError, MisuseError, UnsupportedError
from kvmbench.kvm.region import PAGE_BYTES

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

# Code that is all zero (ADD [RAX], AL, again and again) is none yet.
_BLANK = bytes(16)
# DR7 bits 0 to 7 enable the guest's own breakpoints.
_DR7_ENABLED = 0xFF


@dataclasses.dataclass(frozen=True)
class Options:
    """What `Breakpoints.add` and `watch` were asked for beside the place."""

    condition: Callable[[Any], Any] | None = None
    temporary: bool = False
    mechanism: Mechanism | None = None
    unmapped: bool = False
    overwritten: bool = False
    cr3: int | None = None
    page_table_isolation: bool = False
    ignore: int = 0

    @classmethod
    def checked(cls, *, mechanism: str | None = None, **given: Any) -> Options:
        """Refuses what cannot be right."""
        wanted = None
        if mechanism is not None:
            try:
                wanted = Mechanism(mechanism)
            except ValueError:
                names = [str(one) for one in Mechanism]
                raise MisuseError(f"no mechanism {mechanism!r}; {instead(mechanism, names)}") from None
        options = cls(mechanism=wanted, **given)
        check_condition(options.condition)
        check_ignore(options.ignore)
        check_cr3(options.cr3)
        for name in ("temporary", "unmapped", "overwritten", "page_table_isolation"):
            check_flag(getattr(options, name), name)
        if options.cr3 is None and options.page_table_isolation:
            raise MisuseError("page_table_isolation=True says how cr3 is compared; give cr3, too")
        return options


class Breakpoints:
    """``cpu.breakpoints``: add, remove, list.

    The mechanism is chosen from what the host's self-check saw to work, and each
    breakpoint's `why` says what for; `kvmbench.debug.mechanism` has what each can and cannot do.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._all: dict[int, Breakpoint] = {}
        self._next = 1
        self._version = 0
        self._plans: dict[bool, Plan] = {}

    @spelled_out
    def add(
        self,
        where: int | str,
        *,
        condition: Callable[[Any], Any] | None = None,
        temporary: bool = False,
        mechanism: str | None = None,
        unmapped: bool = False,
        overwritten: bool = False,
        cr3: int | None = None,
        page_table_isolation: bool = False,
        ignore: int = 0,
    ) -> Breakpoint:
        """Stops the guest before it executes the instruction at `where`.

        Args:
            where: address (gva) or symbol, such as ``"loop"`` or ``"loop+4"``.
            condition: called with the `Cpu` at each hit; false lets the guest go on.
            temporary: remove it at the first stop.
            mechanism: one of `Mechanism` instead of the one kvmbench would choose.
            unmapped: accept an address that is not mapped yet.
            overwritten: the guest will write the code there, as a loader does: choose what survives it.
            cr3: only in the address space of this table, in which `where` is looked up, too. PCID and no-flush bits
                do not count. The breakpoint is reached in other spaces as well, and the guest goes on from it.
            page_table_isolation: bit 12 of `cr3` does not count either, as Linux has two tables a process.
            ignore: let the guest go on from the first so many hits.

        Raises:
            AddressError: nothing is mapped there, and `unmapped` is not given.
            UnsupportedError: no mechanism for it works on this host.
            MisuseError: an unknown symbol or mechanism; more than 1024 of them.
        """
        options = Options.checked(
            condition=condition,
            temporary=temporary,
            mechanism=mechanism,
            unmapped=unmapped,
            overwritten=overwritten,
            cr3=cr3,
            page_table_isolation=page_table_isolation,
            ignore=ignore,
        )
        return self._insert(where, "x", 1, options)

    @spelled_out
    def watch(
        self,
        where: int | str,
        size_bytes: int = 8,
        kind: str = "w",
        *,
        condition: Callable[[Any], Any] | None = None,
        temporary: bool = False,
        mechanism: str | None = None,
        cr3: int | None = None,
        page_table_isolation: bool = False,
        ignore: int = 0,
    ) -> Breakpoint:
        """Stops the guest after an instruction that wrote (``"w"``) or touched (``"rw"``) memory.

        Beyond the four that debug registers hold, and for other sizes, the page is protected, which is slower.
        With the stepping loop a write is seen when it changes the bytes; a write of
        the value that was there is not.

        Raises:
            AddressError, UnsupportedError, MisuseError: as `add`.
        """
        if kind not in ("w", "rw"):
            raise MisuseError(f"a watchpoint is 'w' (write) or 'rw' (read or write), not {kind!r}")
        size = integer(size_bytes, "size_bytes")
        if not 1 <= size <= PAGE_BYTES:
            raise MisuseError(f"a watchpoint covers 1 to {PAGE_BYTES} bytes, not {size}")
        options = Options.checked(
            condition=condition,
            temporary=temporary,
            mechanism=mechanism,
            cr3=cr3,
            page_table_isolation=page_table_isolation,
            ignore=ignore,
        )
        return self._insert(where, kind, size, options)

    def _insert(self, where: int | str, kind: str, size_bytes: int, options: Options) -> Breakpoint:
        cpu = self._cpu
        # Single-stepping compares them all, whatever their mechanism is.
        if kind == "x" and sum(not one.is_watchpoint for one in self._all.values()) >= wire.KB_MAX_STOPS:
            raise MisuseError(f"there are {wire.KB_MAX_STOPS} breakpoints, the most that single-stepping can compare")
        address = cpu.symbols.resolve(where)
        gpa = self._gpa(address, size_bytes, options.cr3)
        if gpa is None and not options.unmapped:
            raise AddressError(self._not_mapped(kind, address, size_bytes, options.cr3))
        choice = self._choose(kind, address, size_bytes, gpa, options)
        breakpoint = Breakpoint(
            self._next,
            address,
            kind,
            size_bytes,
            choice.mechanism,
            choice.levels,
            cpu.symbols.label(address) or f"{address:#x}",
            gpa,
            choice.why,
            options.condition,
            options.cr3,
            options.page_table_isolation,
            options.ignore,
            temporary=options.temporary,
            hazard=choice.hazard,
        )
        breakpoint.changed = self._changed
        if choice.mechanism is Mechanism.DEBUG_REGISTER:
            self._look_for_conflict([breakpoint])
        self._all[self._next] = breakpoint
        self._next += 1
        self._changed()
        if choice.mechanism in SLOTS:
            try:
                self._protect()
            except Exception:
                del self._all[breakpoint.number]
                raise
        return breakpoint

    def _not_mapped(self, kind: str, address: int, size_bytes: int, cr3: int | None) -> str:
        where = f"{address:#x}" if size_bytes == 1 else f"{address:#x} to {address + size_bytes - 1:#x}"
        if cr3 is not None:
            return f"{where} is not in that address space: nothing is mapped at {where} by cr3 {cr3:#x}"
        said = f"nothing is mapped at {where} now; map it first"
        if kind == "x":
            said += ", or for code that will be loaded later use breakpoints.add(..., unmapped=True)"
        return said

    def _changed(self) -> None:
        self._version += 1
        self._cpu.forget_request()

    def _gpa(self, address: int, size_bytes: int, cr3: int | None) -> int | None:
        """Where the address leads, or None where that is no memory."""
        cpu = self._cpu
        sregs = cpu.state.get_sregs() if cr3 is not None else None
        if sregs is None or (cr3 is not None and (cr3 ^ int(sregs.cr3)) & TABLE == 0):
            gpa = cpu.translate(address)
        else:
            found = walk(cpu.machine.memory, sregs, address, cr3)
            gpa = None if found is None else found.gpa
        return gpa if gpa is not None and cpu.machine.memory.holds(gpa, size_bytes) else None

    def _choose(self, kind: str, address: int, size_bytes: int, gpa: int | None, options: Options) -> Choice:
        cpu = self._cpu
        taken = sum(1 for one in self if one.mechanism is Mechanism.DEBUG_REGISTER)
        overwritten = "the guest will write its code there" if options.overwritten else ""
        works = cpu.machine.host.mechanisms
        # Asked of the guest only where it matters: on some hosts each question takes milliseconds.
        writes = works.int3 or works.hlt
        if kind == "x" and gpa is not None and writes and not overwritten and options.mechanism is None:
            room = min(len(_BLANK), PAGE_BYTES - gpa % PAGE_BYTES)
            if cpu.machine.memory.holds(gpa, room) and cpu.machine.memory.read(gpa, room) == _BLANK[:room]:
                overwritten = "nothing is loaded there yet, and a loader would overwrite its byte"
        levels = BOTH
        if kind == "x" and gpa is not None and not works.int3 >= BOTH:
            levels = self._levels(address, options.cr3)
        place = Place(
            kind,
            address,
            size_bytes,
            mapped=gpa is not None,
            levels=levels,
            overwritten=overwritten,
            irqchip=cpu.machine.irqchip,
            free_debug_registers=4 - taken,
        )
        choice = choose(place, works, wanted=options.mechanism)
        if choice.mechanism in SLOTS and gpa is not None:
            choice = keep_off(cpu, choice, place, gpa, asked=options.mechanism is not None)
        self._check_level(choice, place, options)
        if choice.mechanism in OPCODES and gpa is not None:
            # Only one byte can stand there.
            there = cpu.machine.written.mechanism_at(gpa)
            if there not in (None, choice.mechanism):
                if options.mechanism is not None:
                    raise MisuseError(f"another breakpoint at gpa {gpa:#x} uses {there}; use it for this one, too")
                why = f"another breakpoint at gpa {gpa:#x} uses it"
                choice = dataclasses.replace(choose(place, works, wanted=there), why=why)
        return choice

    def _levels(self, address: int, cr3: int | None) -> frozenset[int]:
        """Privilege levels at which the guest may get there, as far as it can be told now."""
        mode = self._cpu.mode
        if mode.paging == "off":
            return BOTH if mode.cpl == 3 else frozenset({0})
        found = walk(self._cpu.machine.memory, self._cpu.state.get_sregs(), address, cr3)
        return BOTH if found is None or found.user else frozenset({0})

    def _check_level(self, choice: Choice, place: Place, options: Options) -> None:
        # At CPL 0 the guest may never leave it; at CPL 3 it is where the breakpoint would be missed.
        if options.mechanism is not None or 3 in choice.levels or self._cpu.mode.cpl != 3:
            return
        if 3 in self._levels(place.address, options.cr3):
            raise UnsupportedError(
                f"no way to stop on {place.kind!r} at {place.address:#x} at CPL 3, where the guest is now: "
                f"{choice.mechanism} is the best on this host, and works at CPL 0 only "
                f"(mechanism={str(choice.mechanism)!r} sets it nevertheless)"
            )

    def remove(self, which: int | Breakpoint) -> None:
        """Removes a breakpoint, given itself or its number.

        Raises:
            MisuseError: there is no such breakpoint.
        """
        gone = self[which.number if isinstance(which, Breakpoint) else which]
        if isinstance(which, Breakpoint) and gone is not which:
            raise MisuseError(f"{which!r} is not one of this vcpu; number {gone.number} here is {gone!r}")
        del self._all[gone.number]
        self._changed()
        if gone.shared is not None:
            gone.shared.dropped(gone)
        if gone.mechanism in SLOTS:
            self._protect()

    def clear(self) -> None:
        """Removes all of them."""
        for number in list(self._all):
            self.remove(number)

    def __getitem__(self, number: int) -> Breakpoint:
        if not isinstance(number, int) or number not in self._all:
            raise MisuseError(f"no breakpoint {number!r}; there are {sorted(self._all) or 'none'}, by number")
        return self._all[number]

    def __iter__(self) -> Iterator[Breakpoint]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no breakpoints"

    def _repr_html_(self) -> str:
        if not self._all:
            return "no breakpoints"
        rows = "".join(f"<tr><td style='text-align:left'>{html.escape(repr(one))}</td></tr>" for one in self)
        return f"<table>{rows}</table>"

    def _protect(self) -> None:
        memory = self._cpu.machine.memory
        machine = self._cpu.machine
        wanted: dict[int, int] = {}
        # Slots are the machine's: a page is free only when no vcpu's watchpoint needs it.
        for one in (one for cpu in machine.cpus for one in cpu.breakpoints):
            if one.gpa is None or one.mechanism not in SLOTS:
                continue
            protection = wire.KB_PROTECT_WRITE if one.mechanism is Mechanism.READONLY_SLOT else wire.KB_PROTECT_ALL
            first = one.gpa // PAGE_BYTES
            for page in range(first, (one.gpa + one.size_bytes - 1) // PAGE_BYTES + 1):
                wanted[page] = max(wanted.get(page, 0), protection)
        before = machine.protected
        changed = [page for page in before.keys() | wanted.keys() if before.get(page) != wanted.get(page)]
        if not changed:
            return
        # The whole region is away for a moment, and a vcpu that fetched code from it would fail.
        with machine.gate.hold(self._cpu):
            for page in changed:
                region, offset = memory.find(page * PAGE_BYTES, PAGE_BYTES)
                protection = wanted.get(page, wire.KB_PROTECT_NONE)
                machine.host.core.protect(region.handle, offset, PAGE_BYTES, protection)
            machine.protected = wanted

    def _look_for_conflict(self, registers: list[Breakpoint]) -> None:
        # KVM_GUESTDBG_USE_HW_BP puts ours in the place of the guest's, and KVM_GET_DEBUGREGS still tells the guest's.
        dr7 = int(self._cpu.vcpu.get_debugregs().dr7)
        said = ""
        if dr7 & _DR7_ENABLED:
            said = f"the guest has debug registers in use (dr7 {dr7:#x}), which are not in force while this one is"
        for one in registers:
            one.conflict = said

    def look_for_conflicts(self) -> None:
        """Called when the vcpu has run: the guest may use debug registers of its own by now."""
        registers = [one for one in self if one.enabled and one.mechanism is Mechanism.DEBUG_REGISTER]
        if registers:
            self._look_for_conflict(registers)

    def overwritten(self, gpa: int) -> bool:
        """Called when the guest was seen to have overwritten the byte at `gpa`; True if a breakpoint has moved."""
        moved = False
        for one in self:
            if one.gpa != gpa or one.mechanism not in OPCODES:
                continue
            one.overwritten += 1
            place = Place(
                "x",
                one.address,
                overwritten="the guest overwrote its byte",
                free_debug_registers=4 - sum(1 for each in self if each.mechanism is Mechanism.DEBUG_REGISTER),
            )
            try:
                choice = choose(place, self._cpu.machine.host.mechanisms)
            except UnsupportedError:
                choice = None
            quick = choice is not None and choice.mechanism is not Mechanism.STEPPING
            if choice is not None and (quick or one.overwritten > 1) and choice.levels >= one.levels:
                one.move(choice, f"moved from {one.mechanism}: the guest overwrote its byte")
                moved = True
            else:
                times = "once" if one.overwritten == 1 else f"{one.overwritten} times"
                one.remarks = [f"the guest overwrote its byte {times}, and it was written again"]
        if moved:
            self._changed()
        return moved

    @property
    def quiet(self) -> bool:
        """True if nothing has to be armed or minded for a single step but addresses for the core to compare."""
        machine = self._cpu.machine
        if machine.gate.is_held or machine.written:
            return False
        return not self._all or not any(one.enabled and one.is_watchpoint for one in self._all.values())

    @property
    def version(self) -> tuple[int, int]:
        """Changes when a plan is out of date."""
        return self._version, self._cpu.machine.written.version

    def plan(self, *, stepping: bool) -> Plan:
        """What to arm; kept until the list, a breakpoint's `enabled` or the bytes for other vcpus change."""
        version, written = self.version, self._cpu.machine.written
        kept = self._plans.get(stepping)
        if kept is None or kept.version != version:
            active = [one for one in self if one.enabled]
            others = written.addresses(self._cpu)
            made = make_plan(active, self._cpu.machine.memory, stepping=stepping, others=others)
            self._plans[stepping] = kept = dataclasses.replace(made, version=version)
        return kept

    def met_by_access(self, gpa: int, size_bytes: int, is_write: bool) -> list[Breakpoint]:
        """The enabled watchpoints that an access to a protected page touches.

        Also those with a debug register: KVM's emulator, which makes such accesses, does not look at it.
        """
        met = []
        for one in self:
            if one.enabled and one.gpa is not None and one.is_watchpoint:
                if one.mechanism is Mechanism.STEPPING:
                    continue  # it compares the bytes itself
                overlaps = gpa < one.gpa + one.size_bytes and one.gpa < gpa + size_bytes
                if overlaps and (is_write or one.kind == "rw"):
                    met.append(one)
        return met

    def reached(self, address: int) -> list[Breakpoint]:
        """The enabled execute breakpoints at a linear address."""
        return [one for one in self if one.enabled and one.kind == "x" and one.address == address]
