"""The Memory panel, without a page."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvmbench as kb
import kvmbench_widgets as kw
from kvmbench.errors import MisuseError

STORE = """
        mov byte ptr [0x2003], 0x41
        mov qword ptr [0x2008], 0x1122334
        hlt
"""


def row(panel: Any, address: int) -> dict[str, Any]:
    return next(each for each in panel.view["rows"] if int(each["at"], 16) == address)


@pytest.fixture
def storing(machine: Any) -> Any:
    machine.load_asm(STORE, at=0x1000)
    return machine


def test_bytes_that_a_step_changed_are_marked_with_what_they_were(storing: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Memory(storing), kw.Controls(storing)
    send(panel, "go", where="0x2000")
    assert "was" not in row(panel, 0x2000)
    send(controls, "step")
    assert row(panel, 0x2000) == {
        "at": "00002000",
        "hex": "00000041" + "00" * 12,
        "was": "00" * 16,
    }
    send(controls, "step")
    assert row(panel, 0x2000)["was"] == "00000041" + "00" * 12, "marks are against the stop before, not the first"
    send(controls, "step")
    assert "was" not in row(panel, 0x2000)


def test_only_pages_looked_at_are_compared(storing: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Memory(storing), kw.Controls(storing)
    send(controls, "step")
    send(panel, "go", where="0x2000")
    assert row(panel, 0x2000)["hex"].startswith("00000041")
    assert "was" not in row(panel, 0x2000), "nobody saw what was there before"


@pytest.mark.parametrize(
    ("where", "at"),
    [("loop", "0x1007"), ("rsp+8", "0x80008"), ("rip", "0x1000"), ("0x3000", "0x3000"), ("4096", "0x1000"),
     ("loop - 7", "0x1000"), ("RSP", "0x80000")],
)  # fmt: skip
def test_places_are_symbols_registers_and_numbers(machine: Any, send: Callable[..., None], where: str, at: str) -> None:
    panel = kw.Memory(machine)
    send(panel, "go", where=where)
    assert panel.error == ""
    assert panel.view["place"]["at"] == at
    assert any(int(each["at"], 16) == int(at, 16) & ~15 for each in panel.view["rows"])


@pytest.mark.parametrize(("address", "at"), [("loop", "0x1007"), (0x3000, "0x3000"), ("rsp+8", "0x80008")])
def test_it_begins_where_it_is_told_to(machine: Any, address: int | str, at: str) -> None:
    assert kw.Memory(machine, address=address).view["place"]["at"] == at


@pytest.mark.parametrize("address", ["nowhere_at_all", -1, 1 << 64, ""])
def test_a_place_that_is_none_is_refused(machine: Any, address: int | str) -> None:
    with pytest.raises(MisuseError):
        kw.Memory(machine, address=address)


def test_linear_addresses_go_through_the_page_tables(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Memory(machine, space="gva")
    assert row(panel, 0x1000)["hex"].startswith("48c7c001000000")
    assert row(panel, 0x1000)["label"] == "loop"
    assert panel.view["total"] == 2 * (1 << 47) // 16 + 1
    send(panel, "go", where="0xffff800000000000")
    assert row(panel, 0xFFFF800000000000)["note"] == "not mapped"
    gap = panel.view["rows"][panel.view["place"]["row"] - 1 - panel.view["first"]]
    assert "no canonical addresses" in gap["note"]
    send(panel, "go", where="0xfffffffffffffff8")
    assert panel.view["place"]["row"] == panel.view["total"] - 1
    send(panel, "write", edits=[["0xffff800000000000", "00"]])
    assert "not mapped" in panel.error


def test_a_linear_page_mapped_elsewhere_shows_what_is_there(machine: Any, send: Callable[..., None]) -> None:
    top = machine.cpu.regs.cr3 & ~0xFFF
    machine.memory.write_u64(top + 8 * 256, machine.memory.read_u64(top))
    panel = kw.Memory(machine, space="gva")
    send(panel, "go", where="0xffff800000001000")
    assert row(panel, 0xFFFF800000001000)["hex"].startswith("48c7c0")
    send(panel, "write", edits=[["0xffff800000001ffe", "0a0b0c0d"]])
    assert panel.error == ""
    assert machine.memory[0x1FFE:0x2002] == b"\x0a\x0b\x0c\x0d", "an edit across two pages"
    panel.space = "gpa"
    assert panel.view["place"]["at"] == "0x1000", "the place is kept"


def test_a_gap_between_regions_is_one_row(widget_host: Any, send: Callable[..., None]) -> None:
    with kb.Machine(widget_host, mode="real", memory="1M") as machine:
        machine.memory.map(0x400000, "64K", name="far")
        machine.load_asm("hlt", at=0x7C00)
        panel = kw.Memory(machine)
        assert panel.view["total"] == (0x100000 + 0x10000) // 16 + 1
        send(panel, "show", first=0x10000 - 1, count=3)
        assert [each["at"] for each in panel.view["rows"]] == ["000ffff0", "00100000", "00400000"]
        assert "no memory up to 0x3fffff (3M)" in panel.view["rows"][1]["note"]
        assert [each["at"] for each in panel.view["regions"]] == ["0x0", "0x400000"]
        panel.space = "gva"
        send(panel, "region", at="0x400000")
        assert panel.space == "gpa"
        assert panel.view["place"]["at"] == "0x400000"
        machine.memory.write(0x40FFF0, b"needle")
        send(panel, "find", pattern="needle")
        assert panel.view["place"]["at"] == "0x40fff0"


def test_edits_are_written(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Memory(machine)
    send(panel, "go", where="0x2000")
    send(panel, "write", edits=[["0x2000", "dead"], ["0x2fff", "beef"]])
    assert panel.error == ""
    assert machine.memory[0x2000:0x2002] == b"\xde\xad"
    assert machine.memory[0x2FFF:0x3001] == b"\xbe\xef"
    assert row(panel, 0x2000)["hex"].startswith("dead")


def test_find_goes_from_one_place_to_the_next_and_around(machine: Any, send: Callable[..., None]) -> None:
    for place in (0x5000, 0x400000 - 3, 0x900000):
        machine.memory.write(place, b"a needle")
    panel = kw.Memory(machine)
    found = []
    for _ in range(4):
        send(panel, "find", pattern="needle")
        found.append(int(panel.view["place"]["at"], 16))
    assert found == [0x5002, 0x400000 - 1, 0x900002, 0x5002]
    send(panel, "find", pattern="0x6e 65 65", kind="hex")
    assert panel.view["place"] == panel.view["place"] | {"at": "0x5002", "length": 3}
    panel.space = "gva"
    send(panel, "find", pattern="needle")
    send(panel, "find", pattern="needle")
    assert panel.view["place"]["at"] == "0x3fffff"
    send(panel, "find", pattern="not in there")
    assert "not found" in panel.error


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"do": "go", "where": "nowhere"}, "nowhere"),
        ({"do": "go", "where": "rsp-0x80001"}, "no address of 64 bits"),
        ({"do": "go", "where": "0x100000000"}, "not in the list of gpas"),
        ({"do": "go", "where": ""}, "no address"),
        ({"do": "go", "where": "rsp+x"}, "'x'"),
        ({"do": "go", "where": 5}, "5 is no address"),
        ({"do": "show", "first": -1, "count": 5}, "-1"),
        ({"do": "show", "first": 0, "count": "5"}, "'5'"),
        ({"do": "region", "at": "0x123"}, "0x123"),
        ({"do": "find", "pattern": ""}, "nothing to look for"),
        ({"do": "find", "pattern": "abc", "kind": "hex"}, "pairs of hex digits"),
        ({"do": "find", "pattern": "abc", "kind": "colour"}, "colour"),
        ({"do": "find", "pattern": 7}, "7"),
        ({"do": "find", "pattern": "x" * 5000}, "too much"),
        ({"do": "find", "pattern": "surely nowhere"}, "nowhere in memory"),
        ({"do": "write", "edits": [["0x2000", "de"], ["0x100000000", "00"]]}, "0x100000000"),
        ({"do": "write", "edits": [["0xffffffffffffffff", "0000"]]}, "beyond the last address"),
        ({"do": "write", "edits": [["-5", "00"]]}, "beyond the last address"),
        ({"do": "write", "edits": [["0x2000", "xy"]]}, "hex digits"),
        ({"do": "write", "edits": 3}, "cannot write 3"),
        ({"do": "write", "edits": [["0x2000", "00" * ((1 << 20) + 1)]]}, "more than 1 MiB"),
    ],
)
def test_bad_orders_are_told_in_words_and_write_nothing(machine: Any, message: dict[str, Any], words: str) -> None:
    panel = kw.Memory(machine)
    panel._receive(None, message, [])
    assert words in panel.error
    assert machine.memory[0x2000] == 0


def test_numbers_are_grouped_little_endian(machine: Any, send: Callable[..., None]) -> None:
    machine.memory.write_u64(0x2008, 0xFEDCBA9876543210)
    panel = kw.Memory(machine, group=8, width=8)
    send(panel, "go", where="0x2008")
    assert "00002008  fedcba9876543210  .2Tv...." in panel.text()


def test_what_a_running_guest_writes_is_seen_only_while_somebody_looks(machine: Any, send: Callable[..., None]) -> None:
    machine.load_asm("again: inc qword ptr [0x2000]\njmp again", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    controls = kw.Controls(machine)
    seen, unseen, linear = kw.Memory(machine), kw.Memory(machine), kw.Memory(machine, space="gva")
    for panel in (seen, unseen, linear):
        send(panel, "go", where="0x2000")
    send(controls, "run", wait=False)
    end = time.monotonic() + 20
    values = set()
    while len(values) < 3:
        assert time.monotonic() < end
        seen.looked_at += 1
        values.add(row(seen, 0x2000)["hex"])
        time.sleep(0.01)
    assert seen.view["live"]
    assert "was" in row(seen, 0x2000), "marked against the last stop"
    assert row(unseen, 0x2000)["hex"] == row(linear, 0x2000)["hex"] == "00" * 16
    send(linear, "go", wait=False, where="0x2000")
    assert "pause it first" in linear.error
    for where in ("rsp", "loop"):
        send(seen, "go", wait=False, where=where)
        assert "pause" in seen.error
    unseen.space = "gva"
    assert not unseen.view["live"]
    send(seen, "write", wait=False, edits=[["0x2010", "77"]])
    assert machine.memory[0x2010] == 0x77
    send(controls, "pause")
    value = machine.memory[0x2000:0x2010].hex()
    assert row(seen, 0x2000)["hex"] == row(unseen, 0x2000)["hex"] == row(linear, 0x2000)["hex"] == value
    assert row(seen, 0x2000)["was"] == "00" * 16
    assert not seen.view["live"]
    assert (unseen.view["space"], unseen.view["place"]["at"]) == ("gva", "0x2000"), "kept until it could be looked up"


def test_it_saves_its_data_and_its_picture(storing: Any, send: Callable[..., None], tmp_path: Path) -> None:
    panel, controls = kw.Memory(storing), kw.Controls(storing)
    send(panel, "go", where="0x2000")
    send(controls, "step")
    panel.save(tmp_path / "m.csv")
    head, data = (tmp_path / "m.csv").read_text().split("address,", 1)
    assert str(storing.host.provenance) in head
    rows = {each[0]: each for each in csv.reader(data.splitlines()[1:])}
    assert rows["0x00002000"][1:4] == ["00000041" + "00" * 12, "...A............", "00" * 16]
    panel.save(tmp_path / "m.svg")
    assert "00002000" in (tmp_path / "m.svg").read_text()


def test_what_was_seen_last_stays_when_the_machine_is_closed(widget_host: Any) -> None:
    with kb.Machine(widget_host, mode="long") as machine:
        machine.load_asm("hlt", at=0x1000)
        panel = kw.Memory(machine)
    panel.refresh()
    assert panel.state == "closed"
    assert "00001000  f4 00" in panel.text()
    panel._receive(None, {"do": "write", "edits": [["0x1000", "90"]]}, [])
    assert "closed" in panel.error
