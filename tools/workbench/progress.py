"""What the set-up says while it works: one line a step, and a log for the rest.

Set-up steps run other programs (apt-get, pip, compilers) whose output matters
only when they fail. Their output goes to ``out/log/``; the terminal gets one
line with the time taken, or on failure the last lines of the log.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_LINES = 25


class SetupError(Exception):
    """The set-up cannot go on; the message says what is missing and what mends it."""


def say(text: str = "") -> None:
    """Prints a line at once, so that logs of a CI run keep their order."""
    print(text, flush=True)


def step_done(name: str, what: str, seconds: float | None = None) -> None:
    """Prints the line of one finished step.

    Args:
        name: the step, such as ``.venv``.
        what: what was done, in a few words.
        seconds: how long it took, in seconds; None leaves it out.
    """
    taken = "" if seconds is None else f"{seconds:8.1f} s"
    say(f"  {name:<18}{what:<48}{taken}".rstrip())


def run_logged(
    command: Sequence[str],
    *,
    name: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> list[str]:
    """Runs a command with its output in `log`; returns that output's lines.

    On a terminal the last line of output is shown while it runs, so that a long
    download is seen to move. The command inherits `pass_fds` besides its output.

    Raises:
        SetupError: the command failed or does not exist. The message holds the
            last lines of its output and where the whole of it is.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    live = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns - 1
    lines: list[str] = []
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"\n$ {' '.join(command)}\n")
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                pass_fds=pass_fds,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise SetupError(f"{name}: cannot run {command[0]}: {error.strerror}") from error
        assert process.stdout is not None
        try:
            for line in process.stdout:
                sink.write(line)
                sink.flush()
                lines.append(line.rstrip("\n"))
                if live and line.strip():
                    print("\r\x1b[K" + f"  {name}: {line.strip()}"[:width], end="", flush=True)
            status = process.wait()
        except BaseException:
            # Ctrl-C: the child must not go on installing behind our back.
            process.terminate()
            process.wait()
            raise
        finally:
            process.stdout.close()
            if live:
                print("\r\x1b[K", end="", flush=True)
    if status:
        tail = "\n".join(f"    | {line}" for line in lines[-TAIL_LINES:])
        raise SetupError(
            f"{name} failed ({os.path.basename(command[0])} ended with {status}).\n{tail}\n  The whole log: {log}"
        )
    return lines


class Timer:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Elapsed time in seconds."""
        return time.monotonic() - self._start
