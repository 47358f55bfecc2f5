"""The Intel appliance, real kvm_intel in Bochs: its starts, its channel, and what a step costs there.

Each start is a new process, as a person's would be. Two ratios: of a saved state's start to a boot's; and of a recorded
step with its rows in Python to the plain C loop (KVM_RUN and a copied row) on the same vcpu, both by this machine's
clock. Times inside the appliance are emulator time, where 50 million instructions are a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable

from measuring import median, paired, tell

import kvmbench as kb
from kvmbench.core import wire
from kvmbench.errors import HostUnavailable

START = """
import time
import kvmbench as kb
start = time.perf_counter()
host = kb.connect("appliance:intel", quiet=True, ept=1, warm={warm})
with kb.Machine(host, memory="2M") as m:
    m.load_asm("mov eax, 1; hlt")
    m.cpu.step()
    print(time.perf_counter() - start)
host.close()
"""
LOOP = "again: add rbx, rax\ninc rax\nmov [0x3000], rbx\njmp again"
HELLO = struct.pack("<IIIi", 16, 0, wire.KB_HELLO, 0)
STEPS = 1000
BULK_BYTES = 1 << 20


def starts(cold_times: int, warm_times: int) -> None:
    figures = {}
    for name, warm, times in (("cold", False, cold_times), ("warm", True, warm_times)):
        taken = []
        for n in range(times + warm):
            run = subprocess.run(
                [sys.executable, "-c", START.format(warm=warm)], capture_output=True, text=True, check=True
            )
            if n or not warm:  # the first warm one may have to save the state
                taken.append(float(run.stdout))
        figures[name] = statistics.median(taken)
        print(
            f"    {name}: connect() to first step {figures[name]:.2f} s ({min(taken):.2f} to {max(taken):.2f});"
            f" goal {'12 s' if name == 'cold' else '3 s'}"
        )
    print(f"    a saved state's start to a boot's: ratio {figures['warm'] / figures['cold']:.3f}")


def timed(work: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - start) / times


def channel(host: kb.Host) -> None:
    exchange = median(lambda: timed(lambda: host.core.channel.call(HELLO), 2000))
    print(f"    the shortest exchange: {exchange * 1e6:.0f} us")
    data = os.urandom(BULK_BYTES)
    with kb.Machine(host, memory="4M") as m:
        to_guest = median(lambda: timed(lambda: m.memory.write(0x100000, data), 1), times=5)
        from_guest = median(lambda: timed(lambda: m.memory.read(0x100000, BULK_BYTES), 1), times=5)
    print(
        f"    memory: {BULK_BYTES / to_guest / 1e6:.0f} MB/s to the guest, {BULK_BYTES / from_guest / 1e6:.0f} from it"
    )


def steps(host: kb.Host) -> None:
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(LOOP, at=0x1000)

        def plain_ns() -> int:
            count, ns = m.host.core.raw_loop(m.cpu.vcpu.handle, wire.KB_RAW_STEPS, STEPS)
            m.cpu.state.current = None
            assert count == STEPS, f"the plain loop made {count} of {STEPS} steps"
            return int(ns)

        def record() -> None:
            assert len(m.cpu.record(STEPS, progress=False)) == STEPS

        def ours_inside() -> float:
            record()
            return m.cpu.engine.core_ns / STEPS / 1e3

        print(f"    step(): {median(lambda: timed(m.cpu.step, 500)) * 1e6:.0f} us")
        clocks = {
            "emulator time": (lambda: plain_ns() / STEPS / 1e3, ours_inside),
            "this machine's clock": (
                lambda: timed(plain_ns, 1) / STEPS * 1e6,
                lambda: timed(record, 1) / STEPS * 1e6,
            ),
        }
        for clock, (plain, ours) in clocks.items():
            tell(f"record({STEPS}), a step ({clock}, CPL 0)", "us", paired(plain, ours), "1.05, at most 1.15")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", help="taken, and of no effect: there is one")
    parser.add_argument("--cold", type=int, default=3, help="how many boots")
    chosen = parser.parse_args()
    print((__doc__ or "").splitlines()[0])
    try:
        host = kb.connect("appliance:intel", quiet=True, ept=1)
    except HostUnavailable as error:
        print(f"  intel: not here: {error}")
        return
    with host:
        print(f"  {host.info.describe()}")
        channel(host)
        steps(host)
    starts(chosen.cold, 7)


if __name__ == "__main__":
    main()
