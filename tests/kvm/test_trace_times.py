"""Where the time went, and what is seen of a trace that runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.traces.exits import NOT_TOLD
from kvmbench.traces.trace import Trace
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


def test_what_a_guest_stood_before_the_kvm_run_under_way_is_no_time_of_kvms(host):
    with kb.Machine(host, memory="2M") as m:
        m.load_asm("hlt\nagain: cpuid\njmp again", at=0x1000)
        with kb.trace(m, ("kvm_exit", "kvm_entry", "kvm_userspace_exit")) as t:
            m.cpu.run(deadline_s=30)
            thread = threading.Thread(target=m.cpu.run, kwargs={"deadline_s": 60})
            thread.start()
            try:
                while not t.log.under_way:
                    assert thread.is_alive()
                now = Trace(t.data)
                t.stop()
            finally:
                while thread.is_alive():
                    m.cpu.interrupt()
                    thread.join(0.01)
    for seen in (now, t):
        log, exits = seen.log, seen.exits
        (halted,) = np.flatnonzero(exits.user_exit == ExitReason.HLT)
        ((_, _, begun_ns),) = seen.log.under_way
        next_ns = int(log["enter_ns"][1]) if len(log) > 1 else begun_ns
        assert exits.outside_ns[halted] == next_ns - log["leave_ns"][0]
        assert (exits.kvm_ns[halted] == NOT_TOLD) == (not exits.isa[halted])
        # From the exit to the end of KVM_RUN, and from the beginning of the next to the entry.
        if exits.isa[halted]:
            entered_ns = int(exits.time_ns[halted + 1] - exits.guest_ns[halted + 1])
            spent = log["leave_ns"][0] - exits.time_ns[halted] + entered_ns - next_ns
            assert exits.kvm_ns[halted] == spent


def test_the_end_of_a_long_kvm_run_has_its_events(machine):
    machine.load_asm("again: xor eax, eax\ncpuid\njmp again", at=0x1000)
    thread = threading.Thread(target=machine.cpu.run, kwargs={"deadline_s": 60})
    thread.start()
    try:
        with kb.trace(machine, ("kvm_cpuid",)) as t:
            since_ns = None
            while since_ns is None:
                assert thread.is_alive()
                data, since_ns = t.latest(1 << 16)
            assert data.events.count
            end_ns = int(data.events["kvm_cpuid"].time_ns[-1])
            whole = t.events["kvm_cpuid"].time_ns
    finally:
        while thread.is_alive():
            machine.cpu.interrupt()
            thread.join(0.01)
    # From that moment on all is in it.
    shown = data.events["kvm_cpuid"].time_ns
    assert (shown[shown >= since_ns] == whole[(whole >= since_ns) & (whole <= end_ns)]).all()


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
