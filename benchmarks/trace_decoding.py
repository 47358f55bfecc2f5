"""Reading a trace: events a second out of the kernel's pages, against its text; and a summary of ten million.

The pages are those of a guest of the AMD appliance that leaves by CPUID, repeated until there are enough. The text is
what the kernel prints of the events of a guest of this machine, read line by line with a regular expression; it takes
root and /dev/kvm, and is left out where these are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import kvmbench as kb
from kvmbench.core import wire
from kvmbench.host import trace_messages as messages
from kvmbench.traces.assemble import attribute, event_table, run_log
from kvmbench.traces.exits import exit_table
from kvmbench.traces.format import EventFormat, PageLayout, parse_format
from kvmbench.traces.pages import decode
from kvmbench.traces.places import Places
from kvmbench.traces.run_log import RunLog
from kvmbench.traces.summary import summarise

# As a trace that is being taken reads them.
READ_BYTES = 4 << 20
LOOP = """
        mov r9d, {count}
again:  xor eax, eax
        cpuid
        dec r9d
        jnz again
        hlt
"""
LINE = re.compile(
    r"\s*(?P<comm>.+?)-(?P<pid>\d+)\s+\[(?P<cpu>\d+)\]\s+\S+\s+(?P<time>\d+\.\d+): (?P<event>\w+): (?P<rest>.*)"
)


def take(host: kb.Host, count: int) -> tuple[bytes, dict[int, EventFormat], RunLog, dict[int, int]]:
    """Pages of a real trace of one processor, the formats of its events, its log, and whose they are."""
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(LOOP.format(count=count), at=0x1000)
        names = ["kvm/kvm_exit", "kvm/kvm_entry", "kvm/kvm_cpuid"]
        core = host.core
        opened = messages.trace_open(core, m.vm.handle, names, log_rows=4096, buffer_kb=65536, own_only=False)
        messages.trace_set(core, opened.handle, True)
        m.cpu.run()
        messages.trace_set(core, opened.handle, False)
        pages, rows, more = [], [], True
        while more:
            chunks, more = messages.trace_read(core, opened.handle, 16 << 20)
            pages += [bytes(chunk.data) for chunk in chunks if chunk.sort == wire.KB_TRACE_CHUNK_PAGE]
            rows += [(c.index, c.data, c.lost) for c in chunks if c.sort == wire.KB_TRACE_CHUNK_LOG]
        texts = [messages.event_format(core, name) for name in (*names, "ftrace/raw_data")]
        described = [parse_format(text) for text in texts]
        core.close_handle(opened.handle)
        vcpus = {m.vcpus[0].handle: 0}
        return b"".join(pages), {one.id: one for one in described}, run_log(rows, vcpus), vcpus


def tiled(pages: bytes, times: int, span_ns: int) -> memoryview:
    """The pages again and again, each time later by `span_ns`."""
    one = np.frombuffer(pages, np.uint8).reshape(-1, 4096)
    many = np.tile(one, (times, 1))
    stamps = many[:, :8].copy().view("<u8").reshape(times, len(one))
    stamps += (np.arange(times, dtype=np.uint64) * np.uint64(span_ns))[:, None]
    many[:, :8] = stamps.reshape(-1, 1).view(np.uint8)
    return memoryview(many.reshape(-1))


def rate(events: int, work: Callable[[], object], *, rounds: int) -> list[float]:
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(events / (time.perf_counter() - start) / 1e6)
    return found


def tell(what: str, rates: list[float]) -> None:
    middle = statistics.median(rates)
    print(f"    {what:<52} {middle:8.2f} million events a second ({min(rates):.2f} to {max(rates):.2f})")


def text_of_this_machine(least: int) -> list[str]:
    """What the kernel prints of a guest of this machine, in a directory of tracefs of our own; [] without root."""
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "tracefs", "none", folder], capture_output=True).returncode:
            return []
        instance = Path(folder) / "instances" / f"bench-{time.monotonic_ns()}"
        try:
            instance.mkdir()
            (instance / "buffer_size_kb").write_text("65536")
            for event in ("kvm_userspace_exit", "kvm_pio", "kvm_emulate_insn"):
                (instance / "events" / "kvm" / event / "enable").write_text("1")
            with kb.connect("local", quiet=True) as host, kb.Machine(host, memory="2M") as m:
                m.load_asm("mov r9d, 40000\nagain: out 0xe9, al\ndec r9d\njnz again\nhlt", at=0x1000)
                m.cpu.run()
            lines = [ln for ln in (instance / "trace").read_text().splitlines() if not ln.startswith("#")]
            return (lines * (least // max(1, len(lines)) + 1))[:least] if lines else []
        except (OSError, kb.KvmbenchError):
            return []
        finally:
            if instance.exists():
                instance.rmdir()
            subprocess.run(["umount", folder], check=False)


def read_text(lines: list[str]) -> int:
    kept: list[tuple[float, int, str, str]] = []
    for line in lines:
        found = LINE.match(line)
        if found:
            kept.append((float(found["time"]), int(found["cpu"]), found["event"], found["rest"]))
    return len(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=10_000_000, help="events in the summary")
    wanted = parser.parse_args().events
    with kb.connect("appliance", quiet=True) as host:
        pages, formats, log, vcpus = take(host, 20_000)
    counted = event_table([(0, memoryview(pages))], formats, page_bytes=4096, layout=PageLayout())
    events = counted.count
    span = int(counted["kvm_exit"].time_ns[-1] - counted["kvm_exit"].time_ns[0]) + 1_000_000
    print(f"  {events:,} real events in {len(pages):,} bytes, {len(pages) / events:.0f} a piece")

    sample = tiled(pages, 16, span)
    for use_core, rounds in ((True, 9), (False, 3)):

        def columns(use_core: bool = use_core) -> None:
            for _ in decode(sample, formats, use_core=use_core):
                pass

        rates = rate(events * 16, columns, rounds=rounds)
        tell("binary into columns, " + ("C core" if use_core else "without the C core"), rates)
    lines = text_of_this_machine(200_000)
    if lines:
        tell("the kernel's text, a regular expression a line", rate(len(lines), lambda: read_text(lines), rounds=3))
    else:
        print("    the kernel's text: not tried, it takes root and /dev/kvm")

    times = -(-wanted // events)
    many = tiled(pages, times, span)
    pieces = [(0, many[start : start + READ_BYTES]) for start in range(0, len(many), READ_BYTES)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    table = attribute(event_table(pieces, formats, page_bytes=4096, layout=PageLayout()), log, vcpus)
    read = time.perf_counter()
    in_columns = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = len(many)
    del pieces, many  # as the end of a trace does
    # The KVM_RUN goes on for as long as the pages are repeated: beside it nothing would be told.
    rows = log.data.copy()
    rows["leave_ns"][-1] += int(table["kvm_exit"].time_ns[-1])
    exits = exit_table(table, dataclasses.replace(log, data=rows))
    joined = time.perf_counter()
    summary = summarise(exits, ("reason",), places=Places())
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"    summary of {table.count:,} events, {len(exits):,} exits: {done - start:.2f} s")
    print(f"      pages to columns {read - start:.2f} s, exits {joined - read:.2f} s, summary {done - joined:.2f} s")
    print(f"      memory at the peak {peak / 1024:,.0f} MB, pages for a while among them {size / 1e6:,.0f} MB;")
    print(f"      {before / 1024:,.0f} MB of it before it began, {in_columns / 1024:,.0f} MB when all was in columns")
    print("      " + repr(summary).replace("\n", "\n      "))


if __name__ == "__main__":
    main()
