"""Exits: each time the guest was left, why, and what became of the time.

Two sources, one table. Where the kernel told `kvm_exit` and `kvm_entry`, a row is one exit of the processor. The core's
log says which of them went on to user space and how long that took. A KVM_RUN without any `kvm_exit` (the events are
off, or KVM ran the code in its instruction emulator) is a row by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.arguments import integer
from kvmbench.errors import MisuseError
from kvmbench.traces.event_table import EventColumns, EventTable, Gap
from kvmbench.traces.hardware_exits import parse_reason_table, reason_name
from kvmbench.traces.qualification import describe_exit
from kvmbench.traces.run_log import UNTOLD, RunLog, exit_words, run_name
from kvmbench.traces.words import counted
from kvmbench.uapi.exit_reasons import ExitReason

if TYPE_CHECKING:
    import pandas as pd

#: A time that no source tells.
NOT_TOLD = -1
#: `ExitTable.user_exit` of an exit that KVM dealt with alone.
NO_USER_EXIT = -1
_NUMBERS = ("info1", "info2", "intr_info", "error_code")


@dataclass(frozen=True)
class ExitTable:
    """Exits in order of time; every column has the shape (n,), times are in nanoseconds.

    Attributes:
        names: what reasons are called.
        time_ns: when the guest was left, by CLOCK_MONOTONIC of the host, int64.
        vcpu: place in ``m.cpus``, int16.
        reason: place in `names`, uint16.
        rip: of the instruction that made the exit, uint64; 0: not told. Where neither `kvm_exit` nor
            `kvm_emulate_insn` tells it, what KVM says at the exit, which on kvm_pvm is behind an OUT.
        guest_ns: in the guest before it, int64; `NOT_TOLD` where events are missing. Where `isa` is 0: in KVM_RUN,
            guest and KVM together.
        kvm_ns: in KVM until the guest ran again, without user space, but with what a vcpu waited after a HLT that KVM
            dealt with; `NOT_TOLD` likewise.
        user_ns: in user space, which answered the exit (I/O, MMIO); 0: KVM did it alone, or rows of the log are lost
            behind it.
        outside_ns: the guest stood: a debugger, the end of a run.
        user_exit: KVM_EXIT_* with which KVM_RUN returned, int16; `NO_USER_EXIT`: it did not.
        isa: whose numbers these are, uint8: 1 VMX, 2 SVM, 0: no exit of the processor was told.
        number: the processor's or KVM's number of the reason, uint32.
        info1, info2, intr_info, error_code: as kvm_exit tells them, uint64; 0 where `isa` is 0.
        log: the KVM_RUNs, for the words about rows whose `isa` is 0.
        log_row: which of them ended with this exit, int64; -1: none.
    """

    names: tuple[str, ...]
    time_ns: NDArray[np.int64]
    vcpu: NDArray[np.int16]
    reason: NDArray[np.uint16]
    rip: NDArray[np.uint64]
    guest_ns: NDArray[np.int64]
    kvm_ns: NDArray[np.int64]
    user_ns: NDArray[np.int64]
    outside_ns: NDArray[np.int64]
    user_exit: NDArray[np.int16]
    isa: NDArray[np.uint8]
    number: NDArray[np.uint32]
    info1: NDArray[np.uint64]
    info2: NDArray[np.uint64]
    intr_info: NDArray[np.uint64]
    error_code: NDArray[np.uint64]
    log: RunLog = field(repr=False)
    log_row: NDArray[np.int64] = field(repr=False)

    def __len__(self) -> int:
        return len(self.time_ns)

    @property
    def span_ns(self) -> NDArray[np.int64]:
        """From the exit until the guest ran again, without what it stood; `NOT_TOLD` where nothing tells.

        Where no exit of the processor was told (`isa` is 0), only what user space took to answer it.
        """
        span = self.kvm_ns + self.user_ns
        of_log = np.where((self.isa == 0) & (self.user_ns > 0), self.user_ns, NOT_TOLD)
        return np.where(self.kvm_ns == NOT_TOLD, of_log, span)

    @property
    def reasons(self) -> NDArray[np.str_]:
        """The name of each exit's reason."""
        return np.array(self.names, dtype=np.str_)[self.reason] if len(self) else np.zeros(0, dtype="<U1")

    def words(self, row: int) -> str:
        """One exit in words: port, size, direction; fault address and cause; names of registers.

        Args:
            row: its place in this table; negative: from the end.

        Raises:
            MisuseError: there is no such row.
        """
        if not len(self):
            raise MisuseError(f"row={row!r:.40}: this table has no exits")
        row = integer(row, "row", -len(self), len(self) - 1)
        words = ""
        if self.isa[row]:
            numbers = [int(getattr(self, name)[row]) for name in _NUMBERS]
            words = describe_exit(int(self.isa[row]), int(self.number[row]), *numbers)
        at = int(self.log_row[row])
        if at >= 0:
            said = exit_words(self.log.data[at])
            kind = run_name(int(self.log.data["exit"][at]), int(self.log.data["error"][at]))
            return f"{words}; to user space: {kind} {said}".strip("; ") if self.isa[row] else said
        return words

    def take(self, at: NDArray[Any]) -> ExitTable:
        """Those rows, by place or by a mask."""
        columns = {name: getattr(self, name)[at] for name in _COLUMNS}
        return ExitTable(names=self.names, log=self.log, **columns)

    def between(self, start_ns: int, end_ns: int) -> ExitTable:
        """Only those in [start_ns, end_ns)."""
        start_ns, end_ns = integer(start_ns, "start_ns"), integer(end_ns, "end_ns")
        first, last = np.searchsorted(self.time_ns, (start_ns, end_ns))
        return self.take(np.arange(first, last))

    def to_dataframe(self) -> pd.DataFrame:
        """A pandas frame; ``words`` is not in it, for it costs microseconds a row."""
        import pandas as pd

        columns: dict[str, Any] = {name: getattr(self, name) for name in _COLUMNS if name not in ("reason", "log_row")}
        frame = pd.DataFrame(columns)
        frame.insert(2, "reason", pd.Categorical.from_codes(self.reason.astype(np.int32), categories=list(self.names)))
        return frame

    def __repr__(self) -> str:
        counts = np.bincount(self.reason, minlength=len(self.names))
        most = np.argsort(-counts, kind="stable")[:5]
        shown = ", ".join(f"{self.names[n]} {int(counts[n]):,}" for n in most if counts[n])
        return f"<ExitTable: {counted(len(self), 'exit')}{'; ' if shown else ''}{shown}>"


