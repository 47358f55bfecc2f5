"""CSV and Parquet, read back, against the tables."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from kvmbench.errors import UnsupportedError
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.export import columns as columns_module
from kvmbench.traces.export import write_csv, write_parquet
from kvmbench.traces.export.columns import EXIT_COLUMNS
from kvmbench.traces.run_log import ROW, RunLog
from kvmbench.traces.trace import Trace, TraceData

TIMES = ("guest_ns", "kvm_ns", "user_ns", "outside_ns")
NUMBERS = ("rip", "number", "info1", "info2", "intr_info", "error_code")


def test_csv_has_a_line_an_exit_with_addresses_in_hex(traced, tmp_path):
    write_csv(tmp_path / "x.csv", traced)
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    exits = traced.exits
    assert tuple(rows[0]) == EXIT_COLUMNS
    assert [row["reason"] for row in rows] == exits.reasons.tolist()
    assert [int(row["time_ns"]) for row in rows] == exits.time_ns.tolist()
    for name in NUMBERS:
        assert all(row[name].startswith("0x") for row in rows)
        assert [int(row[name], 16) for row in rows] == getattr(exits, name).tolist()
    for name in TIMES:
        assert [int(row[name] or -1) for row in rows] == getattr(exits, name).tolist()
    assert [row["words"] for row in rows] == [exits.words(n) for n in range(57)]
    assert {row["isa"] for row in rows} == {"SVM"}
    assert {row["user_exit"] for row in rows} == {"", "IO", "SHUTDOWN"}
    assert {row["host"] for row in rows} == {f"{traced.provenance}; CLOCK_MONOTONIC, emulator time"}


def test_a_time_that_nothing_tells_is_an_empty_cell(traced, tmp_path):
    traced.exits.kvm_ns[3] = -1
    write_csv(tmp_path / "x.csv", traced)
    with open(tmp_path / "x.csv", newline="") as file:
        assert list(csv.DictReader(file))[3]["kvm_ns"] == ""


def test_parquet_keeps_types_and_says_the_host(traced, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    named = Trace(replace(traced.data, labels=("one",)))
    named.exits.kvm_ns[3] = -1
    write_parquet(tmp_path / "x.parquet", named)
    table = pq.read_table(tmp_path / "x.parquet")
    exits = named.exits
    assert tuple(table.column_names) == EXIT_COLUMNS
    assert table["reason"].to_pylist() == exits.reasons.tolist()
    for name in (*NUMBERS, "time_ns", "vcpu"):
        assert table[name].to_numpy().tolist() == getattr(exits, name).tolist()
        assert table[name].to_numpy().dtype == getattr(exits, name).dtype
    assert table["kvm_ns"].to_pylist()[3] is None
    assert [n if n is not None else -1 for n in table["kvm_ns"].to_pylist()] == exits.kvm_ns.tolist()
    assert table["words"].to_pylist() == [exits.words(n) for n in range(57)]
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert json.loads(metadata["kvmbench.provenance"])["emulator"] == "QEMU 7.2"
    assert metadata["kvmbench.clock"] == "CLOCK_MONOTONIC, emulator time"
    assert metadata["kvmbench.vcpus"] == "one"


def test_a_table_of_several_blocks_is_one_table(traced, tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(columns_module, "_BLOCK", 2)
    write_parquet(tmp_path / "x.parquet", traced)
    write_csv(tmp_path / "x.csv", traced)
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["reason"].to_pylist() == traced.exits.reasons.tolist()
    assert table["words"].to_pylist() == [traced.exits.words(n) for n in range(57)]
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 58


def test_empty_tables_have_their_columns(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    log = RunLog(np.zeros(0, np.int16), np.zeros(0, ROW))
    empty = Trace(TraceData(EventTable(), log))
    write_csv(tmp_path / "x.csv", empty)
    write_parquet(tmp_path / "x.parquet", empty)
    assert (tmp_path / "x.csv").read_text().strip() == ",".join(EXIT_COLUMNS)
    assert tuple(pq.read_table(tmp_path / "x.parquet").column_names) == EXIT_COLUMNS


def test_without_pyarrow_the_error_names_the_extra_and_csv_works(traced, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'kvmbench\[parquet\]'; CSV needs none"):
        write_parquet(tmp_path / "x.parquet", traced)
    write_csv(tmp_path / "x.csv", traced)


def test_importing_writers_and_readers_loads_none_of_the_packages():
    code = (
        "import sys, kvmbench.traces.export, kvmbench.traces.imports; "
        "print([n for n in ('perfetto', 'pyarrow', 'pandas', 'zstandard', 'google.protobuf') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
