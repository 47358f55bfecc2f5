"""Many guests on several hosts: every pair compared, what diverges shrunk and told."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from .compare import Divergence, compare
from .guest import Guest
from .runner import Outcome, Runner
from .shrink import shrink

_BATCH = 64
# Divergences of one signature that are kept; the others are counted.
_MOST_ALIKE = 1


@dataclass
class Result:
    """What came of it.

    Attributes:
        guests: guests run by at least two hosts.
        compared: by pair of hosts, how many guests.
        steps: by host.
        seconds: by host, in which it was busy.
        divergences: unexplained ones, shrunk, the first of each sort.
        counts: how many of each sort: (hosts, signature).
        quirks: explained ones: (quirk, kind of host) to how often.
        settings: by setting, how many guests.
    """

    guests: int = 0
    compared: Counter[tuple[str, str]] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    divergences: list[Divergence] = field(default_factory=list)
    counts: Counter[tuple[object, ...]] = field(default_factory=Counter)
    quirks: Counter[tuple[str, str]] = field(default_factory=Counter)
    settings: Counter[str] = field(default_factory=Counter)


class Session:
    """Hosts that are kept, and what they found."""

    def __init__(self, runners: Sequence[Runner], *, shrinking: bool = True, at_once: bool = True) -> None:
        """Takes hosts.

        Args:
            at_once: a thread a host; else one host after the other.
        """
        self._threads = len(runners) if at_once else 1
        self.runners = list(runners)
        self.shrinking = shrinking
        self.result = Result()

    def run(self, guests: Iterable[Guest], *, found: Callable[[Divergence], None] | None = None) -> Result:
        """Runs guests; may be called again.

        Args:
            found: called with each divergence of a new sort.
        """
        remaining = iter(guests)
        with ThreadPoolExecutor(self._threads) as pool:
            while batch := list(itertools.islice(remaining, _BATCH)):
                outcomes = list(pool.map(lambda runner: self._on(runner, batch), self.runners))
                for n, guest in enumerate(batch):
                    self._compare_all(guest, [each[n] for each in outcomes], found)
        return self.result

    def _on(self, runner: Runner, batch: list[Guest]) -> list[Outcome | None]:
        start = time.monotonic()
        outcomes = [runner.run(guest) if runner.supports(guest.setting) else None for guest in batch]
        seconds = self.result.seconds
        seconds[runner.name] = seconds.get(runner.name, 0.0) + time.monotonic() - start
        self.result.steps[runner.name] += sum(len(each.rows) for each in outcomes if each is not None)
        return outcomes

    def _compare_all(
        self, guest: Guest, outcomes: list[Outcome | None], found: Callable[[Divergence], None] | None
    ) -> None:
        result = self.result
        ran = [(runner, each) for runner, each in zip(self.runners, outcomes, strict=True) if each is not None]
        if len(ran) > 1:
            result.guests += 1
            result.settings[guest.setting.name] += 1
        for (one, first), (other, second) in itertools.combinations(ran, 2):
            result.compared[one.name, other.name] += 1
            divergence, met = compare(guest, first, second, (one.kind, other.kind))
            for each in met:
                result.quirks[each.name, each.kind] += 1
            if divergence is None:
                continue
            sort = (one.name, other.name, *divergence.signature)
            result.counts[sort] += 1
            if result.counts[sort] > _MOST_ALIKE:
                continue
            if self.shrinking:
                _, divergence = shrink(guest, divergence, lambda trial, a=one, b=other: attempt(a, b, trial))
            result.divergences.append(divergence)
            if found is not None:
                found(divergence)


def attempt(one: Runner, other: Runner, guest: Guest) -> Divergence | None:
    """Runs a guest on two hosts and compares."""
    return compare(guest, one.run(guest), other.run(guest), (one.kind, other.kind))[0]
