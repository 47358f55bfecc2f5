"""A step in lock-step, against one in a recording of one vcpu and against single steps by turns from Python."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from measuring import hosts

import kvmbench as kb

LOOP = "again: inc rax\nmov rbx, rax\nmov [0x5000], rax\njmp again"
ROUNDS = 5


def measure(host: kb.Host) -> None:
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm(LOOP, at=0x1000)
        steps, few = 20_000, 400

        def by_turns() -> None:
            for turn in range(few):
                m.cpus[turn & 1].step()

        works: list[tuple[str, Callable[[], object], int]] = [
            ("lock-step, by turns", lambda: m.lockstep(steps, progress=False), steps),
            ("lock-step, drawn", lambda: m.lockstep(steps, seed=1, progress=False), steps),
            ("one vcpu recorded", lambda: m.cpu.record(steps, progress=False), steps),
            ("single steps from Python, by turns", by_turns, few),
        ]
        times: dict[str, list[float]] = {name: [] for name, _, _ in works}
        for _ in range(ROUNDS):  # in turn, for the machine drifts
            for name, work, count in works:
                start = time.perf_counter()
                work()
                times[name].append((time.perf_counter() - start) / count * 1e6)
        for name, taken in times.items():
            print(f"    {name:36} {statistics.median(taken):8.1f} us (least {min(taken):.1f})")


def main() -> None:
    for host in hosts(__doc__):
        measure(host)


if __name__ == "__main__":
    main()
