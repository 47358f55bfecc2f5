"""Chrome's JSON, read back with json, against the tables."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from kvmbench.traces.event_table import EventTable
from kvmbench.traces.export import write_chrome
from kvmbench.traces.run_log import ROW, RunLog
from kvmbench.traces.trace import Trace, TraceData


def read(path: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    whole = json.loads(path.read_text(), parse_float=Decimal)
    return whole, whole["traceEvents"]


def ns(value: Decimal) -> int:
    exact = value * 1000
    assert exact == int(exact)
    return int(exact)


def test_slices_have_the_times_of_the_table_to_the_nanosecond(traced, tmp_path):
    path = tmp_path / "t.json"
    write_chrome(path, traced)
    exits = traced.exits
    found = [e for e in read(path)[1] if e["ph"] in "Xi" and "rip" in e["args"] and e["name"] in exits.names]
    found.sort(key=lambda e: e["ts"])
    assert [e["name"] for e in found] == exits.reasons.tolist()
    assert [ns(e["ts"]) for e in found] == exits.time_ns.tolist()
    assert [int(e["args"]["rip"], 16) for e in found] == exits.rip.tolist()
    assert [int(e["args"]["info2"], 16) for e in found] == exits.info2.tolist()
    assert [e["args"].get("words", "") for e in found] == [exits.words(n) for n in range(57)]
    whole = exits.kvm_ns + exits.user_ns + exits.outside_ns
    assert [ns(e["dur"]) for e in found[:-1]] == whole.tolist()[:-1]
    user = [e for e in read(path)[1] if e["name"] == "user space"]
    assert sorted(ns(e["dur"]) for e in user) == sorted(n for n in exits.user_ns.tolist() if n)


def test_events_marks_and_losses_are_there_and_tracks_have_names(traced, tmp_path):
    path = tmp_path / "t.json"
    write_chrome(path, traced)
    whole, entries = read(path)
    names = {e["tid"]: e["args"]["name"] for e in entries if e["name"] == "thread_name"}
    assert {e["tid"] for e in entries if "tid" in e} == names.keys()
    assert sorted(names.values()) == [
        "lost of logs",
        "lost on processor 0",
        "lost on processor 1",
        "marks",
        "processor 0 of the host",
        "vcpu 0",
    ]
    pio = [e for e in entries if e["name"] == "kvm_pio"]
    assert [ns(e["ts"]) for e in pio] == traced.events["kvm_pio"].time_ns.tolist()
    assert pio[0]["args"] == {"rw": 1, "port": 0x3F8, "size": 1, "count": 1, "val": 0x41}
    assert [e["args"] for e in entries if e["name"].startswith("mark ")] == [
        {"mark": 'before "it"', "source": "host"},
        {"mark": "0x7", "source": "guest"},
    ]
    assert [e["args"]["lost"] for e in entries if e["name"].endswith("lost")] == [12, 0, 3]
    assert whole["otherData"]["clock"] == "CLOCK_MONOTONIC, emulator time"
    assert whole["otherData"]["notes"] == list(traced.notes) != []
    assert "emulator time" in entries[0]["args"]["name"]


def test_numbers_beyond_a_double_are_text_in_hex(traced, tmp_path):
    faults = traced.events["kvm_page_fault"]
    faults.data["fault_address"][0] = 0xFFFF_8000_0000_0001
    write_chrome(tmp_path / "t.json", traced)
    entries = read(tmp_path / "t.json")[1]
    first = next(e for e in entries if e["name"] == "kvm_page_fault")
    assert first["args"]["fault_address"] == "0xffff800000000001"


def test_an_empty_trace_is_json_too(tmp_path):
    log = RunLog(np.zeros(0, np.int16), np.zeros(0, ROW))
    write_chrome(tmp_path / "t.json", Trace(TraceData(EventTable(), log)))
    assert [e["name"] for e in read(tmp_path / "t.json")[1]] == ["process_name"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(traced, tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    path.write_text("old")
    monkeypatch.setattr(traced.exits.__class__, "words", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_chrome(path, traced)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
