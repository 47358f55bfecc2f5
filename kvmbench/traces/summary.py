"""What exits cost: by reason, vcpu, instruction or symbol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.debug.step_rows import exit_name
from kvmbench.traces.exits import NO_USER_EXIT, NOT_TOLD, ExitTable
from kvmbench.traces.keyed_table import KeyedTable
from kvmbench.traces.places import Places
from kvmbench.traces.words import counted, show_ns
from kvmbench.uapi.exit_reasons import ExitReason

if TYPE_CHECKING:
    import pandas as pd

#: What a summary can tell apart.
KEYS = ("reason", "vcpu", "rip", "symbol", "instruction", "user_exit")
_COLUMNS = ("count", "total", "mean", "p50", "p99", "max", "share")


@dataclass(frozen=True)
class SummaryRow:
    """Exits that have something in common. Times are of the span from an exit until the guest ran again.

    Attributes:
        key: what they have in common, a value for each of `Summary.by`.
        count: how many.
        timed: of how many the span is known; what follows is of these, in nanoseconds, `None` if there are none.
        total_ns, mean_ns, p50_ns, p99_ns, max_ns: of the span; percentiles are by nearest rank, so each is a time seen.
        kvm_ns, user_ns: what of the total was spent in KVM and in user space.
        share: of the time of all vcpus (guest, KVM and user space), 0 to 1.
    """

    key: tuple[str, ...]
    count: int
    timed: int
    total_ns: int | None
    mean_ns: float | None
    p50_ns: float | None
    p99_ns: float | None
    max_ns: int | None
    kvm_ns: int
    user_ns: int
    share: float | None


class Summary(KeyedTable[SummaryRow]):
    """Rows, those with the most time first.

    Attributes:
        guest_ns, kvm_ns, user_ns, outside_ns: where the time of all vcpus went; outside is what they stood.
        undivided_ns: of KVM_RUNs of which no exit of the processor was told, guest and KVM together; not in `guest_ns`.
        halted_ns: what of the time in KVM a vcpu waited there for an interrupt, after a HLT.
        together: `guest_ns` is guest and KVM together, for no exit of the processor was told at all.
        untimed: exits whose span is not known.
    """

    def __init__(
        self,
        rows: Sequence[SummaryRow],
        *,
        by: tuple[str, ...],
        guest_ns: int,
        kvm_ns: int,
        user_ns: int,
        outside_ns: int,
        together: bool,
        untimed: int,
        undivided_ns: int = 0,
        halted_ns: int = 0,
        clock: str = "",
        warnings: tuple[str, ...] = (),
    ) -> None:
        super().__init__(rows, by=by, clock=clock, warnings=warnings)
        self.guest_ns, self.kvm_ns, self.user_ns, self.outside_ns = guest_ns, kvm_ns, user_ns, outside_ns
        self.undivided_ns, self.halted_ns = undivided_ns, halted_ns
        self.together, self.untimed = together, untimed

    @property
    def exits(self) -> int:
        """Exits of all rows."""
        return sum(row.count for row in self._rows)

    @property
    def counts(self) -> dict[str, int]:
        """Count by key, for ``kb.plot.exits``."""
        return {" ".join(row.key): row.count for row in self._rows}

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas frame with a column a field."""
        import pandas as pd

        fields = ("count", "timed", "total_ns", "mean_ns", "p50_ns", "p99_ns", "max_ns", "kvm_ns", "user_ns", "share")
        columns: dict[str, list[Any]] = {name: [row.key[n] for row in self._rows] for n, name in enumerate(self.by)}
        columns |= {name: [getattr(row, name) for row in self._rows] for name in fields}
        return pd.DataFrame(columns)

    @property
    def where_time_went(self) -> str:
        """One line: shares of guest, KVM and user space."""
        total = self.guest_ns + self.kvm_ns + self.user_ns + self.undivided_ns
        if not total:
            return "no time was told"
        said = [("guest and KVM" if self.together else "guest", self.guest_ns)]
        if not self.together:
            said.append(("KVM", self.kvm_ns))
        if self.undivided_ns:
            said.append(("guest or KVM", self.undivided_ns))
        said.append(("user space", self.user_ns))
        waited = f"; of it {show_ns(self.halted_ns)} halted" if self.halted_ns else ""
        shares = ", ".join(
            f"{name} {show_ns(ns)} ({ns / total:.1%}{waited * (name in ('KVM', 'guest and KVM'))})" for name, ns in said
        )
        stood = f"; stood {show_ns(self.outside_ns)}" if self.outside_ns else ""
        return f"{shares}{stood}{f' ({self.clock})' if self.clock else ''}"

    def _head(self) -> list[str]:
        return list(_COLUMNS)

    def _cells(self, row: SummaryRow) -> list[str]:
        times = (row.total_ns, row.mean_ns, row.p50_ns, row.p99_ns, row.max_ns)
        return [f"{row.count:,}", *map(show_ns, times), "" if row.share is None else f"{row.share:.1%}"]

    def _below(self) -> list[str]:
        lines = [self.where_time_went]
        if self.together:
            # What KVM took of an exit nothing tells then (`ExitTable.span_ns`).
            lines.append("no exits of the processor were told: total to max are what user space took to answer")
        if self.untimed:
            lines.append(f"of {counted(self.untimed, 'exit')} nothing tells when the guest ran again")
        return [*lines, *super()._below()]


