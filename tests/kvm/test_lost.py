"""The agent or QEMU killed in the middle of work: HostLost at once, and what was fetched stays."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import ClosedError, HostLost, HostUnavailable

# From the kill to the exception, on any thread, on a busy machine: not the 30 s after which silence counts as the end.
AT_ONCE_S = 5.0
COUNT = """
again:  inc qword ptr [0x3000]
        jmp again
"""
# Two steps each; a recording comes in pieces of some thousands.
ENOUGH_ITERATIONS = 12_000


@dataclass
class Victim:
    """A host, and the process that will be killed."""

    host: kb.Host
    pid: int
    killed_s: float = 0.0

    def kill(self) -> None:
        self.killed_s = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)

    @property
    def since_s(self) -> float:
        return time.monotonic() - self.killed_s


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(params=["agent", "appliance"])
def victim(request: pytest.FixtureRequest, need) -> Iterator[Victim]:
    """A host of its own for each test, which is to end without leaving a process."""
    try:
        if request.param == "agent":
            host = kb.connect("local", agent=True, quiet=True)
            pid = host.core.hello()["agent_pid"]
        else:
            host = kb.connect("appliance", vcpus=2, quiet=True)
            pid = host._closer.__self__.pid
    except HostUnavailable as error:
        need({"agent": "local", "appliance": "amd"}[request.param], f"no {request.param} host: {error}")
    assert is_there(pid)
    yield Victim(host, pid)
    host.close()
    assert not is_there(pid)


class Worker(threading.Thread):
    """Does something on a thread of its own, and keeps how and when it ended."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.ended_s = 0.0
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        self.ended_s = time.monotonic()


def wait_for_count(machine: kb.Machine, at_least: int, worker: Worker) -> None:
    """Until the guest has counted so far, as seen from another thread."""
    while machine.memory.read_u64(0x3000) < at_least:
        assert worker.is_alive(), worker.error


def call_until_lost(call: Callable[[], object]) -> None:
    """The kernel may take a moment to end what was killed, so an answer or two can still come."""
    while True:
        call()


def assert_lost_at_once(victim: Victim, *workers: Worker) -> None:
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive()
        assert isinstance(worker.error, HostLost), worker.error
        assert worker.ended_s - victim.killed_s < AT_ONCE_S


def assert_is_lost(host: kb.Host) -> None:
    assert host.lost is not None
    assert re.search(r"is gone: .*SIGKILL", host.lost, re.DOTALL)
    assert "(lost: " in repr(host)
    assert "lost" in host._repr_html_()
    with pytest.raises(HostLost, match="connect again"):
        host.core.hello()


def test_an_idle_host_notices_its_end_before_any_call(victim):
    assert victim.host.lost is None
    victim.kill()
    while victim.host.lost is None:
        assert victim.since_s < AT_ONCE_S
    assert_is_lost(victim.host)


def test_the_call_that_notices_raises_at_once(victim):
    with kb.Machine(victim.host, memory="2M") as m:
        m.load_asm(COUNT, at=0x1000)
        m.cpu.step()
        victim.kill()
        with pytest.raises(HostLost, match="SIGKILL"):
            call_until_lost(m.cpu.step)
        assert victim.since_s < AT_ONCE_S
        for call in (m.cpu.step, m.cpu.run, lambda: m.memory.read(0, 8), lambda: m.cpu.record(10)):
            with pytest.raises(HostLost):
                call()
    assert_is_lost(victim.host)


def test_a_run_that_is_under_way_raises_at_once(victim):
    with kb.Machine(victim.host, memory="2M") as m:
        m.load_asm(COUNT, at=0x1000)
        runner = Worker(lambda: m.cpu.run(deadline_s=120))
        wait_for_count(m, 1, runner)
        victim.kill()
        assert_lost_at_once(victim, runner)
        assert not m.cpu.running
    assert_is_lost(victim.host)


def test_a_recording_that_is_under_way_keeps_what_was_fetched(victim):
    with kb.Machine(victim.host, memory="2M") as m:
        m.load_asm(COUNT, at=0x1000)
        recorder = Worker(lambda: m.cpu.record(50_000_000, progress=False))
        wait_for_count(m, ENOUGH_ITERATIONS, recorder)
        victim.kill()
        assert_lost_at_once(victim, recorder)
        rec = m.cpu.last_record
    victim.host.close()
    # Of the loop's two instructions each row shows the next one: no row is missing or torn.
    assert 0 < len(rec) < 50_000_000
    first, second = int(rec.executed_rip[0]), int(rec.rip[0])
    assert np.array_equal(rec.rip, np.resize([second, first], len(rec)))
    assert repr(rec)
    assert rec.provenance.module == victim.host.info.module