_COLUMNS = (
    "time_ns",
    "vcpu",
    "reason",
    "rip",
    "guest_ns",
    "kvm_ns",
    "user_ns",
    "outside_ns",
    "user_exit",
    "isa",
    "number",
    *_NUMBERS,
    "log_row",
)


def exit_table(events: EventTable, log: RunLog) -> ExitTable:
    """Makes the table out of a trace's two sources; either may be empty."""
    vcpus = {int(v) for v in np.unique(log.vcpu)}
    exits, entries = events.get("kvm_exit"), events.get("kvm_entry")
    if exits is not None:
        vcpus |= {int(v) for v in np.unique(exits.vcpu) if v >= 0}
    emulated, left = events.get("kvm_emulate_insn"), events.get("kvm_userspace_exit")
    gaps = [gap for gap in events.gaps if gap.cpu >= 0]
    parts = []
    for vcpu in sorted(vcpus):
        returns = left.time_ns[left.vcpu == vcpu] if left is not None else np.zeros(0, np.int64)
        part = _of_vcpu(vcpu, exits, entries, returns, log, gaps)
        _find_instructions(part, vcpu, emulated, log)
        parts.append(part)
    parts = parts or [_rows(0)]
    joined = parts[0]
    if len(parts) > 1:
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if np.any(joined["time_ns"][1:] < joined["time_ns"][:-1]):
        at = np.argsort(joined["time_ns"], kind="stable")
        joined = {name: column[at] for name, column in joined.items()}
    names, reason = _name_reasons(joined, exits)
    del joined["error"]
    return ExitTable(names=names, reason=reason, log=log, **joined)


def _rows(n: int) -> dict[str, NDArray[Any]]:
    return {
        "time_ns": np.zeros(n, np.int64),
        "vcpu": np.zeros(n, np.int16),
        "rip": np.zeros(n, np.uint64),
        "guest_ns": np.full(n, NOT_TOLD, np.int64),
        "kvm_ns": np.full(n, NOT_TOLD, np.int64),
        "user_ns": np.zeros(n, np.int64),
        "outside_ns": np.zeros(n, np.int64),
        "user_exit": np.full(n, NO_USER_EXIT, np.int16),
        "isa": np.zeros(n, np.uint8),
        "number": np.zeros(n, np.uint32),
        **{name: np.zeros(n, np.uint64) for name in _NUMBERS},
        "log_row": np.full(n, -1, np.int64),
        "error": np.zeros(n, np.int32),
    }


