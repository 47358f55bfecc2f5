"""Rows: the layout of wire.h, and gathering them without holding more than them."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import kvmbench.errors
from kvmbench.debug.step_rows import EXIT_DEBUG, ROW, TAINTS, WIDTHS, RowBuilder, exit_name, row_of
from kvmbench.errors import InternalError, MisuseError
from kvmbench.uapi import ffi

WIRE = (Path(kvmbench.errors.__file__).parent / "core" / "wire.h").read_text(encoding="utf-8")


def test_the_rows_have_the_layout_of_wire_h() -> None:
    body = re.search(r"struct kb_row \{(.*?)\};", WIRE, re.DOTALL)
    assert body is not None
    fields = re.findall(r"uint(32|64)_t (\w+);", body[1])
    assert [(name, f"<u{int(bits) // 8}") for bits, name in fields] == [
        (name, ROW[name].str) for name in ROW.names or ()
    ]
    assert ROW.itemsize == 152


def test_the_flags_of_a_row_mean_what_wire_h_says() -> None:
    values = {name: int(value) for name, value in re.findall(r"(KB_(?:WIDTH|TAINT)_\w+) = (\d+)", WIRE)}
    assert {values[f"KB_WIDTH_BITS{bits}"]: bits for bits in (16, 32, 64)} == WIDTHS
    assert {value for name, value in values.items() if name.startswith("KB_TAINT")} == set(TAINTS)


def test_exits_have_the_kernels_names() -> None:
    assert EXIT_DEBUG == 4
    assert exit_name(2) == "IO"
    assert exit_name(5) == "HLT"
    assert exit_name(9999) == "exit 9999"


def test_a_row_is_made_from_kvm_regs() -> None:
    regs = ffi.new("struct kvm_regs *")
    regs.rax, regs.r15, regs.rflags = (1 << 64) - 1, 15, 2
    row = row_of(regs, exit=4)
    assert (int(row["rax"]), int(row["r15"]), int(row["rflags"]), int(row["exit"])) == (
        (1 << 64) - 1,
        15,
        2,
        4,
    )


def numbered(first: int, count: int) -> np.ndarray:
    rows = np.zeros(count, dtype=ROW)
    rows["rip"] = np.arange(first, first + count)
    return rows


def test_batches_come_out_in_order() -> None:
    builder = RowBuilder()
    assert [builder.append(numbered(at, 7).tobytes()) for at in (0, 7, 14)] == [7, 7, 7]
    assert len(builder) == 21
    assert builder.snapshot()["rip"].tolist() == list(range(21))
    rows = builder.finish()
    assert rows["rip"].tolist() == list(range(21))
    assert rows.shape == (21,)


def test_no_rows_make_an_empty_array() -> None:
    builder = RowBuilder(steps=1000)
    assert builder.append(b"") == 0
    assert builder.finish().shape == (0,)


def test_a_builder_grows_beyond_its_first_room_and_ends_with_no_spare_room() -> None:
    builder = RowBuilder()
    for at in range(0, 600_000, 100_000):
        builder.append(numbered(at, 100_000))
    rows = builder.finish()
    assert rows.nbytes == 600_000 * 152
    assert (rows["rip"] == np.arange(600_000)).all()


def test_a_builder_never_holds_much_more_than_the_rows() -> None:
    batch = numbered(0, 50_000).tobytes()
    tracemalloc.start()
    try:
        builder = RowBuilder(steps=1_000_000)
        for _ in range(20):
            builder.append(batch)
        rows = builder.finish()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.nbytes == 152_000_000
    assert held < rows.nbytes + 1_000_000
    # numpy's resize moves pages and does not copy; tracemalloc counts a block being moved once.
    assert peak < rows.nbytes * 1.3


def test_bytes_that_are_no_whole_rows_are_our_own_error() -> None:
    with pytest.raises(InternalError, match="151 bytes are no whole number of 152-byte rows"):
        RowBuilder().append(bytes(151))


def test_a_finished_builder_takes_no_more() -> None:
    builder = RowBuilder()
    builder.finish()
    with pytest.raises(MisuseError, match="finished"):
        builder.append(numbered(0, 1))
