"""A walk of the guest's page tables against KVM_TRANSLATE; the map of 4 GiB in 4-KiB pages against reading its tables.

Two guests for the map: one whose pages lie in a row (one range), and one whose pages are shuffled (a range a page).
Memory is what Python and numpy allocate at most meanwhile, by tracemalloc.
"""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
from measuring import hosts, paired, tell

import kvmbench as kb

PAGES = 1 << 20
MIB = 1 << 20
# The map's tables: 2048 of PTEs, 4 of PDEs, one PDPT, one PML4.
TABLES_GPA = 16 * MIB
TABLES_BYTES = (2048 + 4 + 2) * 4096


def write_tables(m: kb.Machine, order: np.ndarray) -> int:
    """Maps 4 GiB from 0 on, page n to ``order[n]``; the top table's gpa."""
    ptes = TABLES_GPA + 6 * 4096
    pdes, pdpt, top = TABLES_GPA + 2 * 4096, TABLES_GPA + 4096, TABLES_GPA
    m.memory.write(ptes, order.astype("<u8") * 4096 | 3)
    m.memory.write(pdes, np.arange(2048, dtype="<u8") * 4096 + ptes | 3)
    m.memory.write(pdpt, np.arange(4, dtype="<u8") * 4096 + pdes | 3)
    m.memory.write(top, np.array([pdpt | 3], dtype="<u8"))
    return top


def timed(run: object, times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()  # type: ignore[operator]
    return (time.perf_counter() - start) / times


def measure_walk(m: kb.Machine, times: int) -> None:
    m.load_asm("nop; hlt")
    m.cpu.step()
    tell(
        "a walk, plain KVM_TRANSLATE",
        "us",
        paired(
            lambda: timed(lambda: m.cpu.translate(0x1234), times) * 1e6,
            lambda: timed(lambda: m.cpu.walk(0x1234, "write"), times) * 1e6,
        ),
    )


def measure_map(m: kb.Machine, what: str, order: np.ndarray) -> None:
    top = write_tables(m, order)

    def plain() -> float:
        return timed(lambda: m.memory.read(TABLES_GPA, TABLES_BYTES)) * 1e3

    def ours() -> float:
        return timed(lambda: m.cpu.address_space(top)) * 1e3

    local = m.host.info.kind == "local"
    tell(f"a map of 4 GiB, {what}", "ms", paired(plain, ours), "250 ms" if local else "")
    tracemalloc.start()
    space = m.cpu.address_space(top)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"    {'':<44} {len(space):,} ranges, {kept / MIB:.1f} MiB kept, {peak / MIB:.1f} MiB at most")


def main() -> None:
    rng = np.random.default_rng(1)
    for host in hosts(__doc__):
        remote = host.info.kind != "local"
        with kb.Machine(host, memory="32M" if remote else "4G") as m:
            measure_walk(m, 50 if remote else 2000)
            measure_map(m, "pages in a row", np.arange(PAGES))
            measure_map(m, "pages shuffled", rng.permutation(PAGES))


if __name__ == "__main__":
    main()
