"""Traces as files of our own, and files that only look like such."""

from __future__ import annotations

import io
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import LoadError
from kvmbench.traces.event_table import EventTable, Gap
from kvmbench.traces.export.timeline import Lost, lost_of, vcpu_name
from kvmbench.traces.run_log import ROW, RunLog
from kvmbench.traces.trace import Trace, TraceData

FILES = Path(__file__).parent / "files"
Members = dict[str, bytes]


@pytest.fixture(scope="module")
def members(tmp_path_factory) -> Members:
    """What is in a file of ours, by name."""
    path = tmp_path_factory.mktemp("saved") / "t.npz"
    kb.open_trace(FILES / "amd-v6.dat").save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def about_of(members: Members) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(np.load(io.BytesIO(members["about.npy"])).tobytes())
    return told


def with_about(members: Members, **changed: object) -> Members:
    """The file's members with something else in the JSON."""
    file = io.BytesIO()
    np.save(file, np.frombuffer(json.dumps(about_of(members) | changed).encode(), np.uint8))
    return members | {"about.npy": file.getvalue()}


@pytest.mark.parametrize("name", ["about.npy", "log.npy", "kvm_exit.data.npy", "kvm_exit.time_ns.npy"])
def test_a_member_whose_head_is_no_python_is_damage(members, tmp_path, name):
    # numpy reads old heads with Python's tokenizer, which has an exception of its own.
    data = bytearray(members[name])
    data[data.index(b"}")] = ord("(")
    with pytest.raises(LoadError, match="damaged"):
        kb.open_trace(written(tmp_path / "t.npz", members | {name: bytes(data)}))


@pytest.mark.parametrize(
    "changed",
    [
        {"bad_pages": 1e400},
        {"unknown": -1},
        {"gaps": [[0, 0, 1 << 64]]},
        {"gaps": [[1 << 63, 0, 1]]},
        {"gaps": [[0, 1 << 16, 1]]},
        {"gaps": [[0, -2, 1]]},
        {"marks": [[1 << 63, "m", "host", -1]]},
        {"marks": [[0, "m", "host", 1 << 40]]},
        {"clock_error_ns": 1e400},
        {"log_lost": 1 << 64},
        {"log_holes": [[0, 1 << 63]]},
        {"notes": ["half of a \ud800 pair"]},
        {"labels": ["\udfff"]},
        {"symbols": {"main": "0x1" + "0" * 40}},
    ],
    ids=lambda changed: "-".join(f"{name}={value}"[:40] for name, value in changed.items()).encode().decode("ascii"),
)
def test_numbers_and_texts_that_no_trace_has_are_damage(members, tmp_path, changed):
    # They would go on to fail where it is drawn or exported.
    with pytest.raises(LoadError, match="damaged"):
        kb.open_trace(written(tmp_path / "t.npz", with_about(members, **changed)))


def test_the_limits_themselves_are_read(members, tmp_path):
    most = (1 << 63) - 1
    changed = with_about(members, gaps=[[most, 0xFFFF, most], [-most, -1, 0]], marks=[[most, "m", "guest", -1]])
    trace = kb.open_trace(written(tmp_path / "t.npz", changed))
    assert [gap.time_ns for gap in trace.data.events.gaps] == [-most, most]


def test_exits_of_a_vcpu_that_nothing_names_do_not_get_the_last_ones_label(tmp_path):
    assert vcpu_name(-1, ("first", "last")) == "vcpu -1"
    rows = np.zeros(3, ROW)
    rows["leave_ns"], rows["enter_ns"] = [10, 20, 30], [5, 15, 25]
    data = kb.open_trace(FILES / "local-perf-script.txt").data
    log = RunLog(np.array([-5, -1, 0], np.int16), rows)
    trace = Trace(TraceData(EventTable(), log, data.provenance, labels=("only",)))
    for suffix in ("csv", "json"):
        trace.save(tmp_path / f"t.{suffix}")
    assert [line.split(",")[1] for line in (tmp_path / "t.csv").read_text().splitlines()[1:]] == [
        "vcpu -5",
        "vcpu -1",
        "only",
    ]


def test_gaps_of_thousands_of_processors_take_no_time():
    events = kb.open_trace(FILES / "amd-v6.dat").events
    gaps = [Gap(n, cpu, 1) for n, cpu in enumerate(range(1, 1 << 15))]
    started = time.perf_counter()
    lost = lost_of(EventTable(events.values(), gaps=gaps))
    assert time.perf_counter() - started < 1
    assert lost[:2] == [Lost(0, 0, 1, 1), Lost(1, 1, 2, 1)]
    assert len(lost) == len(gaps)