def test_a_lock_step_that_is_under_way_keeps_what_was_fetched(victim):
    with kb.Machine(victim.host, memory="2M", vcpus=2) as m:
        m.load_asm(COUNT, at=0x1000)
        stepper = Worker(lambda: m.lockstep(50_000_000, progress=False))
        wait_for_count(m, ENOUGH_ITERATIONS, stepper)
        victim.kill()
        assert_lost_at_once(victim, stepper)
        record = m.last_lockstep
        assert not any(cpu.running for cpu in m.cpus)
    assert 0 < len(record) < 50_000_000
    assert np.array_equal(record.vcpu, np.resize([0, 1], len(record)))
    assert "is gone" in record.ended
    assert record.records[1].provenance.module == victim.host.info.module


def test_every_thread_is_told(victim):
    with kb.Machine(victim.host, memory="2M", vcpus=2) as m, kb.Machine(victim.host, memory="2M") as other:
        for machine in (m, other):
            machine.load_asm(COUNT, at=0x1000)

        def read_for_ever() -> None:
            while True:
                m.memory.read(0, 4096)

        runners = [
            Worker(lambda: m.cpus[0].run(deadline_s=120)),
            Worker(lambda: m.cpus[1].record(50_000_000, progress=False)),
            Worker(lambda: other.cpu.run(deadline_s=120)),
            Worker(read_for_ever),
        ]
        wait_for_count(m, 1, runners[0])
        wait_for_count(other, 1, runners[2])
        victim.kill()
        assert_lost_at_once(victim, *runners)
    assert_is_lost(victim.host)


def test_running_all_vcpus_together_raises_and_leaves_no_thread(victim):
    with kb.Machine(victim.host, memory="2M", vcpus=2) as m:
        m.load_asm(COUNT, at=0x1000)
        runner = Worker(lambda: m.run(deadline_s=120))
        wait_for_count(m, 1, runner)
        victim.kill()
        assert_lost_at_once(victim, runner)
    for thread in threading.enumerate():
        if re.fullmatch(r"vcpu \d", thread.name):
            thread.join(AT_ONCE_S)
            assert not thread.is_alive()


def test_a_lost_host_can_be_closed_and_then_says_closed(victim):
    machine = kb.Machine(victim.host, memory="2M")
    victim.kill()
    with pytest.raises(HostLost):
        call_until_lost(lambda: machine.memory.read(0, 8))
    machine.close()
    start = time.monotonic()
    victim.host.close()
    victim.host.close()
    assert time.monotonic() - start < AT_ONCE_S
    assert not is_there(victim.pid)
    assert "(closed)" in repr(victim.host)
    with pytest.raises(ClosedError):
        victim.host.core.hello()
    with pytest.raises(ClosedError):
        machine.cpu.step()


def test_another_host_works_beside_and_after_a_lost_one(victim):
    name = victim.host.name
    options = {"agent": True} if name == "local" else {}
    with kb.connect(name, quiet=True, **options) as beside:
        machine = kb.Machine(beside, memory="2M")
        victim.kill()
        with pytest.raises(HostLost):
            call_until_lost(victim.host.core.hello)
        assert beside.lost is None
        machine.load_asm("mov eax, 5\nhlt", at=0x1000)
        assert machine.cpu.run(deadline_s=30).cause is kb.Cause.HALT
        assert machine.cpu.regs.eax == 5
    with kb.connect(name, quiet=True, **options) as after, kb.Machine(after, memory="2M") as machine:
        machine.load_asm("mov eax, 6\nhlt", at=0x1000)
        assert machine.cpu.run(deadline_s=30).cause is kb.Cause.HALT
        assert machine.cpu.regs.eax == 6


def test_an_agent_that_aborts_shows_what_it_said_last(need):
    # QEMU prints nothing when it is killed; the agent's stream may end for reasons of its own.
    try:
        host = kb.connect("local", agent=True, quiet=True)
    except HostUnavailable as error:
        need("local", f"no agent host: {error}")
    with host:
        # A length that cannot be: the agent says so on standard error and ends in good order.
        host.core.channel._stream.sendall((3).to_bytes(4, "little") + bytes(12))
        with pytest.raises(HostLost, match="a message of 3 bytes cannot be") as caught:
            call_until_lost(host.core.hello)
        assert "status 0" in str(caught.value)
