"""Another machine: the agent on it, over the user's own ssh command.

One ssh connection does everything. A line of shell on the other side says what
is there; if it lacks this very agent the binary follows on the same stream; then
the shell becomes the agent. The agent stays in ``~/.cache/kvmbench`` there.
"""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kvmbench.core.agent import agent_binary
from kvmbench.errors import HostUnavailable, MisuseError
from kvmbench.host.cache import cache_directory
from kvmbench.host.child import attach
from kvmbench.host.process import Process
from kvmbench.host.stream import StreamChannel, greet

_ANSWER_WITHIN_S = 60.0
_MARK = b"kvmbench: "
# Shell start-up files may print; more than this before our line is no greeting.
_MOST_NOISE_BYTES = 65536

# Run by `sh -c` there. No single quotes, no "!": the words pass through the login shell, whichever it is.
# A file is uploaded under a name of its own and renamed, so a half one is never taken for the agent.
_SCRIPT = (
    'say() { echo "kvmbench: $*"; }; '
    'case "$(uname -sm)" in "Linux x86_64") ;; *) say system $(uname -sm); exit 1;; esac; '
    'd="${XDG_CACHE_HOME:-$HOME/.cache}/kvmbench"; f="$d/agent-KEY"; '
    'if [ -x "$f" ]; then say ready; else '
    'mkdir -p "$d" 2>/dev/null; t="$f.$$"; (umask 077; : > "$t") 2>/dev/null || { say folder "$d"; exit 1; }; '
    'say send; head -c SIZE > "$t" && chmod 700 "$t" && mv "$t" "$f" || { rm -f "$t"; say full "$d"; exit 1; }; '
    "say ready; fi; "
    '"$f" --probe </dev/null >/dev/null 2>&1; [ $? -eq 2 ] || { say noexec "$d"; exit 1; }; '
    'say go; exec "$f" --stdio'
)


@dataclass(frozen=True)
class Address:
    """Where an ssh URL leads.

    Attributes:
        host: name or address, or a name of the user's ssh configuration.
        user: None leaves it to ssh.
        port: None leaves it to ssh.
    """

    host: str
    user: str | None = None
    port: int | None = None


def parse_url(url: str) -> Address:
    """Reads ``ssh://[user@]host[:port]``.

    Raises:
        MisuseError: not of that form.
    """
    form = f"{url!r} is not of the form ssh://[user@]host[:port]"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise MisuseError(f"{form}: {error}") from None
    host, user = parts.hostname, parts.username
    extra = parts.path not in ("", "/") or parts.query or parts.fragment or parts.password is not None
    if parts.scheme != "ssh" or not host or extra:
        raise MisuseError(form)
    # ssh would take such a name for an option.
    if host.startswith("-") or (user is not None and (not user or user.startswith("-"))):
        raise MisuseError(form)
    return Address(host, user, port)


def start_ssh(url: str, *, ssh_options: Sequence[str] = ()) -> tuple[StreamChannel, Callable[[], None]]:
    """Runs the agent on another machine.

    ``$KVMBENCH_SSH`` names another command than `ssh`, words split as the shell does.

    Args:
        url: ``ssh://[user@]host[:port]``; keys and the like as the user's ssh finds them.
            ssh asks nothing: what it would have to ask for is an error.
        ssh_options: further words for the ssh command, such as ``["-i", "key"]``.

    Returns:
        The channel, and a function that ends both; idempotent.

    Raises:
        MisuseError: no such URL.
        HostUnavailable: ssh does not get there, or the agent cannot run there; says why.
    """
    address = parse_url(url)
    if isinstance(ssh_options, str) or not all(isinstance(word, str) for word in _listed(ssh_options)):
        raise MisuseError(f"ssh_options={ssh_options!r}: give a list of words, such as ['-i', 'key']")
    agent = agent_binary(cache_directory())
    command = ssh_command(address, agent, ssh_options=ssh_options)
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = Process("ssh", command, stdio=theirs)
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                mend = "`sudo apt-get install openssh-client`, or name it in $KVMBENCH_SSH"
                raise HostUnavailable(f"{command[0]} does not start: {error.strerror}; {mend}") from error
            raise
    try:
        try:
            _install(ours, agent, url)
            greet(ours, timeout_s=_ANSWER_WITHIN_S)
        except EOFError:
            reason = process.describe_end()  # waits for its last words
            raise HostUnavailable(_explain(url, process.output()) or f"{url}: {reason}") from None
        except TimeoutError:
            said = process.output()
            raise HostUnavailable(f"{url} did not answer within {_ANSWER_WITHIN_S:.0f} s; {said}") from None
    except BaseException:
        ours.close()
        process.end()
        raise
    return attach(ours, process, peer=url)


