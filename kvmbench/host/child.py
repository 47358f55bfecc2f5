"""The agent as a child of this process, as this user or through sudo.

With sudo the core may open /dev/kvm and trace, and the notebook need not run as root.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from kvmbench.core.agent import agent_binary
from kvmbench.errors import HostUnavailable
from kvmbench.host.cache import cache_directory
from kvmbench.host.process import Process
from kvmbench.host.stream import StreamChannel, greet

_ANSWER_WITHIN_S = 20.0
# The agent stops its vcpus and goes when its input ends.
_END_WITHIN_S = 5.0


def start_child(*, sudo: bool = False, agent: Path | None = None) -> tuple[StreamChannel, Callable[[], None]]:
    """Starts `kvmbench-agent --stdio` on this machine.

    Args:
        sudo: through `sudo -n`, which asks for no password.
        agent: the binary; None builds it or takes it from the cache.

    Returns:
        The channel, and a function that ends both; idempotent.

    Raises:
        HostUnavailable: no compiler, no sudo, or sudo wants a password.
    """
    binary = agent if agent is not None else agent_binary(cache_directory())
    command = [str(binary), "--stdio"]
    if sudo:
        found = shutil.which("sudo")
        if found is None:
            raise HostUnavailable("sudo=True, but there is no sudo here: run as root instead, or install sudo")
        command = [found, "-n", "--", *command]
    return start_program("sudo" if sudo else "the agent", command, explain=_explain, timeout_s=_ANSWER_WITHIN_S)


def _explain(said: str) -> str | None:
    if "password is required" in said or "a terminal is required" in said:
        return "sudo wants a password: run `sudo -v` in this terminal first, or allow the agent in sudoers"
    if "not in the sudoers" in said or "not allowed to" in said:
        return "sudo does not allow this user to run the agent"
    return None


def start_program(
    name: str, command: Sequence[str], *, explain: Callable[[str], str | None], timeout_s: float
) -> tuple[StreamChannel, Callable[[], None]]:
    """Starts a program that has an agent on its standard streams, and waits for the agent's first answer.

    Args:
        name: of the program, for messages.
        command: the program and its arguments.
        explain: turns what it printed into one sentence that says what to do, or None.
        timeout_s: seconds to wait for the answer.

    Returns:
        As `start_child`.

    Raises:
        HostUnavailable: it does not start, ends, or does not answer.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = Process(name, command, stdio=theirs)
        except OSError as error:
            ours.close()
            raise HostUnavailable(f"{command[0]} does not start: {error.strerror}") from error
        except BaseException:
            ours.close()
            raise
    try:
        greet(ours, timeout_s=timeout_s)
    except (EOFError, TimeoutError) as error:
        ours.close()
        if isinstance(error, TimeoutError):
            reason = f"{name} did not answer within {timeout_s:.0f} s: {process.output()}"
        else:
            reason = process.describe_end()
        sentence = explain(process.output())
        process.end()
        raise HostUnavailable(sentence or reason) from None
    except BaseException:
        ours.close()
        process.end()
        raise
    return attach(ours, process, peer=name)


def attach(stream: socket.socket, process: Process, *, peer: str) -> tuple[StreamChannel, Callable[[], None]]:
    """A channel over a stream whose agent has answered, and the function that ends it with its program."""
    channel = StreamChannel(stream, peer=peer, describe_end=process.describe_end)

    def close() -> None:
        channel.close()
        process.end(patience_s=_END_WITHIN_S)

    return channel, close
