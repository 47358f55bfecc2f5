"""Integers whose bits have names, and RFLAGS, the first of them.

A `NamedBits` is an ``int`` in every respect (it compares, hashes, formats and
computes as one); it only adds attributes for its bits and a repr that spells
them out. Arithmetic gives a plain ``int``.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, Self

from kvmbench.arguments import integer
from kvmbench.errors import MisuseError


class NamedBits(int):
    """A register value with named bits and multi-bit fields.

    ``value.NAME`` is a bool for a single bit and an int for a field. Subclasses
    fill in the two tables.
    """

    #: Bit name to bit number, in the order the repr lists them.
    BITS: ClassVar[dict[str, int]] = {}
    #: Field name to (lowest bit, width in bits).
    FIELDS: ClassVar[dict[str, tuple[int, int]]] = {}
    #: Width of the register, in bits.
    WIDTH_BITS: ClassVar[int] = 64

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that int itself does not have.
        bit = self.BITS.get(name)
        if bit is not None:
            return bool(self >> bit & 1)
        field = self.FIELDS.get(name)
        if field is not None:
            low, width = field
            return self >> low & ((1 << width) - 1)
        raise AttributeError(
            f"{type(self).__name__} has no bit {name!r}; it has {', '.join([*self.BITS, *self.FIELDS])}"
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        register = "rflags" if isinstance(self, Flags) else type(self).__name__.lower()
        raise AttributeError(
            f"this is a value, not the register: assign regs.{register} = regs.{register}.replace({name}={value!r})"
        )

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.BITS, *self.FIELDS]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the bits that are set, from the table's order; no fields."""
        return tuple(name for name, bit in self.BITS.items() if self >> bit & 1)

    def replace(self, **bits: int) -> Self:
        """The same value with some bits or fields changed: ``flags.replace(ZF=0, IOPL=3)``.

        Raises:
            MisuseError: no such bit, or the value does not fit it.
        """
        value = int(self)
        for name, new in bits.items():
            if name in self.BITS:
                low, width = self.BITS[name], 1
            elif name in self.FIELDS:
                low, width = self.FIELDS[name]
            else:
                known = ", ".join([*self.BITS, *self.FIELDS])
                raise MisuseError(f"{type(self).__name__} has no bit {name!r}; it has {known}")
            if (
                not 0
                <= integer(int(new) if isinstance(new, bool) else new, f"{type(self).__name__}.{name}")
                < 1 << width
            ):
                raise MisuseError(f"{type(self).__name__}.{name} = {new} does not fit {width} bit(s)")
            mask = (1 << width) - 1
            value = value & ~(mask << low) | int(new) << low
        return type(self)(value)

    def describe(self) -> str:
        """The set bits and the non-zero fields, without the number: ``PF ZF IOPL=3``."""
        words = list(self.names)
        words += [f"{name}={value:#x}" for name in self.FIELDS if (value := getattr(self, name))]
        return " ".join(words)

    def __repr__(self) -> str:
        words = self.describe()
        return f"{int(self):#x} [{words}]" if words else f"{int(self):#x}"

    # int.__str__ is int.__repr__, which the line above has replaced; print() should show the same.
    __str__ = __repr__


class Flags(NamedBits):
    """RFLAGS (SDM volume 1, "EFLAGS Register").

    Under single-step KVM hides TF from what it reports, even a TF that the
    guest set itself; so `TF` is unreliable while stepping.
    """

    BITS: ClassVar[dict[str, int]] = {
        "CF": 0, "PF": 2, "AF": 4, "ZF": 6, "SF": 7, "TF": 8, "IF": 9, "DF": 10, "OF": 11,
        "NT": 14, "RF": 16, "VM": 17, "AC": 18, "VIF": 19, "VIP": 20, "ID": 21,
    }  # fmt: skip
    FIELDS: ClassVar[dict[str, tuple[int, int]]] = {"IOPL": (12, 2)}
    __slots__ = ()

    def describe(self) -> str:
        """The set bits, and IOPL in decimal when it is not 0: ``PF ZF IF IOPL=3``."""
        return " ".join([*self.names, *([f"IOPL={self.IOPL}"] if self.IOPL else [])])
