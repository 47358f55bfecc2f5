"""Addresses as a reader types them: a number, a symbol, a register, and a distance from any of these."""

from __future__ import annotations

import re

from kvmbench.debug.cpu import Cpu
from kvmbench.debug.register_table import INTEGER, SUBREGISTERS
from kvmbench.errors import MisuseError

_MASK = (1 << 64) - 1
_TERM = re.compile(r"\s*(?P<head>[^\s+-]+)\s*(?:(?P<sign>[+-])\s*(?P<offset>\w+)\s*)?")
_CODE = frozenset({"rip"})
_STACK = frozenset({"rsp", "rbp"})


def number(text: str) -> int | None:
    """The value of "0x10", "16" or "0b1", or None."""
    try:
        return int(text, 10) if text.isdigit() else int(text, 0)
    except ValueError:
        return None


def evaluate(cpu: Cpu, text: str) -> tuple[int, bool]:
    """What an expression means, and whether it is a linear address rather than a plain number.

    A register that holds an offset is taken in its segment: rip in CS, rsp and rbp in SS,
    the others as they are.

    Raises:
        MisuseError: no such symbol or register, the result does not fit 64 bits, or a register is asked for
            while the vcpu runs.
    """
    if not isinstance(text, str):
        raise MisuseError(f"{text!r} is no address: give a symbol, a register, a number, or 'rsp+8'")
    match = _TERM.fullmatch(text)
    if match is None:
        raise MisuseError(f"{text!r} is no address: give a symbol, a register, a number, or 'rsp+8'")
    head, offset = match["head"], match["offset"]
    distance = 0
    if offset is not None:
        found = number(offset)
        if found is None:
            raise MisuseError(f"{offset!r} in {text!r} is not a number")
        distance = -found if match["sign"] == "-" else found
    name = head.lower()
    if head not in cpu.symbols and (name in INTEGER or name in SUBREGISTERS):
        start, linear = _register(cpu, name), True
    else:
        start, linear = cpu.symbols.resolve(head), number(head) is None
    address = start + distance
    if not 0 <= address <= _MASK:
        raise MisuseError(f"{text} is {address:#x}, which is no address of 64 bits")
    return address, linear


def _register(cpu: Cpu, name: str) -> int:
    if cpu.running:
        raise MisuseError(f"{name} is not known while vcpu {cpu.index} runs; pause it first")
    value = int(cpu.regs[name])
    parent = SUBREGISTERS[name].parent if name in SUBREGISTERS else name
    if parent in _CODE:
        return cpu.mode.linear(value)
    if parent in _STACK and cpu.mode.bits != 64:
        return (int(cpu.regs.ss.base) + value) & 0xFFFF_FFFF
    return value
