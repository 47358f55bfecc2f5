"""What a trace costs the guest: nothing, the kernel's own tracing of the same events, and kb.trace, in turn.

The kernel's own tracing is the same events in a ring buffer that nobody reads. kb.trace keeps its log besides, and
takes everything out while the guest runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from measuring import hosts

import kvmbench as kb
from kvmbench.host import trace_messages

GUESTS = {
    "user-space exits (OUT)": "mov r9d, {n}\nagain: out 0xe9, al\ndec r9d\njnz again\nhlt",
    "exits in KVM (CPUID)": "mov r9d, {n}\nagain: xor eax, eax\ncpuid\ndec r9d\njnz again\nhlt",
    "no exits (a loop)": "mov r9d, {n}00\nagain: dec r9d\njnz again\nhlt",
}
ROUNDS = 9


@contextmanager
def kernel_only(m: kb.Machine) -> Iterator[None]:
    core = m.host.core
    names = [name for name in trace_messages.available_events(core) if name.startswith("kvm/")]
    opened = trace_messages.trace_open(core, m.vm.handle, names, log_rows=0, buffer_kb=4096, own_only=True)
    if opened.trouble:
        raise kb.KvmbenchError(opened.trouble)
    trace_messages.trace_set(core, opened.handle, True)
    try:
        yield
    finally:
        trace_messages.trace_set(core, opened.handle, False)
        core.close_handle(opened.handle)


@contextmanager
def nothing(m: kb.Machine) -> Iterator[None]:
    yield


@contextmanager
def log_only(m: kb.Machine) -> Iterator[None]:
    with kb.trace(m, ()):
        yield


@contextmanager
def ours(m: kb.Machine) -> Iterator[None]:
    with kb.trace(m):
        yield


WAYS = {"nothing": nothing, "the log": log_only, "kernel's own": kernel_only, "kb.trace": ours}


def measure(host: kb.Host, what: str, source: str, n: int) -> None:
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    with kb.Machine(host, memory="2M") as m:
        for turn in range(ROUNDS + 1):
            for name, way in WAYS.items():
                m.load_asm(source.format(n=n), at=0x1000)
                with way(m):
                    start = time.perf_counter()
                    m.cpu.run()
                    spent = time.perf_counter() - start
                if turn:  # the first round warms up
                    taken[name].append(spent)
    plain = taken["nothing"]
    print(f"    {what}: {statistics.median(plain) / n * 1e6:.2f} us a round without a trace")
    for name in list(WAYS)[1:]:
        ratios = [one / two for one, two in zip(taken[name], plain, strict=True)]
        print(f"      {name:<14} {statistics.median(ratios):6.3f} of that ({min(ratios):.3f} to {max(ratios):.3f})")
    both = [one / two for one, two in zip(taken["kb.trace"], taken["kernel's own"], strict=True)]
    print(f"      kb.trace against the kernel's own {statistics.median(both):.3f} ({min(both):.3f} to {max(both):.3f})")


def main() -> None:
    for host in hosts(__doc__):
        n = 20_000 if host.name == "local" else 1500
        for what, source in GUESTS.items():
            measure(host, what, source, n)


if __name__ == "__main__":
    main()
