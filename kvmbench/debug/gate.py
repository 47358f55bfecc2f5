"""Holds the vcpus of a machine out of the guest for a moment, while what they all see is changed.

Where several vcpus run, a byte of a breakpoint is written or taken away, and a memory slot taken out and put back, only
while the others are not in the guest: they would miss the byte, run into one that nobody claims, or fetch code
from memory that is not there (`test_a_watchpoint_is_set_while_another_vcpu_runs`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from threading import get_ident
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

# Between two kicks: one that comes before its vcpu has entered the core is lost.
_PAUSE_S = 0.002


class Gate:
    """Through which every vcpu of a machine goes into the guest.

    `Cpu.step` does not, where nothing has to be minded (`is_open`), as that would cost it a tenth.
    """

    def __init__(self, machine: Any) -> None:
        self._machine = machine
        self._changed = threading.Condition(threading.Lock())
        #: Thread that is inside with a vcpu, and those that wait to get in, by the vcpu's index.
        self._inside: dict[int, int] = {}
        self._waiting: dict[int, int] = {}
        self._holder: int | None = None
        self._depth = 0

    @property
    def is_held(self) -> bool:
        """Whether some thread holds the vcpus out."""
        return self._holder is not None

    def enter(self, cpu: Cpu) -> None:
        """Called before the vcpu goes into the guest; waits while others hold it out."""
        me = get_ident()
        with self._changed:
            self._waiting[cpu.index] = me
            try:
                while self._holder is not None and self._holder != me:
                    self._changed.notify_all()
                    self._changed.wait(_PAUSE_S)  # with an end, to hear a Ctrl-C
                self._inside[cpu.index] = me
            finally:
                del self._waiting[cpu.index]

    def leave(self, cpu: Cpu) -> None:
        """Called when it is out again, or did not get in."""
        with self._changed:
            self._inside.pop(cpu.index, None)
            if self._holder is not None:
                self._changed.notify_all()

    @contextlib.contextmanager
    def hold(self, mine: Cpu | None = None) -> Iterator[None]:
        """Takes all vcpus but `mine` out of the guest, and keeps them out meanwhile; may be nested."""
        me = get_ident()
        held = False
        try:
            with self._changed:
                while self._holder is not None and self._holder != me:
                    self._changed.wait(_PAUSE_S)  # with an end, to hear a Ctrl-C
                self._holder = me
                self._depth += 1
                held = True  # no call since the line before, so no Ctrl-C between them
            self._empty(mine, me)
            yield
        finally:
            with self._changed:
                if held:
                    self._depth -= 1
                    if not self._depth:
                        self._holder = None
                        self._changed.notify_all()

    def _empty(self, mine: Cpu | None, me: int) -> None:
        others = [cpu for cpu in self._machine.cpus if cpu is not mine]
        for cpu in others:
            cpu.forget_request()  # the next single step comes by here
        while True:
            with self._changed:
                left = [cpu for cpu in others if self._is_in(cpu, me)]
            if not left:
                return
            for cpu in left:
                cpu.engine.make_way()
            with self._changed:
                if any(self._is_in(cpu, me) for cpu in left):
                    self._changed.wait(_PAUSE_S)

    def _is_in(self, cpu: Cpu, me: int) -> bool:
        if cpu.index in self._inside:
            return self._inside[cpu.index] != me
        # A single step does not come by here, but is over soon.
        return cpu.running and not cpu.engine.going and cpu.index not in self._waiting
