"""All that a guest's page tables map, in ranges."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.arguments import integer
from kvmbench.errors import MisuseError
from kvmbench.machine.memory import Memory
from kvmbench.machine.size import show_size
from kvmbench.mmu.paging import Paging
from kvmbench.mmu.table_scan import GLOBAL, KEY_SHIFT, NO_EXECUTE, PAT_SHIFT, USER, WRITABLE, Found, scan
from kvmbench.mmu.vcpu_paging import paging_of

if TYPE_CHECKING:
    import pandas as pd

#: Ranges that a map has at most.
MOST_RANGES = 2_000_000
# Rows that a repr shows.
_SHOWN = 30
_HEAD = ("gva", "to", "gpa", "size", "pages of", "rights", "besides")


@dataclass(frozen=True, slots=True)
class MappedRange:
    """Linear addresses that lead to physical ones in a row, with the same rights and the same size of pages.

    Attributes:
        gva: the first.
        gpa: where it leads.
        size_bytes: how many.
        page_bytes: size of the pages.
        writable: R/W is set at every level.
        user: U/S is set at every level.
        executable: XD is clear at every level, or means nothing.
        is_global: G is set, and CR4.PGE.
        pat_index: which byte of IA32_PAT says the memory type.
        key: protection key; 0 where there are none.
    """

    gva: int
    gpa: int
    size_bytes: int
    page_bytes: int
    writable: bool
    user: bool
    executable: bool
    is_global: bool
    pat_index: int
    key: int

    @property
    def end(self) -> int:
        """The first linear address behind it; 1 << 64 at the very end."""
        return self.gva + self.size_bytes

    @property
    def rights(self) -> str:
        """Bits of the tables: "rwx user", "r-x supervisor"; control registers may take from it (`GuestWalk.can`)."""
        letters = f"r{'w' if self.writable else '-'}{'x' if self.executable else '-'}"
        return f"{letters} {'user' if self.user else 'supervisor'}"

    @property
    def besides(self) -> str:
        """Global, PAT index and key, where they are not 0."""
        words = ["global"] if self.is_global else []
        words += [f"PAT {self.pat_index}"] if self.pat_index else []
        return " ".join([*words, f"key {self.key}"] if self.key else words)

    def __str__(self) -> str:
        return " ".join([f"{self.gva:#x} to {self.end - 1:#x} -> {self.gpa:#x}, {self.rights}", self.besides]).rstrip()


class AddressSpace(Sequence[MappedRange]):
    """The ranges by linear address; a copy, which later changes of the tables leave as it is.

    Each column has the shape (n,); `MappedRange` has their meaning.

    Attributes:
        paging: the state of the vcpu that decided.
        gva, gpa, size_bytes, page_bytes, writable, user, executable, is_global, pat_index, key: columns.
        tables: how many tables were read; each once.
        entries: how many present entries they have.
        cut_at: linear address from which on nothing is told, as there were too many ranges; None: all is told.
        warnings: sentences about what is missing, and about entries that fault.
    """

    def __init__(self, found: Found, paging: Paging) -> None:
        self.paging = paging
        self.gva, self.gpa, self.size_bytes = found.gva, found.gpa, found.size_bytes
        shifts = np.array([level.shift for level in paging.levels], np.uint64)
        self.page_bytes: NDArray[np.uint64] = np.uint64(1) << shifts[found.level]
        bits = found.attributes
        self.writable: NDArray[np.bool_] = (bits & WRITABLE) != 0
        self.user: NDArray[np.bool_] = (bits & USER) != 0
        self.executable: NDArray[np.bool_] = (bits & NO_EXECUTE) == 0
        self.is_global: NDArray[np.bool_] = (bits & GLOBAL) != 0
        self.pat_index: NDArray[np.uint8] = (bits >> PAT_SHIFT & 7).astype(np.uint8)
        self.key: NDArray[np.uint8] = (bits >> KEY_SHIFT & 15).astype(np.uint8)
        self.tables, self.entries, self.cut_at = found.tables, found.entries, found.cut_at
        told = [f"cut at gva {self.cut_at:#x}: there are too many ranges"] if self.cut_at is not None else []
        self.warnings = (*found.warnings, *told)

    @property
    def mapped_bytes(self) -> int:
        """How many linear addresses lead somewhere."""
        return int(self.size_bytes.sum(dtype=object)) if len(self) else 0

    def find(self, gva: int) -> MappedRange | None:
        """The range that holds a linear address, or None."""
        gva = integer(gva, "gva", 0, (1 << 64) - 1)
        at = int(np.searchsorted(self.gva, np.uint64(gva), side="right")) - 1
        return self[at] if at >= 0 and gva - int(self.gva[at]) < int(self.size_bytes[at]) else None

    def translate(self, gva: int) -> int | None:
        """Where a linear address leads, or None."""
        found = self.find(gva)
        return None if found is None else found.gpa + gva - found.gva

    def gvas_of(self, gpa: int) -> list[int]:
        """All linear addresses that lead to a physical one, ascending."""
        gpa = integer(gpa, "gpa", 0, (1 << 64) - 1)
        hit = (self.gpa <= np.uint64(gpa)) & (np.uint64(gpa) - self.gpa < self.size_bytes)
        return [int(one) for one in self.gva[hit] + (np.uint64(gpa) - self.gpa[hit])]

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas frame with a column a field."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name) for name in MappedRange.__slots__})

    def __len__(self) -> int:
        return len(self.gva)

    def __getitem__(self, at: Any) -> Any:
        """A range, or a list of them for a slice; `find` looks for an address."""
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(len(self)))]
        n = integer(at, "at")
        if not -len(self) <= n < len(self):
            raise IndexError(f"there are {len(self)} ranges, and no {n}; find(gva) looks for an address")
        values = (getattr(self, name)[n].item() for name in MappedRange.__slots__)
        return MappedRange(*values)

    def __iter__(self) -> Iterator[MappedRange]:
        return (self[n] for n in range(len(self)))

    @property
    def summary(self) -> str:
        """One line."""
        ranges = f"{len(self):,} range{'' if len(self) == 1 else 's'}"
        return f"{ranges}, {show_size(self.mapped_bytes)} mapped by {self.tables:,} tables; {self.paging}"

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                f"{one.gva:#x}", f"{one.end - 1:#x}", f"{one.gpa:#x}", show_size(one.size_bytes),
                show_size(one.page_bytes), one.rights, one.besides,
            )
            for one in self[:_SHOWN]
        ]  # fmt: skip

    def _below(self) -> list[str]:
        return [*([f"{len(self) - _SHOWN:,} ranges more"] if len(self) > _SHOWN else []), *self.warnings]

    def __repr__(self) -> str:
        rows = [_HEAD, *self._rows()] if len(self) else []
        wide = [max((len(row[n]) for row in rows), default=0) for n in range(len(_HEAD))]
        lines = [
            "  ".join(f"{cell:>{wide[n]}}" if n < 5 else f"{cell:<{wide[n]}}" for n, cell in enumerate(row)).rstrip()
            for row in rows
        ]
        return "\n".join([self.summary, *lines, *self._below()])

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Sequence[str]) -> str:
            styles = [' style="text-align:right"' if n < 5 else "" for n in range(len(cells))]
            found = (f"<{tag}{style}>{html.escape(cell)}</{tag}>" for style, cell in zip(styles, cells, strict=True))
            return f"<tr>{''.join(found)}</tr>"

        body = "".join(line("td", row) for row in self._rows())
        table = f"<table><thead>{line('th', _HEAD)}</thead><tbody>{body}</tbody></table>" if body else ""
        below = "<br>".join(map(html.escape, self._below()))
        return f"<p><b>{html.escape(self.summary)}</b></p>{table}<p>{below}</p>"


def map_tables(memory: Memory, paging: Paging, *, limit: int = MOST_RANGES) -> AddressSpace:
    """All that tables map.

    Args:
        limit: ranges that are told at most.

    Raises:
        MisuseError: paging is off.
    """
    if paging.mode == "off":
        raise MisuseError(
            "paging is off (CR0.PG is clear), so there are no tables: a linear address is its gpa. "
            "m.memory.regions has what is memory"
        )
    return AddressSpace(scan(memory, paging, limit=limit), paging)


def address_space_of(cpu: Any, cr3: int | None = None) -> AddressSpace:
    """`map_tables` for a `kvmbench.debug.cpu.Cpu` as it is now."""
    return map_tables(cpu.machine.memory, paging_of(cpu, cr3))
