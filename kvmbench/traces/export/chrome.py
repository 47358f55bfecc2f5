"""Chrome's JSON trace event format, which chrome://tracing, Perfetto's viewer and speedscope open.

Times are microseconds there; three digits behind the point keep the nanoseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from kvmbench.traces.event_table import EventTable
from kvmbench.traces.exits import ExitTable
from kvmbench.traces.export.timeline import (
    EXIT,
    NAMES,
    Words,
    clock_name,
    lost_of,
    moments_of,
    other_kinds,
    slices_of,
    text_file,
    vcpu_name,
    vcpus_of,
    without_length,
)
from kvmbench.traces.run_log import RunLog

if TYPE_CHECKING:
    from kvmbench.traces.trace import Trace

# One process with a thread a track: vcpus from 0, then processors of the host, then what belongs to no one.
_PID = 1
_CPU_TRACKS, _LOST_TRACKS, _MARK_TRACK = 100_000, 200_000, 300_000
# A JSON number is a double: what may be larger is written as text in hex.
_EXACT = 1 << 53


def write_chrome(path: Path, trace: Trace) -> None:
    """Writes a trace as JSON, one event after the other.

    Args:
        path: the file; one that is there is replaced.
        trace: one that does not run.

    Raises:
        OSError: it cannot be written.
    """
    with text_file(path) as file:
        about = {
            "host": str(trace.provenance),
            "clock": clock_name(trace.data.clock, trace.provenance),
            "provenance": json.loads(trace.provenance.to_json()),
            "notes": list(trace.notes),
        }
        file.write('{"displayTimeUnit":"ns","otherData":' + json.dumps(about) + ',"traceEvents":[\n')
        _write(_Lines(file), trace)
        file.write("\n]}\n")


class _Lines:
    # Entries of the list, with commas between them.
    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._first = True
        self._named: set[int] = set()

    def add(self, text: str) -> None:
        self._file.write(text if self._first else ",\n" + text)
        self._first = False

    def name(self, tid: int, name: str) -> None:
        if tid in self._named:
            return
        self._named.add(tid)
        head = f'{{"ph":"M","pid":{_PID},"tid":{tid},"name":'
        self.add(f'{head}"thread_name","args":{{"name":{json.dumps(name)}}}}}')
        self.add(f'{head}"thread_sort_index","args":{{"sort_index":{tid}}}}}')

    def slice(self, tid: int, name: str, start_ns: int, end_ns: int, args: str) -> None:
        # Not json.dumps: this is the line of which there are millions. `name` and `args` are JSON already.
        self.add(
            f'{{"ph":"X","pid":{_PID},"tid":{tid},"ts":{_us(start_ns)},"dur":{_us(end_ns - start_ns)},'
            f'"name":{name},"args":{args}}}'
        )

    def moment(self, tid: int, name: str, time_ns: int, args: str) -> None:
        self.add(f'{{"ph":"i","s":"t","pid":{_PID},"tid":{tid},"ts":{_us(time_ns)},"name":{name},"args":{args}}}')


def _us(ns: int) -> str:
    sign = "-" if ns < 0 else ""
    return f"{sign}{abs(ns) // 1000}.{abs(ns) % 1000:03d}"


def _write(
    out: _Lines,
    trace: Trace,
) -> None:
    data, exits = trace.data, trace.exits
    events, log, marks, provenance, labels = data.events, data.log, data.marks, data.provenance, data.labels
    process = json.dumps(f"KVM: {provenance}; {clock_name(data.clock, provenance)}")
    out.add(f'{{"ph":"M","pid":{_PID},"name":"process_name","args":{{"name":{process}}}}}')
    args_of = _exit_args(exits)
    reasons = [json.dumps(name) for name in exits.names]
    kinds = {kind: json.dumps(name) for kind, name in NAMES.items()}
    for vcpu in vcpus_of(events, exits):
        out.name(vcpu, vcpu_name(vcpu, labels))
        for start, end, kind, row in slices_of(exits, vcpu):
            if kind == EXIT:
                out.slice(vcpu, reasons[exits.reason[row]], start, end, args_of(row))
            else:
                out.slice(vcpu, kinds[kind], start, end, "{}")
        for row in without_length(exits, vcpu):
            out.moment(vcpu, reasons[exits.reason[row]], int(exits.time_ns[row]), args_of(int(row)))
    for columns in other_kinds(events, with_print=not marks):
        name = json.dumps(columns.name)
        for time, vcpu, cpu, values in moments_of(columns):
            tid = vcpu if vcpu >= 0 else _CPU_TRACKS + cpu
            if vcpu < 0:
                out.name(tid, f"processor {cpu} of the host")
            out.moment(tid, name, time, json.dumps({key: _safe(value) for key, value in values.items()}))
    for mark in marks:
        tid = mark.vcpu if mark.vcpu >= 0 else _MARK_TRACK
        out.name(tid, "marks" if mark.vcpu < 0 else vcpu_name(mark.vcpu, labels))
        args = json.dumps({"mark": mark.text, "source": mark.source})
        out.moment(tid, json.dumps(f"mark {mark.text}"), mark.time_ns, args)
    _lost(out, events, log)


def _lost(out: _Lines, events: EventTable, log: RunLog) -> None:
    for lost in lost_of(events):
        tid = _LOST_TRACKS + 1 + lost.cpu
        out.name(tid, f"lost on processor {lost.cpu}" if lost.cpu >= 0 else "lost of logs")
        out.slice(tid, json.dumps(lost.name), lost.start_ns, lost.end_ns, f'{{"lost":{lost.count}}}')
    if log.lost and not any(gap.cpu < 0 for gap in events.gaps):
        out.name(_LOST_TRACKS, "lost of logs")
        end = int(log["leave_ns"].max()) if len(log) else 0
        out.moment(_LOST_TRACKS, json.dumps(f"{log.lost:,} rows of the log lost"), end, f'{{"lost":{log.lost}}}')


def _exit_args(exits: ExitTable) -> Callable[[int], str]:
    words = Words(exits)

    def args(row: int) -> str:
        told = f',"info1":"{int(exits.info1[row]):#x}","info2":"{int(exits.info2[row]):#x}"' if exits.isa[row] else ""
        said = words(row)
        return f'{{"rip":"{int(exits.rip[row]):#x}"{told}' + (f',"words":{json.dumps(said)}}}' if said else "}")

    return args


def _safe(value: Any) -> Any:
    if isinstance(value, int) and not -_EXACT < value < _EXACT:
        return f"{value:#x}"
    if isinstance(value, list):
        return [_safe(one) for one in value]
    return value.hex() if isinstance(value, bytes) else value
