"""Recordings survive files, and files that are no recordings are refused in words."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmbench.debug.record import StepRecord
from kvmbench.errors import LoadError


def test_a_saved_recording_comes_back_whole(record: StepRecord, tmp_path: Path) -> None:
    path = record[1:].save(tmp_path / "run.npz")
    loaded = StepRecord.load(path)
    assert loaded.first_difference(record[1:]) is None
    assert loaded.start == record[1:].start
    assert loaded.provenance == record.provenance
    assert loaded.first_step == 1
    assert list(loaded.symbols) == list(record.symbols)
    assert loaded.symbols.line(0x1003) == record.symbols.line(0x1003)
    assert loaded.disassemble() == record[1:].disassemble()
    assert repr(loaded) == repr(record[1:])


def test_the_file_is_readable_with_numpy_alone(record: StepRecord, tmp_path: Path) -> None:
    with np.load(record.save(tmp_path / "run.npz"), allow_pickle=False) as archive:
        assert archive["rows"]["rax"].tolist() == record.rax.tolist()


def test_saving_leaves_no_other_file_and_replaces_an_old_one(record: StepRecord, tmp_path: Path) -> None:
    (tmp_path / "run.npz").write_text("old")
    record.save(tmp_path / "run.npz")
    record[:3].save(tmp_path / "run.npz")
    assert os.listdir(tmp_path) == ["run.npz"]
    assert len(StepRecord.load(tmp_path / "run.npz")) == 3


def test_a_name_without_a_suffix_is_kept(record: StepRecord, tmp_path: Path) -> None:
    assert record.save(tmp_path / "run") == tmp_path / "run"
    assert len(StepRecord.load(tmp_path / "run")) == 11


def test_an_empty_recording_survives_too(record: StepRecord, tmp_path: Path) -> None:
    assert len(StepRecord.load(record[:0].save(tmp_path / "none.npz"))) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or damaged|not a recording"),
        (b"hello world, this is text", "not a recording that kvmbench saved"),
        (b"PK\x03\x04 and no more", "truncated or damaged"),
        (b"\x80\x04\x95", "not a recording"),
    ],
)
def test_a_foreign_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "foreign.npz"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message) as caught:
        StepRecord.load(path)
    assert str(path) in str(caught.value)


def test_other_numpy_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.arange(3))
    with pytest.raises(LoadError, match="a single numpy array, not a recording"):
        StepRecord.load(tmp_path / "one.npy")
    np.savez(tmp_path / "other.npz", x=np.arange(3))
    with pytest.raises(LoadError, match="it has no about, rows, start"):
        StepRecord.load(tmp_path / "other.npz")
    np.savez(tmp_path / "alike.npz", rows=np.arange(3), start=np.arange(3), about=np.arange(3))
    with pytest.raises(LoadError, match="its rows are int64, not the layout"):
        StepRecord.load(tmp_path / "alike.npz")


def test_a_pickle_inside_is_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", rows=np.array([print], dtype=object), start=1, about=1)
    with pytest.raises(LoadError, match="not a recording"):
        StepRecord.load(tmp_path / "evil.npz")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (b"[]", "a recording that kvmbench saved, or a damaged one"),
        (b"{}", "a recording that kvmbench saved, or a damaged one"),
        (b"\xff", "a recording that kvmbench saved, or a damaged one"),
        (b'{"format": "kvmbench steps 99"}', "written as 'kvmbench steps 99'; this version reads"),
    ],
)
def test_a_damaged_description_is_refused(
    record: StepRecord, tmp_path: Path, about: bytes, message: str
) -> None:
    path = tmp_path / "about.npz"
    np.savez(path, rows=record.rows, start=record.start, about=np.frombuffer(about, dtype=np.uint8))
    with pytest.raises(LoadError, match=message):
        StepRecord.load(path)


def test_a_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StepRecord.load(tmp_path / "nothing.npz")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.floats(0, 0.999), flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=4)
)
def test_a_truncated_or_damaged_file_is_an_error_or_the_same_recording(
    record: StepRecord, tmp_path: Path, cut: float, flips: list[tuple[float, int]]
) -> None:
    whole = record.save(tmp_path / "whole.npz").read_bytes()
    damaged = bytearray(whole if flips else whole[: int(len(whole) * cut)])
    for where, mask in flips:
        damaged[int(len(damaged) * where)] ^= mask
    path = tmp_path / "damaged.npz"
    path.write_bytes(damaged)
    try:
        loaded = StepRecord.load(path)
    except LoadError:
        return
    # A flipped bit in a part of the zip that says nothing, such as a time stamp.
    assert flips
    assert loaded.first_difference(record) is None


def test_a_member_that_claims_to_be_huge_is_refused(record: StepRecord, tmp_path: Path) -> None:
    source = record.save(tmp_path / "run.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {
            "descr": np.lib.format.dtype_to_descr(record.rows.dtype),
            "fortran_order": False,
            "shape": (1 << 55,),
        },
    )
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "huge.npz", "w") as new:
        for name in old.namelist():
            new.writestr(name, header.getvalue() if name == "rows.npy" else old.read(name))
    with pytest.raises(LoadError):
        StepRecord.load(tmp_path / "huge.npz")


def test_csv_has_a_line_a_step_with_hex_numbers(record: StepRecord, tmp_path: Path) -> None:
    with record[1:].to_csv(tmp_path / "run.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 10
    assert lines[0]["step"] == "1"
    assert lines[0]["executed_rip"] == "0x1003"
    assert lines[0]["symbol"] == "loop"
    assert lines[0]["rax"] == "0x3"
    assert lines[0]["exit"] == "DEBUG"
    assert "flags" not in lines[0]


def test_a_frame_has_a_row_a_step_and_keeps_64_bits(record: StepRecord) -> None:
    rows = record.rows.copy()
    rows["rdx"] = (1 << 64) - 1
    frame = StepRecord(rows, record.start, symbols=record.symbols)[2:].to_dataframe()
    assert frame.index.name == "step"
    assert frame.index.tolist() == list(range(2, 11))
    assert frame["rdx"].iloc[0] == (1 << 64) - 1
    assert frame["symbol"].tolist()[:3] == ["loop+0x3", "loop", "loop+0x3"]
    assert set(frame["exit"]) == {"DEBUG"}
    assert len(record[:0].to_dataframe()) == 0


def test_what_ended_the_recording_is_kept_and_a_file_without_it_is_read(record: StepRecord, tmp_path: Path) -> None:
    ended = StepRecord(record.rows, record.start, symbols=record.symbols, ended="shutdown")
    path = ended.save(tmp_path / "ended.npz")
    assert StepRecord.load(path).ended == "shutdown"
    with np.load(path) as archive:
        members = dict(archive)
    about = json.loads(members["about"].tobytes())
    del about["ended"]
    members["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    np.savez(tmp_path / "older.npz", **members)
    assert StepRecord.load(tmp_path / "older.npz").ended == ""
