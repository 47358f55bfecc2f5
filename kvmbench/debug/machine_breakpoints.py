"""Breakpoints for all vcpus of a machine: ``m.breakpoints``."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kvmbench.arguments import integer, spelled_out
from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.errors import MisuseError

if TYPE_CHECKING:
    from kvmbench.debug.machine import Machine


class SharedBreakpoint:
    """One place at which every vcpu stops: a `Breakpoint` on each, added, counted and removed together.

    Attributes:
        number: its name in ``m.breakpoints``, from 1.
        each: the `Breakpoint` of each vcpu, in their order; `Stop.breakpoint` is one of these.
        ignore: how many of the next hits, of any vcpu, let the guest go on; counts down. May be assigned.
    """

    def __init__(self, number: int, each: tuple[Breakpoint, ...], remove: Callable[[int], None], ignore: int) -> None:
        self.number = number
        self.each = each
        self.ignore = ignore
        self._remove = remove

    @property
    def address(self) -> int:
        """Linear address (gva)."""
        return self.each[0].address

    @property
    def hits(self) -> int:
        """How often any vcpu reached it with its condition true."""
        return sum(one.hits for one in self.each)

    @property
    def passes(self) -> int:
        """How often any vcpu reached it with its condition false."""
        return sum(one.passes for one in self.each)

    @property
    def enabled(self) -> bool:
        """Whether it stops any vcpu; may be assigned."""
        return any(one.enabled for one in self.each)

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for one in self.each:
            one.enabled = value

    def remove(self) -> None:
        """Removes it from all vcpus; not an error if it is gone already."""
        self._remove(self.number)

    def __repr__(self) -> str:
        first = repr(self.each[0]).removeprefix(f"<{self.each[0]}").removesuffix(f"; {self.each[0].hits} hits>")
        noun = "watchpoint" if self.each[0].is_watchpoint else "breakpoint"
        hits = ", ".join(f"{one.hits} of vcpu {index}" for index, one in enumerate(self.each))
        return f"<shared {noun} {self.number} at {self.each[0].label}{first}; {self.hits} hits: {hits}>"


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
        ignore = integer(ignore, "ignore", 0)
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
        self._gone(self[which.number if isinstance(which, SharedBreakpoint) else which].number)

    def _gone(self, number: int) -> None:
        shared = self._all.pop(number, None)
        if shared is None:
            return
        for cpu, one in zip(self._machine.cpus, shared.each, strict=True):
            if one in cpu.breakpoints:
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
