"""Programs that serve this one: started on a socket, watched, and never left behind."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any

# What a program said last, as far back as a message repeats it.
_TAIL_LINES = 12
_TAIL_BYTES = 8192
# How long the end of a stream may come before the end of the program that closed it: a killed QEMU on a busy
# machine needs over half a second to give its memory back.
_EXIT_WAIT_S = 3.0
# Checks, once the death signal is set, that there is still the parent to die with.
_IF_PARENT_LIVES = 'test "$PPID" = "$0" && exec "$@"'


class Process:
    """A program with one end of a socket pair, and its output kept for error messages.

    Output goes to a file without a name, so that nothing fills up and nothing is
    left behind. Ctrl-C in the terminal does not reach the program.

    Args:
        name: what it is, for messages: "QEMU", "ssh".
        command: program and arguments.
        stdio: the socket that becomes its standard input and output, or None:
            input is empty then, and what it prints goes with the errors.
        pass_fds: descriptors it inherits under the same numbers.
        telling: matches a line of its output that says more than the last ones do.
        die_with_parent: the kernel kills it when this process ends in whatever way.

    Raises:
        OSError: the program cannot be started.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        stdio: socket.socket | None = None,
        pass_fds: Sequence[int] = (),
        telling: re.Pattern[str] | None = None,
        die_with_parent: bool = False,
    ) -> None:
        self.name = name
        self._telling = telling
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL if stdio is None else stdio,
            "stdout": self._output if stdio is None else stdio,
            "stderr": self._output,
            "pass_fds": tuple(pass_fds),
            # Its own group, for Ctrl-C goes to the terminal's foreground group. Not its own session:
            # sudo remembers a password by the terminal.
            "process_group": 0,
        }
        try:
            if die_with_parent:
                self._popen = _start_to_die_with_us(command, options)
            else:
                self._popen = subprocess.Popen(command, **options)
        except BaseException:
            self._output.close()
            raise

    @property
    def pid(self) -> int:
        """Its process number."""
        return self._popen.pid

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return self._popen.poll() is None

    def output(self) -> str:
        """What it printed: the last few lines, or from the first `telling` one on."""
        if self._output.closed:
            return ""
        descriptor = self._output.fileno()
        size = os.fstat(descriptor).st_size
        # pread: the file's position is shared with the program.
        data = os.pread(descriptor, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        lines = [line.rstrip() for line in data.decode("utf-8", "replace").replace("\r", "\n").split("\n")]
        lines = [line for line in lines if line]
        first = max(0, len(lines) - _TAIL_LINES)
        if self._telling is not None:
            first = next((n for n, line in enumerate(lines[:first]) if self._telling.search(line)), first)
        return "\n".join(lines[first : first + _TAIL_LINES])

    def first_output(self) -> str:
        """What it printed first, 8 KiB at most."""
        if self._output.closed:
            return ""
        return os.pread(self._output.fileno(), _TAIL_BYTES, 0).decode("utf-8", "replace")

    def describe_end(self) -> str:
        """How it ended and what it said last, for `HostLost`; waits a moment for the end."""
        try:
            status = self._popen.wait(_EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            how = "closed the connection"
        else:
            how = describe_status(status)
        said = self.output()
        return f"{self.name} {how}" + (f"; it said last:\n{said}\n" if said else "")

    def end(self, *, patience_s: float = 0.0) -> None:
        """Waits `patience_s` for it to end by itself, then kills it. Idempotent.

        A program of another user (sudo) cannot be killed; it ends with its input.
        """
        try:
            self._popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(PermissionError):
                self._popen.kill()
            self._popen.wait()
        self._output.close()


def describe_status(status: int) -> str:
    """An exit status of `subprocess` in words."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"was ended by {name}"


# The kernel's parent-death signal comes when the *thread* that started the program ends, and notebooks
# start hosts from threads that come and go. So one thread that lives as long as the process starts
# them all. A fork of the process has no such thread and makes its own.

_Job = Callable[[], None]
_spawner_lock = threading.Lock()
_spawner: tuple[int, queue.SimpleQueue[_Job]] | None = None


def _start_to_die_with_us(command: Sequence[str], options: dict[str, Any]) -> subprocess.Popen[bytes]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        # Not Linux, or not its usual tools: the program ends when its streams do.
        return subprocess.Popen(command, **options)
    guarded = [setpriv, "--pdeathsig", "KILL", "sh", "-c", _IF_PARENT_LIVES, str(os.getpid()), *command]
    outcome: list[subprocess.Popen[bytes] | BaseException] = []
    done = threading.Event()

    def job() -> None:
        try:
            outcome.append(subprocess.Popen(guarded, **options))
        except BaseException as error:
            outcome.append(error)
        done.set()

    _spawner_queue().put(job)
    try:
        done.wait()
    except BaseException:  # Ctrl-C: what is being started must not stay
        done.wait()
        if isinstance(outcome[0], subprocess.Popen):
            outcome[0].kill()
            outcome[0].wait()
        raise
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _spawner_queue() -> queue.SimpleQueue[_Job]:
    global _spawner
    with _spawner_lock:
        if _spawner is None or _spawner[0] != os.getpid():
            jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
            threading.Thread(target=_spawn, args=(jobs,), name="kvmbench-spawner", daemon=True).start()
            _spawner = (os.getpid(), jobs)
        return _spawner[1]


def _spawn(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        jobs.get()()
