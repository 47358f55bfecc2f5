"""What is at the addresses of a trace: symbols, and the instructions as they were when it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from kvmbench.debug.code_image import CodeImage
from kvmbench.debug.disassembly import disassemble
from kvmbench.debug.symbols import Symbols


@dataclass(frozen=True)
class Places:
    """Names of addresses, and code.

    Attributes:
        symbols: address by name.
        code: bytes of code by linear address.
        bits: width of the code: 16, 32 or 64.
        code_base: linear address of offset 0 in CS.
    """

    symbols: Mapping[str, int] = field(default_factory=dict)
    code: CodeImage = field(default_factory=CodeImage, repr=False)
    bits: int = 64
    code_base: int = 0

    @cached_property
    def _table(self) -> Symbols:
        return Symbols.of(self.symbols)

    def symbol(self, rip: int) -> str:
        """The symbol that an instruction lies in, or its address."""
        found = self._table.nearest(rip + self.code_base)
        return f"{rip:#x}" if found is None else found[0]

    def address(self, rip: int) -> str:
        """ "0x1005"."""
        return f"{rip:#x}"

    def instruction(self, rip: int) -> str:
        """ "0x1005 again+0x5: out 0xe9, al", as far as is known."""
        label = self._table.label(rip + self.code_base)
        where = f"{rip:#x} {label}".rstrip()
        found = disassemble(
            self.code, address=rip, bits=self.bits, count=1, code_base=self.code_base, symbols=self._table
        )
        return f"{where}: {found[0].text}" if len(found) else where

    def namer(self, key: str) -> Callable[[int], str]:
        """What names an address for a summary by "rip", "symbol" or "instruction"."""
        return {"symbol": self.symbol, "instruction": self.instruction}.get(key, self.address)
