"""BTF, the kernel's own description of its types, as `/sys/kernel/btf` shows it.

A type is a number; those of a module go on where the kernel's end and refer to them ("split" BTF).
Source: the kernel's Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from kvmbench.errors import LoadError

_HEADER = struct.Struct("<HBBIIIII")  # magic, version, flags, hdr_len, type_off, type_len, str_off, str_len
_TYPE = struct.Struct("<III")  # name_off, info, size or type
_MAGIC = 0xEB9F


class Kind(IntEnum):
    """BTF_KIND_*."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# Bytes behind a type's fixed part: so many, and so many more for each of its `vlen`.
_TAILS = {
    Kind.INT: (4, 0), Kind.ARRAY: (12, 0), Kind.STRUCT: (0, 12), Kind.UNION: (0, 12), Kind.ENUM: (0, 8),
    Kind.FUNC_PROTO: (0, 8), Kind.VAR: (4, 0), Kind.DATASEC: (0, 12), Kind.DECL_TAG: (4, 0), Kind.ENUM64: (0, 12),
}  # fmt: skip


@dataclass(frozen=True)
class BtfType:
    """One type.

    Attributes:
        number: its number.
        name: "" if it has none.
        vlen: how many members, enumerators or parameters it has.
        flag: ``kind_flag``: bit-fields' sizes are in their offsets; an enum is signed; a forward is of a union.
        size_or_type: bytes, or the number of the type that it refers to, by kind.
        tail: what follows: members and so on, as little-endian 32-bit words.
    """

    number: int
    kind: Kind
    name: str
    vlen: int
    flag: bool
    size_or_type: int
    tail: tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """A member of a struct or union; `bits` is 0 but for bit-fields."""

    name: str
    type: int
    bit_offset: int
    bits: int


