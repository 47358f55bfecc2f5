"""Who reads and who runs (core/agent.h): nothing that a vcpu does keeps the others, or what stops it, waiting.

In this process there is no such thing as a reader, and the same must hold.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable

import pytest

import kvmbench as kb
from kvmbench.core import wire
from kvmbench.core._wire import ffi
from kvmbench.errors import BusyError, ClosedError, HostError
from kvmbench.host.stream import StreamChannel
from kvmbench.uapi import constants as c

AT_ONCE_S = 2.0
# Far more than any test here takes.
NEVER_S = 120.0
# 0x1000 and 0x1003: two steps a round.
COUNT = "again: inc rbx\njmp again"
SPIN = "again: inc qword ptr [0x3000]\njmp again"


class Runner(threading.Thread):
    """Does something on a thread of its own, and keeps what it returned or raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.result: object = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.result = error

    def end(self) -> object:
        self.join(60)
        assert not self.is_alive()
        return self.result


def steps_counted(cpu: kb.debug.cpu.Cpu) -> int:
    """How many steps of COUNT the guest has made, by what they did."""
    return 2 * cpu.regs.rbx - (cpu.regs.rip == 0x1003)


def start_counting(m: kb.Machine) -> None:
    m.load_asm(COUNT, at=0x1000)
    for cpu in m.cpus:
        cpu.regs.rip = 0x1000
        cpu.regs.rbx = 0


def wait_until_running(cpu: kb.debug.cpu.Cpu, runner: Runner) -> None:
    """Until the core says so itself."""
    while True:
        assert runner.is_alive(), runner.result
        try:
            cpu.vcpu.get_regs()
        except BusyError:
            return


def step_that_waits(m: kb.Machine) -> Runner:
    """A single step of vcpu 0 that does not end: it waits in the kernel for an interrupt that nobody sends."""
    m.load_asm("nop", at=0x1000)
    m.cpu.regs.rip = 0x1000
    m.cpu.vcpu.set_mp_state(c.KVM_MP_STATE_HALTED)

    def step() -> kb.Stop:
        while True:
            with contextlib.suppress(BusyError):  # it met the question of `wait_until_running`
                return m.cpu.step(deadline_s=NEVER_S)

    runner = Runner(step)
    wait_until_running(m.cpu, runner)
    return runner


def test_a_vcpu_that_was_stepped_and_now_spins_is_kicked_at_once(host):
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(SPIN, at=0x1000)
        for _ in range(3):
            m.cpu.step(5)
            m.cpu.step()
            before = m.memory.read_u64(0x3000)
            runner = Runner(m.cpu.run)
            while m.memory.read_u64(0x3000) < before + 10:
                assert runner.is_alive(), runner.result
            start = time.monotonic()
            m.cpu.interrupt()
            stop = runner.end()
            assert isinstance(stop, kb.Stop), stop
            assert stop.cause is kb.Cause.INTERRUPTED
            assert time.monotonic() - start < AT_ONCE_S


def test_memory_is_read_and_a_third_vcpu_stepped_while_two_spin(host):
    with kb.Machine(host, memory="2M", vcpus=3) as m:
        m.load_asm(SPIN, at=0x1000)
        m.load_asm(SPIN.replace("0x3000", "0x3008"), at=0x2000)
        start_counting_at = 0x2800
        m.load_asm(COUNT, at=start_counting_at)
        for cpu, rip in zip(m.cpus, (0x1000, 0x2000, start_counting_at), strict=True):
            cpu.regs.rip = rip
            cpu.step()
        third = m.cpus[2]
        runners = [Runner(cpu.run) for cpu in m.cpus[:2]]
        seen = {m.memory.read(0x3000, 16)}
        while len(seen) < 20 or m.memory.read_u64(0x3000) < 10 or m.memory.read_u64(0x3008) < 10:
            seen.add(m.memory.read(0x3000, 16))
            assert third.step().cause is kb.Cause.STEP
            assert all(runner.is_alive() for runner in runners)
        for cpu, runner in zip(m.cpus, runners, strict=False):
            cpu.interrupt()
            stop = runner.end()
            assert isinstance(stop, kb.Stop), stop
            assert stop.cause is kb.Cause.INTERRUPTED


def test_a_step_that_waits_in_the_kernel_holds_up_nobody(host):
    with kb.Machine(host, memory="2M", vcpus=2, irqchip=True) as m:
        runner = step_that_waits(m)
        start = time.monotonic()
        m.memory.write_u64(0x3000, 7)
        assert m.memory.read_u64(0x3000) == 7
        with kb.Machine(host, memory="1M") as other:
            other.load_asm(COUNT, at=0x1000)
            assert other.cpu.step().cause is kb.Cause.STEP
        assert runner.is_alive()
        assert time.monotonic() - start < AT_ONCE_S
        m.cpu.interrupt()
        stop = runner.end()
        assert isinstance(stop, kb.Stop), stop
        assert (stop.cause, stop.rip) == (kb.Cause.INTERRUPTED, 0x1000)


