"""A recorded step against the plain C loop (KVM_RUN and a copied row), on the same vcpu.

The plain loop runs in the core of the same host (KB_RAW_LOOP), so an appliance
is compared with itself.  Rows reach Python in both columns of a `StepRecord`.
"""

from __future__ import annotations

import resource
import time

from measuring import hosts, paired, tell

import kvmbench as kb
from kvmbench.core import wire

LOOP = "again: add rbx, rax\ninc rax\nmov [0x3000], rbx\njmp again"


def measure(host: kb.Host) -> None:
    steps = 40_000 if host.info.emulated else 100_000
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(LOOP, at=0x1000)

        def plain() -> float:
            count, ns = m.host.core.raw_loop(m.cpu.vcpu.handle, wire.KB_RAW_STEPS, steps)
            assert count == steps, f"the plain loop made {count} of {steps} steps"
            m.cpu.state.current = None
            return ns / count / 1e3

        def inside() -> float:
            # The host's own clock on both sides: in an appliance that is emulator time.
            record = m.cpu.record(steps, progress=False)
            assert len(record) == steps
            return m.cpu.engine.core_ns / steps / 1e3

        def ours() -> float:
            start = time.perf_counter()
            record = m.cpu.record(steps, progress=False)
            assert len(record) == steps
            return (time.perf_counter() - start) / steps * 1e6

        def plain_outside() -> float:
            start = time.perf_counter()
            m.host.core.raw_loop(m.cpu.vcpu.handle, wire.KB_RAW_STEPS, steps)
            m.cpu.state.current = None
            return (time.perf_counter() - start) / steps * 1e6

        clock = "emulator time" if host.info.emulated else "host time"
        tell(f"in the core ({clock}, CPL 0)", "us", paired(plain, inside), "1.05, at most 1.15")
        tell("with rows in Python (this machine's clock)", "us", paired(plain_outside, ours), "1.05, at most 1.15")
        if not host.info.emulated:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            record = m.cpu.record(1_000_000, progress=False)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            print(f"    a million steps: rows {record.nbytes / 1e6:.0f} MB, process grew {grown / 1e6:.0f} MB")


def main() -> None:
    for host in hosts(__doc__):
        measure(host)


if __name__ == "__main__":
    main()
