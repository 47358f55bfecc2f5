"""A real trace of kvm_amd with a log of its KVM_RUNs, a gap, a mark, and an event of nobody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmbench.host.provenance import Provenance
from kvmbench.traces.event_table import EventTable, Gap
from kvmbench.traces.imports import read_trace_dat
from kvmbench.traces.run_log import ROW, RunLog
from kvmbench.traces.trace import Mark, Trace, TraceData

FILES = Path(__file__).parents[1] / "files"
EMULATED = Provenance("appliance", kernel="6.1.0", module="kvm_amd", emulator="QEMU 7.2")


@pytest.fixture
def traced() -> Trace:
    """57 exits of one vcpu, of which 26 went to user space; the KVM_RUNs lie around them as the events' times say."""
    events = read_trace_dat(FILES / "amd-v6.dat").events
    left, entered = events["kvm_userspace_exit"], events["kvm_entry"].time_ns
    rows: Any = np.zeros(len(left), ROW)
    rows["leave_ns"] = left.time_ns + 1000
    behind = np.searchsorted(entered, left.time_ns)
    rows["enter_ns"][1:] = entered[behind[:-1]] - 1000
    rows["enter_ns"][0] = entered[0] - 1000
    rows["exit"] = left["reason"]
    rows["where"], rows["value"], rows["detail"] = 0x3F8, 0x41, 1 | 1 << 8 | 1 << 16
    events["kvm_page_fault"].vcpu[-1] = -1
    last = int(events["kvm_exit"].time_ns[-1])
    table = EventTable(events.values(), gaps=[Gap(last, 0, 12), Gap(last + 5, 1, 0)])
    log = RunLog(np.zeros(len(rows), np.int16), rows, lost=3)
    marks = (Mark(last - 50, 'before "it"', "host", -1), Mark(last - 40, "0x7", "guest", 0))
    return Trace(TraceData(table, log, EMULATED, marks))
