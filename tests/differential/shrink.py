"""Takes pieces out of a guest while it still diverges in the same way, and then its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .compare import Divergence
from .guest import PLAIN_MEMORY, Guest

Try = Callable[[Guest], Divergence | None]


def shrink(guest: Guest, first: Divergence, attempt: Try, *, most: int = 200) -> tuple[Guest, Divergence]:
    """The smallest guest found that diverges with the same signature, and its divergence.

    Args:
        attempt: runs a guest on both hosts and compares.
        most: how many guests to try.
    """
    kept = tuple(range(len(guest.pieces)))
    best, found = guest, first
    tried = 0
    chunk = max(1, len(kept) // 2)
    while True:
        progress = False
        at = 0
        while at < len(kept) and tried < most:
            candidate = kept[:at] + kept[at + chunk :]
            tried += 1
            trial = guest.keep(candidate)
            divergence = _attempt(attempt, trial)
            if divergence is not None and divergence.signature == first.signature:
                kept, best, found, progress = candidate, trial, divergence, True
            else:
                at += chunk
        if tried >= most or (chunk == 1 and not progress):
            break
        chunk = max(1, chunk // 2)
    plain = replace(best, data=PLAIN_MEMORY[0], stack=PLAIN_MEMORY[1])
    divergence = _attempt(attempt, plain)
    if divergence is not None and divergence.signature == first.signature:
        return plain, divergence
    return best, found


def _attempt(attempt: Try, guest: Guest) -> Divergence | None:
    try:
        return attempt(guest)
    except AssertionError:  # a short jump that has become too long
        return None
