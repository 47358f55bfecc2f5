"""KVM_RUNs of somebody else's trace: there is no log of them, but KVM says when it goes to user space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvmbench.traces.event_table import EventColumns, EventTable
from kvmbench.traces.format import TAIL
from kvmbench.traces.run_log import ROW, UNTOLD, RunLog
from kvmbench.uapi.exit_reasons import ExitReason

#: What is to be known of a log made here.
NOTE = (
    "KVM_RUNs are taken from kvm_userspace_exit: the time of user space goes on to {until}, "
    "so KVM's way {way} counts as user space's"
)
_LAST = np.iinfo(np.int64).max


def log_of(events: EventTable) -> tuple[RunLog, str]:
    """A row for each kvm_userspace_exit, and a sentence on what its times are; none where nothing tells their ends.

    A KVM_RUN ends with that event. The next begins with the load of the guest's FPU (kvm_fpu), or where that was not
    traced with kvm_entry, some microseconds late.
    """
    left = events.get("kvm_userspace_exit")
    if left is None or not _has_numbers(left, ("reason",)):
        return RunLog(np.zeros(0, np.int16), np.zeros(0, ROW)), ""
    loads, entries = _loads(events.get("kvm_fpu")), events.get("kvm_entry")
    parts, vcpus = [], []
    late = False
    for vcpu in (int(v) for v in np.unique(left.vcpu) if v >= 0):
        mine = left.take(left.vcpu == vcpu)
        began = _of(loads, vcpu)
        if not len(began):
            began = _of(entries, vcpu)
            late = late or bool(len(began))
        if not len(began):
            continue
        parts.append(_rows(mine, began, events, vcpu))
        vcpus.append(np.full(len(mine), vcpu, np.int16))
    if not parts:
        return RunLog(np.zeros(0, np.int16), np.zeros(0, ROW)), ""
    data, vcpu_column = np.concatenate(parts), np.concatenate(vcpus)
    at = np.argsort(data["enter_ns"], kind="stable")
    until, way = ("kvm_entry", "into the guest") if late else ("the load of the guest's FPU", "to there")
    return RunLog(vcpu_column[at], data[at]), NOTE.format(until=until, way=way)


def _has_numbers(columns: EventColumns, names: tuple[str, ...]) -> bool:
    types: Mapping[str, Any] = columns.data.dtype.fields or {}
    return all(name in types and types[name][0].kind in "iu" for name in names)


def _loads(columns: EventColumns | None) -> EventColumns | None:
    if columns is None:
        return None
    if _has_numbers(columns, ("load",)):
        return columns.take(columns["load"] != 0)
    if TAIL in (columns.data.dtype.names or ()):
        return columns.take(np.array([columns.text(row) == "load" for row in range(len(columns))], dtype=bool))
    return None


def _of(columns: EventColumns | None, vcpu: int) -> NDArray[np.int64]:
    return columns.time_ns[columns.vcpu == vcpu] if columns is not None else np.zeros(0, np.int64)


def _rows(mine: EventColumns, began: NDArray[np.int64], events: EventTable, vcpu: int) -> Any:
    rows: Any = np.zeros(len(mine), ROW)
    left = mine.time_ns
    behind = np.searchsorted(began, left[:-1], side="right")
    entered = np.append(began, _LAST)[behind]
    rows["leave_ns"] = left
    # Where KVM_RUN came back without a beginning that was told, it had no length.
    rows["enter_ns"][1:] = np.minimum(entered, left[1:])
    rows["enter_ns"][0] = min(int(began[0]), int(left[0]))
    rows["exit"] = mine["reason"].astype(np.uint32)
    if _has_numbers(mine, ("errno",)):
        rows["error"] = np.maximum(-mine["errno"].astype(np.int64), 0).astype(np.int32)
    rows["thread"] = mine.tid.astype(np.uint32)
    rows["detail"] = UNTOLD
    _accesses(rows, events.get("kvm_pio"), vcpu, ExitReason.IO, ("port", "size", "rw", "count"))
    _accesses(rows, events.get("kvm_mmio"), vcpu, ExitReason.MMIO, ("gpa", "len", "type", ""))
    return rows


def _accesses(rows: Any, told: EventColumns | None, vcpu: int, exit: int, names: tuple[str, str, str, str]) -> None:
    # The access that the exit is about: the last one in its KVM_RUN. A read is told when it is done, behind the exit.
    where, size, kind, count = names
    if told is None or not _has_numbers(told, (where, size, kind)):
        return
    told = told.take(told.vcpu == vcpu)
    at = np.searchsorted(told.time_ns, rows["leave_ns"], side="right") - 1
    found = np.flatnonzero(
        (rows["exit"] == exit) & (rows["error"] == 0) & (at >= 0) & (np.append(told.time_ns, 0)[at] >= rows["enter_ns"])
    )
    if not len(found):
        return
    at = at[found]
    # kvm_pio: 1 is a write; kvm_mmio: 2 is.
    write = told[kind][at] == (1 if count else 2)
    times = told[count][at].astype(np.int64) if _has_numbers(told, (count,)) else np.ones(len(at), np.int64)
    rows["where"][found] = told[where][at].astype(np.uint64)
    if _has_numbers(told, ("val",)):
        rows["value"][found] = told["val"][at].astype(np.uint64)
    detail = told[size][at].astype(np.int64) & 0xFF | write.astype(np.int64) << 8 | (times & 0x7FFF) << 16
    rows["detail"][found] = detail.astype(np.uint32)
