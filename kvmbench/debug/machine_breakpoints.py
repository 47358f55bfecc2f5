"""Breakpoints for all vcpus of a machine: ``m.breakpoints``."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvmbench.arguments import spelled_out
from kvmbench.debug.breakpoint import Breakpoint, check_flag, check_ignore, not_assignable
from kvmbench.errors import MisuseError

if TYPE_CHECKING:
    from kvmbench.debug.machine import Machine

_ASSIGNABLE = ("enabled", "ignore")


class SharedBreakpoint:
    """One place at which every vcpu stops: a `Breakpoint` on each, added, counted and removed together.

    `enabled` and `ignore` may be assigned; conditions are those of `each`.

    Attributes:
        number: its name in ``m.breakpoints``, from 1.
        each: the `Breakpoint` of each vcpu, in their order; `Stop.breakpoint` is one of these. Without those that were
            removed from their vcpu alone; when the last is, it ends.
        ended: it is not in ``m.breakpoints`` any more.
    """

    def __init__(self, number: int, each: tuple[Breakpoint, ...], remove: Callable[[int], None], ignore: int) -> None:
        self._number = number
        self._each = each
        self._all = each
        self._ended = False
        self._ignore = ignore
        self._remove = remove

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in _ASSIGNABLE:
            raise not_assignable(self, name, _ASSIGNABLE)
        object.__setattr__(self, name, value)

    @property
    def number(self) -> int:
        return self._number

    @property
    def each(self) -> tuple[Breakpoint, ...]:
        return self._each

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def ignore(self) -> int:
        """How many of the next hits, of any vcpu, let the guest go on; counts down. May be assigned."""
        return self._ignore

    @ignore.setter
    def ignore(self, value: int) -> None:
        self._ignore = check_ignore(value)

    @property
    def address(self) -> int:
        """Linear address (gva)."""
        return self._all[0].address

    @property
    def hits(self) -> int:
        """How often any vcpu reached it with its condition true."""
        return sum(one.hits for one in self._all)

    @property
    def passes(self) -> int:
        """How often any vcpu reached it with its condition false."""
        return sum(one.passes for one in self._all)

    @property
    def enabled(self) -> bool:
        """Whether it stops any vcpu; may be assigned."""
        return any(one.enabled for one in self.each)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        check_flag(value, "enabled")
        for one in self.each:
            one.enabled = value

    def remove(self) -> None:
        """Removes it from all vcpus; not an error if it is gone already."""
        self._remove(self.number)

    def dropped(self, one: Breakpoint) -> None:
        """Called when it was removed from one vcpu."""
        if self.ended:
            return
        left = tuple(each for each in self.each if each is not one)
        if not left:
            self.remove()
        self._each = left

    def end(self) -> None:
        """Called when it is taken out of ``m.breakpoints``."""
        self._ended = True

    def __str__(self) -> str:
        shown = self._all[0]
        return f"shared {'watchpoint' if shown.is_watchpoint else 'breakpoint'} {self.number} at {shown.label}"

    def __repr__(self) -> str:
        shown = (self.each or self._all)[0]
        first = repr(shown).removeprefix(f"<{shown}").removesuffix(f"; {shown.hits} hits>")
        hits = ", ".join(
            f"{one.hits} of vcpu {index}" + ("" if one in self.each else " (removed)")
            for index, one in enumerate(self._all)
        )
        ignores = f"; ignores the next {self.ignore}" if self.ignore else ""
        return f"<{self}{first}{ignores}; {self.hits} hits: {hits}>"


class MachineBreakpoints:
    """``m.breakpoints``: as `Cpu.breakpoints`, for all vcpus at once."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._all: dict[int, SharedBreakpoint] = {}
        self._next = 1

    @spelled_out
    def add(self, where: int | str, *, ignore: int = 0, **options: Any) -> SharedBreakpoint:
        """Stops every vcpu before it executes the instruction at `where`; takes what `Breakpoints.add` takes.

        `ignore` counts the hits of all vcpus together; a temporary one is removed from all at the first stop.

        Raises:
            BusyError: a vcpu is running.
            AddressError, UnsupportedError, MisuseError: as `Breakpoints.add`, for any vcpu; then none has it.
        """
        return self._insert(lambda cpu: cpu.breakpoints.add(where, **options), ignore)

    @spelled_out
    def watch(
        self, where: int | str, size_bytes: int = 8, kind: str = "w", *, ignore: int = 0, **options: Any
    ) -> SharedBreakpoint:
        """Stops every vcpu after an access, as `Breakpoints.watch`.

        Raises:
            BusyError, AddressError, UnsupportedError, MisuseError: as `add`.
        """
        return self._insert(lambda cpu: cpu.breakpoints.watch(where, size_bytes, kind, **options), ignore)

    def _insert(self, add: Callable[[Any], Breakpoint], ignore: int) -> SharedBreakpoint:
        ignore = check_ignore(ignore)
        made: list[tuple[Any, Breakpoint]] = []
        try:
            for cpu in self._machine.cpus:
                made.append((cpu, add(cpu)))
        except BaseException:
            for cpu, one in made:
                cpu.breakpoints.remove(one)
            raise
        shared = SharedBreakpoint(self._next, tuple(one for _, one in made), self._gone, ignore)
        for one in shared.each:
            one.shared = shared
        self._all[self._next] = shared
        self._next += 1
        return shared

    def remove(self, which: int | SharedBreakpoint) -> None:
        """Removes one from all vcpus, given itself or its number.

        Raises:
            MisuseError: there is no such breakpoint.
        """
        gone = self[which.number if isinstance(which, SharedBreakpoint) else which]
        if isinstance(which, SharedBreakpoint) and gone is not which:
            raise MisuseError(f"{which!r} is not one of this machine; number {gone.number} here is {gone!r}")
        self._gone(gone.number)

    def _gone(self, number: int) -> None:
        shared = self._all.pop(number, None)
        if shared is None:
            return
        shared.end()
        for cpu in self._machine.cpus:
            for one in cpu.breakpoints:
                if one in shared.each:
                    cpu.breakpoints.remove(one)

    def clear(self) -> None:
        """Removes all of them; those of single vcpus stay."""
        for number in list(self._all):
            self._gone(number)

    def __getitem__(self, number: int) -> SharedBreakpoint:
        if not isinstance(number, int) or number not in self._all:
            raise MisuseError(f"no shared breakpoint {number!r}; there are {sorted(self._all) or 'none'}, by number")
        return self._all[number]

    def __iter__(self) -> Iterator[SharedBreakpoint]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        return len(self._all)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self)) or "no shared breakpoints"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td style='text-align:left'>{html.escape(repr(one))}</td></tr>" for one in self)
        return f"<table>{rows}</table>" if rows else "no shared breakpoints"
