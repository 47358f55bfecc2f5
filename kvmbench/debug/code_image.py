"""The bytes of code that a recording ran, for disassembling it later or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from kvmbench.debug.instruction import MAX_BYTES

#: Reads guest memory: ``(gva, length_bytes)`` to as many of these bytes as can be read.
CodeReader = Callable[[int, int], bytes]

# Addresses this close are fetched together, up to a page: an appliance takes 150 us for a read of any size.
_JOIN_BYTES = 64
_READ_BYTES = 4096


class CodeImage:
    """Stretches of code by linear address; call it like a `CodeReader`."""

    def __init__(self, stretches: Mapping[int, bytes] | None = None) -> None:
        self._stretches = dict(sorted((stretches or {}).items()))
        # Stretches do not overlap much, so the few that touch the page of an address are soon looked through.
        self._by_page: dict[int, list[int]] = {}
        for start, code in self._stretches.items():
            for page in range(start >> 12, (start + max(len(code), 1) - 1 >> 12) + 1):
                self._by_page.setdefault(page, []).append(start)

    @classmethod
    def capture(cls, reader: CodeReader, addresses: Iterable[int]) -> CodeImage:
        """Reads 15 bytes at each linear address, in few reads; leaves out what is unreadable."""
        stretches: dict[int, bytes] = {}
        start = end = -1
        for address in [*sorted(set(addresses)), None]:
            if address is not None and start >= 0 and address <= end + _JOIN_BYTES and address - start < _READ_BYTES:
                end = max(end, address + MAX_BYTES)
                continue
            if start >= 0 and (code := reader(start, end - start)):
                stretches[start] = bytes(code)
            if address is not None:
                start, end = address, address + MAX_BYTES
        return cls(stretches)

    def __call__(self, gva: int, length_bytes: int) -> bytes:
        for start in self._by_page.get(gva >> 12, ()):
            code = self._stretches[start]
            if start <= gva < start + len(code):
                return code[gva - start : gva - start + length_bytes]
        return b""

    @property
    def stretches(self) -> dict[int, bytes]:
        """Linear address to the bytes from there on."""
        return dict(self._stretches)

    def __len__(self) -> int:
        return sum(len(code) for code in self._stretches.values())

    def __repr__(self) -> str:
        return f"CodeImage({len(self._stretches)} stretches, {len(self)} bytes)"