class Btf:
    """The types of the kernel, or those that a module adds.

    Args:
        data: the file.
        base: the kernel's, for a module.

    Raises:
        LoadError: it is no BTF, or cut short.
    """

    def __init__(self, data: bytes, base: Btf | None = None, *, name: str = "BTF") -> None:
        self._data = data
        self._what = name
        self._base = base
        if len(data) < _HEADER.size:
            raise LoadError(f"{name}: {len(data)} bytes are no BTF")
        magic, version, _, header_bytes, type_at, type_bytes, text_at, text_bytes = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != 1:
            raise LoadError(f"{name}: begins with {data[:4].hex(' ')}; BTF of version 1 begins with 9f eb 01")
        types, texts = header_bytes + type_at, header_bytes + text_at
        if max(types + type_bytes, texts + text_bytes) > len(data) or not text_bytes:
            raise LoadError(f"{name}: cut short at {len(data):,} bytes")
        self._texts = data[texts : texts + text_bytes]
        self._first = base.end if base is not None else 1
        self._first_text = base.text_end if base is not None else 0
        self._offsets = self._index(types, types + type_bytes)
        words = np.frombuffer(data, "<u4", (len(data) - types) // 4, types)
        places = (np.array(self._offsets, np.int64) - types) // 4
        self._names = words[places] if len(places) else np.empty(0, np.uint32)

    @property
    def first(self) -> int:
        """The number of the first type of its own."""
        return self._first

    @property
    def end(self) -> int:
        """The number after that of the last type."""
        return self._first + len(self._offsets)

    @property
    def text_end(self) -> int:
        """Where a module's names begin."""
        return self._first_text + len(self._texts)

    def _index(self, at: int, end: int) -> list[int]:
        data, offsets = self._data, []
        tails = [_TAILS.get(Kind(n), (0, 0)) if n < len(Kind) else (0, 0) for n in range(32)]
        unpack = struct.Struct("<I").unpack_from
        while at + _TYPE.size <= end:
            offsets.append(at)
            (info,) = unpack(data, at + 4)
            fixed, each = tails[info >> 24 & 0x1F]
            at += 12 + fixed + each * (info & 0xFFFF)
        if at != end:
            raise LoadError(f"{self._what}: its types end at byte {at:,}, not {end:,}")
        return offsets

    def text(self, offset: int) -> str:
        """A name by its place among the names."""
        if offset < self._first_text:
            return self._base.text(offset) if self._base is not None else ""
        at = offset - self._first_text
        end = self._texts.find(b"\0", at)
        if not 0 <= at < len(self._texts) or end < 0:
            raise LoadError(f"{self._what}: a name at {offset:#x}, beyond the names")
        return self._texts[at:end].decode("utf-8", "replace")

    def type(self, number: int) -> BtfType:
        """A type by its number."""
        if number == 0:
            return BtfType(0, Kind.VOID, "void", 0, False, 0, ())
        if number < self._first and self._base is not None:
            return self._base.type(number)
        if not self._first <= number < self.end:
            raise LoadError(f"{self._what}: no type {number}; there are {self._first} to {self.end - 1}")
        at = self._offsets[number - self._first]
        name, info, size_or_type = _TYPE.unpack_from(self._data, at)
        code, vlen = info >> 24 & 0x1F, info & 0xFFFF
        if code >= len(Kind):
            raise LoadError(f"{self._what}: type {number} is of kind {code}, which this library does not know")
        kind = Kind(code)
        fixed, each = _TAILS.get(kind, (0, 0))
        words = (fixed + each * vlen) // 4
        tail = struct.unpack_from(f"<{words}I", self._data, at + _TYPE.size)
        return BtfType(number, kind, self.text(name), vlen, bool(info >> 31), size_or_type, tail)

    def find(self, name: str, *kinds: Kind) -> BtfType | None:
        """The first type of that name and of one of the kinds; a module's own before the kernel's."""
        wanted = name.encode()
        at = -1
        while (at := self._texts.find(wanted + b"\0", at + 1)) >= 0:
            # The compiler lets a name be the end of another.
            for place in np.flatnonzero(self._names == at + self._first_text):
                found = self.type(self._first + int(place))
                if found.kind in kinds:
                    return found
        found_below = self._base.find(name, *kinds) if self._base is not None else None
        if found_below is not None or self._base is None:
            return found_below
        # A module's type may have a name that is among the kernel's.
        return self._find_by_kernel_name(wanted, kinds)

    def _find_by_kernel_name(self, wanted: bytes, kinds: tuple[Kind, ...]) -> BtfType | None:
        assert self._base is not None
        texts, at = self._base._texts, -1
        while (at := texts.find(wanted + b"\0", at + 1)) >= 0:
            for place in np.flatnonzero(self._names == at + self._base._first_text):
                found = self.type(self._first + int(place))
                if found.kind in kinds:
                    return found
        return None

    @cached_property
    def _enumerators(self) -> dict[int, int]:
        # By the place of the name, the first enumeration that has it.
        found: dict[int, int] = {}
        for number in range(self._first, self.end):
            code = self._data[self._offsets[number - self._first] + 7] & 0x1F
            if code in (Kind.ENUM, Kind.ENUM64):
                one = self.type(number)
                for name in one.tail[:: 2 + (code == Kind.ENUM64)]:
                    found.setdefault(name, number)
        return found

    def find_enumerator(self, name: str) -> BtfType | None:
        """The enumeration that a constant is of, this module's or the kernel's."""
        wanted, btf = name.encode() + b"\0", self
        while True:
            at = -1
            while (at := btf._texts.find(wanted, at + 1)) >= 0:
                number = self._enumerators.get(at + btf._first_text)
                if number is not None:
                    return self.type(number)
            if btf._base is None:
                break
            btf = btf._base
        return self._base.find_enumerator(name) if self._base is not None else None

    def enumerators(self, type_: BtfType) -> dict[str, int]:
        """Names and values of an enumeration."""
        wide = type_.kind is Kind.ENUM64
        bits, each = (64, 3) if wide else (32, 2)
        found = {}
        for n in range(type_.vlen):
            name, low, *high = type_.tail[n * each : (n + 1) * each]
            value = low | (high[0] << 32 if high else 0)
            if type_.flag and value >> bits - 1:
                value -= 1 << bits
            found[self.text(name)] = value
        return found

    def members(self, type_: BtfType) -> list[Member]:
        """Of a struct or union, in their order."""
        found = []
        for name, number, offset in zip(type_.tail[0::3], type_.tail[1::3], type_.tail[2::3], strict=True):
            bits = offset >> 24 if type_.flag else 0
            found.append(Member(self.text(name), number, offset & 0xFFFFFF if type_.flag else offset, bits))
        return found
