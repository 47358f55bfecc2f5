"""What several vcpus did in lock-step: a recording of each, and the order of their steps."""

from __future__ import annotations

import html
import io
import operator
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvmbench.debug.record import Step, StepRecord
from kvmbench.debug.register_table import INTEGER
from kvmbench.debug.schedule import Schedule, Turns
from kvmbench.debug.step_rows import ROW, Rows
from kvmbench.errors import LoadError, MisuseError

if TYPE_CHECKING:
    import pandas

    from kvmbench.debug.stops import Stops

_SHOWN_STEPS = 40
_ORDER = "schedule.txt"


@dataclass(frozen=True, slots=True)
class LockstepStep:
    """One step of the interleaved recording.

    Attributes:
        index: its place among the steps of all vcpus.
        vcpu: which one made it.
        step: the step; its index counts those of this vcpu.
    """

    index: int
    vcpu: int
    step: Step

    def __repr__(self) -> str:
        return f"{self.index}: vcpu {self.vcpu}, {self.step!r}"


class LockstepRecord:
    """Steps of several vcpus in the order in which they were made. Read-only.

    Columns are attributes, interleaved: ``rec.rip``, ``rec.rax``, ..., ``rec.exit``, and ``rec.vcpu``, shape (n,),
    the state of the vcpu that made the step after it. ``rec[i]`` is a `LockstepStep`.

    Attributes:
        vcpu: uint8 array, shape (n,), the vcpu of each step.
        records: the `StepRecord` of each vcpu, by its index.
        ended: why there are no more steps, in words.
        notes: turns that were passed over, and why.
        stops: where each vcpu stands and why; None after `load`.
    """

    def __init__(
        self,
        order: Turns,
        records: Mapping[int, StepRecord],
        *,
        ended: str = "",
        notes: tuple[str, ...] = (),
        stops: Stops | None = None,
    ) -> None:
        """Takes over arrays and never writes to them.

        Raises:
            MisuseError: the order and the recordings have different numbers of steps.
        """
        self.vcpu: Turns = np.array(order, np.uint8)
        self.vcpu.flags.writeable = False
        self.records = dict(records)
        counts = np.bincount(self.vcpu, minlength=256)
        if any(counts[vcpu] != len(self.records.get(vcpu, ())) for vcpu in {*self.records, *np.flatnonzero(counts)}):
            raise MisuseError("the recordings have not the steps that the order says")
        self.ended = ended
        self.notes = notes
        self.stops = stops
        self._rows: Rows | None = None

    @property
    def schedule(self) -> Schedule:
        """The steps as a schedule, which makes them again when it is given to `Machine.lockstep`.

        Raises:
            MisuseError: there are no steps.
        """
        return Schedule(self.vcpu)

    @property
    def rows(self) -> Rows:
        """The interleaved rows, shape (n,), dtype `step_rows.ROW`; made at the first call."""
        if self._rows is None:
            rows = np.empty(len(self.vcpu), ROW)
            for vcpu, record in self.records.items():
                rows[self.vcpu == vcpu] = record.rows
            rows.flags.writeable = False
            self._rows = rows
        return self._rows

    def __getattr__(self, name: str) -> Any:
        if name in (ROW.names or ()):
            return self.rows[name]
        raise AttributeError(f"a LockstepRecord has no {name!r}; its columns are vcpu, {', '.join(ROW.names or ())}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(ROW.names or ())]

    def __len__(self) -> int:
        return len(self.vcpu)

    def __getitem__(self, index: int) -> LockstepStep:
        try:
            at = operator.index(index)
        except TypeError:
            raise MisuseError(f"rec[{index!r}]: give the number of a step; rec.records[vcpu] takes slices") from None
        if not -len(self) <= at < len(self):
            raise IndexError(f"step {at} of a recording of {len(self):,} steps")
        at %= len(self)
        vcpu = int(self.vcpu[at])
        return LockstepStep(at, vcpu, self.records[vcpu][int(np.count_nonzero(self.vcpu[:at] == vcpu))])

    def __iter__(self) -> Iterator[LockstepStep]:
        return (self[index] for index in range(len(self)))

    def where(self, vcpu: int) -> npt.NDArray[np.intp]:
        """Places of the steps of one vcpu among those of all."""
        return np.flatnonzero(self.vcpu == vcpu)

    def first_difference(self, other: LockstepRecord) -> int | None:
        """Index of the first step at which the vcpu, its registers or the exit differ, or None.

        A recording that ends while the other goes on differs at its end. The starts are not compared.
        """
        if not isinstance(other, LockstepRecord):
            raise MisuseError(f"a recording is compared with another LockstepRecord, not {other!r}")
        shared = min(len(self), len(other))
        differs = self.vcpu[:shared] != other.vcpu[:shared]
        for name in (*INTEGER, "exit"):
            differs |= self.rows[name][:shared] != other.rows[name][:shared]
        if differs.any():
            return int(differs.argmax())
        return None if len(self) == len(other) else shared

    def disassemble(self, steps: slice | int = slice(0, _SHOWN_STEPS)) -> str:
        """A table of steps, a column a vcpu: index, address and instruction."""
        at = range(len(self))[steps] if isinstance(steps, slice) else [range(len(self))[steps]]
        vcpus = sorted(self.records)
        lines = [["step", *(f"vcpu {vcpu}" for vcpu in vcpus)]]
        for index in at:
            one = self[index]
            record = self.records[one.vcpu]
            found = record.instruction(one.step.index - record.first_step)
            where = record.symbols.label(one.step.executed_rip + record.code_base) or f"{one.step.executed_rip:#x}"
            text = f"{where}  {found.text if found is not None else '(code not known)'}"
            lines.append([str(index), *(text if vcpu == one.vcpu else "" for vcpu in vcpus)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def to_dataframe(self) -> pandas.DataFrame:
        """The frames of the recordings (`StepRecord.to_dataframe`) in one, by step; ``vcpu`` is added."""
        import pandas

        frames = []
        for vcpu, record in self.records.items():
            frame = record.to_dataframe()
            frame["symbol"] = frame["symbol"].astype(str)
            frame["exit"] = frame["exit"].astype(str)
            frame.insert(0, "vcpu", np.uint8(vcpu))
            frame.index = pandas.Index(self.where(vcpu), name="step")
            frames.append(frame)
        return pandas.concat(frames).sort_index()

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes a zip of the schedule as text and an ``.npz`` a vcpu, which `load` reads back."""
        target = Path(path)
        with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            part = Path(folder) / "part"
            with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as file:
                file.writestr(_ORDER, str(self.schedule) if len(self) else "")
                file.writestr("ended.txt", "\n".join((self.ended, *self.notes)))
                for vcpu, record in self.records.items():
                    file.write(record.save(Path(folder) / f"vcpu{vcpu}.npz"), f"vcpu{vcpu}.npz")
            part.replace(target)
        return target

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LockstepRecord:
        """Reads a file that `save` wrote.

        Raises:
            LoadError: it is something else, or damaged.
            OSError: it cannot be opened.
        """
        source = Path(path)
        records = {}
        try:
            with zipfile.ZipFile(io.BytesIO(source.read_bytes())) as file, TemporaryDirectory() as folder:
                text = file.read(_ORDER).decode("ascii")
                ended, *notes = file.read("ended.txt").decode().split("\n")
                for name in file.namelist():
                    if name.startswith("vcpu"):
                        member = Path(folder) / "member.npz"
                        member.write_bytes(file.read(name))
                        records[int(name.removeprefix("vcpu").removesuffix(".npz"))] = StepRecord.load(member)
            order = Schedule(text).turns if text else np.empty(0, np.uint8)
            return cls(order, records, ended=ended, notes=tuple(notes))
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            raise LoadError(f"{source}: not a recording that LockstepRecord.save wrote ({error})") from None

    def summary(self) -> str:
        """One line: how many steps of which vcpus, and how it ended."""
        each = ", ".join(f"vcpu {vcpu} {len(record):,}" for vcpu, record in sorted(self.records.items()))
        provenance = next((str(record.provenance) for record in self.records.values()), "")
        return f"{len(self):,} steps ({each}); {self.ended}; {provenance}"

    def __repr__(self) -> str:
        return "\n    ".join((f"LockstepRecord: {self.summary()}", *self.notes))

    def _repr_html_(self) -> str:
        head = "<br>".join(html.escape(line) for line in (self.summary(), *self.notes))
        return f"<div>{head}</div><pre>{html.escape(self.disassemble())}</pre>"
