"""The Disassembly panel, without a page."""

from __future__ import annotations

import csv
import dataclasses
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import traitlets

import kvmbench as kb
import kvmbench_widgets as kw


def code(panel: Any) -> dict[int, dict[str, Any]]:
    return {int(row["linear"], 16): row for row in panel.view["rows"] if row["kind"] == "code"}


def here(panel: Any) -> dict[str, Any]:
    return panel.view["rows"][panel.view["here"] - panel.view["first"]]


def at(panel: Any) -> dict[str, Any]:
    return panel.view["rows"][panel.view["at"] - panel.view["first"]]


@pytest.fixture
def real(widget_host: Any) -> Iterator[Any]:
    """A real-mode machine."""
    with kb.Machine(widget_host, mode="real") as machine:
        yield machine


def test_it_shows_labels_targets_arrows_and_where_the_guest_is(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Disassembly(machine)
    assert here(panel)["linear"] == "0x1000"
    labels = [row["text"] for row in panel.view["rows"] if row["kind"] == "label"]
    assert labels == ["start:", "loop:"]
    jne = code(panel)[0x100F]
    assert jne["operands"] == "loop"
    assert jne["target"] == "0x1007"
    (arrow,) = panel.view["arrows"]
    assert [panel.view["rows"][arrow[end]]["linear"] for end in ("from", "to")] == ["0x100f", "0x1007"]
    assert "here" not in arrow
    send(kw.Controls(machine), "step", count=3)
    assert here(panel)["taken"] is True
    assert panel.view["arrows"][0] == {**arrow, "here": True, "taken": True}


def test_whether_the_jump_at_rip_is_taken_follows_the_flags(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Disassembly(machine)
    send(kw.Controls(machine), "step", count=3)
    send(kw.Registers(machine), "flip", name="rflags", bit="ZF")
    assert here(panel)["taken"] is False
    assert "falls through" in panel.text()


def test_a_breakpoint_is_set_and_taken_away_and_shown_hollow_while_disabled(
    machine: Any, send: Callable[..., None]
) -> None:
    panel = kw.Disassembly(machine)
    send(panel, "toggle", where="0x1007")
    (one,) = machine.cpu.breakpoints
    assert one.address == 0x1007
    mark = code(panel)[0x1007]["breakpoint"]
    assert (mark["number"], mark["enabled"], mark["conditional"]) == (1, True, False)
    assert "breakpoint 1 at loop" in mark["words"]
    one.enabled = False
    panel.refresh()
    assert code(panel)[0x1007]["breakpoint"]["enabled"] is False
    assert "\no  " in panel.text()
    send(panel, "toggle", where="loop")
    assert len(machine.cpu.breakpoints) == 0
    assert "breakpoint" not in code(panel)[0x1007]


def test_a_goto_stops_following_and_can_be_gone_back_from(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Disassembly(machine)
    moves = panel.view["moves"]
    send(panel, "goto", where="loop+4")
    assert panel.follow is False
    assert at(panel)["linear"] == "0x100b"
    assert panel.view["moves"] != moves
    send(panel, "goto", where="rip")
    assert at(panel)["linear"] == "0x1000"
    send(panel, "back")
    assert at(panel)["linear"] == "0x100b"
    assert panel.view["forward"] is True
    send(panel, "back")
    assert at(panel)["linear"] == "0x1000"
    send(panel, "back")
    assert "nothing to go back to" in panel.error
    send(panel, "forward")
    assert at(panel)["linear"] == "0x100b"
    # Browsing, a step leaves the place alone.
    moves = panel.view["moves"]
    send(kw.Controls(machine), "step", count=2)
    assert panel.view["moves"] == moves
    assert here(panel)["linear"] == "0x100b"
    panel.follow = True
    send(kw.Controls(machine), "step")
    assert at(panel) == here(panel) == code(panel)[0x100F]


def test_it_runs_to_an_address(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Disassembly(machine)
    send(panel, "run_to", where="0x1011")
    assert machine.cpu.regs.rip == 0x1011
    assert machine.cpu.regs.rax == 101
    assert here(panel)["linear"] == "0x1011"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"do": "goto", "where": "nowhere"}, "nowhere"),
        ({"do": "goto", "where": ""}, "no address"),
        ({"do": "goto", "where": None}, "None"),
        ({"do": "goto", "where": True}, "True"),
        ({"do": "goto", "where": -1}, "64 bits"),
        ({"do": "goto", "where": 1 << 64}, "64 bits"),
        ({"do": "goto", "where": "cs:nowhere"}, "nowhere"),
        ({"do": "goto"}, "missing"),
        ({"do": "back"}, "nothing to go back"),
        ({"do": "forward"}, "nothing to go forward"),
        ({"do": "toggle", "where": "0xffff0000"}, "nothing is mapped at 0xffff0000"),
        ({"do": "toggle", "where": []}, "[]"),
        ({"do": "run_to", "where": "lop"}, "did you mean 'loop'"),
        ({"do": "show", "first": -1, "count": 5}, "cannot show"),
        ({"do": "show", "first": "0", "count": 5}, "cannot show"),
        ({"do": "show", "first": True, "count": 5}, "cannot show"),
        ({"do": "show_address", "gva": 0}, "cannot do"),
    ],
)
def test_what_a_page_must_not_send_is_told_in_words(machine: Any, message: dict[str, Any], words: str) -> None:
    panel = kw.Disassembly(machine)
    panel._receive(None, message, [])
    assert words in panel.error
    assert here(panel)["linear"] == "0x1000", "and what was shown stays"


