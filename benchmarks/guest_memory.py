"""Guest memory from Python: small reads, copies, and comparison with a snapshot, against plain memcpy and memcmp."""

from __future__ import annotations

import time

import numpy as np
from measuring import hosts, median, paired, tell

import kvmbench as kb


def measure(host: kb.Host) -> None:
    remote = host.info.kind != "local"
    with kb.Machine(host, memory="16M") as m:
        times = 200 if remote else 100_000

        def small() -> float:
            read = m.memory.read
            start = time.perf_counter()
            for _ in range(times):
                read(0x20_0000, 8)
            return (time.perf_counter() - start) / times * 1e6

        print(f"    {'8 bytes by physical address':<44} {median(small):10.2f} us{'' if remote else '; goal 0.5'}")
        mib = 1 << 20
        block = np.random.default_rng(1).integers(0, 256, mib, dtype=np.uint8)
        other = block.copy()
        m.memory.write(0x20_0000, block)
        snapshot = m.memory.snapshot(0x20_0000, mib)

        def plain_copy() -> float:
            start = time.perf_counter()
            block.tobytes()
            return (time.perf_counter() - start) * 1e6

        def copy() -> float:
            start = time.perf_counter()
            m.memory.read(0x20_0000, mib)
            return (time.perf_counter() - start) * 1e6

        def plain_compare() -> float:
            start = time.perf_counter()
            assert np.array_equal(block, other)
            return (time.perf_counter() - start) * 1e6

        def compare() -> float:
            start = time.perf_counter()
            assert m.memory.changes(snapshot) == []
            return (time.perf_counter() - start) * 1e6

        tell("a MiB read", "us", paired(plain_copy, copy, pairs=25))
        goal = "" if remote else "100 us"
        tell("a MiB compared with a snapshot", "us", paired(plain_compare, compare, pairs=25), goal)


def main() -> None:
    for host in hosts(__doc__):
        measure(host)


if __name__ == "__main__":
    main()
