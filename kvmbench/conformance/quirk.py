"""A known reason for a host to differ from the manual, and how it accounts for what is seen.

A quirk does not excuse a point: it says what is seen in place of what is
expected, entry by entry, so that a point which differs in another way on the
same host stays unexplained.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Any

Seen = tuple[str, ...]
Sees = Callable[[Seen], Seen]


class Cause(StrEnum):
    """Whose a difference is."""

    EMULATOR = "emulator"
    KVM = "KVM"
    OURS = "kvmbench"


@dataclasses.dataclass(frozen=True)
class Where:
    """Hosts that have a quirk; what is None or empty is not looked at.

    Attributes:
        modules: KVM modules.
        emulator: start of the emulator's name.
        emulator_before: its first version without the quirk, such as (9, 1).
        kernel_before: the first Linux without it.
    """

    modules: tuple[str, ...] = ()
    emulator: str | None = None
    emulator_before: tuple[int, ...] | None = None
    kernel_before: tuple[int, ...] | None = None

    def has(self, info: Any) -> bool:
        """Whether a host, by its `HostInfo`, is one of them."""
        if self.modules and info.module not in self.modules:
            return False
        if self.emulator is not None and not info.emulator.startswith(self.emulator):
            return False
        if self.emulator_before is not None and numbers(info.emulator_version) >= self.emulator_before:
            return False
        return self.kernel_before is None or numbers(info.kernel) < self.kernel_before

    def __str__(self) -> str:
        parts = [" and ".join(self.modules)] if self.modules else []
        if self.emulator is not None:
            before = self.emulator_before
            version = f" before {'.'.join(map(str, before))}" if before is not None else ""
            parts.append(f"{self.emulator}{version}")
        if self.kernel_before is not None:
            parts.append(f"Linux before {'.'.join(map(str, self.kernel_before))}")
        return ", ".join(parts) or "every host"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``6.1.0-56-cloud`` is (6, 1, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Quirk:
    """One of them.

    Attributes:
        name: short, for the matrix.
        cause: whose it is.
        where: which hosts have it.
        why: what happens, in a sentence or two.
        source: the commit, source file, manual section or test that shows it.
        points: names of points, with ``*``, to what makes of their expectation what is seen in its place.
    """

    name: str
    cause: Cause
    where: Where
    why: str
    source: str
    points: Mapping[str, Sees]

    def concerns(self, point: str, info: Any) -> bool:
        """Whether it is about a point on a host."""
        return self.where.has(info) and any(fnmatch.fnmatchcase(point, pattern) for pattern in self.points)

    def sees(self, point: str, expected: Seen) -> Seen:
        """What is seen in place of what a point expects."""
        return next(sees for pattern, sees in self.points.items() if fnmatch.fnmatchcase(point, pattern))(expected)


def explain(
    point: str, expected: Seen, observed: Seen, info: Any, quirks: Iterable[Quirk], *, most: int = 3
) -> tuple[Quirk, ...]:
    """The fewest quirks that together turn what is expected into what was observed; none if no set does.

    Args:
        info: the host's `HostInfo`.
        most: how many may come together.
    """
    known = [quirk for quirk in quirks if quirk.concerns(point, info)]
    for size in range(1, most + 1):
        for chosen in itertools.combinations(known, size):
            wanted = expected
            for quirk in chosen:
                wanted = quirk.sees(point, wanted)
            if wanted == observed:
                return chosen
    return ()


# --- what is seen in place of what is expected


def only(*kept: str) -> Sees:
    """Of the expected entries these alone, and no others."""
    return lambda expected: tuple(entry for entry in expected if entry in kept)


def instead(*entries: str) -> Sees:
    """These entries and nothing of the expected ones."""
    return lambda _: entries


def changed(*pairs: tuple[str, str]) -> Sees:
    """Text in entries replaced by other text; every pair has to occur."""

    def sees(expected: Seen) -> Seen:
        for old, new in pairs:
            if not any(old in entry for entry in expected):
                return ()
            expected = tuple(entry.replace(old, new) for entry in expected)
        return expected

    return sees
