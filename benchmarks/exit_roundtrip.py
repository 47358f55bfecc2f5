"""An exit handled by a Python device, against the plain C loop that discards it."""

from __future__ import annotations

import time

from measuring import hosts, paired, tell

import kvmbench as kb
from kvmbench.core import wire
from kvmbench.machine import Device, StopRequest

LOOP = "mov dx, 0x500\nagain: out dx, al\njmp again"


class Counter(Device):
    """Counts what is written to port 0x500, and stops the guest at the limit."""

    name = "counter"
    ports = (range(0x500, 0x501),)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.limit = 0

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        self.count += 1
        return StopRequest("limit") if self.count >= self.limit else None


def measure(host: kb.Host) -> None:
    exits = 2000 if host.info.emulated else 20_000
    with kb.Machine(host, memory="2M") as m:
        counter = Counter()
        m.bus.attach(counter)
        m.load_asm(LOOP, at=0x1000)

        def plain() -> float:
            start = time.perf_counter()
            count, _ = m.host.core.raw_loop(m.cpu.vcpu.handle, wire.KB_RAW_EXITS, exits)
            assert count == exits
            m.cpu.state.current = None
            return (time.perf_counter() - start) / exits * 1e6

        def ours() -> float:
            counter.count, counter.limit = 0, exits
            start = time.perf_counter()
            stop = m.cpu.run()
            assert stop.cause is kb.Cause.GUEST_EXIT, stop
            return (time.perf_counter() - start) / exits * 1e6

        tell("OUT to a Python device (CPL 0)", "us", paired(plain, ours), "" if host.info.emulated else "1.15")
        m.cpu.log_exits()
        tell("the same, with a log of exits", "us", paired(plain, ours))


def main() -> None:
    for host in hosts(__doc__):
        measure(host)


if __name__ == "__main__":
    main()
