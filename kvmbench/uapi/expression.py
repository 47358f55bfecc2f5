"""Evaluates C integer constant expressions, as the macros of `<linux/kvm.h>` use them.

Covers what appears there: numbers with suffixes, enumerators, arithmetic, shifts, comparisons, casts to
integer types and ``sizeof``. Widths and signedness follow C on x86-64 (LP64), because a plain Python number
would turn ``-1ul`` into a negative one. Used by the generator only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pycparser import c_ast, c_generator, c_parser  # type: ignore[import-untyped]  # it ships no types

_TYPES = {
    "char": (8, False), "signed char": (8, False), "unsigned char": (8, True),
    "short": (16, False), "unsigned short": (16, True),
    "int": (32, False), "unsigned int": (32, True), "unsigned": (32, True),
    "long": (64, False), "unsigned long": (64, True),
    "long long": (64, False), "unsigned long long": (64, True),
    "__u8": (8, True), "__u16": (16, True), "__u32": (32, True), "__u64": (64, True),
    "__s8": (8, False), "__s16": (16, False), "__s32": (32, False), "__s64": (64, False),
}  # fmt: skip

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul,
    "&": operator.and_, "|": operator.or_, "^": operator.xor,
    "/": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
}  # fmt: skip

_COMPARISON: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt,
    ">": operator.gt, "<=": operator.le, ">=": operator.ge,
}  # fmt: skip


class _Integer(NamedTuple):
    # A C value: `value` always lies within the type of `bits` and `unsigned`.
    value: int
    bits: int
    unsigned: bool


class _NotConstantError(Exception):
    pass


def evaluate(text: str, *, known: Mapping[str, int], size_of: Callable[[str], int]) -> int | None:
    """Evaluates a C expression.

    Args:
        text: the expression, macros already expanded.
        known: enumerators by name.
        size_of: the size in bytes of a type named as in C; KeyError when it is not known.

    Returns:
        The value, or None when the text is not an integer constant expression.
    """
    prelude = "".join(f"typedef int {name};" for name in _TYPES if name.startswith("__"))
    try:
        tree = c_parser.CParser().parse(f"{prelude} int kvmbench = {text};")
        return _evaluate(tree.ext[-1].init, known, size_of).value
    except (c_parser.ParseError, _NotConstantError, ZeroDivisionError):
        return None


def _evaluate(node: Any, known: Mapping[str, int], size_of: Callable[[str], int]) -> _Integer:
    def of(inner: Any) -> _Integer:
        return _evaluate(inner, known, size_of)

    if isinstance(node, c_ast.Constant) and "int" in node.type:
        return _literal(node.value)
    if isinstance(node, c_ast.ID) and node.name in known:
        return _Integer(known[node.name], 32, False)
    if isinstance(node, c_ast.Cast):
        return _convert(of(node.expr).value, *_type_of(node.to_type))
    if isinstance(node, c_ast.UnaryOp):
        if node.op == "sizeof":
            return _Integer(_size(node.expr, size_of), 64, True)
        operand = _promote(of(node.expr))
        match node.op:
            case "-":
                return _convert(-operand.value, operand.bits, operand.unsigned)
            case "~":
                return _convert(~operand.value, operand.bits, operand.unsigned)
            case "+":
                return operand
            case "!":
                return _Integer(int(not operand.value), 32, False)
    if isinstance(node, c_ast.BinaryOp):
        left, right = _promote(of(node.left)), _promote(of(node.right))
        if node.op in ("<<", ">>"):
            # The result has the left operand's type, unlike every other operator.
            shift = operator.lshift if node.op == "<<" else operator.rshift
            return _convert(shift(left.value, right.value), left.bits, left.unsigned)
        bits = max(left.bits, right.bits)
        unsigned = any(side.unsigned for side in (left, right) if side.bits == bits)
        if node.op in _COMPARISON:
            return _Integer(int(_COMPARISON[node.op](left.value, right.value)), 32, False)
        if node.op in _ARITHMETIC:
            return _convert(_ARITHMETIC[node.op](left.value, right.value), bits, unsigned)
    raise _NotConstantError


def _literal(text: str) -> _Integer:
    digits = text.rstrip("uUlL")
    suffix = text[len(digits) :].lower()
    octal = len(digits) > 1 and digits.isdecimal() and digits.startswith("0")
    value = int(digits, 8 if octal else 0)
    unsigned = "u" in suffix
    decimal = digits.isdecimal() and not octal
    # C 6.4.4.1: the first type of a list that holds the value; without a suffix only hexadecimal and
    # octal numbers may become unsigned.
    for bits in (32, 64) if "l" not in suffix else (64,):
        if not unsigned and value < 1 << (bits - 1):
            return _Integer(value, bits, False)
        if (unsigned or not decimal) and value < 1 << bits:
            return _Integer(value, bits, True)
    raise _NotConstantError


def _promote(number: _Integer) -> _Integer:
    return number if number.bits >= 32 else _Integer(number.value, 32, False)


def _convert(value: int, bits: int, unsigned: bool) -> _Integer:
    value &= (1 << bits) - 1
    if not unsigned and value >> (bits - 1):
        value -= 1 << bits
    return _Integer(value, bits, unsigned)


def _name(node: Any) -> str:
    return str(c_generator.CGenerator().visit(node))


def _type_of(node: Any) -> tuple[int, bool]:
    try:
        return _TYPES[_name(node)]
    except KeyError:
        raise _NotConstantError from None


def _size(node: Any, size_of: Callable[[str], int]) -> int:
    name = _name(node)
    if name in _TYPES:
        return _TYPES[name][0] // 8
    try:
        return size_of(name)
    except KeyError:
        raise _NotConstantError from None
