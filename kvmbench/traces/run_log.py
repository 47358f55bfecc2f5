"""The core's log: a row for each KVM_RUN, whoever may trace or not."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvmbench.debug.step_rows import exit_name
from kvmbench.uapi.exit_reasons import ExitReason

if TYPE_CHECKING:
    import pandas as pd

#: `struct kb_log_row` of core/wire.h.
ROW = np.dtype(
    [
        ("enter_ns", "<i8"),
        ("leave_ns", "<i8"),
        ("rip", "<u8"),
        ("where", "<u8"),
        ("value", "<u8"),
        ("exit", "<u4"),
        ("error", "<i4"),
        ("thread", "<u4"),
        ("detail", "<u4"),
    ]
)
#: `detail` of a row that says no more than the exit: one made of another program's trace.
UNTOLD = 0xFFFF_FFFF
# KVM waits for these to be answered before the instruction is done; after others the guest just stands.
ANSWERED = frozenset(
    (
        ExitReason.IO,
        ExitReason.MMIO,
        ExitReason.HYPERCALL,
        ExitReason.X86_RDMSR,
        ExitReason.X86_WRMSR,
        ExitReason.XEN,
        ExitReason.HYPERV,
        ExitReason.IOAPIC_EOI,
        ExitReason.SET_TPR,
        ExitReason.TPR_ACCESS,
    )
)


@dataclass(frozen=True)
class RunLog:
    """KVM_RUNs in the order of their beginning; every column has the shape (n,).

    Attributes:
        vcpu: place in ``m.cpus``, int16.
        data: the rows, as `ROW`: enter_ns and leave_ns by CLOCK_MONOTONIC of the host; rip; where (port,
            guest-physical address, MSR, ...); value (what was written); exit (KVM_EXIT_*); error (errno, 0: none);
            thread; detail (bytes an access | write << 8 | accesses << 16).
        lost: rows there was no room for.
        under_way: KVM_RUNs that have begun and not ended: (vcpu, thread, enter_ns) each.
        holes: where rows are lost: (vcpu, leave_ns of the row before) each.
    """

    vcpu: NDArray[np.int16]
    data: NDArray[np.void]
    lost: int = 0
    under_way: tuple[tuple[int, int, int], ...] = ()
    holes: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, name: str) -> NDArray[np.int64]:
        return self.data[name]

    def of_vcpu(self, vcpu: int) -> RunLog:
        """Only that vcpu's; `lost` stays that of all."""
        at = self.vcpu == vcpu
        under_way = tuple(run for run in self.under_way if run[0] == vcpu)
        holes = tuple(hole for hole in self.holes if hole[0] == vcpu)
        return RunLog(self.vcpu[at], self.data[at], self.lost, under_way, holes)

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Which of the exits user space answers (I/O, MMIO, ...) before the guest goes on."""
        found = np.isin(self.data["exit"], [int(reason) for reason in ANSWERED]) & (self.data["error"] == 0)
        return np.asarray(found, dtype=np.bool_)

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas frame with a column a field."""
        import pandas as pd

        return pd.DataFrame({"vcpu": self.vcpu, **{name: self.data[name] for name in ROW.names or ()}})

    def __repr__(self) -> str:
        lost = f"; {self.lost:,} lost" if self.lost else ""
        return f"<RunLog: {len(self):,} KVM_RUNs{lost}>"


def run_name(reason: int, error: int = 0) -> str:
    """What a row's exit is called: "IO", "HLT", "EINTR"."""
    return errno.errorcode.get(error, f"errno {error}") if error else exit_name(reason)


def exit_words(row: np.void) -> str:
    """One row in words: port, size, direction; address; MSR.

    Args:
        row: a row of `RunLog.data`.
    """
    reason, where, detail = int(row["exit"]), int(row["where"]), int(row["detail"])
    if row["error"]:
        return "interrupted" if row["error"] == errno.EINTR else f"failed with errno {int(row['error'])}"
    if detail == UNTOLD:
        return ""
    size, write, count = detail & 0xFF, detail >> 8 & 1, detail >> 16
    if reason == ExitReason.IO:
        times = f", {count} times" if count > 1 else ""
        what = f"out {int(row['value']):#x} to" if write else "in from"
        return f"{what} port {where:#x}, {size} byte{'s' * (size != 1)}{times}"
    if reason == ExitReason.MMIO:
        what = f"write {int(row['value']):#x} to" if write else "read from"
        return f"{what} {where:#x}, {size} byte{'s' * (size != 1)}"
    if reason == ExitReason.X86_RDMSR:
        return f"read of MSR {where:#x}"
    if reason == ExitReason.X86_WRMSR:
        return f"write of {int(row['value']):#x} to MSR {where:#x}"
    if reason == ExitReason.HYPERCALL:
        return f"hypercall {where}"
    if reason == ExitReason.DEBUG:
        return f"debug at {where:#x}, DR6 {int(row['value']):#x}"
    if reason in (ExitReason.INTERNAL_ERROR, ExitReason.FAIL_ENTRY):
        return f"reason {where:#x}"
    return ""
