"""An X-ray of a thousand shadow pages: how long KVM's tables take to read, and how much memory.

The guest has a thousand page tables of its own, and touches one page through each. Goal: 1 s in the AMD appliance with
shadow paging. The first X-ray of a host also reads its types and symbols.
"""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np
from measuring import opened

import kvmbench as kb

TABLES = 1000
TIMES = 9
TOP = 0x1000000
TOUCH = f"mov ecx, {TABLES}\nmov rdi, 0x1000\nagain: mov rax, [rdi]\nadd rdi, 0x200000\nloop again\nhlt"


def guest(host: kb.Host) -> kb.Machine:
    """A machine whose guest has touched a page through each of its tables."""
    machine = kb.Machine(host, memory="32M")
    machine.vm.set_nr_mmu_pages(4 * TABLES)
    machine.load_asm(TOUCH, at=0x1000)
    tables = TOP + 0x100000 + 4096 * np.arange(TABLES, dtype="<u8")
    machine.memory.write(TOP, (TOP + 0x1067).to_bytes(8, "little"))
    machine.memory.write(TOP + 0x1000, np.array([TOP + 0x2067, TOP + 0x3067], "<u8").tobytes())
    machine.memory.write(TOP + 0x2000, (tables + np.uint64(0x67)).tobytes())
    entries = 4096 * np.arange(512, dtype="<u8") + np.uint64(0x67)
    machine.memory.write(int(tables[0]), np.tile(entries, TABLES).tobytes())
    machine.cpu.regs.cr3 = TOP
    assert machine.cpu.run(deadline_s=60).cause is kb.Cause.HALT
    return machine


def main() -> None:
    print((__doc__ or "").splitlines()[0])
    for host in opened(("npt0",)):
        with guest(host) as machine:
            start = time.perf_counter()
            machine.xray()
            first = time.perf_counter() - start
            taken = []
            for _ in range(TIMES):
                start = time.perf_counter()
                x = machine.xray()
                taken.append(time.perf_counter() - start)
            assert len(x.pages) >= TABLES, x
            print(
                f"    {len(x.pages):,} tables, {len(x.sptes):,} entries: {statistics.median(taken):.3f} s "
                f"({min(taken):.3f} to {max(taken):.3f}); the first {first:.2f} s; goal 1 s"
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"    peak of this process: {peak:.0f} MB")


if __name__ == "__main__":
    main()
