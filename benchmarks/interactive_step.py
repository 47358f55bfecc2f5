"""One `cpu.step()` from Python, without and with looking at the Stop, against the plain C loop."""

from __future__ import annotations

import statistics
import time

from measuring import hosts, paired, tell

import kvmbench as kb
from kvmbench.core import wire

LOOP = "again: add rbx, rax\ninc rax\nmov [0x3000], rbx\njmp again"
# Between two steps of somebody who looks at each; by then everything has gone to sleep.
PAUSE_S = 0.02


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

        def printed(count: int, pause_s: float = 0.0) -> list[float]:
            step = m.cpu.step
            step()
            taken = []
            for _ in range(count):
                if pause_s:
                    time.sleep(pause_s)
                start = time.perf_counter()
                repr(step())
                taken.append((time.perf_counter() - start) * 1e6)
            return taken

        goal = "" if host.info.emulated else "1.3"
        tell("cpu.step() (CPL 0)", "us", paired(plain, ours), goal)
        for n in range(20):
            m.cpu.breakpoints.add(0x1800 + n)
        tell("the same, with 20 breakpoints elsewhere", "us", paired(plain, ours))
        m.cpu.breakpoints.clear()
        goal = "; goal 500" if host.info.emulated else ""
        printed(steps)  # warm up
        spread("cpu.step() and its printed Stop", printed(9 * steps), goal)
        spread(f"the same, {PAUSE_S * 1e3:.0f} ms apart", printed(200, PAUSE_S))


def spread(what: str, taken: list[float], goal: str = "") -> None:
    """Prints one line: the median of single times, and the time that 95 of 100 keep."""
    late = statistics.quantiles(taken, n=20)[-1]
    print(f"    {what:<44} {statistics.median(taken):10.2f} us, p95 {late:10.2f} us{goal}")


def main() -> None:
    for host in hosts(__doc__):
        measure(host)


if __name__ == "__main__":
    main()
