"""The end of a core in this process: once, by whoever is the last inside."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

from kvmbench.errors import ClosedError, HostUnavailable
from kvmbench.host.channel import LocalChannel
from kvmbench.host.client import Core


def open_kvms() -> int:
    """How often this process has /dev/kvm open; a core does, until it is ended."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own
            count += os.readlink(f"/proc/self/fd/{name}") == "/dev/kvm"
    return count


@pytest.fixture
def channel() -> Iterator[LocalChannel]:
    before = open_kvms()
    try:
        channel = LocalChannel()
    except HostUnavailable as error:
        pytest.skip(str(error))
    Core(channel).hello()  # opens it
    if open_kvms() != before + 1:
        channel.close()
        pytest.skip("no /dev/kvm, by which the end of a core is seen")
    yield channel
    channel.busy.clear()
    channel.held.clear()
    channel.close()
    channel.bury(0)
    assert open_kvms() == before


@contextmanager
def ctrl_c_every(seconds: float) -> Iterator[None]:
    def press(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Inside:
    """A thread in a loop of calls, as one that serves a device is, until it is told to leave."""

    def __init__(self, channel: LocalChannel) -> None:
        self._channel, self._leave, entered = channel, threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._stay, args=(entered,))
        self._thread.start()
        assert entered.wait(10)

    def _stay(self, entered: threading.Event) -> None:
        mine = threading.get_ident()
        try:
            self._channel.hold()
            entered.set()
            self._leave.wait(60)
        finally:
            self._channel.held.discard(mine)
            if self._channel.doomed is not None:
                self._channel.bury(mine)

    def leave(self) -> None:
        self._leave.set()
        self._thread.join()


def test_a_close_that_ctrl_c_gives_up_is_finished_by_the_last_thread_inside(channel: LocalChannel) -> None:
    before, inside = open_kvms(), Inside(channel)
    try:
        with pytest.raises(KeyboardInterrupt), ctrl_c_every(0.05):
            channel.close()
        assert open_kvms() == before, "a thread is inside still"
        with pytest.raises(ClosedError):
            channel.call(bytes(16))
        assert open_kvms() == before
    finally:
        inside.leave()
    assert open_kvms() == before - 1


def test_one_ctrl_c_does_not_keep_a_close_from_its_end(channel: LocalChannel) -> None:
    before, inside = open_kvms(), Inside(channel)
    timer = threading.Timer(0.3, inside.leave)
    timer.start()
    with pytest.raises(KeyboardInterrupt), ctrl_c_every(0.2):
        channel.close()
    timer.join()
    assert open_kvms() == before - 1


def test_a_core_closed_from_within_outlasts_a_late_call_of_another_thread(channel: LocalChannel) -> None:
    before, mine, refused = open_kvms(), threading.get_ident(), list[BaseException]()

    def late() -> None:
        try:
            channel.call(bytes(16))
        except ClosedError as error:
            refused.append(error)

    channel.hold()
    channel.close()  # as a device would, which is served by this thread
    thread = threading.Thread(target=late)
    thread.start()
    thread.join()
    assert refused
    assert open_kvms() == before, "this thread is inside still"
    channel.held.discard(mine)
    channel.bury(mine)
    assert open_kvms() == before - 1
