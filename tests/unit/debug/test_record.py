"""Recordings: columns, steps, slices, questions, and text."""

from __future__ import annotations

import numpy as np
import pytest

from kvmbench.debug.record import StepRecord
from kvmbench.debug.register_table import INTEGER
from kvmbench.debug.step_rows import ROW
from kvmbench.errors import MisuseError


def test_columns_are_views_of_the_rows(record: StepRecord) -> None:
    assert record.rax.tolist() == [0, 3, 3, 6, 6, 9, 9, 12, 12, 15, 15]
    assert record.rip.dtype == np.uint64
    assert np.shares_memory(record.rip, record.rows)
    assert len(record) == 11
    assert record.nbytes == 11 * 152
    assert {"rax", "rip", "exit"} <= set(dir(record))


def test_the_executed_instruction_is_one_row_back(record: StepRecord) -> None:
    assert record.executed_rip.tolist() == [0x1000, *([0x1003, 0x1006] * 5)]


def test_a_recording_cannot_be_changed(record: StepRecord) -> None:
    with pytest.raises(ValueError, match="read-only"):
        record.rax[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        record.start["rax"] = 1


def test_a_step_knows_what_it_changed(record: StepRecord) -> None:
    step = record[0]
    assert (step.index, step.executed_rip, step.exit) == (0, 0x1000, 4)
    assert step.changes == {"rax": (0xFFFF, 0), "rip": (0x1000, 0x1003), "rflags": (2, 0x46)}
    assert record.changes(2) == {"rip": (0x1006, 0x1003)}
    assert repr(record[1]) == "Step 1 at 0x1003: rax=0x3 rflags=0x2"
    assert repr(record[2]) == "Step 2 at 0x1006: no register changed"
    assert record[-1].index == 10


def test_a_slice_is_a_recording_that_knows_its_place(record: StepRecord) -> None:
    part = record[3:7]
    assert (len(part), part.first_step) == (4, 3)
    assert part.executed_rip.tolist() == record.executed_rip[3:7].tolist()
    assert part[0].index == 3
    assert part[0].changes == record[3].changes
    assert np.shares_memory(part.rows, record.rows)
    assert part[1:3].first_step == 4
    assert len(record[20:30]) == 0
    assert len(record[5:2]) == 0
    assert record[-2:].first_step == 9


def test_a_slice_with_gaps_is_refused(record: StepRecord) -> None:
    with pytest.raises(MisuseError, match=r"rec.rows\[::2\]"):
        record[::2]


def test_a_step_that_does_not_exist_is_an_index_error(record: StepRecord) -> None:
    with pytest.raises(IndexError, match="step 11 of a recording of 11 steps"):
        record[11]
    with pytest.raises(IndexError):
        record.changes(-12)


def test_iterating_gives_every_step(record: StepRecord) -> None:
    assert [step.index for step in record] == list(range(11))


def test_addresses_and_symbols_are_found(record: StepRecord) -> None:
    assert record.where("loop").tolist() == [1, 3, 5, 7, 9]
    assert record.where(0x1000).tolist() == [0]
    assert record.where("loop+3").tolist() == [2, 4, 6, 8, 10]
    assert record.hits("loop") == 5
    assert record.hits(0x9999) == 0
    with pytest.raises(MisuseError, match="did you mean 'loop'"):
        record.where("lop")


def test_steps_that_changed_a_register_are_found(record: StepRecord) -> None:
    assert record.changed("rax").tolist() == [0, 1, 3, 5, 7, 9]
    assert record.changed("rbx").tolist() == []
    assert record[1:].changed("rax").tolist() == [0, 2, 4, 6, 8]
    with pytest.raises(MisuseError, match="no column 'eax'"):
        record.changed("eax")


def test_changes_are_counted_by_register(record: StepRecord) -> None:
    counts = record.change_counts()
    assert counts == {name: len(record.changed(name)) for name in INTEGER}
    assert (counts["rax"], counts["rip"], counts["rbx"]) == (6, 11, 0)
    assert set(record[:0].change_counts().values()) == {0}


def test_changes_are_counted_across_the_pieces_of_a_long_recording(record: StepRecord) -> None:
    rows = np.zeros(30_000, dtype=ROW)
    rows["rcx"] = np.arange(30_000)
    assert StepRecord(rows, rows[0]).change_counts()["rcx"] == 29_999


def test_exits_are_counted_by_name(record: StepRecord) -> None:
    rows = record.rows.copy()
    rows["exit"][[2, 4]] = 2
    rows["exit"][10] = 5
    assert StepRecord(rows, record.start).exit_counts() == {"DEBUG": 8, "IO": 2, "HLT": 1}


def test_the_first_difference_between_two_runs_is_found(record: StepRecord) -> None:
    rows = record.rows.copy()
    rows["rcx"][6] = 1
    assert record.first_difference(StepRecord(rows, record.start)) == 6
    assert record.first_difference(record) is None
    assert record.first_difference(record[:4]) == 4


def test_an_instruction_is_decoded_where_it_ran(record: StepRecord) -> None:
    texts = [found.text for found in map(record.instruction, range(3)) if found is not None]
    assert texts == ["xor rax, rax", "add rax, rbx", "jmp loop"]
    assert record[1:].instruction(0) == record.instruction(1)


def test_each_step_is_decoded_in_the_width_it_ran_in(record: StepRecord) -> None:
    rows = record.rows[:2].copy()
    rows["rip"] = [0x1003, 0x1006]
    rows["flags"] = [2, 0]
    switched = StepRecord(rows, record.start, bits=16, code=lambda gva, length: b"\xb8\x34\x12\x00\x00")
    assert [switched.instruction(i).text for i in (0, 1)] == ["mov ax, 0x1234", "mov eax, 0x1234"]  # type: ignore[union-attr]
    assert switched[1:].bits == 32


def test_captured_code_outlives_memory(record: StepRecord) -> None:
    memory = {"gone": False}
    reader = record._reader
    assert reader is not None
    kept = StepRecord(
        record.rows,
        record.start,
        symbols=record.symbols,
        code=lambda gva, length: b"" if memory["gone"] else reader(gva, length),
    )
    kept.capture_code()
    memory["gone"] = True
    assert kept.disassemble() == record.disassemble()


def test_the_listing_shows_instructions_and_what_they_changed(record: StepRecord) -> None:
    assert record.disassemble(slice(0, 3)).splitlines() == [
        "step  address  symbol    instruction   changed",
        "   0  0x1000   start     xor rax, rax  rax=0x0 rflags=[PF ZF]",
        "   1  0x1003   loop      add rax, rbx  rax=0x3 rflags=[]",
        "   2  0x1006   loop+0x3  jmp loop",
    ]
    assert record.disassemble(-1).splitlines()[1].split()[:2] == ["10", "0x1006"]


def test_the_listing_shows_exits_taints_and_unknown_code(record: StepRecord) -> None:
    rows = record.rows[:3].copy()
    rows["exit"][0], rows["flags"][1], rows["flags"][2] = 2, 8, 16 | 14 << 8
    shown = StepRecord(rows, record.start)
    text = shown.disassemble()
    assert "exit IO" in text.splitlines()[1]
    assert "(jumped where no branch leads)" in text.splitlines()[2]
    assert "(entered vector 14 (#PF))" in text.splitlines()[3]
    assert " ? " in text
    assert shown.entered_vector.tolist() == [-1, -1, 14]
    assert [step.entered_vector for step in shown] == [None, None, 14]


def test_the_repr_is_one_line_whatever_the_length(record: StepRecord) -> None:
    assert repr(record) == (
        "StepRecord: 11 steps, 0x1000 start to 0x1003 loop; local, Linux 6.1.0, kvm_amd npt=1"
    )
    assert repr(record[2:4]).startswith("StepRecord: 2 steps after 2, 0x1006 loop+0x3 to ")
    assert repr(record[:0]).startswith("StepRecord: no steps, at 0x1000 start")


def test_the_repr_says_what_ended_the_recording_and_only_slices_of_the_end_do(record: StepRecord) -> None:
    ended = StepRecord(record.rows, record.start, symbols=record.symbols, ended="shutdown")
    assert "to 0x1003 loop; ended: shutdown; " in repr(ended)
    assert "ended: shutdown" in ended._repr_html_()
    assert (ended[4:].ended, ended[-1:].ended, ended[:4].ended, ended[:-1].ended) == ("shutdown", "shutdown", "", "")
    assert "ended" not in repr(ended[:4])
    nothing = StepRecord(record.rows[:0], record.start, ended="breakpoint 1 at loop")
    assert repr(nothing).startswith("StepRecord: no steps, at 0x1000; ended: breakpoint 1 at loop; ")
    assert (record.ended, "ended" in repr(record)) == ("", False)


def test_a_frame_says_which_steps_entered_a_handler(record: StepRecord) -> None:
    rows = record.rows.copy()
    rows["flags"][2], rows["flags"][5] = 16 | 14 << 8, 16
    frame = StepRecord(rows, record.start).to_dataframe()
    assert frame["entered_vector"].dtype == np.int16
    assert frame["entered_vector"].tolist() == [-1, -1, 14, -1, -1, 0, *[-1] * 5]
    assert set(record.to_dataframe()["entered_vector"]) == {-1}, "it is there when nothing was entered"


def test_the_reprs_of_ten_million_steps_are_short_and_hold_no_second_copy(record: StepRecord) -> None:
    # A broadcast array: ten million rows that take the room of one.
    rows = np.broadcast_to(record.rows[:1], 10_000_000)
    many = StepRecord(rows, record.start, code=record._reader)
    assert "10,000,000 steps" in repr(many)
    assert len(repr(many)) < 200
    html = many._repr_html_()
    assert "9,999,988 more steps" in html
    assert html.count("<tr>") == 14


def test_no_repr_asks_the_guest(record: StepRecord) -> None:
    asked: list[int] = []
    reader = record._reader
    assert reader is not None

    def read(gva: int, length: int) -> bytes:
        asked.append(gva)
        return reader(gva, length)

    mine = StepRecord(record.rows, record.start, symbols=record.symbols, code=read)
    assert "<td>?</td>" in mine._repr_html_()
    assert mine.instruction(0, read=False) is None
    assert not asked
    mine.sample_code()
    read_once = len(asked)
    for shown in (mine, mine[2:5]):
        assert "<td>?</td>" not in shown._repr_html_()
        assert "jmp loop" in shown._repr_html_()
    assert len(asked) == read_once > 0
    assert mine.disassemble() == record.disassemble()


def test_sampled_code_is_that_of_the_ends_and_of_what_ran_most(record: StepRecord) -> None:
    rows = np.broadcast_to(record.rows[:1], 1_000_000).copy()
    rows["rip"][:10_000] = 0x9000
    rows["rip"][500_000] = 0xA000
    long = StepRecord(rows, record.start, code=lambda gva, length: b"\x90" * length)
    long.sample_code()
    assert long.instruction(10, read=False) is not None
    assert long.instruction(300_000, read=False) is not None
    assert long.instruction(500_001, read=False) is None
    assert long.instruction(500_001) is not None
    before = long.instruction(300_000)
    long.capture_code()
    assert long.instruction(300_000) == before


def test_rows_of_another_layout_are_refused(record: StepRecord) -> None:
    with pytest.raises(MisuseError, match=r"dtype step_rows.ROW"):
        StepRecord(np.zeros(3, dtype=np.uint64), record.start)
    with pytest.raises(MisuseError, match="8 bits"):
        StepRecord(np.zeros(3, dtype=ROW), record.start, bits=8)


def test_a_misspelt_column_names_the_columns(record: StepRecord) -> None:
    with pytest.raises(AttributeError, match="has no 'raz'; did you mean rax"):
        record.raz  # noqa: B018
