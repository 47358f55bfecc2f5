"""What summaries and comparisons are: rows that have a key, as a sequence, as text and as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any, Generic, Protocol, TypeVar

# Rows that a repr shows.
_SHOWN = 30


class Keyed(Protocol):
    """A row: its key has a value for each of `KeyedTable.by`."""

    @property
    def key(self) -> tuple[str, ...]: ...


Row = TypeVar("Row", bound=Keyed)


class KeyedTable(Sequence[Row], Generic[Row]):
    """Rows, by place or, where one thing tells them apart, by its name.

    Attributes:
        by: what the rows tell apart.
        clock: what to write beside times: "emulator time", or "".
        warnings: sentences about what is missing.
    """

    # Columns of words behind those of `by`, counted from the right; the others are numbers.
    _words_at_the_end = 0

    def __init__(self, rows: Sequence[Row], *, by: tuple[str, ...], clock: str, warnings: tuple[str, ...]) -> None:
        self._rows = tuple(rows)
        self.by = by
        self.clock = clock
        self.warnings = warnings

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, str):
            for row in self._rows:
                if row.key == (at,):
                    return row
            raise KeyError(f"no exits {at!r}; there are {', '.join(' '.join(row.key) for row in self._rows)}")
        return self._rows[at]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def _head(self) -> list[str]:
        # Of the columns behind those of `by`.
        raise NotImplementedError

    def _cells(self, row: Row) -> list[str]:
        # As many as `_head`.
        raise NotImplementedError

    def _below(self) -> list[str]:
        # Lines under the table.
        more = [f"{len(self) - _SHOWN} rows more"] if len(self) > _SHOWN else []
        return [*more, *self.warnings]

    def _lines(self) -> list[list[str]]:
        return [[*self.by, *self._head()], *([*row.key, *self._cells(row)] for row in self._rows[:_SHOWN])]

    def _is_words(self, column: int) -> bool:
        return column < len(self.by) or column >= len(self.by) + len(self._head()) - self._words_at_the_end

    def __repr__(self) -> str:
        lines = self._lines()
        wide = [max(map(len, column)) for column in zip(*lines, strict=True)]
        left = [self._is_words(n) for n in range(len(wide))]
        text = [
            "  ".join(
                c.ljust(w) if words else c.rjust(w) for c, w, words in zip(line, wide, left, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*text, *self._below()])

    def _repr_html_(self) -> str:
        def line(tag: str, cells: list[str]) -> str:
            styles = ["" if self._is_words(n) else ' style="text-align:right"' for n in range(len(cells))]
            found = (f"<{tag}{style}>{escape(cell)}</{tag}>" for style, cell in zip(styles, cells, strict=True))
            return f"<tr>{''.join(found)}</tr>"

        head, *rows = self._lines()
        body = "".join(line("td", cells) for cells in rows)
        below = "<br>".join(escape(text) for text in self._below())
        return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table><p>{below}</p>"
