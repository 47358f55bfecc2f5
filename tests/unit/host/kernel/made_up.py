"""BTF written by hand, so that a test knows what is in it."""

from __future__ import annotations

import struct


class Writer:
    """Collects types; `data()` is the file.

    Args:
        base: what a module's BTF refers to.
    """

    def __init__(self, base: Writer | None = None) -> None:
        self._texts = b"\0" if base is None else b""
        self._text_start = 0 if base is None else base._text_start + len(base._texts)
        self._next = 1 if base is None else base._next
        self._types = b""

    def text(self, name: str) -> int:
        """Where a name is; added if it is not there."""
        if not name:
            return 0
        wanted = name.encode() + b"\0"
        if wanted not in self._texts:
            self._texts += wanted
        return self._text_start + self._texts.index(wanted)

    def add(self, name: str, kind: int, size_or_type: int, *tail: int, vlen: int = 0, flag: bool = False) -> int:
        """A type; returns its number."""
        info = kind << 24 | vlen | flag << 31
        self._types += struct.pack(f"<III{len(tail)}I", self.text(name), info, size_or_type, *tail)
        self._next += 1
        return self._next - 1

    def data(self) -> bytes:
        """The file."""
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self._types), len(self._types), len(self._texts))
        return header + self._types + self._texts
