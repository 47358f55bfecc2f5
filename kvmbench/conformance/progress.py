"""One line that says what is being done, rewritten in place on a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO


class Progress:
    """What `survey` takes as ``progress``: ``npt=1  34/110  kvm.step.rep``.

    Where the stream is no terminal, a line a host and nothing else.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._last = ""

    def __call__(self, label: str, place: int, count: int, what: str) -> None:
        if self._live:
            end = "\n" if what == "done" or what.startswith("not there") else ""
            self._stream.write(f"\r\x1b[K{label:<8}{place:>4}/{count}  {what}{end}")
        elif what == "opening" or what == "done" or what.startswith("not there"):
            self._stream.write(f"{label}: {what}\n")
        self._last = what
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._live and self._last:
            self._stream.write("\n")