def _of_vcpu(
    vcpu: int,
    exits: EventColumns | None,
    entries: EventColumns | None,
    returns: NDArray[np.int64],
    log: RunLog,
    gaps: Sequence[Gap],
) -> dict[str, NDArray[Any]]:
    of_log = np.flatnonzero(log.vcpu == vcpu)
    runs, answered = log.data[of_log], log.answered[of_log]
    under_way = [enter for of, _, enter in log.under_way if of == vcpu]
    gap = _gaps(runs, under_way)
    # Behind these, KVM_RUNs are lost: nothing tells what the time until the next one was.
    holes = np.array([left for of, left in log.holes if of == vcpu], np.int64)
    gap[np.isin(runs["leave_ns"], holes)] = 0
    mine = exits.take(exits.vcpu == vcpu) if exits is not None else None
    if mine is None or not len(mine):
        return _of_runs(vcpu, runs, of_log, gap, answered)
    rows = _rows(len(mine))
    rows["vcpu"][:] = vcpu
    rows["time_ns"] = mine.time_ns
    rows["isa"] = mine["isa"].astype(np.uint8) if "isa" in mine.fields else np.full(len(mine), 0, np.uint8)
    rows["number"] = mine["exit_reason"].astype(np.uint32)
    for name, source in (("rip", "guest_rip"), *((name, name) for name in _NUMBERS)):
        if source in mine.fields:
            rows[name] = mine[source].astype(np.uint64)
    began = entries.time_ns[entries.vcpu == vcpu] if entries is not None else np.zeros(0, np.int64)
    _spans(rows, began, np.unique([gap.time_ns for gap in gaps]).astype(np.int64))
    followed = np.searchsorted(runs["enter_ns"], holes, side="left")
    for left, place in zip(holes.tolist(), followed.tolist(), strict=True):
        # Of these exits any may have gone to user space.
        end = runs["enter_ns"][place] if place < len(runs) else np.iinfo(np.int64).max
        last = np.searchsorted(mine.time_ns, left, side="right") - 1
        rows["kvm_ns"][max(last, 0) : np.searchsorted(mine.time_ns, end)] = NOT_TOLD
    following = _following(mine.time_ns, began)
    rows["kvm_ns"][_beside_the_log(mine.time_ns, following, runs, under_way, returns)] = NOT_TOLD
    hidden = _hidden(mine, following, gaps)
    alone = _to_user_space(rows, runs, of_log, gap, answered, following=following, hidden=hidden)
    if len(alone):
        others = _of_runs(vcpu, runs[alone], of_log[alone], gap[alone], answered[alone])
        # Behind a gap: of the time in KVM_RUN the exits that are told have had their parts.
        begun, ended = (np.searchsorted(mine.time_ns, runs[name][alone]) for name in ("enter_ns", "leave_ns"))
        others["guest_ns"][ended > begun] = NOT_TOLD
        rows = {name: np.concatenate([rows[name], others[name]]) for name in rows}
    return rows


def _gaps(runs: NDArray[np.void], under_way: Sequence[int]) -> NDArray[np.int64]:
    # After each KVM_RUN: how long until the next, which may not have ended yet.
    gap = np.zeros(len(runs), np.int64)
    if len(runs):
        gap[:-1] = runs["enter_ns"][1:] - runs["leave_ns"][:-1]
        gap[-1] = max(0, min(under_way, default=0) - int(runs["leave_ns"][-1]))
    return gap


def _beside_the_log(
    time: NDArray[np.int64],
    following: NDArray[np.int64],
    runs: NDArray[np.void],
    under_way: Sequence[int],
    returns: NDArray[np.int64],
) -> NDArray[np.bool_]:
    # Between which exits and what followed user space was without a row of the log that tells how long: KVM_RUNs of
    # before the log began, of behind its end, and those whose rows are not read yet. `returns`: kvm_userspace_exit.
    if not len(runs) and not under_way:
        return np.zeros(len(time), np.bool_)
    enters = np.sort(np.concatenate([runs["enter_ns"], np.array(under_way, np.int64)]))
    beside = np.asarray((time < enters[0]) & (following > enters[0]), np.bool_)
    if not under_way:
        beside |= following > runs["leave_ns"][-1]
        if runs["detail"][-1] == UNTOLD:
            # Made of kvm_userspace_exit: of KVM_RUNs that did not come back there is no row.
            beside &= time <= runs["leave_ns"][-1]
    if len(returns) and len(time):
        row = np.searchsorted(runs["enter_ns"], returns, side="right") - 1
        within = row >= 0
        within[within] &= returns[within] <= runs["leave_ns"][row[within]]
        unknown = returns[~within]
        at = np.searchsorted(time, unknown, side="right") - 1
        at = at[(at >= 0) & (unknown < following[np.maximum(at, 0)])]
        beside[at] = True
    return beside


