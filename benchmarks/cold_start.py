"""From nothing to the first step: `connect()`, a machine, one step; cold, warm, and another machine in the same host.

Each start is a new process, as a person's would be; the time counts from
`connect()`, the import before it is shown beside it.  There is no plain loop to
compare with: the ratio is that of the second machine, which starts on a host that
is up, to the first.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

FIRST_STEP = """
import time; start = time.perf_counter()
import kvmbench as kb
imported = time.perf_counter()
host = kb.connect({spec!r}, quiet=True, **{options!r})
connected = time.perf_counter()
def first_step():
    begin = time.perf_counter()
    m = kb.Machine(host, memory="16M")
    m.load_asm("mov eax, 1; hlt")
    m.cpu.step()
    return time.perf_counter() - begin
one = first_step()
done = time.perf_counter()
two = first_step()
host.close()
print(imported - start, connected - imported, done - imported, two)
"""
CASES = {
    "local": ("local", {}, 5, ""),
    "appliance, cold": ("appliance", {"warm": False}, 3, "goal 3 s"),
    "appliance, warm": ("appliance", {}, 7, "goal 0.3 s"),
}


def main() -> None:
    print((__doc__ or "").splitlines()[0])
    for name, (spec, options, times, goal) in CASES.items():
        rows = []
        for n in range(times + 1):
            code = FIRST_STEP.format(spec=spec, options=options)
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
            if run.returncode:
                print(f"  {name}: {run.stderr.strip().splitlines()[-1]}")
                break
            if n:  # the first fills caches
                rows.append([float(word) for word in run.stdout.split()])
        else:
            imported, connected, total, another = (statistics.median(column) for column in zip(*rows, strict=True))
            print(
                f"  {name:<16} connect() to first step {total:6.3f} s"
                f" ({min(row[2] for row in rows):.3f} to {max(row[2] for row in rows):.3f}; connect {connected:.3f})"
                f"{'; ' + goal if goal else ''}; import before it {imported:.3f} s;"
                f" another machine's first step {another * 1e3:.1f} ms"
                f" (ratio {another / total:.3f}); goal 50 ms"
            )


if __name__ == "__main__":
    main()
