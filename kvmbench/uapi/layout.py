"""Struct layouts as cffi computes them, in a form that can be compared with another's.

Used by ``python -m kvmbench.uapi.generate --check`` (committed against regenerated) and by the tests (cffi
against the C compiler). A member inside an anonymous struct or union has the path that C code writes for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Member(NamedTuple):
    """Where a member lies in its struct.

    Attributes:
        offset: in bytes from the start of the outermost struct.
        size_bytes: of the member; 0 for a flexible array; of the storage unit for a bitfield.
        bit_offset: first bit of a bitfield in its storage unit, else -1.
        bit_size: width of a bitfield, else -1.
    """

    offset: int
    size_bytes: int
    bit_offset: int = -1
    bit_size: int = -1


class Layout(NamedTuple):
    """A struct: its size, and its members by path, such as ``io.port`` or ``redirtbl[0].fields.mask``."""

    size_bytes: int
    members: dict[str, Member]


def layouts(ffi: Any) -> dict[str, Layout]:
    """The layout of each struct that `ffi` declares by name, keyed by tag (``struct kvm_run``)."""
    found: dict[str, Layout] = {}
    for name in sorted(ffi.list_types()[1]):
        kind = ffi.typeof(f"struct {name}")
        members: dict[str, Member] = {}
        _collect(ffi, kind, "", 0, members)
        found[f"struct {name}"] = Layout(ffi.sizeof(kind), members)
    return found


def _collect(ffi: Any, kind: Any, prefix: str, base: int, members: dict[str, Member]) -> None:
    for name, member in kind.fields:
        offset = base + member.offset
        inner = member.type
        if not name:
            # Anonymous: its members belong to the enclosing struct.
            _collect(ffi, inner, prefix, offset, members)
            continue
        path = prefix + name
        if member.bitsize >= 0:
            members[path] = Member(offset, ffi.sizeof(inner), member.bitshift, member.bitsize)
            continue
        size = 0 if inner.kind == "array" and inner.length is None else ffi.sizeof(inner)
        members[path] = Member(offset, size)
        if inner.kind == "array" and inner.length:
            inner, path = inner.item, path + "[0]"
        # A named struct is compared under its own name; what has none is only reachable through here.
        if inner.kind in ("struct", "union") and _is_unnamed(inner):
            _collect(ffi, inner, path + ".", offset, members)


def _is_unnamed(kind: Any) -> bool:
    return "$" in kind.cname