def _spans(rows: dict[str, NDArray[Any]], began: NDArray[np.int64], gaps: NDArray[np.int64]) -> None:
    # Times in the guest and out of it, from the entries; where one is missing (lost, or not asked for), not told. Nor
    # across a gap: the entry behind it may be the hundredth since.
    time = rows["time_ns"]
    if not len(began):
        return
    behind = np.searchsorted(began, time, side="right")
    entered = began[np.maximum(behind - 1, 0)]
    before = np.concatenate([[np.iinfo(np.int64).min], time[:-1]])
    good = (behind > 0) & (entered >= before) & ~_across(gaps, entered, time)
    rows["guest_ns"][good] = (time - entered)[good]
    resumed = began[np.minimum(behind, len(began) - 1)]
    after = np.concatenate([time[1:], [np.iinfo(np.int64).max]])
    good = (behind < len(began)) & (resumed <= after) & ~_across(gaps, time, resumed)
    rows["kvm_ns"][good] = (resumed - time)[good]


def _following(time: NDArray[np.int64], began: NDArray[np.int64]) -> NDArray[np.int64]:
    # When the kernel told of the vcpu next: an entry, or an exit whose entry is lost.
    last = np.iinfo(np.int64).max
    after = np.concatenate([time[1:], [last]])
    if not len(began):
        return after
    behind = np.searchsorted(began, time, side="right")
    entered = np.where(behind < len(began), began[np.minimum(behind, len(began) - 1)], last)
    return np.asarray(np.minimum(after, entered), dtype=np.int64)


def _hidden(exits: EventColumns, following: NDArray[np.int64], gaps: Sequence[Gap]) -> NDArray[np.bool_]:
    # Behind which exits another may be lost: a gap of the processor they were on, or of that of the next one.
    hidden = np.zeros(len(exits), np.bool_)
    of_cpu: dict[int, list[int]] = {int(cpu): [] for cpu in np.unique(exits.cpu)} if gaps else {}
    for gap in gaps:
        of_cpu.get(gap.cpu, []).append(gap.time_ns)
    for cpu, times in of_cpu.items():
        here = exits.cpu == cpu
        here[:-1] |= here[1:]
        hidden |= here & _across(np.unique(np.array(times, np.int64)), exits.time_ns, following)
    return hidden


def _across(gaps: NDArray[np.int64], start: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.bool_]:
    # A gap's time is that of the first event behind it.
    if not len(gaps):
        return np.zeros(len(start), np.bool_)
    at = np.searchsorted(gaps, start, side="right")
    return (at < len(gaps)) & (gaps[np.minimum(at, len(gaps) - 1)] <= end)


def _to_user_space(
    rows: dict[str, NDArray[Any]],
    runs: NDArray[np.void],
    of_log: NDArray[np.int64],
    gap: NDArray[np.int64],
    answered: NDArray[np.bool_],
    *,
    following: NDArray[np.int64],
    hidden: NDArray[np.bool_],
) -> NDArray[np.int64]:
    # Which exits KVM_RUN returned with, and what then passed; returns the KVM_RUNs that had no exit of the processor,
    # or of which a gap hides it. `following`: when what the kernel told next happened.
    if not len(runs):
        return np.zeros(0, np.int64)
    time = rows["time_ns"]
    at = np.searchsorted(time, runs["leave_ns"], side="right") - 1
    has = (at >= 0) & (time[np.maximum(at, 0)] >= runs["enter_ns"])
    # Nor did it with an exit behind which the guest was entered once more.
    has[has] = ~hidden[at[has]] & (following[at[has]] > runs["leave_ns"][has])
    which, at = np.flatnonzero(has), at[has]
    rows["user_exit"][at] = runs["exit"][which].astype(np.int16)
    rows["log_row"][at] = of_log[which]
    rows["error"][at] = runs["error"][which]
    took = gap[which]
    spent = answered[which]
    rows["user_ns"][at[spent]] = took[spent]
    rows["outside_ns"][at[~spent]] = took[~spent]
    # Gaps behind KVM_RUNs of their own lie in the span of the exit before them, too.
    other = np.flatnonzero(~has)
    idle = np.zeros(len(time), np.int64)
    np.add.at(idle, at, took)
    if len(other):
        into = np.searchsorted(time, runs["leave_ns"][other], side="right") - 1
        # Of those behind an entry that is told nothing lies in that span.
        within = (into >= 0) & (runs["enter_ns"][other] >= time[into]) & (runs["leave_ns"][other] < following[into])
        whole = gap[other] + runs["leave_ns"][other] - runs["enter_ns"][other]
        np.add.at(idle, into[within], whole[within])
    told = rows["kvm_ns"] != NOT_TOLD
    rows["kvm_ns"][told] = np.maximum(rows["kvm_ns"][told] - idle[told], 0)
    # The last exit that is told: KVM had it until KVM_RUN returned, if that was the last one, or those behind it have
    # rows of their own, as where the guest stays halted. If one is under way, nothing tells yet what it will be.
    ended = (at == len(time) - 1) & ((which < len(runs) - 1) | (took == 0))
    open_ended = ~told[at] & (rows["guest_ns"][at] != NOT_TOLD) & ended
    rows["kvm_ns"][at[open_ended]] = (runs["leave_ns"][which] - time[at])[open_ended]
    return other


