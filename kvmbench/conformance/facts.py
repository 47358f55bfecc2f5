"""What else a page about hosts says of each, beside the answers to the points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvmbench.debug.machine import Machine
from kvmbench.errors import KvmbenchError


def gather(host: Any) -> dict[str, str]:
    """In words: what breakpoints and watchpoints stop by, whether steps hold interrupts, whose clock it is."""
    found = {}
    with Machine(host, memory="1M") as machine:
        machine.load_asm("nop\nhere: nop\nhlt\n.balign 4096\nvalue: .quad 0\n")
        cpu = machine.cpu
        ways: dict[str, Callable[[], Any]] = {
            "execute breakpoint": lambda: cpu.breakpoints.add("here"),
            "write watchpoint": lambda: cpu.watch("value", 8, "w"),
            "read and write watchpoint": lambda: cpu.watch("value", 8, "rw"),
        }
        for name, add in ways.items():
            try:
                one = add()
                levels = sorted(one.levels)
                found[name] = str(one.mechanism) + ("" if levels == [0, 3] else f", at CPL {levels[0]} only")
                cpu.breakpoints.remove(one)
            except KvmbenchError as error:
                found[name] = f"none: {error}"
        found["interrupts held while stepping"] = "yes" if machine.can_hold_interrupts else "no"
    info = host.info
    found["tracepoints readable"] = "yes" if info.tracing else "no"
    found["kernel memory (/proc/kcore) readable"] = "yes" if info.kcore else "no"
    found["clocks"] = "the emulator's" if info.emulated else "the machine's"
    found["complete, so that connect() may pick it"] = "yes" if host.mechanisms.complete else "no"
    return found
