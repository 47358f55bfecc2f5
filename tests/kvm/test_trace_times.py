"""Where the time went, and what is seen of a trace that runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest

import kvmbench as kb
from kvmbench.uapi import ExitReason

SPIN = "again: out 0x99, al\njmp again"


@pytest.fixture
def spinning(machine: kb.Machine) -> Iterator[tuple[kb.Machine, threading.Thread]]:
    """A machine that runs an endless loop of OUTs, on a thread."""
    machine.load_asm(SPIN, at=0x1000)
    thread = threading.Thread(target=machine.cpu.run, kwargs={"deadline_s": 60})
    thread.start()
    try:
        yield machine, thread
    finally:
        while thread.is_alive():
            machine.cpu.interrupt()
            thread.join(0.01)


def test_figures_of_one_look_belong_together(spinning):
    machine, _ = spinning
    with kb.trace(machine, ()) as t:
        seen = set()
        while len(seen) < 8:
            found = re.search(r"([\d,]+) exits?, 0 events, ([\d,]+) KVM_RUNs?", repr(t))
            assert found, repr(t)
            assert found[1] == found[2], "of a log alone each KVM_RUN is an exit"
            seen.add(found[1])


def test_what_was_seen_of_a_running_trace_stays_and_is_the_beginning_of_all(spinning):
    machine, thread = spinning
    with kb.trace(machine, ("kvm_pio",)) as t:
        looks = []
        while len(looks) < 5:
            events = t.events.get("kvm_pio")
            if events is not None and (not looks or len(events) > len(looks[-1][0])):
                looks.append((events, events.time_ns.copy(), events["port"].copy()))
            assert thread.is_alive()
    whole = t.events["kvm_pio"]
    for events, times, ports in looks:
        assert (events.time_ns == times).all()
        assert (events["port"] == ports).all()
        assert (whole.time_ns[: len(times)] == times).all()


def test_time_that_kvm_waits_after_a_hlt_is_named(host):
    with kb.Machine(host, memory="2M", irqchip=True) as m:
        m.load_asm("hlt", at=0x1000)
        with kb.trace(m, ("kvm_exit", "kvm_entry")) as t:
            assert m.cpu.run(deadline_s=0.5).cause is kb.Cause.DEADLINE
    assert not (t.log["exit"] == ExitReason.HLT).any()
    summary = t.summary()
    spent = summary.guest_ns if summary.together else summary.kvm_ns
    assert summary.halted_ns <= spent
    # The rest is the way into the guest and out of it; an emulator is slow at its first faults.
    assert summary.halted_ns > spent * 0.5
    assert "halted" in summary.where_time_went
