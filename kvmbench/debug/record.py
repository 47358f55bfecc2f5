"""A recorded run: one row a step, as numpy columns.

Facts: a row holds the registers *after* a step, so the instruction that step i
ran is at the rip of row i - 1 (of `StepRecord.start` for the first). Rows come
from the core in the layout of wire.h and stay in it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from kvmbench.arguments import instead, nearest
from kvmbench.debug.code_image import CodeImage, CodeReader
from kvmbench.debug.instruction import DECODER, MAX_BYTES, Instruction
from kvmbench.debug.register_table import INTEGER
from kvmbench.debug.step_rows import (
    ENTERED,
    EXIT_DEBUG,
    ROW,
    VECTOR_SHIFT,
    WIDTH_MASK,
    WIDTHS,
    Rows,
    exit_name,
    taint_words,
)
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance

if TYPE_CHECKING:
    import pandas

# Rows gone through at a time: 1.2 MB.
_PIECE_ROWS = 8192
# Steps at each end, and about as many between, whose code is kept at once.
_SAMPLED_ROWS = 2048
_COLUMNS = frozenset(ROW.names or ())


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded step.

    Attributes:
        index: counted from the start of the recording, 0 for the first step.
        executed_rip: offset of the instruction that ran.
        exit: ``KVM_EXIT_*`` that the step made; 4, debug, for a plain one.
        before: registers before the step, by name (`register_table.INTEGER`).
        after: registers after it.
        flags: the row's flags: width of the next code and taints (`step_rows`).
    """

    index: int
    executed_rip: int
    exit: int
    before: dict[str, int]
    after: dict[str, int]
    flags: int = 0

    @property
    def changes(self) -> dict[str, tuple[int, int]]:
        """Registers that the step changed: name to (before, after); rip among them."""
        return {name: (old, self.after[name]) for name, old in self.before.items() if old != self.after[name]}

    @property
    def taints(self) -> tuple[str, ...]:
        """What the step did that a step should not do, or did besides: a phrase each."""
        return taint_words(self.flags)

    @property
    def entered_vector(self) -> int | None:
        """The exception or interrupt at whose handler the step ended, or None; the lowest, if several share it."""
        return self.flags >> VECTOR_SHIFT & 0xFF if self.flags & ENTERED else None

    def __repr__(self) -> str:
        changed = " ".join(f"{name}={new:#x}" for name, (_, new) in self.changes.items() if name != "rip")
        exit = "" if self.exit == EXIT_DEBUG else f" exit {exit_name(self.exit)}"
        notes = "".join(f"; {words}" for words in self.taints)
        return f"Step {self.index} at {self.executed_rip:#x}: {changed or 'no register changed'}{exit}{notes}"


