"""Counts and times in words."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """ "1 exit", "1,204 exits"."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def show_ns(ns: float | None) -> str:
    """A time with a unit that fits: "1.23 us"."""
    if ns is None:
        return ""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if abs(ns) >= size:
            return f"{ns / size:.3g} {unit}" if abs(ns) < 1000 * size else f"{ns / size:,.0f} {unit}"
    return f"{ns:.0f} ns"
