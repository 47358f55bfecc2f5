"""That a report of the sanitized agent fails its tests, and what strains the agent most, run on it.

The contract suite itself runs on the agent with sanitizers as the host "sanitized" (conftest).
"""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest

import kvmbench as kb
from kvmbench.core.agent import agent_binary
from kvmbench.errors import BusyError, ClosedError, HostLost, HostUnavailable, KvmbenchError
from kvmbench.host.cache import cache_directory

from .sanitized import REPORTED, sanitized_host

SPIN = """
again:  inc qword ptr [0x3000]
        out 0x80, al
        jmp again
"""


def test_steps_of_several_vcpus_from_several_threads(sanitized):
    """Reading, buffers and requests go from thread to thread (core/agent.h)."""
    with kb.Machine(sanitized, memory="1M", vcpus=3) as m:
        m.load_asm(SPIN, at=0x1000)

        def step(cpu: kb.debug.cpu.Cpu) -> None:
            cpu.regs.rip = 0x1000
            for n in range(100):
                cpu.step()
                if n % 10 == 0:
                    cpu.run(deadline_s=0.001)

        threads = [threading.Thread(target=step, args=(cpu,)) for cpu in m.cpus]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            m.memory.read(0x1000, 8)
            for cpu in m.cpus:
                cpu.interrupt()


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGSEGV, REPORTED, "AddressSanitizer"),  # the sanitizer's own handler makes a report of it
        (signal.SIGKILL, 128 + signal.SIGKILL, ""),
    ],
)
def test_an_agent_that_does_not_end_in_good_order_fails_its_tests(number, status, said, tmp_path, need):
    def use() -> None:
        with sanitized_host(tmp_path) as host:
            os.kill(host.core.hello()["agent_pid"], number)
            # As in test_lost.py the test itself expects the end: the report must not go under with it.
            try:
                while True:
                    host.core.hello()
            except HostLost:
                pass

    try:
        agent_binary(cache_directory(), sanitize=True)
    except HostUnavailable as error:
        need("local", f"no sanitized host: {error}")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        need("local", "no usable /dev/kvm")
    with pytest.raises(AssertionError, match=f"the sanitized agent ended with {status}") as caught:
        use()
    assert said in str(caught.value)


def test_machines_come_and_go_without_a_trace(sanitized):
    for n in range(40):
        with kb.Machine(sanitized, memory="1M", vcpus=1 + n % 3, irqchip=bool(n % 2)) as m:
            m.load_asm(SPIN, at=0x1000)
            m.cpu.record(20)
            if n % 4 == 0:
                m.cpu.breakpoints.add("again")
                m.cpu.run(deadline_s=5)
        # The next loop's handles reuse these places; a stale handle must not reach what is there now.
        with pytest.raises(ClosedError):
            m.cpu.step()


def test_a_host_closed_over_open_machines_leaks_nothing(sanitized):
    machines = [kb.Machine(sanitized, memory="1M", vcpus=2) for _ in range(5)]
    for m in machines:
        m.load_asm(SPIN, at=0x1000)
        m.cpus[1].step(3)
    sanitized.close()
    assert all(m.closed for m in machines)


def test_threads_that_run_kick_read_and_close_at_once(sanitized):
    """Everything that may happen to a vcpu while it runs, from other threads and in any order."""
    with kb.Machine(sanitized, memory="1M", vcpus=2) as m:
        m.load_asm(SPIN, at=0x1000)
        ended = threading.Event()
        surprises: list[BaseException] = []

        def keep(work) -> threading.Thread:
            def loop() -> None:
                while not ended.is_set():
                    try:
                        work()
                    except (BusyError, ClosedError):
                        pass
                    except BaseException as error:
                        surprises.append(error)
                        return

            thread = threading.Thread(target=loop)
            thread.start()
            return thread

        def come_and_go() -> None:
            with kb.Machine(sanitized, memory="64K", mode="real") as short:
                short.load_asm("again: inc ax\njmp again", at=0x1000)
                short.cpu.step(3)

        rng = random.Random(5)
        threads = [
            keep(lambda: m.cpus[0].run(deadline_s=0.01)),
            keep(lambda: m.cpus[1].record(500, progress=False)),
            keep(lambda: [cpu.interrupt() for cpu in m.cpus]),
            keep(lambda: m.memory.write(0x4000, rng.randbytes(64))),
            keep(come_and_go),
        ]
        # As long as the guest needs to come back to its counter many times, not a number of seconds.
        while m.memory.read_u64(0x3000) < 3000 and not surprises:
            pass
        ended.set()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert surprises == []
        assert m.cpu.step().cause is kb.Cause.STEP


def test_a_vcpu_that_is_closed_while_it_runs(sanitized):
    for _ in range(10):
        m = kb.Machine(sanitized, memory="1M")
        m.load_asm(SPIN, at=0x1000)
        m.memory.write(0x3000, bytes(8))
        ends: list[object] = []

        def run(cpu: kb.debug.cpu.Cpu = m.cpu, ends: list[object] = ends) -> None:
            try:
                ends.append(cpu.run(deadline_s=60))
            except KvmbenchError as error:
                ends.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while m.memory.read_u64(0x3000) == 0:
            assert thread.is_alive(), ends
        m.close()
        thread.join(10)
        assert not thread.is_alive()
        assert isinstance(ends[0], kb.Stop | KvmbenchError)
