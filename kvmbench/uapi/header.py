"""Reads a C header through the compiler's preprocessor into structs, enumerators and macros.

Only the generator (`kvmbench.uapi.generate`) and its tests use this module: it needs gcc and pycparser,
which nothing else in kvmbench does at run time. The preprocessor expands the header as a C program would see
it; pycparser reads the declarations; what cffi cannot express is rewritten here and nowhere else:

- ``__DECLARE_FLEX_ARRAY(T, name)`` becomes ``T name[]``: cffi has no empty struct;
- a union of nothing but empty arrays becomes ``uint8_t name[]``, as cffi gives every union at least a byte;
  right where the elements are made of bytes, as in kvm_nested_state (test_layout.py would tell);
- kernel integer names (``__u32``) become the ones of ``<stdint.h>``;
- array lengths become plain numbers.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pycparser import c_ast, c_generator, c_parser  # type: ignore[import-untyped]  # it ships no types

from kvmbench.errors import HostUnavailable, InternalError
from kvmbench.uapi.expression import evaluate

# Spellings that pycparser does not know. They never change a layout in the headers read here;
# _refuse_attributes() makes sure of it for __attribute__.
_NEUTRAL = ["-D__extension__=", "-D__signed__=signed", "-D__inline__=", "-D__inline=", "-D__restrict="]

_STDINT = {
    "__u8": "uint8_t", "__u16": "uint16_t", "__u32": "uint32_t", "__u64": "uint64_t",
    "__s8": "int8_t", "__s16": "int16_t", "__s32": "int32_t", "__s64": "int64_t",
}  # fmt: skip

_MARK = "kvmbench_macro"


@dataclass(frozen=True, kw_only=True)
class Macro:
    """An object-like macro: its name and the text it was defined with."""

    name: str
    text: str


@dataclass(kw_only=True)
class Header:
    """What one or several headers declare, in their order.

    Attributes:
        declarations: struct tag (``struct kvm_regs``) to a declaration that cffi accepts.
        needs: struct tag to the tags that its members are made of.
        enums: enum tag (``unnamed0``, ... where it has none) to enumerators and values.
        macros: name to macro, only those that the headers define themselves.
    """

    declarations: dict[str, str] = field(default_factory=dict)
    needs: dict[str, set[str]] = field(default_factory=dict)
    enums: dict[str, dict[str, int]] = field(default_factory=dict)
    macros: dict[str, Macro] = field(default_factory=dict)

    def closure(self, keep: Callable[[str], bool]) -> list[str]:
        """Names the struct tags that `keep` accepts and all they are made of, in header order."""
        wanted: set[str] = set()
        waiting = [tag for tag in self.declarations if keep(tag)]
        while waiting:
            tag = waiting.pop()
            if tag not in wanted:
                wanted.add(tag)
                waiting.extend(self.needs[tag])
        return [tag for tag in self.declarations if tag in wanted]


def preprocess(source: str, *options: str, compiler: str = "gcc", include: Sequence[Path] = ()) -> str:
    """Runs the preprocessor over C source text.

    Raises:
        HostUnavailable: there is no such compiler.
        InternalError: the preprocessor refused the text, for instance for a missing header.
    """
    command = [compiler, "-E", "-x", "c", *options]
    for directory in include:
        command += ["-I", str(directory)]
    try:
        done = subprocess.run([*command, "-"], input=source, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise HostUnavailable(f"no compiler {compiler!r}: `apt-get install gcc` provides it") from None
    if done.returncode != 0:
        raise InternalError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout


def read_header(
    names: Sequence[str], *, own: Callable[[str], bool], compiler: str = "gcc", include: Sequence[Path] = ()
) -> Header:
    """Reads the declarations of the headers `names`.

    Args:
        names: what to include, such as ``linux/kvm.h``.
        own: says of a file's path whether its declarations are wanted; others are read for their types only.
        compiler: the gcc-like compiler whose preprocessor to use.
        include: directories searched before the compiler's own.

    Raises:
        InternalError: the header uses a construct that is not understood here.
    """
    source = "".join(f"#include <{name}>\n" for name in names)
    _refuse_attributes(preprocess(source, compiler=compiler, include=include), own)
    text = preprocess(source, *_NEUTRAL, "-D__attribute__(x)=", compiler=compiler, include=include)
    header = Header()
    reader = _Reader(header)
    for node in c_parser.CParser().parse(text).ext:
        reader.declaration(node, wanted=own(node.coord.file))
    for name, body, file in _macros(preprocess(source, "-dD", compiler=compiler, include=include)):
        if own(file):
            header.macros[name] = Macro(name=name, text=body)
    return header


def evaluate_macros(
    header: Header,
    names: Sequence[str],
    *,
    size_of: Callable[[str], int],
    compiler: str = "gcc",
    include: Sequence[Path] = (),
) -> dict[str, int]:
    """Evaluates the macros of `header` that are integer constants; others are left out.

    Args:
        header: as `read_header` returned it.
        names: the headers that it was read from.
        size_of: the size in bytes of a type, for the ``sizeof`` in ioctl numbers; KeyError when unknown.
        compiler: as for `read_header`.
        include: as for `read_header`.
    """
    lines = [f"#include <{name}>" for name in names]
    lines += [f"{_MARK} {index} {name}" for index, name in enumerate(header.macros)]
    # -P: without it gcc breaks the line around a macro that a system header defined.
    expanded = preprocess("\n".join(lines) + "\n", "-P", *_NEUTRAL, compiler=compiler, include=include)
    known = {name: value for values in header.enums.values() for name, value in values.items()}
    order = list(header.macros)
    values: dict[str, int] = {}
    for match in re.finditer(rf"{_MARK} (\d+) (.+?)\s*(?={_MARK} |\Z)", expanded, re.DOTALL):
        value = evaluate(match[2], known=known, size_of=size_of)
        if value is not None:
            values[order[int(match[1])]] = value
    return values


class _Reader:
    # Turns pycparser's nodes into cffi text, struct by struct.

    def __init__(self, header: Header) -> None:
        self._header = header
        self._generator = c_generator.CGenerator()
        self._known: dict[str, int] = {}

    def declaration(self, node: Any, *, wanted: bool) -> None:
        inner = node.type if isinstance(node, c_ast.Decl) else None
        if isinstance(inner, c_ast.Enum) and inner.values is not None:
            self._enum(inner, wanted=wanted)
        elif isinstance(inner, c_ast.Struct) and inner.decls is not None and wanted:
            tag = f"struct {inner.name}"
            needs: set[str] = set()
            inner.decls = [self._member(member, needs) for member in inner.decls]
            self._header.needs[tag] = needs
            self._header.declarations[tag] = self._generator.visit(inner) + ";"

    def _enum(self, node: Any, *, wanted: bool) -> None:
        values: dict[str, int] = {}
        following = 0
        for enumerator in node.values.enumerators:
            if enumerator.value is not None:
                following = self._integer(enumerator.value)
            values[enumerator.name] = self._known[enumerator.name] = following
            following += 1
        if wanted:
            self._header.enums[node.name or f"unnamed{len(self._header.enums)}"] = values

    def _member(self, member: Any, needs: set[str]) -> Any:
        kind = member.type
        if isinstance(kind, c_ast.Struct) and kind.decls and _is_empty_struct(kind.decls[0]):
            if len(kind.decls) != 2:
                raise InternalError(f"{member.coord}: an empty struct outside __DECLARE_FLEX_ARRAY")
            member = kind.decls[1]
        self._type(member.type, needs)
        if _is_empty_union(member.type):
            byte = c_ast.TypeDecl(member.name, [], None, c_ast.IdentifierType(["uint8_t"]))
            member.type = c_ast.ArrayDecl(byte, None, [])
        if member.bitsize is not None:
            member.bitsize = _number(self._integer(member.bitsize))
        return member

    def _type(self, kind: Any, needs: set[str]) -> None:
        if isinstance(kind, c_ast.ArrayDecl):
            if kind.dim is not None:
                kind.dim = _number(self._integer(kind.dim))
            self._type(kind.type, needs)
        elif isinstance(kind, c_ast.TypeDecl | c_ast.PtrDecl):
            self._type(kind.type, needs)
        elif isinstance(kind, c_ast.Struct | c_ast.Union):
            if kind.decls is None:
                needs.add(f"struct {kind.name}")
            else:
                kind.decls = [self._member(member, needs) for member in kind.decls]
        elif isinstance(kind, c_ast.IdentifierType):
            kind.names = [_STDINT.get(name, name) for name in kind.names]
        else:
            raise InternalError(f"{kind.coord}: a member of a kind that is not understood")

    def _integer(self, node: Any) -> int:
        text = self._generator.visit(node)
        value = evaluate(text, known=self._known, size_of=_no_size)
        if value is None:
            raise InternalError(f"{node.coord}: {text} is no integer constant")
        return value


def _no_size(name: str) -> int:
    raise KeyError(name)


def _is_empty_struct(member: Any) -> bool:
    kind = getattr(member.type, "type", None)
    return isinstance(kind, c_ast.Struct) and not kind.decls and kind.name is None


def _is_empty_union(kind: Any) -> bool:
    union = getattr(kind, "type", None)
    if not isinstance(union, c_ast.Union) or not union.decls:
        return False
    arrays = [member.type for member in union.decls if isinstance(member.type, c_ast.ArrayDecl)]
    empty = [array for array in arrays if array.dim is None or array.dim.value == "0"]
    return len(empty) == len(union.decls)


def _number(value: int) -> Any:
    return c_ast.Constant("int", str(value))


def _located_lines(text: str) -> Iterable[tuple[str, str]]:
    # Each line of the preprocessor's output with the file that it came from.
    file = ""
    for line in text.splitlines():
        marker = re.match(r'# \d+ "([^"]*)"', line)
        if marker:
            file = marker[1]
        else:
            yield file, line


def _macros(text: str) -> Iterable[tuple[str, str, str]]:
    for file, line in _located_lines(text):
        match = re.match(r"#define (\w+) (\S.*)$", line)
        if match:
            yield match[1], match[2], file


def _refuse_attributes(text: str, own: Callable[[str], bool]) -> None:
    # packed and aligned change a layout and are dropped before parsing; no header read here has them so far.
    for file, line in _located_lines(text):
        if own(file) and re.search(r"\b(packed|aligned)\b", line) and "__attribute__" in line:
            raise InternalError(f"{file}: {line.strip()}: attributes on members are not understood here")
