"""The breakpoints of one vcpu, and what has to be armed for them before it runs."""

from __future__ import annotations

import dataclasses
import html
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvmbench.arguments import instead, integer, spelled_out
from kvmbench.core import wire
from kvmbench.debug.breakpoint import KINDS, Breakpoint, Mechanism, choose
from kvmbench.errors import AddressError, MisuseError
from kvmbench.kvm.region import PAGE_BYTES
from kvmbench.uapi import constants as c

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

_WATCH = struct.Struct("<IIQ")  # struct kb_watch
# DR7: L0 to L3 enable, LE (bit 8) and the always-one bit 10 as the SDM asks; 8 bytes are coded 2.
_DR7_BASE = 0x500
_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one KB_EXECUTE needs so that every enabled breakpoint can stop it.

    Attributes:
        control: KVM_GUESTDBG_* bits.
        debugreg: DR0 to DR3 at 0 to 3, DR7 at 7.
        registers: which breakpoint each debug register is for.
        int3: breakpoints to be written into memory while the guest runs.
        stops: addresses for the stepping loop to compare, and their breakpoints.
        watches: ranges for it to compare, packed, and their breakpoints.
    """

    control: int
    debugreg: tuple[int, ...]
    registers: tuple[Breakpoint, ...]
    int3: tuple[Breakpoint, ...]
    stops: tuple[Breakpoint, ...]
    watches: tuple[Breakpoint, ...]
    payload: bytes

    @property
    def must_step(self) -> bool:
        """Whether some breakpoint needs the stepping loop."""
        return bool(self.stops or self.watches)


class Breakpoints:
    """``cpu.breakpoints``: add, remove, list.

    The mechanism is chosen from what the host's self-check saw to work, and each
    breakpoint's repr says which it got.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._all: dict[int, Breakpoint] = {}
        self._next = 1
        self._version = 0
        self._plans: dict[bool, tuple[int, tuple[bool, ...], Plan]] = {}

    @spelled_out
    def add(
        self,
        where: int | str,
        *,
        condition: Callable[[Any], Any] | None = None,
        temporary: bool = False,
        mechanism: str | None = None,
        unmapped: bool = False,
    ) -> Breakpoint:
        """Stops the guest before it executes the instruction at `where`.

        Args:
            where: address (gva) or symbol, such as ``"loop"`` or ``"loop+4"``.
            condition: called with the `Cpu` at each hit; false lets the guest go on.
            temporary: remove it at the first hit.
            mechanism: one of `Mechanism` instead of the one kvmbench would choose.
            unmapped: accept an address that is not mapped yet.

        Raises:
            AddressError: nothing is mapped there, and `unmapped` is not given.
            UnsupportedError: no mechanism for it works on this host.
            MisuseError: an unknown symbol or mechanism.
        """
        return self._insert(where, "x", 1, condition, temporary, mechanism, unmapped)

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
    ) -> Breakpoint:
        """Stops the guest after an instruction that wrote (``"w"``) or touched (``"rw"``) memory.

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
        return self._insert(where, kind, size, condition, temporary, mechanism, False)

    def _insert(
        self,
        where: int | str,
        kind: str,
        size_bytes: int,
        condition: Callable[[Any], Any] | None,
        temporary: bool,
        mechanism: str | None,
        unmapped: bool,
    ) -> Breakpoint:
        cpu = self._cpu
        if condition is not None and not callable(condition):
            raise MisuseError(f"a condition is a function of the cpu, not {condition!r}")
        wanted = None
        if mechanism is not None:
            try:
                wanted = Mechanism(mechanism)
            except ValueError:
                names = [str(one) for one in Mechanism]
                raise MisuseError(f"no mechanism {mechanism!r}; {instead(mechanism, names)}") from None
        address = cpu.symbols.resolve(where)
        gpa = cpu.translate(address)
        if gpa is not None and not cpu.machine.memory.holds(gpa, size_bytes):
            gpa = None
        if gpa is None and not unmapped:
            raise AddressError(
                f"nothing is mapped at {address:#x} now; map it first, or for code that will be "
                "loaded later use breakpoints.add(..., unmapped=True)"
            )
        taken = sum(1 for one in self if one.mechanism is Mechanism.DEBUG_REGISTER)
        chosen, levels = choose(
            kind,
            cpu.machine.host.mechanisms,
            wanted=wanted,
            size_bytes=size_bytes,
            address=address,
            mapped=gpa is not None,
            free_debug_registers=4 - taken,
        )
        label = cpu.symbols.label(address) or f"{address:#x}"
        breakpoint = Breakpoint(
            self._next, address, kind, size_bytes, chosen, levels, label, gpa, condition, temporary=temporary
        )
        breakpoint.changed = cpu.forget_request
        self._all[self._next] = breakpoint
        self._next += 1
        self._version += 1
        cpu.forget_request()
        if chosen in (Mechanism.READONLY_SLOT, Mechanism.NO_SLOT):
            try:
                self._protect()
            except Exception:
                del self._all[breakpoint.number]
                raise
        return breakpoint

    def remove(self, which: int | Breakpoint) -> None:
        """Removes a breakpoint, given itself or its number.

        Raises:
            MisuseError: there is no such breakpoint.
        """
        gone = self[which.number if isinstance(which, Breakpoint) else which]
        del self._all[gone.number]
        self._version += 1
        self._cpu.forget_request()
        if gone.mechanism in (Mechanism.READONLY_SLOT, Mechanism.NO_SLOT):
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
            if one.gpa is None or one.mechanism not in (Mechanism.READONLY_SLOT, Mechanism.NO_SLOT):
                continue
            protection = wire.KB_PROTECT_WRITE if one.mechanism is Mechanism.READONLY_SLOT else wire.KB_PROTECT_ALL
            first = one.gpa // PAGE_BYTES
            for page in range(first, (one.gpa + one.size_bytes - 1) // PAGE_BYTES + 1):
                wanted[page] = max(wanted.get(page, 0), protection)
        before = machine.protected
        for page in before.keys() | wanted.keys():
            if before.get(page) != wanted.get(page):
                region, offset = memory.find(page * PAGE_BYTES, PAGE_BYTES)
                protection = wanted.get(page, wire.KB_PROTECT_NONE)
                machine.host.core.protect(region.handle, offset, PAGE_BYTES, protection)
        machine.protected = wanted

    @property
    def quiet(self) -> bool:
        """True if no watchpoint has to be armed for a single step."""
        return not self._all or not any(one.enabled and one.is_watchpoint for one in self._all.values())

    def plan(self, *, stepping: bool) -> Plan:
        """What to arm.  While single-stepping, execute breakpoints are compared, not armed.

        The result is kept until the list, or a breakpoint's `enabled`, changes.
        """
        enabled = tuple(one.enabled for one in self._all.values())
        kept = self._plans.get(stepping)
        if kept is not None and kept[0] == self._version and kept[1] == enabled:
            return kept[2]
        plan = self._make_plan(stepping)
        self._plans[stepping] = (self._version, enabled, plan)
        return plan

    def _make_plan(self, stepping: bool) -> Plan:
        active = [one for one in self if one.enabled]
        memory = self._cpu.machine.memory
        registers: list[Breakpoint] = []
        int3: list[Breakpoint] = []
        stops: list[Breakpoint] = []
        watches: list[Breakpoint] = []
        must_step = stepping or any(one.mechanism is Mechanism.STEPPING for one in active)
        for one in active:
            if one.kind == "x" and must_step:
                stops.append(one)
            elif one.mechanism is Mechanism.DEBUG_REGISTER:
                registers.append(one)
            elif one.mechanism is Mechanism.INT3:
                int3.append(one)
            elif one.mechanism is Mechanism.STEPPING:
                watches.append(one)
        if len(stops) > wire.KB_MAX_STOPS or len(watches) > wire.KB_MAX_WATCHES:
            raise MisuseError(
                f"{len(stops)} breakpoints and {len(watches)} watchpoints for the stepping loop; "
                f"it takes {wire.KB_MAX_STOPS} and {wire.KB_MAX_WATCHES}"
            )
        debugreg = [0] * 8
        control = c.KVM_GUESTDBG_USE_SW_BP if int3 else 0
        if registers:
            control |= c.KVM_GUESTDBG_USE_HW_BP
            debugreg[7] = _DR7_BASE
            for n, one in enumerate(registers):
                debugreg[n] = one.address
                debugreg[7] |= 1 << 2 * n | KINDS[one.kind] << 16 + 4 * n
                debugreg[7] |= _LENGTHS[one.size_bytes] << 18 + 4 * n
        payload = struct.pack(f"<{len(stops)}Q", *(one.address for one in stops))
        for one in watches:
            assert one.gpa is not None  # choose() gives the stepping loop mapped ranges only
            region, offset = memory.find(one.gpa, one.size_bytes)
            payload += _WATCH.pack(region.handle, one.size_bytes, offset)
        return Plan(control, tuple(debugreg), tuple(registers), tuple(int3), tuple(stops), tuple(watches), payload)

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

    def at(self, address: int) -> Breakpoint | None:
        """The enabled execute breakpoint at a linear address, or None."""
        for one in self:
            if one.enabled and one.kind == "x" and one.address == address:
                return one
        return None
