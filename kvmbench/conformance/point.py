"""A point of conformance: a guest, what has to be seen of it, and who says so.

What a point expects is the manual's word, never what some host was seen to do;
where a host differs, `kvmbench.conformance.quirks` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

from kvmbench.errors import KvmbenchError

Attempt = Callable[[Any], Iterator[str]]


class Layer(StrEnum):
    """Whose behaviour a point looks at."""

    #: KVM_SET_GUEST_DEBUG and KVM_RUN, and nothing of ours between them.
    KVM = "KVM"
    #: What `cpu.step()`, `cpu.run()` and breakpoints make of it.
    KVMBENCH = "kvmbench"


#: What goes wrong with guest debug, by number; each has at least one point (tests/unit/conformance/test_points.py).
ITEMS: dict[int, str] = {
    1: "TF is armed for one rip",
    2: "TF is hidden, the guest's own too",
    3: "TF leaks into images on the stack",
    4: "steps land in interrupt handlers",
    5: "the shadows of STI and MOV SS",
    6: "exits come before the step is done",
    7: "HLT and WRMSR swallow a step",
    8: "INT3, and the guest's own #BP and #DB",
    9: "debug registers fire again, and replace the guest's",
    10: "the bytes of software breakpoints",
    11: "inactive bits of DR6",
    12: "instructions that KVM emulates",
    13: "the kernel's selftest debug_regs",
    14: "KVM_TRANSLATE says nothing of rights",
    15: "CR3 is more than an address",
    16: "a vcpu and its thread",
}


class CannotTry(KvmbenchError):
    """A point has no meaning on this host, or needs what it has not got; the message says what."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One thing that guest debug must do.

    Attributes:
        name: such as ``kvm.int3.cpl0``; its first part is the layer.
        layer: whose behaviour it is.
        topic: heading it stands under.
        title: what holds, in a sentence.
        item: number in `ITEMS`.
        source: the manual's section, the KVM API entry or the kernel's selftest that says so.
        expected: everything that has to be seen, in order.
        needs: mechanisms of the host's self-check, (name, CPL), without which it cannot be tried.
        attempt: runs the guest on a host and yields what is seen.
    """

    name: str
    layer: Layer
    topic: str
    title: str
    item: int
    source: str
    expected: tuple[str, ...]
    needs: tuple[tuple[str, int], ...]
    attempt: Attempt = dataclasses.field(repr=False, compare=False)


class Topic:
    """Points under one heading, in the order they are written.

    Args:
        heading: the heading.
        layer: that of all of them.
    """

    def __init__(self, heading: str, layer: Layer) -> None:
        self.heading = heading
        self.layer = layer
        self.points: list[Point] = []

    def point(
        self,
        name: str,
        title: str,
        *expected: str,
        item: int,
        source: str,
        needs: tuple[tuple[str, int], ...] = (),
    ) -> Callable[[Attempt], Attempt]:
        """Decorates a generator that takes a host and yields what it sees."""

        def add(attempt: Attempt) -> Attempt:
            self.add(name, title, expected, attempt, item=item, source=source, needs=needs)
            return attempt

        return add

    def add(
        self,
        name: str,
        title: str,
        expected: tuple[str, ...],
        attempt: Attempt,
        *,
        item: int,
        source: str,
        needs: tuple[tuple[str, int], ...] = (),
    ) -> None:
        """The same for points that differ in a number only."""
        full = f"{self.layer.lower()}.{name}"
        self.points.append(Point(full, self.layer, self.heading, title, item, source, expected, needs, attempt))
