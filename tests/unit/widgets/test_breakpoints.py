"""The Breakpoints panel, without a page."""

from __future__ import annotations

import csv
import dataclasses
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvmbench_widgets as kw
from kvmbench.errors import MisuseError
from kvmbench_widgets import export
from kvmbench_widgets.breakpoints import Condition


def rows(panel: Any) -> list[dict[str, Any]]:
    return list(panel.view["rows"])


def test_a_breakpoint_is_listed_with_its_mechanism_and_counts_its_hits(machine: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Breakpoints(machine), kw.Controls(machine)
    assert panel.text().endswith("no breakpoints")
    send(panel, "add", where="loop")
    (row,) = rows(panel)
    assert (row["number"], row["place"], row["address"], row["noun"]) == (1, "loop", "0x1007", "execute")
    (one,) = machine.cpu.breakpoints
    assert row["mechanism"] == str(one.mechanism)
    assert row["why"] == repr(one)[1:-1]
    send(controls, "run")
    assert rows(panel)[0]["hits"] == "1"
    assert rows(panel)[0]["hit"] is True
    send(controls, "step")
    assert "hit" not in rows(panel)[0], "the vcpu has moved on"


def test_a_condition_lets_the_guest_pass_until_it_holds(machine: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Breakpoints(machine), kw.Controls(machine)
    send(panel, "add", where="loop", condition=" regs.rax > 20 and m.cpu is cpu ")
    assert rows(panel)[0]["condition"] == "regs.rax > 20 and m.cpu is cpu"
    send(controls, "run")
    assert machine.cpu.regs.rax == 21
    assert (rows(panel)[0]["hits"], rows(panel)[0]["passes"]) == ("1", "10")
    send(panel, "set_condition", number=1, text="regs.rax == 0x31")
    send(controls, "run")
    assert machine.cpu.regs.rax == 0x31
    send(panel, "set_condition", number=1, text="")
    assert rows(panel)[0]["condition"] == ""
    assert machine.cpu.breakpoints[1].condition is None
    send(controls, "run")
    assert machine.cpu.regs.rax == 0x33


def test_a_condition_that_fails_when_asked_is_told_and_stops_the_guest(machine: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Breakpoints(machine), kw.Controls(machine)
    send(panel, "add", where="loop", condition="1 / 0")
    send(controls, "run")
    assert "the condition of breakpoint 1 at loop failed: ZeroDivisionError" in controls.error
    assert machine.cpu.regs.rip == 0x1007


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("regs.rax >", "no Python expression"),
        ("rax > 5", "no name 'rax'"),
        ("x = 5", "no Python expression"),
        ("a\0b", "no Python expression"),
        ("(" * 5000, "no Python expression"),
    ],
)
def test_what_is_no_condition_is_told_at_once(machine: Any, send: Callable[..., None], text: str, words: str) -> None:
    panel = kw.Breakpoints(machine)
    send(panel, "add", where="loop", condition=text)
    assert words in panel.error
    assert len(machine.cpu.breakpoints) == 0
    with pytest.raises(MisuseError, match=words):
        Condition(text)


def test_a_condition_may_name_what_it_makes_itself(machine: Any) -> None:
    assert Condition("any(n == regs.rip for n in (0x1000, 2))")(machine.cpu)
    assert Condition("(lambda value: value > 5)(regs.rip)")(machine.cpu)
    assert not Condition("(n := regs.rax) and n > 1")(machine.cpu)
    assert repr(Condition("m")) == "Condition('m')"


def test_hundreds_of_breakpoints_are_listed_shown_in_the_code_and_hit(machine: Any, send: Callable[..., None]) -> None:
    machine.load_asm("slide: " + "nop\n" * 400 + "hlt", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    panel, code, controls = kw.Breakpoints(machine), kw.Disassembly(machine), kw.Controls(machine)
    start = time.monotonic()
    for n in range(1, 301):
        send(panel, "add", where=0x3000 + n)
        assert panel.error == ""
    took_s = time.monotonic() - start
    assert [row["number"] for row in rows(panel)] == list(range(1, 301))
    assert took_s < 30, "three panels are drawn at each"
    marked = [row for row in code.view["rows"] if "breakpoint" in row]
    assert len(marked) > 80, "all that are in sight"
    assert all(int(row["linear"], 16) == 0x3000 + row["breakpoint"]["number"] for row in marked)
    for n in (1, 2, 3):
        send(controls, "run")
        assert machine.cpu.regs.rip == 0x3000 + n
        assert [row["number"] for row in rows(panel) if "hit" in row] == [n]
    for n in range(1, 301):
        if n != 300:
            send(panel, "remove", number=n)
    send(controls, "run")
    assert machine.cpu.regs.rip == 0x3000 + 300
    assert len(list(csv.reader(as_csv(panel)))) == 2
    assert bytes(machine.memory[0x3000:0x3190]) == b"\x90" * 400


def as_csv(panel: Any) -> list[str]:
    where = panel.machine.host.provenance
    lines = export.as_csv(panel.table(), where, panel.TITLE).decode().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_a_watchpoint_stops_after_the_write(machine: Any, send: Callable[..., None]) -> None:
    machine.load_asm("mov qword ptr [0x2000], 7\nhlt", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    panel, controls = kw.Breakpoints(machine), kw.Controls(machine)
    send(panel, "add", where="0x2000", kind="w", size_bytes=4)
    (row,) = rows(panel)
    assert (row["kind"], row["noun"], row["place"]) == ("w", "write, 4 B", "0x2000")
    send(controls, "run")
    assert controls.view["cause"] == "watchpoint"
    assert rows(panel)[0]["hit"] is True


def test_one_is_disabled_and_removed(machine: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Breakpoints(machine), kw.Controls(machine)
    send(panel, "add", where="loop")
    send(panel, "add", where="loop+4")
    send(panel, "enable", number=1, on=False)
    assert [row["enabled"] for row in rows(panel)] == [False, True]
    send(controls, "run")
    assert machine.cpu.regs.rip == 0x100B
    assert "○ loop " in panel.text()
    send(panel, "remove", number=1)
    assert [row["number"] for row in rows(panel)] == [2]


def test_a_condition_given_by_a_cell_is_shown_by_its_name(machine: Any) -> None:
    def even(cpu: Any) -> bool:
        return cpu.regs.rax % 2 == 0

    machine.cpu.breakpoints.add("loop", condition=even)
    machine.cpu.breakpoints.add("loop", temporary=True)
    one, two = rows(kw.Breakpoints(machine))
    assert one["condition"] == "even"
    assert two["notes"] == ["temporary"]


def test_what_filters_a_breakpoint_and_what_happened_to_it_stand_in_its_line(
    machine: Any, send: Callable[..., None]
) -> None:
    cpu, panel = machine.cpu, kw.Breakpoints(machine)
    plain = cpu.breakpoints.add("loop")
    # Another address space with the same pages: a copy of the top table.
    other, here = 0x9000, int(cpu.regs.cr3)
    machine.memory[other : other + 0x1000] = bytes(machine.memory[here : here + 0x1000])
    cpu.breakpoints.add("loop+4", cr3=other, temporary=True)
    cpu.breakpoints.add("loop+4", condition=lambda cpu: cpu.regs.rax > 20, ignore=2)
    machine.breakpoints.add("start", ignore=3)
    plain.remarks.append("its byte was overwritten")
    send(kw.Controls(machine), "run")
    send(kw.Controls(machine), "run")
    panel.refresh()
    one, two, three, four = rows(panel)
    assert one["notes"] == ["its byte was overwritten"]
    assert two["notes"] == ["cr3 0x9000 only, 1 elsewhere", "temporary"]
    assert three["notes"] == ["ignores the next 2"]
    assert four["notes"] == ["shared breakpoint 1 of all vcpus, 0 hits in all", "ignores the next 3"]
    lines = [line for line in panel.text().splitlines() if "0x10" in line]
    assert [str(each.mechanism) in line for each, line in zip(cpu.breakpoints, lines, strict=True)] == [True] * 4
    assert lines[0].endswith("2 hits  (its byte was overwritten)")
    assert lines[1].endswith("0 hits  (cr3 0x9000 only, 1 elsewhere; temporary)")
    assert "0 hits, 1 passed  if <lambda>  (ignores the next 2)" in lines[2]
    assert "passed" not in lines[0] + lines[1] + lines[3]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"do": "add", "where": "nowhere"}, "nowhere"),
        ({"do": "add", "where": ""}, "no place"),
        ({"do": "add", "where": None}, "no place"),
        ({"do": "add", "where": "0xffff0000"}, "is mapped at 0xffff0000"),
        ({"do": "add", "where": "loop", "kind": "q"}, "'w' (write) or 'rw'"),
        ({"do": "add", "where": "loop", "kind": []}, "[]"),
        ({"do": "add", "where": "0x2000", "kind": "w", "size_bytes": 0}, "1 to 4096"),
        ({"do": "add", "where": "0x2000", "kind": "w", "size_bytes": "8"}, "'8'"),
        ({"do": "add", "where": "loop", "condition": 5}, "Python text"),
        ({"do": "add"}, "missing"),
        ({"do": "remove", "number": 7}, "no breakpoint 7"),
        ({"do": "remove", "number": "1"}, "no breakpoint '1'"),
        ({"do": "remove", "number": True}, "no breakpoint True"),
        ({"do": "remove", "number": [1]}, "no breakpoint"),
        ({"do": "enable", "number": 1, "on": 1}, "True or False"),
        ({"do": "set_condition", "number": 1, "text": None}, "Python text"),
        ({"do": "goto", "number": 9}, "no breakpoint 9"),
        ({"do": "make_view"}, "cannot do"),
    ],
)
def test_what_a_page_must_not_send_is_told_in_words(machine: Any, message: dict[str, Any], words: str) -> None:
    machine.cpu.breakpoints.add("loop")
    panel = kw.Breakpoints(machine)
    before = rows(panel)
    panel._receive(None, message, [])
    assert words in panel.error
    panel.refresh()
    assert rows(panel) == before


