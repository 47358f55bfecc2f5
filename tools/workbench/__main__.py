"""`./workbench`: set up what a command needs, then run it.

Runs on the standard library alone, with whatever Python 3.11 or newer the
`workbench` script found; everything else it needs, it installs.
"""

from __future__ import annotations

import fcntl
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import appliance
import packages
import tasks
import virtualenv
from checkout import LOGS, ROOT
from progress import SetupError, Timer, say

USAGE = """\
usage: ./workbench COMMAND [ARGUMENTS]

  demo [NOTEBOOK ...]   run the first notebook (or those named) and leave it, with its pictures, in out/
  lab  [ARGUMENTS]      open JupyterLab on the notebooks
  test [ARGUMENTS]      run the tests; arguments go to pytest: ./workbench test tests/unit -k wire
  bench [NAME ...]      run the benchmarks (or those whose name contains NAME); options go to them: --hosts=local
  setup                 only do the set-up

Each command first sets up what is missing: system packages (with apt-get, through sudo when you are
not root), .venv, the project in it, the agent and the appliance. A second run finds it all done.
"""

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": tasks.demo,
    "lab": tasks.lab,
    "test": tasks.test,
    "bench": tasks.bench,
    "setup": tasks.setup,
}


def main(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], list(arguments[1:])
    if command not in COMMANDS:
        print(f"workbench: there is no command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        set_up(for_tests=command == "test", with_bochs=command in ("test", "bench", "setup"))
        return COMMANDS[command](rest)
    except SetupError as error:
        say(f"workbench: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nworkbench: interrupted; run it again to go on")
        return 130


def set_up(*, for_tests: bool, with_bochs: bool) -> None:
    """Does what is not done yet.

    Args:
        for_tests: also get what only the tests need.
        with_bochs: also get what the Intel appliance needs, which `demo` and `lab` do without.

    Raises:
        SetupError: a step failed and nothing can work without it.
    """
    if platform.system() != "Linux":
        raise SetupError("this script sets up Debian and Ubuntu. Elsewhere: pip install -e '.[notebook,test]'")
    timer = Timer()
    with _alone() as lock:
        # Each step prints its own line when it has something to do; all must run, hence no `or`.
        done = [
            packages.ensure(for_tests=for_tests, with_bochs=with_bochs, log=LOGS / "apt.log"),
            virtualenv.ensure(lock=lock),
            appliance.ensure(),
        ]
    say(f"workbench: set-up {'finished' if any(done) else 'was complete'} ({timer.seconds:.1f} s)")


@contextmanager
def _alone() -> Iterator[int]:
    # Two set-ups at once in one checkout would undo each other. The lock ends with the last of its holders.
    descriptor = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("workbench: another ./workbench is setting up this checkout; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