def _listed(words: object) -> Iterable[object]:
    return words if isinstance(words, Iterable) else (words,)


def ssh_command(address: Address, agent: Path, *, ssh_options: Sequence[str] = ()) -> list[str]:
    """The words that start the agent on the other machine."""
    base = shlex.split(os.environ.get("KVMBENCH_SSH", "")) or ["ssh"]
    where = [*(["-p", str(address.port)] if address.port is not None else [])]
    where += ["-l", address.user] if address.user is not None else []
    script = _SCRIPT.replace("KEY", agent.parent.name).replace("SIZE", str(agent.stat().st_size))
    options = ["-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"]
    # ssh takes the first of several values, so the user's options come first.
    return [*base, *ssh_options, *options, *where, "--", address.host, f"sh -c '{script}'"]


def _install(stream: socket.socket, agent: Path, url: str) -> None:
    # Talks to _SCRIPT until it becomes the agent.
    deadline = time.monotonic() + _ANSWER_WITHIN_S
    while True:
        word, _, rest = _line(stream, deadline).partition(" ")
        if word == "go":
            return
        if word == "send":
            stream.settimeout(None)  # a slow line may take its time; ssh itself notices a dead one
            try:
                stream.sendall(agent.read_bytes())
            except (BrokenPipeError, ConnectionResetError):
                raise EOFError from None
            deadline = time.monotonic() + _ANSWER_WITHIN_S
        elif word != "ready":
            raise HostUnavailable(f"{url}: {_failure(word, rest)}")


def _failure(word: str, rest: str) -> str:
    known = {
        "system": f"it is {rest}; the agent runs on Linux x86_64 only",
        "folder": f"{rest} there cannot be written",
        "full": f"the agent cannot be stored in {rest} there; is the disk full?",
        "noexec": f"the agent in {rest} there cannot be run; is that file system mounted noexec?",
    }
    return known.get(word, f"it said {word!r}")


def _line(stream: socket.socket, deadline: float) -> str:
    # One line of _SCRIPT's; others are of shell start-up files. Byte by byte: what follows is the agent's.
    noise = 0
    line = b""
    while True:
        stream.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            piece = stream.recv(1)
        except ConnectionResetError:
            piece = b""
        if not piece:
            raise EOFError
        if piece != b"\n":
            line += piece
            noise += 1
            if noise > _MOST_NOISE_BYTES:
                raise HostUnavailable("the other machine's shell prints without end; see its start-up files")
        elif line.startswith(_MARK):
            return line.removeprefix(_MARK).decode("utf-8", "replace").strip()
        else:
            line = b""


def _explain(url: str, said: str) -> str | None:
    mends = {
        "Permission denied": "ssh was not let in: `ssh-copy-id`, or `ssh-add` for a key with a passphrase",
        "Could not resolve hostname": "there is no such host",
        "Host key verification failed": "its host key is not known yet, or has changed: run ssh there by hand once",
        "Connection refused": "no ssh server listens there",
        "Connection timed out": "it does not answer",
        "No route to host": "it cannot be reached",
        "Network is unreachable": "it cannot be reached",
        "Too many authentication failures": "ssh was not let in: name the right key with ssh_options=['-i', FILE]",
    }
    for words, mend in mends.items():
        if words in said:
            return f"{url}: {mend} ({said.splitlines()[-1]})"
    return None
