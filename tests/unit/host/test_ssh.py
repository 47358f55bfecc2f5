"""ssh hosts: URLs, and a real sshd with throwaway keys, reached through a pipe and not a port."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmbench.core import wire
from kvmbench.core.agent import agent_binary
from kvmbench.errors import HostLost, HostUnavailable, MisuseError
from kvmbench.host.client import Core
from kvmbench.host.ssh import Address, parse_url, ssh_command, start_ssh

from ...ssh_server import URL, Server, ssh_server


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ssh://server", Address("server")),
        ("ssh://me@server.example.org:2222/", Address("server.example.org", "me", 2222)),
        ("ssh://[::1]:22", Address("::1", None, 22)),
    ],
)
def test_a_url_leads_to_host_user_and_port(url: str, address: Address) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "ssh://",
        "ssh:server",
        "http://server",
        "ssh://server:port",
        "ssh://server:99999",
        "ssh://server/path",
        "ssh://me:secret@server",
        "ssh://-oProxyCommand=x",
        "ssh://-l@server",
        "ssh://@server",
        "ssh://server?x",
    ],
)
def test_a_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(MisuseError, match=r"ssh://\[user@\]host"):
        parse_url(url)


def test_the_users_options_come_before_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tmp_path / "key" / "kvmbench-agent"
    agent.parent.mkdir()
    agent.write_bytes(b"agent")
    monkeypatch.setenv("KVMBENCH_SSH", "my-ssh -F 'a file'")
    words = ssh_command(Address("server", "me", 2222), agent, ssh_options=["-o", "BatchMode=no"])
    assert words[:5] == ["my-ssh", "-F", "a file", "-o", "BatchMode=no"]
    assert words.index("BatchMode=no") < words.index("BatchMode=yes")
    assert words[-7:-1] == ["-p", "2222", "-l", "me", "--", "server"]
    assert "agent-key" in words[-1]
    assert "head -c 5 " in words[-1]


@pytest.fixture
def server(tmp_path: Path, need: Callable[[str, str], None]) -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(ssh_server(tmp_path))
        except HostUnavailable as error:
            need("ssh", str(error))
        yield made


@pytest.fixture(scope="module")
def built_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    try:
        agent_binary(folder)
    except HostUnavailable as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(autouse=True)
def use_the_built_cache(built_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMBENCH_CACHE", str(built_cache))
    monkeypatch.delenv("KVMBENCH_SSH", raising=False)


def test_the_agent_is_uploaded_once_and_serves(server: Server, built_cache: Path) -> None:
    agent = agent_binary(built_cache)
    uploaded = server.home / "kvmbench" / f"agent-{agent.parent.name}"
    for _ in range(2):
        channel, close = start_ssh(URL, ssh_options=server.options + server.key)
        core = Core(channel)
        assert core.hello()["wire_version"] == wire.KB_WIRE_VERSION
        assert core.host_info()["kernel.release"] == os.uname().release
        close()
        close()
        assert uploaded.read_bytes() == agent.read_bytes()
        first = uploaded.stat().st_mtime_ns
    assert uploaded.stat().st_mtime_ns == first
    assert [path.name for path in uploaded.parent.iterdir()] == [uploaded.name]


def test_a_shell_that_greets_does_not_disturb(server: Server, tmp_path: Path) -> None:
    # ssh runs `sh -c ...` through the login shell; bash reads BASH_ENV there, as others read their start-up files.
    (tmp_path / "greeting").write_text("echo Welcome to this machine\necho kvmbench is a fine thing\n")
    server.add_environment(f"BASH_ENV={tmp_path / 'greeting'}")
    channel, close = start_ssh(URL, ssh_options=server.options + server.key)
    assert Core(channel).hello()["wire_version"] == wire.KB_WIRE_VERSION
    close()


def test_an_agent_killed_over_there_is_host_lost(server: Server) -> None:
    channel, close = start_ssh(URL, ssh_options=server.options + server.key)
    core = Core(channel)
    os.kill(core.hello()["agent_pid"], signal.SIGKILL)
    with pytest.raises(HostLost, match="is gone"):
        core.hello()
    close()


def test_a_key_that_is_not_let_in_says_so(server: Server) -> None:
    with pytest.raises(HostUnavailable, match=r"not let in: `ssh-copy-id`.*Permission denied"):
        start_ssh(URL, ssh_options=server.options + server.other_key)


def test_an_unknown_host_key_says_so(server: Server) -> None:
    (server.folder / "known_hosts").write_text("")
    with pytest.raises(HostUnavailable, match="host key is not known"):
        start_ssh(URL, ssh_options=server.options + server.key)


def test_a_connection_that_fails_is_quoted(server: Server) -> None:
    options = [word if not word.startswith("ProxyCommand=") else "ProxyCommand=false" for word in server.options]
    with pytest.raises(HostUnavailable, match=r"(?s)ssh://.*ssh ended with status 255"):
        start_ssh(URL, ssh_options=options)


def test_a_name_that_does_not_resolve_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # No look-up leaves the machine: the words are ssh's, printed by a stand-in for the command only.
    program = tmp_path / "ssh"
    program.write_text(
        "#!/bin/sh\necho 'ssh: Could not resolve hostname nowhere: Name or service not known' >&2\nexit 255\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("KVMBENCH_SSH", str(program))
    with pytest.raises(HostUnavailable, match="there is no such host"):
        start_ssh("ssh://nowhere")


def test_no_ssh_command_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMBENCH_SSH", "/nonexistent/ssh")
    with pytest.raises(HostUnavailable, match=r"/nonexistent/ssh does not start.*openssh-client"):
        start_ssh("ssh://server")


def test_a_folder_that_cannot_be_written_is_named(server: Server) -> None:
    (server.home / "kvmbench").write_text("in the way")
    with pytest.raises(HostUnavailable, match=r"home/kvmbench there cannot be written"):
        start_ssh(URL, ssh_options=server.options + server.key)


def test_an_agent_that_cannot_run_there_is_told(server: Server, built_cache: Path) -> None:
    uploaded = server.home / "kvmbench" / f"agent-{agent_binary(built_cache).parent.name}"
    uploaded.parent.mkdir()
    uploaded.write_bytes(b"\x7fELF of another machine")
    uploaded.chmod(0o755)
    with pytest.raises(HostUnavailable, match="cannot be run"):
        start_ssh(URL, ssh_options=server.options + server.key)
