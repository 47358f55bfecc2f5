"""Events, rows of the log, and traces of them, made by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kvmbench.traces.assemble import THREAD_MARK_MAGIC, event_table, run_log
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.format import PageLayout, parse_format
from kvmbench.traces.run_log import ROW, RunLog
from kvmbench.uapi import ExitReason

from .ring import event, make_format, page, payload

EXIT = parse_format((Path(__file__).parent / "formats" / "kvm_exit-6.18.txt").read_text(), system="kvm")
ENTRY = make_format("kvm_entry", 104, ("unsigned int", "vcpu_id", 4))
PRINT = make_format("print", 5, ("unsigned long", "ip", 8), ("char", "buf[]", 0), system="ftrace")
RAW = make_format("raw_data", 6, ("unsigned int", "id", 4), ("char", "buf[]", 0), system="ftrace")
RETURN = make_format("kvm_userspace_exit", 105, ("unsigned int", "reason", 4), ("int", "errno", 4))
FORMATS = {f.id: f for f in (EXIT, ENTRY, RETURN, PRINT, RAW)}
HLT, IO, CPUID = 12, 30, 10  # VMX's numbers
SIZE = 256


def kvm_exit(reason: int, rip: int = 0x1000, pid: int = 7) -> bytes:
    values = {"exit_reason": reason, "guest_rip": rip, "isa": 1, "common_pid": pid, "common_type": EXIT.id}
    row = np.zeros(1, EXIT.dtype)
    for name, value in values.items():
        row[name] = value
    return row.tobytes()


def kvm_entry(pid: int = 7) -> bytes:
    return payload(ENTRY.id, pid, bytes(4))


def kvm_userspace_exit(reason: int, pid: int = 7) -> bytes:
    return payload(RETURN.id, pid, struct.pack("<Ii", reason, 0))


def mark(text: str, pid: int = 7) -> bytes:
    return payload(PRINT.id, pid, bytes(8) + text.encode() + b"\n\0")


def thread_mark(pid: int, thread: int, vcpu: int, magic: int = THREAD_MARK_MAGIC) -> bytes:
    return payload(RAW.id, pid, struct.pack("<4I", magic, thread, vcpu, 0))


def table(*timed: tuple[int, bytes], cpu: int = 0, lost: dict[int, int] | None = None) -> EventTable:
    """Events of one processor at their times, in that order."""
    return tables({cpu: timed}, lost=lost)


def tables(cpus: dict[int, Iterable[tuple[int, bytes]]], *, lost: dict[int, int] | None = None) -> EventTable:
    pages = []
    for cpu, timed in cpus.items():
        for time, data in timed:
            # A page each: its head tells the time.
            pages.append((cpu, memoryview(page(time, event(0, data), page_bytes=SIZE))))
    return event_table(pages, FORMATS, page_bytes=SIZE, layout=PageLayout(), lost=lost)


def rows(*runs: tuple[int, int, ExitReason | int], error: int = 0, thread: int = 7) -> bytes:
    """Rows of the log: (enter_ns, leave_ns, reason) each."""
    data = np.zeros(len(runs), ROW)
    for n, (enter, leave, reason) in enumerate(runs):
        data[n]["enter_ns"], data[n]["leave_ns"], data[n]["exit"] = enter, leave, reason
    data["thread"], data["error"] = thread, error
    return data.tobytes()


def log_of(*pieces: tuple[int, bytes], lost: int = 0) -> RunLog:
    """A log out of (vcpu's handle, rows) each; handles 100, 101, ... are vcpus 0, 1, ..."""
    return run_log([(handle, memoryview(data), lost if not n else 0) for n, (handle, data) in enumerate(pieces)], VCPUS)


VCPUS = {100: 0, 101: 1}