def test_interrupt_ends_a_single_step_that_waits(host):
    with kb.Machine(host, memory="2M", irqchip=True) as m:
        for _ in range(3):
            runner = step_that_waits(m)
            start = time.monotonic()
            m.cpu.interrupt()
            stop = runner.end()
            assert isinstance(stop, kb.Stop), stop
            assert (stop.cause, stop.steps) == (kb.Cause.INTERRUPTED, 0)
            assert time.monotonic() - start < AT_ONCE_S
        m.cpu.vcpu.set_mp_state(c.KVM_MP_STATE_RUNNABLE)
        assert (m.cpu.step().cause, m.cpu.regs.rip) == (kb.Cause.STEP, 0x1001)


def test_a_kick_that_comes_with_its_step_in_one_piece_is_not_lost(host):
    channel = host.core.channel
    if not isinstance(channel, StreamChannel):
        pytest.skip("the core is in this process")
    with kb.Machine(host, memory="2M", irqchip=True) as m:
        m.load_asm("nop\nnop", at=0x1000)
        m.cpu.step(deadline_s=NEVER_S)
        step = bytearray(ffi.buffer(m.cpu.execution.request))
        m.cpu.vcpu.set_mp_state(c.KVM_MP_STATE_HALTED)
        kick = bytearray(ffi.buffer(ffi.new("struct kb_handle *", {"handle": m.cpu.vcpu.handle})))
        for number, (message, kind) in enumerate(((step, wire.KB_EXECUTE), (kick, wire.KB_KICK))):
            # Numbers of no call: what comes back is dropped.
            header = ffi.from_buffer("struct kb_header *", message)
            header.size_bytes, header.id, header.kind = len(message), 0xFFFF_0000 + number, kind
        start = time.monotonic()
        with channel._sending:
            channel._stream.sendall(bytes(step + kick))
        while True:
            try:
                m.cpu.vcpu.get_regs()
                break
            except BusyError:
                assert time.monotonic() - start < AT_ONCE_S
        m.cpu.vcpu.set_mp_state(c.KVM_MP_STATE_RUNNABLE)
        assert m.cpu.step().rip == 0x1002


def test_steps_and_runs_of_two_vcpus_in_turn_lose_nothing(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        start_counting(m)
        first, second = m.cpus
        made = 0
        for n in range(40):
            made += second.step().steps
            assert first.run(deadline_s=0.0005).cause is kb.Cause.DEADLINE
            assert first.step().cause is kb.Cause.STEP
            if n % 3 == 0:
                assert first.step().cause is kb.Cause.STEP
            made += second.step(3).steps
        assert made == 160
        assert steps_counted(second) == made


def test_a_storm_of_steps_runs_kicks_and_reads_loses_and_doubles_nothing(host):
    steps = 200 if host.info.emulated else 1000
    with kb.Machine(host, memory="2M", vcpus=4) as m:
        start_counting(m)
        ended = threading.Event()

        def step(cpu: kb.debug.cpu.Cpu) -> int:
            return sum(cpu.step(deadline_s=NEVER_S).steps for _ in range(steps))

        def run() -> int:
            runs = 0
            while not ended.is_set():
                m.cpus[3].run(deadline_s=0.002)
                runs += 1
            return runs

        def kick() -> int:
            while not ended.is_set():
                for cpu in m.cpus:
                    cpu.interrupt()
            return 1

        def read() -> int:
            while not ended.is_set():
                assert m.memory.read(0x1000, 3) == bytes.fromhex("48 ff c3")
            return 1

        steppers = [Runner(lambda cpu=cpu: step(cpu)) for cpu in m.cpus[:3]]  # type: ignore[misc]
        others = [Runner(run), Runner(kick), Runner(read)]
        made = [stepper.end() for stepper in steppers]
        ended.set()
        for other in others:
            result = other.end()
            assert isinstance(result, int), result
            assert result > 0
        assert made == [steps_counted(cpu) for cpu in m.cpus[:3]]
        for cpu in m.cpus:
            assert cpu.step(2).cause is kb.Cause.STEP


def test_a_host_is_closed_over_vcpus_that_were_stepped_and_now_spin(fresh_host):
    m = kb.Machine(fresh_host, memory="2M", vcpus=2)
    m.load_asm(SPIN, at=0x1000)
    for cpu in m.cpus:
        cpu.regs.rip = 0x1000
        cpu.step()
    before = m.memory.read_u64(0x3000)
    runners = [Runner(cpu.run) for cpu in m.cpus]
    while m.memory.read_u64(0x3000) < before + 10:
        assert all(runner.is_alive() for runner in runners)
    start = time.monotonic()
    fresh_host.close()
    for runner in runners:
        assert isinstance(runner.end(), ClosedError | HostError)
    assert time.monotonic() - start < 5


def test_a_machine_is_closed_by_the_thread_of_its_own_vcpu(host):
    # The last step's vcpu reads the request that ends it.
    for _ in range(20):
        with kb.Machine(host, memory="1M") as m:
            start_counting(m)
            assert m.cpu.step().cause is kb.Cause.STEP
    with kb.Machine(host, memory="1M") as m:
        start_counting(m)
        assert m.cpu.step().cause is kb.Cause.STEP


def test_the_timer_that_a_step_leaves_armed_does_not_disturb_the_next_machine(host):
    # KVM_CREATE_VM gives up when it finds a signal pending, and the deadline's may come at any moment.
    rng = random.Random(3)
    with kb.Machine(host, memory="1M") as m:
        start_counting(m)
        for _ in range(40 if host.info.emulated else 600):
            m.cpu.step(deadline_s=rng.uniform(0.0001, 0.001))
            host.core.close_handle(host.core.create_vm())
