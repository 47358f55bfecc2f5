"""Memory sizes as people write them."""

from __future__ import annotations

import operator
import re

from kvmbench.errors import MisuseError
from kvmbench.kvm.region import PAGE_BYTES

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(0x[0-9a-f]+|[0-9]+)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


def parse_size(size: int | str, what: str = "size") -> int:
    """Bytes of ``"16M"``, ``"1G"``, ``"64 KiB"``, ``"0x1000"`` or a number; all units are powers of 1024.

    Raises:
        MisuseError: not a size.
    """
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None:
            raise MisuseError(f'{what}={size!r} is not a size; write it as 16777216, "16M" or "1G"')
        return int(match[1], 0) * _UNITS[match[2].upper()]
    try:
        number = operator.index(size)
    except TypeError:
        raise MisuseError(f'{what}={size!r} is not a size; write it as 16777216, "16M" or "1G"') from None
    if number < 0 or isinstance(size, bool):
        raise MisuseError(f"{what}={size!r} is not a size; it must be a positive number of bytes")
    return number


def page_multiple(size: int | str, what: str = "size") -> int:
    """`parse_size` for what must be whole pages, at least one.

    Raises:
        MisuseError: zero, or not a multiple of 4096.
    """
    number = parse_size(size, what)
    if number == 0:
        raise MisuseError(f"{what}={size!r}: there must be at least one page of {PAGE_BYTES} bytes")
    if number % PAGE_BYTES:
        below = number - number % PAGE_BYTES
        near = f"{below:#x} or {below + PAGE_BYTES:#x}" if below else f"{PAGE_BYTES:#x}"
        raise MisuseError(f"{what}={size!r} is not a multiple of the {PAGE_BYTES}-byte page; take {near}")
    return number


def show_size(size_bytes: int) -> str:
    """The shortest exact way to write a size: ``16M``, ``4100 bytes``."""
    for unit in ("T", "G", "M", "K"):
        if size_bytes and size_bytes % _UNITS[unit] == 0:
            return f"{size_bytes // _UNITS[unit]}{unit}"
    return f"{size_bytes} bytes"