def test_what_this_host_cannot_watch_is_told_in_words(
    machine: Any, send: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    none: frozenset[int] = frozenset()
    found = dataclasses.replace(machine.host.mechanisms, hw_read=none, no_slot=none)
    monkeypatch.setattr(machine.host, "mechanisms", found)
    panel = kw.Breakpoints(machine)
    send(panel, "add", where="0x2000", kind="rw")
    assert "no way to stop on 'rw' at 0x2000" in panel.error
    assert "does not work on this host" in panel.error
    assert rows(panel) == []


def test_nothing_is_written_while_the_vcpu_runs(machine: Any, send: Callable[..., None]) -> None:
    machine.load_asm("spin: jmp spin", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    panel, controls = kw.Breakpoints(machine), kw.Controls(machine)
    send(panel, "add", where="loop")
    send(controls, "run", wait=False)
    for what, options in (
        ("add", {"where": "start"}),
        ("remove", {"number": 1}),
        ("enable", {"number": 1, "on": False}),
        ("set_condition", {"number": 1, "text": "True"}),
    ):
        send(panel, what, wait=False, **options)
        assert "vcpu 0 runs; pause it to" in panel.error
    send(controls, "pause")
    assert [one.enabled for one in machine.cpu.breakpoints] == [True]


def test_its_place_is_shown_by_the_panels_that_can(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Breakpoints(machine)
    send(panel, "add", where="loop")
    send(panel, "goto", number=1)
    assert "no open panel shows 0x1007; kw.Disassembly(m) does" in panel.error
    one, two = kw.Disassembly(machine), kw.Disassembly(machine)
    send(panel, "goto", number=1)
    assert panel.error == ""
    for each in (one, two):
        assert each.follow is False
        assert each.view["rows"][each.view["at"] - each.view["first"]]["linear"] == "0x1007"
    # A watchpoint is a place in memory.
    send(panel, "add", where="0x2340", kind="w")
    send(panel, "goto", number=2)
    assert "kw.Memory(m) does" in panel.error
    memory = kw.Memory(machine)
    send(panel, "goto", number=2)
    assert panel.error == ""
    assert "2340" in memory.text()


def test_it_saves_its_data_and_its_picture_with_where_they_came_from(
    machine: Any, send: Callable[..., None], tmp_path: Path
) -> None:
    panel = kw.Breakpoints(machine)
    send(panel, "add", where="loop", condition="regs.rax > 5")
    panel.save(tmp_path / "b.csv")
    head, data = (tmp_path / "b.csv").read_text().split("number,", 1)
    assert str(machine.host.provenance) in head
    (row,) = csv.DictReader(("number," + data).splitlines())
    assert (row["place"], row["condition"], row["enabled"], row["hits"]) == ("loop", "regs.rax > 5", "1", "0")
    panel.save(tmp_path / "b.svg")
    ElementTree.parse(tmp_path / "b.svg")
    assert "loop  0x1007  execute" in panel.text()
    assert "0 hits, 0 passed  if regs.rax > 5" in panel.text()


def test_a_condition_that_calls_exit_does_not_end_the_vcpus_thread(machine: Any, send: Callable[..., None]) -> None:
    breakpoints, controls = kw.Breakpoints(machine), kw.Controls(machine)
    send(breakpoints, "add", where="loop", condition="exit()")
    send(controls, "run")
    assert "SystemExit" in controls.error
    send(breakpoints, "remove", number=1)
    send(controls, "step")
    assert controls.error == ""
