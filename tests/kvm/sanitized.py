"""An agent built with the address and undefined-behaviour sanitizers, as a host for the contract suite."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import kvmbench as kb
from kvmbench.core.agent import agent_binary
from kvmbench.errors import HostUnavailable
from kvmbench.host.cache import cache_directory
from kvmbench.host.child import start_program
from kvmbench.host.client import Core
from kvmbench.host.host import Host, HostInfo
from kvmbench.host.selfcheck import check

#: A report ends the agent with this status, which nothing else has.
REPORTED = 99
_OPTIONS = (
    # A refused allocation is an answer (KB_NO_MEMORY), not a fault. Leaks are looked for when the agent ends.
    f"ASAN_OPTIONS=exitcode={REPORTED}:allocator_may_return_null=1:detect_leaks=1",
    f"UBSAN_OPTIONS=exitcode={REPORTED}:print_stacktrace=1",
    f"TSAN_OPTIONS=exitcode={REPORTED}",
)
# The agent's exit status outlives it in a file, and so does what it printed: a test that expects
# the host to be lost must not swallow a report.
_SCRIPT = '"$0" --stdio 2>"$1/stderr"; echo $? >"$1/status"'


@contextlib.contextmanager
def sanitized_host(folder: Path, *, cut_off: bool = False, races: bool = False) -> Iterator[kb.Host]:
    """A host over a child with sanitizers; on leaving, fails if they reported anything.

    Args:
        folder: empty, for what the agent prints and its exit status.
        cut_off: the host may be closed while a reply is due; the agent then ends with status 1
            at once, without a search for leaks.
        races: with the thread sanitizer and not the others.

    Raises:
        HostUnavailable: no gcc, no sanitizers, or no /dev/kvm.
    """
    binary = agent_binary(cache_directory(), sanitize=not races, races=races)
    if races:
        _check_thread_sanitizer(binary)
    command = ["env", *_OPTIONS, "sh", "-c", _SCRIPT, str(binary), str(folder)]
    channel, closer = start_program("the sanitized agent", command, explain=lambda said: None, timeout_s=20)
    core = Core(channel)
    try:
        host = Host("local", core, HostInfo.read(core, kind="local"), check(core), closer=closer)
        with host:
            yield host
    finally:
        core.close()
        closer()
        verify(folder, ("0", "1") if cut_off else ("0",))


def _check_thread_sanitizer(binary: Path) -> None:
    # It wants its own layout of addresses, which not every kernel gives it.
    done = subprocess.run([binary, "--tsc-khz"], capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise HostUnavailable(f"the thread sanitizer does not run here: {done.stderr.strip()[:200]}")


def verify(folder: Path, good: tuple[str, ...]) -> None:
    """Fails unless the agent ended by itself, with a good status and without a report."""
    path = folder / "stderr"
    said = path.read_text(errors="replace") if path.exists() else ""
    path = folder / "status"
    assert path.exists(), f"the sanitized agent did not end by itself\n{said}"
    status = path.read_text().strip()
    assert status in good, f"the sanitized agent ended with {status}\n{said}"
    assert "Sanitizer" not in said, said
    assert "runtime error" not in said, said
