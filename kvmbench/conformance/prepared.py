"""A machine with one program and an IDT, as every point begins with one."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from kvmbench.conformance.point import CannotTry
from kvmbench.errors import UnsupportedError
from kvmbench.machine import Machine, Program
from kvmbench.machine.segment import encode_gate

IDT_GPA = 0x70000
_CODE64, _CODE32 = 0x10, 0x08

M = TypeVar("M", bound=Machine)


class Prepared(Generic[M]):
    """A context manager around it.

    Args:
        make: the class of the machine.
        host: where it runs.
        source: assembly source; labels are what observations are told with.
        handlers: vector to label, for an IDT, or None.
        options: those of `make`.

    Attributes:
        machine: the machine.
        program: what was loaded.

    Raises:
        CannotTry: KVM does not run that mode there.
    """

    def __init__(
        self, make: Callable[..., M], host: Any, source: str, handlers: dict[int, str] | None, options: dict[str, Any]
    ) -> None:
        try:
            self.machine = make(host, **{"memory": "1M", **options})
        except UnsupportedError as error:
            raise CannotTry(str(error)) from error
        try:
            self.program = self.machine.load_asm(source)
            if handlers:
                write_idt(self.machine, {vector: self.at(label) for vector, label in handlers.items()})
        except BaseException:
            self.machine.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.machine.close()

    def at(self, label: str) -> int:
        """Address of a label."""
        return self.program.symbols[label]


def place(program: Program, address: int) -> str:
    """The label at an address of a program, ``label+3`` behind one, or the address in hex."""
    inside = {label: at for label, at in program.symbols.items() if program.address <= at <= address}
    if not inside or address >= program.end + 16:
        return f"{address:#x}"
    label, at = max(inside.items(), key=lambda item: item[1])
    return label if at == address else f"{label}+{address - at:#x}"


def write_idt(machine: Machine, handlers: dict[int, int]) -> None:
    """Interrupt gates (DPL 3) for some vectors of a long or protected mode machine, and loads the table."""
    bits, selector = (64, _CODE64) if machine.mode == "long" else (32, _CODE32)
    for vector, at in handlers.items():
        gate = encode_gate(at, selector, bits=bits, dpl=3)
        machine.memory.write(IDT_GPA + vector * len(gate), gate)
    sregs = machine.vcpus[0].get_sregs()
    sregs.idt.base, sregs.idt.limit = IDT_GPA, 256 * bits // 4 - 1
    machine.vcpus[0].set_sregs(sregs)