def _of_runs(
    vcpu: int,
    runs: NDArray[np.void],
    of_log: NDArray[np.int64],
    gap: NDArray[np.int64],
    answered: NDArray[np.bool_],
) -> dict[str, NDArray[Any]]:
    rows = _rows(len(runs))
    rows["vcpu"][:] = vcpu
    rows["time_ns"] = runs["leave_ns"].copy()
    rows["rip"] = runs["rip"].copy()
    rows["guest_ns"] = runs["leave_ns"] - runs["enter_ns"]
    rows["user_ns"] = np.where(answered, gap, 0)
    rows["outside_ns"] = np.where(answered, 0, gap)
    rows["user_exit"] = runs["exit"].astype(np.int16)
    rows["number"] = runs["exit"].copy()
    rows["error"] = runs["error"].copy()
    rows["log_row"] = of_log
    return rows


def _find_instructions(rows: dict[str, NDArray[Any]], vcpu: int, emulated: EventColumns | None, log: RunLog) -> None:
    # KVM_RUN comes back behind a HLT, and behind what KVM has emulated to its end.
    alone = np.flatnonzero((rows["isa"] == 0) & (rows["log_row"] >= 0))
    if not len(alone):
        return
    runs = log.data[rows["log_row"][alone]]
    halted = (runs["exit"] == ExitReason.HLT) & (runs["error"] == 0) & (runs["rip"] != 0)
    rows["rip"][alone[halted]] -= np.uint64(1)
    if emulated is None or "rip" not in emulated.fields:
        return
    mine = emulated.take(emulated.vcpu == vcpu)
    if not len(mine):
        return
    at = np.searchsorted(mine.time_ns, runs["leave_ns"], side="right") - 1
    inside = (at >= 0) & (mine.time_ns[np.maximum(at, 0)] >= runs["enter_ns"])
    rows["rip"][alone[inside]] = mine["rip"][at[inside]]


def _distinct(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # A handful of values in millions of places: those of a part first, and then what is not among them.
    found = np.unique(keys[:: max(1, len(keys) // 1000)])
    while len(found):
        at = np.minimum(np.searchsorted(found, keys), len(found) - 1)
        others = keys[found[at] != keys]
        if not len(others):
            break
        found = np.union1d(found, np.unique(others[:: max(1, len(others) // 1000)]))
    return found


def _name_reasons(
    rows: Mapping[str, NDArray[Any]], exits: EventColumns | None
) -> tuple[tuple[str, ...], NDArray[np.uint16]]:
    tables = parse_reason_table(exits.format.print_format) if exits is not None else {}
    error = np.where(rows["isa"] == 0, rows["error"], 0).astype(np.uint64)
    key = rows["isa"].astype(np.uint64) << np.uint64(48) | error << np.uint64(32) | rows["number"].astype(np.uint64)
    distinct = _distinct(np.asarray(key, dtype=np.uint64))
    place = np.searchsorted(distinct, key)

    def name_of(packed: int) -> str:
        isa, error, number = packed >> 48, packed >> 32 & 0xFFFF, packed & 0xFFFFFFFF
        if not isa:
            return run_name(number, error)
        return reason_name(isa, number, names=tables)

    words = [name_of(int(packed)) for packed in distinct]
    names = tuple(dict.fromkeys(words))
    index = {name: n for n, name in enumerate(names)}
    lookup = np.array([index[word] for word in words], dtype=np.uint16)
    reason = lookup[place] if len(place) else np.zeros(0, np.uint16)
    return names, reason.reshape(-1)
