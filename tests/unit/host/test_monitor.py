"""QEMU's monitor, when nobody answers."""

from __future__ import annotations

import socket

import pytest

from kvmbench.host import monitor
from kvmbench.host.monitor import Monitor


def test_a_monitor_that_does_not_answer_times_out_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_ANSWER_WITHIN_S", 0.05)
    ours, theirs = socket.socketpair()
    with theirs:
        asked = Monitor(ours)
        for _ in range(3):  # Python's own words from the second time on: "cannot read from timed out object"
            with pytest.raises(TimeoutError):
                asked.execute("cont")
        asked.close()


def test_a_monitor_whose_qemu_has_ended_says_so() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    asked = Monitor(ours)
    with pytest.raises(EOFError):
        asked.execute("cont")
    asked.close()