class StepRecord:
    """Recorded steps of one vcpu. Read-only; slices share the rows.

    Columns are attributes: ``rec.rip``, ``rec.rax``, ..., ``rec.rflags`` (uint64,
    shape (n,)) and ``rec.exit`` (uint32), each a view of the rows, the state
    after each step. ``rec[i]`` is a `Step`, ``rec[a:b]`` a StepRecord.

    Attributes:
        rows: numpy structured array, shape (n,), dtype `step_rows.ROW`, 152 bytes a step.
        start: the state before the first step, shape (), same dtype.
        first_step: index of the first row in the recording this is a slice of.
        bits: width of the code at the start; later widths come from the rows' flags where the host gave them.
        code_base: linear address of offset 0 of the code segment at the start.
        symbols: names and source lines of the programs.
        provenance: the host it was recorded on.
        vcpu: index of the vcpu.
        ended: what ended it before all steps asked for were made, such as "shutdown" or "breakpoint 1 at loop"; else
            "". A slice that has the last step keeps it.
    """

    def __init__(
        self,
        rows: Rows,
        start: Rows,
        *,
        first_step: int = 0,
        bits: int = 64,
        code_base: int = 0,
        symbols: Symbols | None = None,
        code: CodeReader | None = None,
        provenance: Provenance | None = None,
        vcpu: int = 0,
        ended: str = "",
    ) -> None:
        """Takes over rows and never writes to them.

        Args:
            code: bytes of code by linear address, or what reads them from guest memory; that is asked only by
                `disassemble`, `instruction`, `capture_code`, `code` and `save`, never by a repr.

        Raises:
            MisuseError: an array of another dtype or shape, or a width that is not 16, 32 or 64.
        """
        if rows.dtype != ROW or rows.ndim != 1 or start.dtype != ROW or start.ndim != 0:
            raise MisuseError(
                "a StepRecord takes rows of shape (n,) and a start of shape (), both of dtype step_rows.ROW; "
                f"got {rows.dtype} {rows.shape} and {start.dtype} {start.shape}"
            )
        if bits not in (16, 32, 64):
            raise MisuseError(f"code of {bits!r} bits: give 16, 32 or 64")
        self.rows: Rows = rows.view()
        self.rows.flags.writeable = False
        # np.array: a row taken out of an array, rows[i], is a scalar and must become an array.
        self.start: Rows = np.array(start)
        self.start.flags.writeable = False
        self.first_step = first_step
        self.bits = bits
        self.code_base = code_base
        self.symbols = symbols if symbols is not None else Symbols()
        self.provenance = provenance if provenance is not None else Provenance()
        self.vcpu = vcpu
        self.ended = ended
        # What was read, and what reads the rest: None where there is nothing to read.
        self._kept = code if isinstance(code, CodeImage) else CodeImage()
        self._reader = None if isinstance(code, CodeImage) else code

    def __getattr__(self, name: str) -> Any:
        if name in _COLUMNS:
            return self.rows[name]
        near = nearest(name, _COLUMNS)
        said = f"did you mean {' or '.join(near)}?" if near else f"its columns are {', '.join(ROW.names or ())}"
        raise AttributeError(f"a StepRecord has no {name!r}; {said}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_COLUMNS]

    @property
    def executed_rip(self) -> npt.NDArray[np.uint64]:
        """Offset of the instruction each step ran, shape (n,): rip one row back. A new array at each call."""
        executed = np.empty(len(self.rows), dtype=np.uint64)
        if len(executed):
            executed[0] = self.start["rip"]
            executed[1:] = self.rows["rip"][:-1]
        return executed

    @property
    def entered_vector(self) -> npt.NDArray[np.int16]:
        """The vector whose handler each step has entered, -1 for none, shape (n,). A new array at each call."""
        flags = self.rows["flags"]
        return np.where(flags & ENTERED, flags >> VECTOR_SHIFT & 0xFF, -1).astype(np.int16)

    @property
    def nbytes(self) -> int:
        """Bytes the rows take."""
        return int(self.rows.nbytes)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> StepRecord: ...
    def __getitem__(self, index: int | slice) -> Step | StepRecord:
        if isinstance(index, slice):
            try:
                first, last, stride = index.indices(len(self))
            except (TypeError, ValueError):
                raise MisuseError(f"rec[{index.start!r}:{index.stop!r}]: a slice has numbers of steps") from None
            if stride != 1:
                raise MisuseError(
                    f"a StepRecord has consecutive steps; rec.rows[::{stride}] gives every {stride}th row"
                )
            last = max(first, last)
            before = self._row_before(first) if first <= len(self) else self.start
            part = StepRecord(
                self.rows[first:last],
                before,
                first_step=self.first_step + first,
                bits=self._bits_before(first),
                code_base=self.code_base,
                symbols=self.symbols,
                code=self._reader,
                provenance=self.provenance,
                vcpu=self.vcpu,
                ended=self.ended if last == len(self) else "",
            )
            part._kept = self._kept
            return part
        at = self._index(index)
        before, after = self._row_before(at), self.rows[at]
        return Step(
            index=self.first_step + at,
            executed_rip=int(before["rip"]),
            exit=int(after["exit"]),
            before={name: int(before[name]) for name in INTEGER},
            after={name: int(after[name]) for name in INTEGER},
            flags=int(after["flags"]),
        )

    def __iter__(self) -> Iterator[Step]:
        return (self[index] for index in range(len(self)))

    def _index(self, index: int) -> int:
        try:
            at = operator.index(index)
        except TypeError:
            raise MisuseError(
                f"rec[{index!r}]: give the number of a step or a slice; columns are attributes, such as rec.rip"
            ) from None
        if not -len(self) <= at < len(self):
            raise IndexError(f"step {at} of a recording of {len(self):,} steps")
        return at % len(self)

    def _row_before(self, at: int) -> Rows:
        if at == 0:
            return self.start
        return np.asarray(self.rows[at - 1])

    def _bits_before(self, at: int) -> int:
        # Width of the code that step `at` runs: the flags of the row before, where the host recorded it.
        if at == 0:
            return self.bits
        return WIDTHS.get(int(self.rows["flags"][at - 1]) & WIDTH_MASK, self.bits)

    def changes(self, index: int) -> dict[str, tuple[int, int]]:
        """Registers that step `index` changed: name to (before, after); rip among them.

        Raises:
            IndexError: no such step.
        """
        return self[index].changes

    def changed(self, name: str) -> npt.NDArray[np.intp]:
        """Indexes of the steps that changed a register.

        Raises:
            MisuseError: no such column.
        """
        if name not in _COLUMNS:
            raise MisuseError(f"no column {name!r}; {instead(name, ROW.names or ())}")
        column = self.rows[name]
        found = np.flatnonzero(column[1:] != column[:-1]) + 1
        if len(column) and column[0] != self.start[name]:
            found = np.concatenate([[0], found])
        return found

    def change_counts(self) -> dict[str, int]:
        """How many steps changed each register, by name, in the table's order; rip and rflags among them."""
        counts = {name: int(len(self) > 0 and self.rows[name][0] != self.start[name]) for name in INTEGER}
        # A piece at a time stays in the processor's cache while its 18 columns are gone through.
        for at in range(0, len(self) - 1, _PIECE_ROWS):
            piece = self.rows[at : at + _PIECE_ROWS + 1]
            for name in INTEGER:
                counts[name] += int(np.count_nonzero(piece[name][1:] != piece[name][:-1]))
        return counts

    def where(self, address: int | str) -> npt.NDArray[np.intp]:
        """Indexes of the steps that ran the instruction at an address: ``rec.where("loop+3")``.

        Args:
            address: linear, as a number or an expression that `Symbols.resolve` takes.

        Raises:
            MisuseError: not an address, or no such symbol.
        """
        rip = np.uint64((self.symbols.resolve(address) - self.code_base) & (1 << 64) - 1)
        found = np.flatnonzero(self.rows["rip"][:-1] == rip) + 1
        if len(self) and self.start["rip"] == rip:
            found = np.concatenate([[0], found])
        return found

    def hits(self, address: int | str) -> int:
        """How often the instruction at an address ran; `where` says in which steps."""
        return len(self.where(address))

    def exit_counts(self) -> dict[str, int]:
        """How many steps made which exit, most frequent first; plain steps are ``DEBUG``."""
        reasons, counts = np.unique(self.rows["exit"], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {exit_name(int(reasons[i])): int(counts[i]) for i in order}

    def first_difference(self, other: StepRecord) -> int | None:
        """Index of the first step whose registers or exit differ from another recording's, or None.

        A recording that ends while the other goes on differs at its end. The
        starts are not compared: look at ``start`` for them.
        """
        if not isinstance(other, StepRecord):
            raise MisuseError(f"a recording is compared with another StepRecord, not {other!r}")
        shared = min(len(self), len(other))
        # In pieces, so that comparing two long recordings needs no memory to speak of.
        for at in range(0, shared, _PIECE_ROWS):
            end = min(at + _PIECE_ROWS, shared)
            differs = np.zeros(end - at, dtype=bool)
            for name in (*INTEGER, "exit"):
                differs |= self.rows[name][at:end] != other.rows[name][at:end]
            if differs.any():
                return at + int(differs.argmax())
        return None if len(self) == len(other) else shared

    def instruction(self, index: int, *, read: bool = True) -> Instruction | None:
        """The instruction that step `index` ran, or None when its bytes are not known.

        The bytes are those that the record keeps, or else those that guest memory
        holds now; code that rewrote itself shows as it was then.

        Args:
            read: ask the guest for bytes that the record does not keep.
        """
        at = self._index(index)
        bits = self._bits_before(at)
        base = 0 if bits == 64 else self.code_base
        address = int(self._row_before(at)["rip"])
        linear = (address + base) & (1 << 64) - 1
        code = self._kept(linear, MAX_BYTES)
        if not code and read and self._reader is not None:
            code = self._reader(linear, MAX_BYTES)
        if not code:
            return None
        return DECODER.decode(code, bits=bits, address=address, symbols=self.symbols, code_base=base)

    def capture_code(self) -> None:
        """Keeps the bytes of all code that ran, to show it after memory changed or the host closed."""
        if self._reader is not None:
            self._keep(self.rows["rip"][:-1])
            self._reader = None

    def sample_code(self) -> None:
        """Keeps the bytes of code at both ends of the recording and of what ran most, in bounded time.

        `cpu.record()` does it, so that tables and figures need not ask the guest.
        """
        if self._reader is not None:
            rip = self.rows["rip"][:-1]
            between = rip[:: max(1, len(rip) // _SAMPLED_ROWS)]
            self._keep(np.concatenate([rip[:_SAMPLED_ROWS], between, rip[-_SAMPLED_ROWS:]]))

    def _keep(self, rips: npt.NDArray[np.uint64]) -> None:
        assert self._reader is not None
        offsets = {int(value) for value in np.unique(rips)} | {int(self.start["rip"])}
        linear = {(offset + self.code_base) & (1 << 64) - 1 for offset in offsets} | offsets
        # What was kept before stays where nothing can be read any more.
        self._kept = CodeImage({**self._kept.stretches, **CodeImage.capture(self._reader, linear).stretches})

    @property
    def code(self) -> CodeImage:
        """The captured code; empty if nothing was captured or can be read."""
        self.capture_code()
        return self._kept

    def disassemble(self, steps: slice | int = slice(0, 40)) -> str:
        """A table of steps: index, address, symbol, instruction, and the registers each one changed.

        Args:
            steps: which steps, the first 40 unless told; ``rec.disassemble(slice(-20, None))``.
        """
        from kvmbench.debug.record_text import as_text

        return as_text(self[steps] if isinstance(steps, slice) else self[self._index(steps) :][:1])

    def to_dataframe(self) -> pandas.DataFrame:
        """A pandas frame: ``executed_rip``, ``symbol``, registers (uint64), ``exit`` by name; index ``step``.

        ``entered_vector`` (int16) is the vector whose handler the step entered, or -1 for none.
        Copies the rows. pandas is imported here and nowhere else.
        """
        from kvmbench.debug.record_file import to_dataframe

        return to_dataframe(self)

    def to_csv(self, path: str | PathLike[str]) -> Path:
        """Writes a CSV table with one line a step; numbers in hex, which spreadsheets do not round."""
        from kvmbench.debug.record_file import to_csv

        return to_csv(self, path)

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes rows, symbols, code and provenance to one ``.npz`` file, which `load` reads back."""
        from kvmbench.debug.record_file import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> StepRecord:
        """Reads a file that `save` wrote.

        Raises:
            LoadError: the file is truncated, damaged, or not a recording.
            OSError: it cannot be opened.
        """
        from kvmbench.debug.record_file import load

        return load(path)

    def summary(self) -> str:
        """One line: how many steps, from where to where, how it ended, on which host."""
        because = f"; ended: {self.ended}" if self.ended else ""
        if not len(self):
            return f"no steps, at {self._place(self.start)}{because}; {self.provenance}"
        last = self.rows[-1]
        count = "1 step" if len(self) == 1 else f"{len(self):,} steps"
        after = f" after {self.first_step:,}" if self.first_step else ""
        exit = "" if int(last["exit"]) == EXIT_DEBUG else f", last exit {exit_name(int(last['exit']))}"
        return f"{count}{after}, {self._place(self.start)} to {self._place(last)}{exit}{because}; {self.provenance}"

    def _place(self, row: Any) -> str:
        rip = int(row["rip"])
        return f"{rip:#x} {self.symbols.label(rip + self.code_base)}".rstrip()

    def __repr__(self) -> str:
        return f"StepRecord: {self.summary()}"

    def _repr_html_(self) -> str:
        from kvmbench.debug.record_text import as_html

        return as_html(self)
