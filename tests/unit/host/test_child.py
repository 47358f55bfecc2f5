"""The agent as a child: framing, threads, every broken message, and its end. Built with sanitizers too.

No test here needs /dev/kvm: what the core does with it is the contract suite's.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmbench.core import wire
from kvmbench.core.agent import agent_binary
from kvmbench.errors import HostLost, HostUnavailable
from kvmbench.host.child import start_child, start_program
from kvmbench.host.client import Core
from kvmbench.host.process import Process

HEADER = struct.Struct("<IIIi")
HELLO = HEADER.pack(16, 1, wire.KB_HELLO, 0)
# How many mutated messages the short fuzz run sends; KVMBENCH_FUZZ asks for another number.
FUZZ_MESSAGES = int(os.environ.get("KVMBENCH_FUZZ", "20000"))


@pytest.fixture(scope="session")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("agents")


@pytest.fixture(scope="session", params=["static", "sanitized"])
def binary(request: pytest.FixtureRequest, agents: Path, need) -> Path:
    try:
        return agent_binary(agents, sanitize=request.param == "sanitized")
    except HostUnavailable as error:
        need("sanitizers" if request.param == "sanitized" else "compiler", str(error))


class Raw:
    """An agent without the channel, for messages that the channel would not send."""

    def __init__(self, binary: Path) -> None:
        self.stream, theirs = socket.socketpair()
        self.process = Process("the agent", [str(binary), "--stdio"], stdio=theirs)
        theirs.close()
        self.stream.settimeout(60)

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.stream.recv(size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def reply(self) -> tuple[int, int, int, bytes]:
        """Id, kind, status and payload of the next reply."""
        size, number, kind, status = HEADER.unpack(self.read(HEADER.size))
        return number, kind, status, self.read(size - HEADER.size)

    def call(self, data: bytes) -> tuple[int, int, int, bytes]:
        self.stream.sendall(data)
        return self.reply()

    def end(self) -> str:
        self.stream.close()
        text = self.process.describe_end()
        self.process.end(patience_s=20)
        return text


@pytest.fixture
def raw(binary: Path) -> Iterator[Raw]:
    agent = Raw(binary)
    yield agent
    assert "ended with status 0" in agent.end()


def test_a_started_child_answers_and_ends_with_its_channel(binary: Path) -> None:
    channel, close = start_child(agent=binary)
    hello = Core(channel).hello()
    assert hello["wire_version"] == wire.KB_WIRE_VERSION
    assert hello["agent_uid"] == os.getuid()
    pid = hello["agent_pid"]
    close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    close()


def test_a_killed_child_gives_host_lost_with_the_signal(binary: Path) -> None:
    channel, close = start_child(agent=binary)
    core = Core(channel)
    os.kill(core.hello()["agent_pid"], signal.SIGKILL)
    with pytest.raises(HostLost, match="was ended by SIGKILL"):
        core.hello()
    assert "SIGKILL" in (channel.lost or "")
    close()


def test_host_info_comes_through(binary: Path) -> None:
    channel, close = start_child(agent=binary)
    assert Core(channel).host_info()["kernel.release"] == os.uname().release
    close()


def test_what_a_program_prints_does_not_get_into_the_stream(raw: Raw) -> None:
    assert raw.call(HELLO)[:3] == (1, wire.KB_HELLO, 0)


@pytest.mark.parametrize("size", [0, 1, 15, wire.KB_MAX_MESSAGE_BYTES + 1, 0xFFFFFFFF])
def test_a_message_of_an_impossible_size_is_answered_and_ends_the_stream(raw: Raw, size: int) -> None:
    assert raw.call(HEADER.pack(size, 9, wire.KB_HELLO, 0)) == (9, wire.KB_HELLO, wire.KB_BAD_LENGTH, b"")
    with pytest.raises(EOFError):
        raw.read(1)


def test_a_message_cut_short_by_the_end_is_no_crash(raw: Raw) -> None:
    raw.stream.sendall(HEADER.pack(1000, 1, wire.KB_WRITE_REGION, 0) + b"only so much")
    raw.stream.shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        raw.read(1)


def test_messages_sent_in_one_piece_and_in_single_bytes_are_told_apart(raw: Raw) -> None:
    raw.stream.sendall(HELLO * 50)
    assert {raw.reply()[1:3] for _ in range(50)} == {(wire.KB_HELLO, 0)}
    for byte in HELLO:
        raw.stream.sendall(bytes([byte]))
    assert raw.reply()[:3] == (1, wire.KB_HELLO, 0)


def test_the_largest_message_is_read_to_its_end(raw: Raw) -> None:
    size = wire.KB_MAX_MESSAGE_BYTES
    assert raw.call(HEADER.pack(size, 5, wire.KB_HELLO, 0) + bytes(size - HEADER.size))[:3] == (
        5,
        wire.KB_HELLO,
        wire.KB_BAD_LENGTH,
    )
    assert raw.call(HELLO)[:3] == (1, wire.KB_HELLO, 0)


@pytest.mark.parametrize("kind", [0, wire.KB_KIND_END, 0xFFFFFFFF])
def test_an_unknown_kind_is_answered(raw: Raw, kind: int) -> None:
    assert raw.call(HEADER.pack(16, 3, kind, 0)) == (3, kind, wire.KB_BAD_KIND, b"")


def test_a_flood_of_vcpus_that_cannot_be_is_answered_one_by_one(raw: Raw) -> None:
    create = HEADER.pack(32, 4, wire.KB_CREATE_VCPU, 0) + struct.pack("<IIII", 12345, 0, 0, 0)
    raw.stream.sendall(create * 500)
    assert {raw.reply() for _ in range(500)} == {(4, wire.KB_CREATE_VCPU, wire.KB_BAD_HANDLE, b"")}


def test_mutated_messages_never_crash_or_hang_the_agent(raw: Raw) -> None:
    generator = random.Random(int(os.environ.get("KVMBENCH_FUZZ_SEED", "1")))
    bodies = {kind: generator.randbytes(120) for kind in range(wire.KB_KIND_END + 2)}
    interesting = (0, 1, 2, 0x7F, 0xFF, 0x1000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x1_0000_0000, 1 << 63)
    left = FUZZ_MESSAGES
    while left > 0:
        batch = min(left, 50)
        sent = b""
        for _ in range(batch):
            kind = generator.choice(list(bodies))
            # Waits and large replies are the contract suite's; here the parser is meant.
            body = bytearray(bodies[kind][: generator.randrange(0, 121)])
            for _ in range(generator.randrange(4)):
                if len(body) >= 8:
                    struct.pack_into("<Q", body, generator.randrange(len(body) - 7), generator.choice(interesting))
            if len(body) >= 4 and generator.random() < 0.7:
                struct.pack_into("<I", body, 0, generator.choice((0, wire.KB_SYSTEM_HANDLE, 2, 0x10002)))
            if kind == wire.KB_EXECUTE and len(body) >= 24:
                struct.pack_into("<Q", body, 16, 1_000_000)  # deadline_ns: no guest may run for ever
            sent += HEADER.pack(HEADER.size + len(body), left, kind, generator.choice((0, -1))) + body
        raw.stream.sendall(sent)
        for _ in range(batch):
            number, kind, _, _ = raw.reply()
            assert (number, kind in bodies) == (left, True)
        left -= batch
    assert raw.call(HELLO)[:3] == (1, wire.KB_HELLO, 0)


@pytest.mark.parametrize("words", [[], ["--fd"], ["--fd", "x"], ["--fd", "-1"], ["--stdio", "more"], ["--help"]])
def test_wrong_arguments_print_the_usage(binary: Path, words: list[str]) -> None:
    done = subprocess.run([str(binary), *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: kvmbench-agent")


def test_a_stream_on_an_inherited_descriptor(binary: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen([str(binary), "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        ours.settimeout(30)
        ours.sendall(HELLO)
        assert HEADER.unpack(ours.recv(16))[2:] == (wire.KB_HELLO, 0)
        ours.shutdown(socket.SHUT_WR)
    assert process.returncode == 0


def test_a_program_that_is_no_agent_is_reported_with_what_it_said() -> None:
    with pytest.raises(HostUnavailable, match=r"(?s)the program ended with status 4.*no such option"):
        start_program(
            "the program",
            ["sh", "-c", "echo no such option >&2; exit 4"],
            explain=lambda said: None,
            timeout_s=30,
        )


def test_a_program_that_is_silent_is_given_up() -> None:
    with pytest.raises(HostUnavailable, match="did not answer"):
        start_program("sleep", ["sleep", "1000"], explain=lambda said: None, timeout_s=0.05)


def test_a_missing_agent_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailable, match=r"no-agent does not start: No such file"):
        start_child(agent=tmp_path / "no-agent")


@pytest.mark.parametrize(
    ("sudo", "match"),
    [
        ("echo 'sudo: a password is required' >&2; exit 1", "sudo -v"),
        ("echo 'nobody is not in the sudoers file.' >&2; exit 1", "does not allow"),
        ('test "$1 $2" = "-n --" && shift 2; exec "$@"', None),
    ],
)
def test_sudo_is_asked_without_a_password_and_its_refusal_is_explained(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sudo: str, match: str | None
) -> None:
    (tmp_path / "sudo").write_text(f"#!/bin/sh\n{sudo}\n")
    (tmp_path / "sudo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if match is not None:
        with pytest.raises(HostUnavailable, match=match):
            start_child(sudo=True, agent=binary)
        return
    channel, close = start_child(sudo=True, agent=binary)
    assert Core(channel).hello()["wire_version"] == wire.KB_WIRE_VERSION
    close()


def test_no_sudo_is_told(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostUnavailable, match="no sudo here"):
        start_child(sudo=True, agent=binary)
