"""How long the other vcpus run on after one has hit a breakpoint: `Stops.held_s`."""

from __future__ import annotations

import statistics

from measuring import hosts

import kvmbench as kb

SPIN = "spin: inc rax\njmp spin"
TIMES = 40


def measure(host: kb.Host, vcpus: int) -> None:
    with kb.Machine(host, memory="2M", vcpus=vcpus) as m:
        m.load_asm(SPIN, at=0x1000)
        m.cpus[-1].breakpoints.add("spin")
        held = [m.run(deadline_s=60).held_s * 1e3 for _ in range(TIMES)]
        print(f"    {vcpus} vcpus: median {statistics.median(held):.2f} ms, longest {max(held):.2f} ms")


def main() -> None:
    for host in hosts(__doc__):
        for vcpus in (2, 3):
            measure(host, vcpus)


if __name__ == "__main__":
    main()
