"""Traces that begin and end while vcpus run, on agents built with sanitizers: the thread sanitizer sees data races."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import kvmbench as kb
from kvmbench.core import wire
from kvmbench.errors import BusyError, ClosedError
from kvmbench.host import trace_messages

from .test_messages import ask, message, struct

SPIN = """
again:  inc qword ptr [0x3000]
        out 0x80, al
        xor eax, eax
        cpuid
        jmp again
"""
TRACES = 25


class Threads:
    """Threads that do their work again and again until the end; what they did not expect is kept."""

    def __init__(self, *expected: type[BaseException]) -> None:
        self.surprises: list[BaseException] = []
        self._expected = expected
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self, work: Callable[[], object]) -> None:
        def loop() -> None:
            while not self._ended.is_set():
                try:
                    work()
                except self._expected:
                    pass
                except BaseException as error:
                    self.surprises.append(error)
                    return

        thread = threading.Thread(target=loop)
        self._threads.append(thread)
        thread.start()

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        assert self.surprises == []


@pytest.mark.parametrize("events", [(), ("kvm_cpuid", "kvm_pio")], ids=["log", "events"])
def test_traces_that_come_and_go_over_running_vcpus(sanitized, events):
    with kb.Machine(sanitized, memory="1M", vcpus=2) as m:
        m.load_asm(SPIN, at=0x1000)
        threads = Threads(BusyError, ClosedError)
        threads.add(lambda: m.cpus[0].run(deadline_s=0.02))
        threads.add(lambda: m.cpus[1].record(200, progress=False))
        threads.add(lambda: m.cpus[0].interrupt())
        rows = 0
        try:
            for _ in range(TRACES):
                with kb.trace(m, events, log_rows=16) as t:
                    t.mark("now")
                    for _ in range(3):
                        rows += len(t.log)
                rows += len(t.log)
        finally:
            threads.end()
        assert rows > TRACES


def test_messages_of_one_trace_from_several_threads(sanitized):
    with kb.Machine(sanitized, memory="1M", vcpus=2) as m:
        m.load_asm(SPIN, at=0x1000)
        core = sanitized.core
        handle = [0]
        read = [0]

        def switch(on: int) -> None:
            ask(sanitized, message(wire.KB_TRACE_SET, struct("kb_trace_set", handle=handle[0], on=on)))

        def take() -> None:
            body = struct("kb_trace_read", handle=handle[0], max_bytes=20000)
            status, reply = ask(sanitized, message(wire.KB_TRACE_READ, body))
            assert status in (0, wire.KB_BAD_HANDLE)
            read[0] += len(reply) if status == 0 else 0

        threads = Threads(BusyError, ClosedError)
        threads.add(lambda: m.cpus[0].run(deadline_s=0.02))
        threads.add(lambda: m.cpus[1].step(20))
        threads.add(lambda: switch(1))
        threads.add(lambda: switch(0))
        threads.add(take)
        threads.add(take)
        try:
            for n in range(TRACES):
                names = ["kvm/kvm_cpuid"] if n % 2 else []
                opened = trace_messages.trace_open(
                    core, m.vm.handle, names, log_rows=16, buffer_kb=64, own_only=bool(n % 3)
                )
                handle[0] = opened.handle
                before = read[0]
                while read[0] < before + 2000:
                    assert not threads.surprises
                core.close_handle(opened.handle)
        finally:
            threads.end()
        # The last is closed, so nothing is noted any more, whatever came late.
        switch(1)
        assert m.cpus[0].run(deadline_s=0.02).cause is kb.Cause.DEADLINE


def test_a_machine_that_is_closed_under_its_trace(sanitized):
    for _ in range(10):
        m = kb.Machine(sanitized, memory="1M")
        m.load_asm(SPIN, at=0x1000)
        threads = Threads(ClosedError)
        threads.add(lambda m=m: m.cpu.run(deadline_s=0.05))
        with kb.trace(m, ()) as t:
            while not len(t.log):
                assert not threads.surprises
            m.close()
        threads.end()
        assert len(t.log)
