"""What a guest pays to ring: exits to user space, eventfds, coalesced writes, hypercall, MSR, CPUID.

    python benchmarks/doorbell.py                     # local, npt=1, npt=0
    python benchmarks/doorbell.py --intel             # and the Intel appliance
    python benchmarks/doorbell.py --hosts npt1 --repeats 21

The experiment itself is `kvmbench.experiments.doorbell`; docs/doorbell.md explains the figures.
"""

from __future__ import annotations

import argparse

from measuring import HOSTS, opened

from kvmbench.experiments.doorbell import PUBLISHED_US, measure, table, told_parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", default="local,npt1,npt0", help=f"comma-separated: {', '.join(HOSTS)}")
    parser.add_argument("--intel", action="store_true", help="the Intel appliance too")
    parser.add_argument("--repeats", type=int, default=9, help="at least 2")
    chosen = parser.parse_args()
    for host in opened([*chosen.hosts.split(","), *(["intel"] if chosen.intel else [])]):
        clock = "emulator time" if host.info.emulated else "real time"
        for cpl in (0, 3):
            print(f"\nCPL {cpl}, {clock}\n")
            found = measure(host, cpl=cpl, repeats=chosen.repeats)
            print(table(found, clock))
            print(f"\n{told_parts({row.name: row.us for row in found})}", flush=True)
    print(f"\npublished: {told_parts(PUBLISHED_US)}")


if __name__ == "__main__":
    main()
