"""Programs started for a host: their last words, their end, and that none outlives this process."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading

import pytest

from kvmbench.host.process import Process, describe_status


def wait_for_end(pid: int) -> None:
    """Waits until the process is gone; fails after 20 s."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(20_000), f"process {pid} is still there"
    finally:
        os.close(descriptor)


def test_the_end_names_the_status_and_the_last_lines() -> None:
    process = Process("the program", ["sh", "-c", "seq 100; echo going >&2; exit 3"])
    text = process.describe_end()
    process.end()
    assert text.startswith("the program ended with status 3; it said last:\n90\n")
    assert text.endswith("\n100\ngoing\n")


def test_a_telling_line_is_shown_though_much_was_printed_after_it() -> None:
    script = "echo before; echo Kernel panic; seq 100"
    process = Process("the program", ["sh", "-c", script], telling=re.compile("Kernel panic"))
    assert process.describe_end().splitlines()[1:4] == ["Kernel panic", "1", "2"]
    process.end()


def test_a_program_that_cannot_be_started_raises_the_os_error() -> None:
    with pytest.raises(FileNotFoundError):
        Process("nothing", ["/nonexistent/program"])


def test_standard_streams_are_the_socket_and_errors_are_kept_apart() -> None:
    ours, theirs = socket.socketpair()
    process = Process("cat", ["sh", "-c", "echo aside >&2; exec cat"], stdio=theirs)
    theirs.close()
    with ours:
        ours.sendall(b"through")
        assert ours.recv(100) == b"through"
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(100) == b""
    assert process.describe_end() == "cat ended with status 0; it said last:\naside\n"
    process.end()


def test_end_kills_what_does_not_end_by_itself_and_may_be_repeated() -> None:
    process = Process("sleep", ["sleep", "1000"], die_with_parent=True)
    assert process.running
    process.end()
    assert not process.running
    process.end()


def test_a_program_that_dies_with_its_parent_survives_the_thread_that_started_it() -> None:
    started: list[Process] = []
    thread = threading.Thread(target=lambda: started.append(Process("sleep", ["sleep", "1000"], die_with_parent=True)))
    thread.start()
    thread.join()
    (process,) = started
    # The death signal of a thread would have come with the thread's end, before join returned or soon after.
    second = Process("true", ["true"], die_with_parent=True)
    second.end(patience_s=10)
    assert process.running
    process.end()


def test_a_program_that_dies_with_its_parent_is_gone_after_the_parent_was_killed() -> None:
    script = (
        "from kvmbench.host.process import Process\n"
        "process = Process('sleep', ['sleep', '1000'], die_with_parent=True)\n"
        "print(process.pid, flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.send_signal(signal.SIGKILL)
    wait_for_end(pid)


@pytest.mark.parametrize(
    ("status", "text"),
    [(0, "ended with status 0"), (7, "ended with status 7"), (-9, "was ended by SIGKILL"), (-99, "signal 99")],
)
def test_an_exit_status_is_told_in_words(status: int, text: str) -> None:
    assert text in describe_status(status)
