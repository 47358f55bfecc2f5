"""Names for addresses: symbols and source lines of the programs in a guest."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Mapping
from typing import Protocol

from kvmbench.arguments import integer, nearest
from kvmbench.errors import MisuseError

# An address farther than this behind the last symbol below it is not said to lie in that symbol, unless the
# program says where it ends: "end+0x7fff0000" would be a lie told with confidence.
_REACH_BYTES = 0x10000

_EXPRESSION = re.compile(r"\s*(?P<head>[^\s+-]+)\s*(?:(?P<sign>[+-])\s*(?P<offset>\w+)\s*)?")


class Program(Protocol):
    """What `Symbols.add` needs of a loaded program (`kvmbench.machine.Program` has it)."""

    @property
    def name(self) -> str: ...
    @property
    def symbols(self) -> Mapping[str, int]: ...
    @property
    def lines(self) -> Mapping[int, tuple[int, str]]: ...


class Symbols:
    """Names and source lines of everything loaded into one machine.

    Addresses are linear (gva), as the programs were linked. A name that two
    programs share belongs to the one added last; the earlier one is still
    reached as ``program:name``.
    """

    def __init__(self) -> None:
        self._addresses: dict[str, int] = {}
        self._lines: dict[int, tuple[int, str]] = {}
        self._ends: list[tuple[int, int]] = []
        # Sorted addresses and the name shown for each; rebuilt when first asked after an add().
        self._sorted: list[int] | None = None
        self._names: list[str] = []
        self._by_address: dict[int, str] = {}
        self._labels: dict[int, str] = {}

    @classmethod
    def of(cls, symbols: Mapping[str, int], lines: Mapping[int, tuple[int, str]] | None = None) -> Symbols:
        """Symbols from plain tables: name to address, and address to (line number, text)."""
        made = cls()
        made._addresses.update(symbols)
        made._by_address.update({address: name for name, address in symbols.items()})
        made._lines.update(lines or {})
        return made

    def add(self, program: Program) -> None:
        """Takes in the symbols and lines of a program; later programs win where names or addresses meet."""
        for name, address in program.symbols.items():
            self._addresses[name] = int(address)
            self._addresses[f"{program.name}:{name}"] = int(address)
            self._by_address[int(address)] = name
        for address, (number, text) in program.lines.items():
            self._lines[int(address)] = (int(number), str(text))
        # Programs that say what they occupy bound their last symbol.
        first, size = getattr(program, "address", None), getattr(program, "size_bytes", None)
        if isinstance(first, int) and isinstance(size, int):
            self._ends.append((first, first + size))
        self._sorted = None

    def clear(self) -> None:
        """Forgets everything."""
        for kept in (self._addresses, self._lines, self._by_address, self._labels):
            kept.clear()
        self._ends.clear()
        self._sorted = None
        self._names = []

    def define(self, name: str, address: int) -> None:
        """Names one address by hand, such as a data structure the program builds at run time.

        Raises:
            MisuseError: the name could be read as a number or an expression.
        """
        address = integer(address, f"address of {name!r}", 0, (1 << 64) - 1)
        if not isinstance(name, str) or not re.fullmatch(r"[^\s+\-\d:][^\s+\-:]*", name):
            raise MisuseError(f"{name!r} cannot name an address: no spaces, signs, colons or leading digit")
        self._addresses[name] = address
        self._by_address[address] = name
        self._sorted = None

    def __len__(self) -> int:
        return len(self._by_address)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Pairs of (name, address) by ascending address, one an address."""
        return iter([(name, address) for address, name in sorted(self._by_address.items())])

    def __contains__(self, name: object) -> bool:
        return name in self._addresses

    def __getitem__(self, name: str) -> int:
        """The address of a symbol.

        Raises:
            MisuseError: no such symbol; the message names the nearest ones.
        """
        if not isinstance(name, str):
            raise MisuseError(f"symbols[{name!r}]: give a name; symbols.label(address) names an address")
        try:
            return self._addresses[name]
        except KeyError:
            raise MisuseError(self._missing(name)) from None

    def _missing(self, name: str) -> str:
        if not self._addresses:
            return f"no symbol {name!r}: no program with symbols is loaded"
        plain = [known for known in self._addresses if ":" not in known]
        near = nearest(name, plain)
        if near:
            return f"no symbol {name!r}; did you mean {' or '.join(repr(word) for word in near)}?"
        shown = ", ".join(sorted(plain)[:8])
        return f"no symbol {name!r}; there are {shown}{', ...' if len(plain) > 8 else ''}"

    def resolve(self, expression: int | str) -> int:
        """The address meant by a number, ``"symbol"``, ``"symbol+8"``, ``"symbol-0x10"`` or ``"0x1000"``.

        Raises:
            MisuseError: not an address, an unknown symbol (with near misses), or outside 64 bits.
        """
        if isinstance(expression, str):
            address = self._parse(expression)
        else:
            try:
                # numpy integers too: addresses are often taken from a record's column.
                address = integer(expression, "address")
            except MisuseError:
                raise MisuseError(
                    f"{expression!r} is not an address: give an integer, 'symbol', 'symbol+8' or '0x1000'"
                ) from None
        if not 0 <= address < 1 << 64:
            raise MisuseError(f"address {address:#x} (from {expression!r}) does not fit 64 bits")
        return address

    def _parse(self, text: str) -> int:
        if text in self._addresses:
            return self._addresses[text]
        match = _EXPRESSION.fullmatch(text)
        if match is None:
            raise MisuseError(f"{text!r} is not an address: give 'symbol', 'symbol+8' or '0x1000'")
        head, offset = match["head"], match["offset"]
        address = _number(head)
        if address is None:
            address = self[head]
        if offset is None:
            return address
        distance = _number(offset)
        if distance is None:
            raise MisuseError(f"{offset!r} in {text!r} is not a number")
        return address + distance if match["sign"] == "+" else address - distance

    def label(self, address: int) -> str:
        """``loop`` or ``loop+0x3`` for an address in a program, else an empty string."""
        known = self._labels.get(address) if self._sorted is not None else None
        if known is not None:
            return known
        found = self.nearest(address)
        text = "" if found is None else found[0] if not found[1] else f"{found[0]}+{found[1]:#x}"
        # Recordings ask for the same few addresses again and again; a walk over all memory must not pile up.
        if len(self._labels) < 65536:
            self._labels[address] = text
        return text

    def nearest(self, address: int) -> tuple[str, int] | None:
        """The last symbol at or below an address and the distance to it in bytes, or None."""
        if self._sorted is None:
            self._sorted = sorted(self._by_address)
            self._names = [self._by_address[place] for place in self._sorted]
            self._labels.clear()
        index = bisect.bisect_right(self._sorted, address) - 1
        if index < 0:
            return None
        start = self._sorted[index]
        for first, end in self._ends:
            if first <= start < end:
                if not first <= address < end:
                    return None
                break
        else:
            if address - start >= _REACH_BYTES:
                return None
        return self._names[index], address - start

    def name_at(self, address: int) -> str:
        """The symbol exactly at an address, or an empty string."""
        return self._by_address.get(address, "")

    @property
    def lines(self) -> dict[int, tuple[int, str]]:
        """Address to (line number, text) of everything loaded; a copy."""
        return dict(self._lines)

    def line(self, address: int) -> tuple[int, str] | None:
        """Line number and text of the source that made the instruction at this address."""
        return self._lines.get(address)

    def __repr__(self) -> str:
        pairs = list(self)
        shown = ", ".join(f"{name}={address:#x}" for name, address in pairs[:6])
        more = f", ... {len(pairs)} in all" if len(pairs) > 6 else ""
        return f"Symbols({shown}{more})"


def _number(text: str) -> int | None:
    # "0x10", "0b1" or decimal; "010" is decimal ten here, as a person would read it.
    try:
        return int(text, 10) if text[:1].isdigit() and text.isdigit() else int(text, 0)
    except ValueError:
        return None
