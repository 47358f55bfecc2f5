"""One `cpu.step()` from Python, without and with looking at the Stop, against the plain C loop."""

from __future__ import annotations

import time

from measuring import hosts, median, paired, tell

import kvmbench as kb
from kvmbench.core import wire

LOOP = "again: add rbx, rax\ninc rax\nmov [0x3000], rbx\njmp again"


def measure(host: kb.Host) -> None:
    steps = 500 if host.info.emulated else 5000
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(LOOP, at=0x1000)

        def plain() -> float:
            start = time.perf_counter()
            m.host.core.raw_loop(m.cpu.vcpu.handle, wire.KB_RAW_STEPS, steps)
            m.cpu.state.current = None
            return (time.perf_counter() - start) / steps * 1e6

        def ours() -> float:
            step = m.cpu.step
            step()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            return (time.perf_counter() - start) / steps * 1e6

        def printed() -> float:
            step = m.cpu.step
            step()
            start = time.perf_counter()
            for _ in range(steps):
                repr(step())
            return (time.perf_counter() - start) / steps * 1e6

        goal = "" if host.info.emulated else "1.3"
        tell("cpu.step() (CPL 0)", "us", paired(plain, ours), goal)
        goal = "; goal 500" if host.info.emulated else ""
        print(f"    {'cpu.step() and its printed Stop':<44} {median(printed):10.2f} us{goal}")


def main() -> None:
    for host in hosts(__doc__):
        measure(host)


if __name__ == "__main__":
    main()
