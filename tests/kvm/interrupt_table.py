"""Guests that raise exceptions: their IDT, or real mode's vectors, and ways through them."""

from __future__ import annotations

import contextlib

import pytest

import kvmbench as kb
from kvmbench.errors import UnsupportedError
from kvmbench.machine.segment import encode_gate

IDT = 0x5000
STACK = 0x9000
# Loads the table; at the start of a program. Long and protected mode take the same source.
LOAD = "start: lidt [table]\n"
TABLE = """
        .balign 8
table:  .word 0x7ff
        .quad 0x5000
"""
HIGH = 0xFFFF_8000_0000_0000


def gate(machine: kb.Machine, handler: int) -> bytes:
    """An interrupt gate of the machine's width, to its own code segment."""
    return encode_gate(handler, int(machine.cpu.regs.cs.selector), bits=machine.cpu.mode.bits)


def write_gates(machine: kb.Machine, handlers: dict[int, str | int]) -> None:
    """Puts a gate for each vector into the table; a handler is a symbol or an offset."""
    table = 0 if machine.cpu.mode.bits == 16 else IDT
    for vector, handler in handlers.items():
        entry = gate(machine, machine.symbols[handler] if isinstance(handler, str) else handler)
        machine.memory.write(table + vector * len(entry), entry)


@contextlib.contextmanager
def guest(host, source, handlers, *, mode="long", tables=True, **options):
    try:
        machine = kb.Machine(host, memory="2M", mode=mode, **options)
    except UnsupportedError as error:
        pytest.skip(str(error))
    with machine as m:
        m.load_asm(LOAD + source + TABLE if tables else source, at=0x1000)
        write_gates(m, handlers)
        m.cpu.regs.rsp = STACK
        yield m


@contextlib.contextmanager
def guest_that_maps_high(host, handlers, *, idt=IDT):
    """Loads the table, maps the low addresses once more at HIGH, raises #UD and halts in its handler."""
    source = f"""
        mov rax, [rdi]
        mov [rdi + 256*8], rax
        ud2
        hlt
ud:     nop
        hlt
        .balign 8
table:  .word 0x7ff
        .quad {idt:#x}
"""
    with guest(host, LOAD + source, handlers, tables=False) as m:
        m.cpu.regs.rdi = m.cpu.regs.cr3
        yield m


def steps(m, most=200):
    """Each stop until the guest ends."""
    found = []
    for _ in range(most):
        found.append(m.cpu.step())
        if found[-1].cause is not kb.Cause.STEP:
            break
    return found


def agree(host, source, handlers, look, **options):
    """What a guest leaves when it runs, when it is stepped and when it is recorded: it must be the same."""
    seen = []
    for way in ("run", "step", "record"):
        with guest(host, source, handlers, **options) as m:
            if way == "run":
                m.cpu.run(deadline_s=10)
            elif way == "step":
                steps(m)
            else:
                m.cpu.record(500)
            assert m.cpu.last_stop.cause is kb.Cause.HALT, way
            seen.append(look(m))
    assert seen[1:] == [seen[0]] * 2
    return seen[0]
