"""Exits to draw, written down row by row or made by the million."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvmbench.host.provenance import Provenance
from kvmbench.traces.event_table import EventColumns, EventTable, Gap
from kvmbench.traces.exits import NO_USER_EXIT, ExitTable
from kvmbench.traces.format import EventFormat, Field
from kvmbench.traces.run_log import ROW, RunLog
from kvmbench.traces.trace import Mark

EMULATED = Provenance(kind="appliance", module="kvm_amd", emulator="QEMU (TCG) 7.2")


@dataclass
class Traced:
    """As much of a trace as figures ask for."""

    exits: ExitTable
    events: EventTable = field(default_factory=EventTable)
    provenance: Provenance = EMULATED
    marks: tuple[Mark, ...] = ()


def table(rows=(), *, names=("io", "npf", "cpuid"), leave_ns=None, lost=0) -> ExitTable:
    """A table of rows, each a dict of its columns; reason by name; the rest 0, or what the table has for nothing."""
    n = len(rows)

    def column(name, kind, otherwise=0):
        return np.array([row.get(name, otherwise) for row in rows], kind).reshape(n)

    log = np.zeros(0 if leave_ns is None else n, ROW)
    if leave_ns is not None:
        log["leave_ns"] = leave_ns
    return ExitTable(
        names=tuple(names),
        time_ns=column("time_ns", np.int64),
        vcpu=column("vcpu", np.int16),
        reason=np.array([names.index(row.get("reason", names[0])) for row in rows], np.uint16).reshape(n),
        rip=column("rip", np.uint64, 0x1000),
        guest_ns=column("guest_ns", np.int64),
        kvm_ns=column("kvm_ns", np.int64),
        user_ns=column("user_ns", np.int64),
        outside_ns=column("outside_ns", np.int64),
        user_exit=column("user_exit", np.int16, NO_USER_EXIT),
        isa=column("isa", np.uint8, 2),
        number=column("number", np.uint32),
        **{name: np.zeros(n, np.uint64) for name in ("info1", "info2", "intr_info", "error_code")},
        log=RunLog(np.zeros(len(log), np.int16), log, lost),
        log_row=np.arange(n) if leave_ns is not None else np.full(n, -1, np.int64),
    )


def many(n: int, *, vcpus: int = 1, seed: int = 1) -> ExitTable:
    """So many exits, back to back on each vcpu, of three reasons with times of their own."""
    random = np.random.default_rng(seed)
    vcpu, reason = random.integers(0, vcpus, n).astype(np.int16), random.integers(0, 3, n).astype(np.uint16)
    guest = random.lognormal(7, 1, n).astype(np.int64) + 1
    kvm = random.lognormal(7, 0.5, n).astype(np.int64) * (1 + reason) + 1
    user = np.where(reason == 0, random.lognormal(9, 0.6, n).astype(np.int64), 0)
    time = np.zeros(n, np.int64)
    for each in range(vcpus):
        mine = vcpu == each
        time[mine] = np.cumsum(guest[mine] + np.concatenate([[0], (kvm + user)[mine][:-1]])[: mine.sum()])
    at = np.argsort(time, kind="stable")
    none = np.zeros(n, np.uint64)
    return ExitTable(
        ("io", "npf", "cpuid"),
        time[at] + 10**12,
        vcpu[at],
        reason[at],
        (0x1000 + 4 * random.integers(0, 300, n)).astype(np.uint64),
        guest[at],
        kvm[at],
        user[at],
        np.zeros(n, np.int64),
        np.where(user[at] > 0, 2, NO_USER_EXIT).astype(np.int16),
        np.full(n, 2, np.uint8),
        reason[at].astype(np.uint32),
        *(none, none, none, none),
        RunLog(np.zeros(0, np.int16), np.zeros(0, ROW)),
        np.full(n, -1, np.int64),
    )


def nested_exits(*times_ns: int, vcpu: int = 0) -> EventTable:
    """Events kvm_nested_vmexit at these times."""
    described = EventFormat("kvm", "kvm_nested_vmexit", 1, (Field("exit_reason", 0, 4, False, "u32"),))
    n = len(times_ns)
    columns = EventColumns(
        described,
        np.array(times_ns, np.int64),
        np.zeros(n, np.uint16),
        np.zeros(n, np.int32),
        np.full(n, vcpu, np.int16),
        np.zeros(n, described.dtype),
    )
    return EventTable([columns])


def with_gap(time_ns: int, lost: int) -> EventTable:
    """No events, and a gap."""
    return EventTable(gaps=[Gap(time_ns, 0, lost)])