def summarise(
    exits: ExitTable,
    by: Sequence[str],
    *,
    places: Places,
    labels: Sequence[str] = (),
    halt_wait_ns: int = 0,
    clock: str = "",
    warnings: Sequence[str] = (),
) -> Summary:
    """Summarises exits; ten million take some seconds (`python benchmarks/trace_decoding.py`).

    Args:
        exits: which.
        by: some of `KEYS`.
        places: what is at their addresses.
        labels: what the vcpus are called; beyond these "vcpu 0".
        halt_wait_ns: of KVM's statistics, for where no exit of the processor tells what was waited.
    """
    span = exits.span_ns
    timed = span != NOT_TOLD
    hardware = exits.isa != 0
    together = len(exits) > 0 and not bool(hardware.any())
    guest = np.maximum(exits.guest_ns, 0)
    undivided_ns = 0 if together else int(guest[~hardware].sum())
    guest_ns = int(guest.sum()) - undivided_ns
    kvm_ns = int(exits.kvm_ns[exits.kvm_ns != NOT_TOLD].sum())
    user_ns = int(exits.user_ns.sum())
    whole = guest_ns + kvm_ns + user_ns + undivided_ns
    rows = [_row(exits, span, timed, at, key, whole) for key, at in group_exits(exits, by, places, labels)]
    rows.sort(key=lambda row: (-(row.total_ns or 0), -row.count))
    return Summary(
        rows,
        by=tuple(by),
        guest_ns=guest_ns,
        kvm_ns=kvm_ns,
        user_ns=user_ns,
        outside_ns=int(exits.outside_ns.sum()),
        together=together,
        untimed=int(np.count_nonzero(~timed)),
        undivided_ns=undivided_ns,
        halted_ns=halt_wait_ns if together else _halted_ns(exits),
        clock=clock,
        warnings=tuple(warnings),
    )


def _halted_ns(exits: ExitTable) -> int:
    # KVM waits itself where it has the interrupt controllers; elsewhere a HLT goes to user space.
    names = np.array([name.lower() == "hlt" for name in exits.names] or [False], np.bool_)
    waited = (exits.isa != 0) & (exits.user_exit != int(ExitReason.HLT)) & (exits.kvm_ns != NOT_TOLD)
    return int(exits.kvm_ns[waited & names[exits.reason]].sum()) if len(exits) else 0


def group_exits(
    exits: ExitTable, by: Sequence[str], places: Places, labels: Sequence[str] = ()
) -> Iterator[tuple[tuple[str, ...], NDArray[np.int64]]]:
    """Yields the exits that have something in common: what it is, and their places."""
    columns = [_column(exits, key, places, labels) for key in by]
    group = np.zeros(len(exits), np.int64)
    for codes, called in columns:
        group = group * max(1, len(called)) + codes
    distinct, counts = np.unique(group, return_counts=True)
    if len(distinct) <= np.iinfo(np.uint16).max:
        # numpy sorts numbers of 16 bits by radix, several times as fast.
        group = np.searchsorted(distinct, group).astype(np.uint16)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(counts)
    for packed, end, count in zip(distinct.tolist(), ends.tolist(), counts.tolist(), strict=True):
        yield _unpack(packed, columns), order[end - count : end]


def _row(
    exits: ExitTable,
    span: NDArray[np.int64],
    timed: NDArray[np.bool_],
    at: NDArray[np.int64],
    key: tuple[str, ...],
    whole_ns: int,
) -> SummaryRow:
    known = at[timed[at]]
    values = np.sort(span[known])
    kvm = exits.kvm_ns[known]
    if not len(values):
        return SummaryRow(key, len(at), 0, None, None, None, None, None, 0, 0, None)
    total = int(values.sum())
    return SummaryRow(
        key,
        len(at),
        len(values),
        total,
        total / len(values),
        float(values[(len(values) - 1) // 2]),
        float(values[max(0, -(-len(values) * 99 // 100) - 1)]),
        int(values[-1]),
        int(kvm[kvm != NOT_TOLD].sum()),
        int(exits.user_ns[known].sum()),
        total / whole_ns if whole_ns else None,
    )


def _column(exits: ExitTable, key: str, places: Places, vcpus: Sequence[str]) -> tuple[NDArray[np.int64], list[str]]:
    # Codes, and what each is called.
    if key == "reason":
        return exits.reason.astype(np.int64), list(exits.names)
    if key == "vcpu":
        values, codes = np.unique(exits.vcpu, return_inverse=True)
        return codes.reshape(-1), [vcpus[v] if 0 <= v < len(vcpus) else f"vcpu {v}" for v in values.tolist()]
    if key == "user_exit":
        values, codes = np.unique(exits.user_exit, return_inverse=True)
        return codes.reshape(-1), ["" if v == NO_USER_EXIT else exit_name(int(v)) for v in values.tolist()]
    values, codes = np.unique(exits.rip, return_inverse=True)
    name = places.namer(key)
    names = [name(v) if v else "" for v in values.tolist()]
    # Several addresses may lie in one symbol.
    labels = list(dict.fromkeys(names))
    place = {label: n for n, label in enumerate(labels)}
    return np.array([place[name] for name in names], np.int64)[codes.reshape(-1)], labels


def _unpack(packed: int, columns: Sequence[tuple[NDArray[np.int64], list[str]]]) -> tuple[str, ...]:
    key: list[str] = []
    for _, labels in reversed(columns):
        packed, code = divmod(packed, max(1, len(labels)))
        key.append(labels[code])
    return tuple(reversed(key))
