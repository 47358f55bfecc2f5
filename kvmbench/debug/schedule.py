"""Whose turn it is when several vcpus are stepped one instruction at a time.

As text a schedule is vcpus in their order, a run of the same one shortened: ``0*12 1 0 1*3``. That is what its repr,
its files and `Schedule` itself take, so one can be written by hand, kept, and given again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from kvmbench.arguments import integer
from kvmbench.errors import LoadError, MisuseError

Turns = npt.NDArray[np.uint8]

_FORMAT = "kvmbench schedule 1"
_RUN = re.compile(r"(\d+)(?:\*(\d+))?", re.ASCII)
MOST_TURNS = 1 << 28
_MOST_VCPU = 254
# Turns gone through at a time.
_PIECE = 1 << 18
# Runs shown by a repr, and written in a line of a file.
_SHOWN_RUNS = 12


class Schedule:
    """An order of turns; each is one step of one vcpu. Read-only.

    Attributes:
        turns: uint8 array, shape (n,), the vcpu of each turn.
    """

    def __init__(self, turns: str | Iterable[int]) -> None:
        """Takes vcpus by index, or text such as ``"0*3 1 0"``.

        Raises:
            MisuseError: empty, or not of that form.
        """
        self.turns: Turns = _from_text(turns) if isinstance(turns, str) else _from_numbers(turns)
        if not len(self.turns):
            raise MisuseError("an order without turns; name at least one vcpu, such as [0, 1]")
        self.turns.flags.writeable = False

    @classmethod
    def round_robin(cls, vcpus: Iterable[int], steps: int) -> Schedule:
        """Each vcpu in turn, `steps` turns altogether."""
        return cls(vcpus).repeated(steps)

    @classmethod
    def random(cls, vcpus: Iterable[int], steps: int, seed: int) -> Schedule:
        """Turns drawn evenly; the same seed gives the same order, on every machine and with every numpy.

        Raises:
            MisuseError: a seed that is no integer from 0 to 2**32 - 1.
        """
        among = cls(vcpus).turns
        # RandomState's stream is frozen (NEP 19); that of default_rng is not.
        stream = np.random.RandomState(integer(seed, "seed", 0, (1 << 32) - 1))
        turns = np.empty(_count(steps), np.uint8)
        for at in range(0, len(turns), _PIECE):
            piece = turns[at : at + _PIECE]
            piece[:] = among[(stream.random_sample(len(piece)) * len(among)).astype(np.intp)]
        return cls(turns)

    def repeated(self, steps: int) -> Schedule:
        """As many turns as asked for: the first ones, or all of them again and again."""
        steps = _count(steps)
        return Schedule(np.tile(self.turns, -(-steps // len(self.turns)))[:steps])

    @property
    def vcpus(self) -> tuple[int, ...]:
        """The vcpus that have a turn."""
        counts = np.zeros(256, np.int64)
        for at in range(0, len(self.turns), _PIECE):  # numpy counts in 8 bytes a turn
            counts += np.bincount(self.turns[at : at + _PIECE], minlength=256)
        return tuple(int(each) for each in np.flatnonzero(counts))

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[int]:
        return iter(self.turns.tolist())

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> Schedule: ...
    def __getitem__(self, key: int | slice) -> int | Schedule:
        return Schedule(self.turns[key]) if isinstance(key, slice) else int(self.turns[key])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and np.array_equal(self.turns, other.turns)

    def __hash__(self) -> int:
        return hash(self.turns.tobytes())

    def _runs(self) -> list[str]:
        starts = np.concatenate(([0], np.flatnonzero(np.diff(self.turns)) + 1))
        lengths = np.diff(np.concatenate((starts, [len(self.turns)])))
        pairs = zip(self.turns[starts].tolist(), lengths.tolist(), strict=True)
        return [f"{vcpu}*{length}" if length > 1 else f"{vcpu}" for vcpu, length in pairs]

    def __str__(self) -> str:
        return " ".join(self._runs())

    def __repr__(self) -> str:
        runs = self[: 64 * _SHOWN_RUNS]._runs()
        more = "" if len(runs) <= _SHOWN_RUNS and len(self) <= 64 * _SHOWN_RUNS else " ..."
        return f"<Schedule of {len(self):,} turns: {' '.join(runs[:_SHOWN_RUNS])}{more}>"

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the text to a file, which `load` reads."""
        runs, target = self._runs(), Path(path)
        lines = (" ".join(runs[at : at + _SHOWN_RUNS]) for at in range(0, len(runs), _SHOWN_RUNS))
        target.write_text("\n".join((_FORMAT, *lines, "")), encoding="ascii")
        return target

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Schedule:
        """Reads a file that `save` wrote.

        Raises:
            LoadError: it is something else, or damaged.
            OSError: it cannot be opened.
        """
        first, _, rest = Path(path).read_text(encoding="ascii", errors="replace").partition("\n")
        if first != _FORMAT:
            raise LoadError(f"{path}: starts with {first[:40]!r}; a schedule starts with {_FORMAT!r}")
        try:
            return cls(rest)
        except MisuseError as error:
            raise LoadError(f"{path}: {error}") from None


def _count(steps: Any) -> int:
    return integer(steps, "steps", 1, MOST_TURNS)


def _from_text(text: str) -> Turns:
    vcpus, lengths = [], []
    for word in text.split():
        found = _RUN.fullmatch(word)
        if found is None:
            raise MisuseError(f"{word[:40]!r} in an order; write vcpus and how often, such as '0*3 1 0'")
        vcpus.append(integer(int(found[1]), "vcpu", 0, _MOST_VCPU))
        lengths.append(integer(int(found[2] or 1), "turns", 1, MOST_TURNS))
    if sum(lengths) > MOST_TURNS:
        raise MisuseError(f"an order of {sum(lengths):,} turns; {MOST_TURNS:,} are the most")
    return np.repeat(np.array(vcpus, np.uint8), lengths)


def _from_numbers(turns: Any) -> Turns:
    if isinstance(turns, np.ndarray) and turns.dtype == np.uint8 and turns.ndim == 1:
        return turns.copy()
    try:
        numbers = list(turns)
    except TypeError:
        raise MisuseError(f"{turns!r} is no order; give vcpus such as [0, 1, 1], or text such as '0 1*2'") from None
    return np.array([integer(each, "vcpu", 0, _MOST_VCPU) for each in numbers], np.uint8)