def test_a_width_that_code_does_not_have_is_refused(machine: Any) -> None:
    with pytest.raises(traitlets.TraitError):
        kw.Disassembly(machine, bits=24)


def test_nothing_is_written_while_the_vcpu_runs(machine: Any, send: Callable[..., None]) -> None:
    machine.load_asm("spin: jmp spin", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    panel, controls = kw.Disassembly(machine), kw.Controls(machine)
    rows = panel.view["rows"]
    send(controls, "run", wait=False)
    for what, options in (("toggle", {"where": "spin"}), ("goto", {"where": "loop"}), ("run_to", {"where": "loop"})):
        send(panel, what, wait=False, **options)
        assert "vcpu 0 runs; pause it to" in panel.error
    # Scrolling goes on, over what was seen last.
    send(panel, "show", wait=False, first=0, count=100)
    assert panel.error == ""
    assert panel.view["rows"] == rows
    send(controls, "pause")
    assert len(machine.cpu.breakpoints) == 0


def test_code_that_changes_itself_is_shown_as_it_is(machine: Any, send: Callable[..., None]) -> None:
    machine.load_asm(
        """
        patch: mov word ptr [rip+target], 0x9090
        target: mov eax, 5
        hlt
        """,
        at=0x4000,
    )
    machine.cpu.regs.rip = 0x4000
    panel = kw.Disassembly(machine)
    target = machine.symbols["target"]
    assert code(panel)[target]["mnemonic"] == "mov"
    send(kw.Controls(machine), "step")
    assert [code(panel)[target + n]["mnemonic"] for n in (0, 1)] == ["nop", "nop"]
    assert code(panel)[target]["was"] == "b8"
    assert here(panel) == code(panel)[target]


def test_rip_is_always_at_the_beginning_of_a_row(machine: Any, send: Callable[..., None]) -> None:
    # Jumps over the opcode of a MOV into its immediate.
    machine.load_asm("entry: .byte 0xeb, 0x01, 0xb8, 0x90, 0x90, 0x90, 0xf4, 0xf4", at=0x5000)
    machine.cpu.regs.rip = 0x5000
    panel = kw.Disassembly(machine)
    assert 0x5003 not in code(panel)
    send(kw.Controls(machine), "step")
    assert here(panel)["linear"] == "0x5003"
    assert [code(panel)[0x5003 + n]["mnemonic"] for n in range(4)] == ["nop", "nop", "nop", "hlt"]


def test_ten_thousand_rows_are_numbered_and_only_the_window_is_sent(machine: Any, send: Callable[..., None]) -> None:
    source = "\n".join(f"l{i}: add rax, {i}\n mov [rbx+{i}], rcx\n jne l{max(0, i - 3)}" for i in range(4000))
    machine.load_asm(source, at=0x100000)
    panel = kw.Disassembly(machine)
    send(panel, "goto", where="l2000")
    assert panel.view["total"] == 16000 + 2, "code, labels, and a row at each end"
    assert len(panel.view["rows"]) < 200
    assert panel.view["rows"][panel.view["at"] - panel.view["first"] - 1]["text"] == "l2000:"
    send(panel, "show", first=15990, count=150)
    assert panel.view["first"] == 15990
    assert panel.view["rows"][-1]["kind"] == "edge"
    assert panel.view["rows"][-2]["operands"] == "l3996"
    moves = panel.view["moves"]
    send(panel, "show", first=0, count=1 << 40)
    assert len(panel.view["rows"]) == 1000
    assert panel.view["moves"] == moves, "a list that was scrolled stays there"
    # Following, the next stop brings rip back into the window.
    send(panel, "show", first=8000, count=150)
    panel.follow = True
    assert here(panel)["linear"] == "0x100000"


def test_where_nothing_is_mapped_it_says_so(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Disassembly(machine)
    send(panel, "goto", where="0xffff000000")
    assert [row["text"] for row in panel.view["rows"]] == ["nothing is mapped at 0xffff000000"]
    machine.cpu.regs.rip = 0xFFFF000000
    panel.refresh()
    assert "nothing is mapped" in panel.text()


def test_several_programs_and_what_lies_between_them(machine: Any, send: Callable[..., None]) -> None:
    machine.load_asm("other: inc rcx\njmp start", at=0x8000, symbols={"start": 0x1000})
    panel = kw.Disassembly(machine)
    send(panel, "goto", where="other")
    assert list(code(panel)) == [0x8000, 0x8003]
    assert code(panel)[0x8003]["operands"] == "start"
    assert panel.view["arrows"] == []
    # The row at the end goes on; from there the program is seen too.
    edge = panel.view["rows"][-1]
    assert edge["kind"] == "edge"
    send(panel, "goto", where=edge["target"])
    assert at(panel)["linear"] == edge["target"]
    send(panel, "goto", where="0x1800")
    assert at(panel)["linear"] == "0x1800"
    # A program loaded over the code shown is shown.
    send(panel, "goto", where="other")
    machine.load_asm("newer: nop", at=0x8000)
    panel.refresh()
    assert code(panel)[0x8000]["mnemonic"] == "nop"
    assert panel.view["rows"][1]["text"] == "newer:"


def test_a_machine_without_a_program_shows_memory(widget_host: Any) -> None:
    with kb.Machine(widget_host, mode="long", memory="2M") as machine:
        machine.memory.write(0x2000, b"\x90\xf4")
        machine.cpu.regs.rip = 0x2000
        panel = kw.Disassembly(machine)
        assert here(panel)["mnemonic"] == "nop"
        assert code(panel)[0x2001]["mnemonic"] == "hlt"
        # Up to the end of memory, and no further.
        panel.goto(0x1FFFFE)
        assert panel.view["rows"][-1]["text"] == "nothing is mapped from 0x200000 on"


def test_a_16_bit_segment_shows_offsets_as_rip_has_them(real: Any, send: Callable[..., None]) -> None:
    real.load_asm(".code16\nstart: mov ax, 1\nagain: dec ax\njnz again\nhlt", at=0x7C00)
    cs = real.cpu.regs.cs
    real.cpu.regs.cs = dataclasses.replace(cs, selector=0x7C0, base=0x7C00)
    real.cpu.regs.rip = 0
    panel = kw.Disassembly(real)
    assert panel.view["bits"] == 16
    assert (here(panel)["address"], here(panel)["linear"]) == ("0x0", "0x7c00")
    jump = code(panel)[0x7C04]
    assert (jump["operands"], jump["target"]) == ("again", "0x7c03")
    assert len(panel.view["arrows"]) == 1
    send(panel, "toggle", where=jump["linear"])
    send(kw.Controls(real), "run")
    assert real.cpu.regs.rip == 4
    assert here(panel)["linear"] == "0x7c04"
    send(panel, "goto", where="cs:0x3")
    assert at(panel)["linear"] == "0x7c03"
    send(panel, "goto", where="rip")
    assert at(panel)["linear"] == "0x7c04"


def test_a_switch_of_mode_decodes_anew_and_a_width_can_be_chosen(machine: Any) -> None:
    machine.load_asm(".byte 0x48, 0x31, 0xc0, 0xf4", at=0x6000)
    machine.cpu.regs.rip = 0x6000
    panel = kw.Disassembly(machine)
    assert [row["mnemonic"] for row in code(panel).values()] == ["xor", "hlt"]
    panel.bits = 32
    assert [row["mnemonic"] for row in code(panel).values()] == ["dec", "xor", "hlt"]
    panel.bits = 0
    assert panel.view["bits"] == 64


def test_without_a_page_it_prints_a_listing_with_arrows(machine: Any) -> None:
    panel = kw.Disassembly(machine)
    text = panel.text()
    lines = [" ".join(line[8:].split()) for line in text.splitlines()]
    assert "0x1000 48 c7 c0 01 00 00 00 mov rax, 1 line 2" in lines
    assert "\n  =>    0x1000" in text
    assert "\n     ┌> 0x1007  48 83 c0 02" in text
    assert "\n     └─ 0x100f  75 f6 " in text
    panel.show_bytes = False
    assert "48 83 c0 02" not in panel.text()


def test_it_saves_its_data_and_its_picture_with_where_they_came_from(machine: Any, tmp_path: Path) -> None:
    panel = kw.Disassembly(machine)
    panel.toggle("loop")
    panel.save(tmp_path / "d.csv")
    head, data = (tmp_path / "d.csv").read_text().split("linear,", 1)
    assert str(machine.host.provenance) in head
    rows = list(csv.DictReader(("linear," + data).splitlines()))
    assert rows[0]["instruction"] == "mov rax, 1"
    assert rows[0]["here"] == "1"
    assert "breakpoint 1" in rows[1]["breakpoint"]
    assert rows[4]["bytes"] == "48 bb 11 32 54 76 98 ba dc fe"
    panel.save(tmp_path / "d.svg")
    ElementTree.parse(tmp_path / "d.svg")
    panel.save(tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_it_shows_the_vcpu_it_is_given(widget_host: Any, send: Callable[..., None]) -> None:
    with kb.Machine(widget_host, mode="long", vcpus=2) as machine:
        machine.load_asm("one: nop\ntwo: nop\nhlt", at=0x1000)
        machine.cpus[1].regs.rip = 0x1001
        first, second = kw.Disassembly(machine), kw.Disassembly(machine.cpus[1])
        assert [here(each)["linear"] for each in (first, second)] == ["0x1000", "0x1001"]
        send(second, "toggle", where="two")
        assert "breakpoint" not in code(first)[0x1001], "each vcpu has breakpoints of its own"
        send(kw.Breakpoints(machine.cpus[1]), "goto", number=1)
        assert (first.follow, second.follow) == (True, False), "and its own panels"
        first.cpu = machine.cpus[1]
        assert here(first)["linear"] == "0x1001"
        assert "breakpoint" in code(first)[0x1001]


def test_a_closed_machine_keeps_what_was_seen_last(widget_host: Any, send: Callable[..., None]) -> None:
    with kb.Machine(widget_host, mode="long") as machine:
        machine.load_asm("again: inc rax\njmp again", at=0x1000)
        panel = kw.Disassembly(machine)
    panel.refresh()
    assert panel.state == "closed"
    send(panel, "show", first=0, count=50)
    assert "jmp again" in panel.text()
