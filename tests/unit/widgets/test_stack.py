"""The Stack panel, without a page."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvmbench as kb
import kvmbench_widgets as kw

CALLS = """
start:  mov rsp, 0x8000
        mov rax, 0x6f6c6c6568
        push rax
        call f
back:   hlt
f:      push rbp
        mov rbp, rsp
        lea rax, [f]
        call rax
"""


@pytest.fixture
def calling(machine: Any) -> Any:
    machine.load_asm(CALLS, at=0x1000)
    return machine


def test_return_addresses_texts_and_both_pointers_are_told(calling: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Stack(calling), kw.Controls(calling)
    send(controls, "step", count=8)
    words = panel.view["rows"]
    assert panel.view["pointer"] == "7fe0"
    assert [each["at"] for each in words[:3]] == ["0000000000007fe0", "0000000000007fe8", "0000000000007ff0"]
    assert words[0]["marks"] == ["rsp"]
    assert words[0]["call"] == "call rax"
    assert words[1]["marks"] == ["rbp"]
    assert (words[2]["call"], words[2]["label"]) == ("call f", "back")
    assert words[3]["text"] == "hello"
    assert "return to back after call f" in panel.text()


def test_what_a_push_wrote_is_marked(calling: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Stack(calling), kw.Controls(calling)
    calling.memory.write_u64(0x7FF8, 0x77)
    calling.cpu.regs.rsp = 0x7FF0
    panel.refresh()
    send(controls, "until", where="back-5")
    assert panel.view["rows"][0] == panel.view["rows"][0] | {"hex": f"{0x6F6C6C6568:016x}", "was": f"{0x77:016x}"}
    assert "was" not in panel.view["rows"][1]


def test_words_are_as_wide_as_the_mode_pushes_and_end_with_the_segment(
    widget_host: Any, send: Callable[..., None]
) -> None:
    with kb.Machine(widget_host, mode="real") as machine:
        machine.load_asm("mov ax, 0x200\nmov ss, ax\nmov sp, 0\npush 0x1234\ncall f\nf: hlt", at=0x7C00)
        panel, controls = kw.Stack(machine), kw.Controls(machine)
        send(controls, "step", count=5)
        view = panel.view
        assert (view["word_bytes"], view["segment"], view["pointer"]) == (2, "0200", "fffc")
        assert view["total"] == 2, "sp wrapped to the segment's end"
        assert view["rows"][0]["at"] == "00011ffc"
        assert view["rows"][0]["label"] == "f"
        assert view["rows"][0]["call"].startswith("call")
        assert view["rows"][1]["hex"] == "1234"
    with kb.Machine(widget_host, mode="protected") as machine:
        machine.load_asm("mov esp, 0x8000\npush 0x12345\nhlt", at=0x1000)
        panel, controls = kw.Stack(machine), kw.Controls(machine)
        send(controls, "step", count=2)
        assert panel.view["rows"][0] == panel.view["rows"][0] | {"at": "00007ffc", "hex": "00012345", "marks": ["esp"]}


def test_a_word_is_edited_with_a_number_a_symbol_or_a_register(calling: Any, send: Callable[..., None]) -> None:
    panel = kw.Stack(calling)
    calling.cpu.regs.rsp = 0x7FFC
    calling.cpu.regs.rdx = 0x55
    for value, found in (("0xfedcba9876543211", 0xFEDCBA9876543211), ("back+1", 0x1018), ("rdx", 0x55)):
        send(panel, "write", address="0x7ffc", value=value)
        assert panel.error == ""
        assert panel.view["rows"][0]["hex"] == f"{found:016x}"
        assert calling.memory.read_u64(0x7FFC) == found
    calling.cpu.regs.rsp = 0x1FFC
    send(panel, "write", address="0x1ffc", value="0x1122334455667788")
    assert calling.memory.read_u64(0x1FFC) == 0x1122334455667788, "across two pages"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"do": "write", "address": "0x7000", "value": "nowhere"}, "nowhere"),
        ({"do": "write", "address": "0x7000", "value": "0x10000000000000000"}, "64 bits"),
        ({"do": "write", "address": "0xffff800000000000", "value": "1"}, "not mapped"),
        ({"do": "write", "address": "stack", "value": "1"}, "hex digits"),
        ({"do": "write", "address": "-8", "value": "1"}, "64 bits"),
        ({"do": "write", "address": None, "value": "1"}, "None"),
        ({"do": "write", "address": "0x7000", "value": None}, "None"),
        ({"do": "show", "first": True, "count": 2}, "True"),
        ({"do": "show", "first": 0, "count": -2}, "-2"),
    ],
)
def test_bad_orders_are_told_in_words(machine: Any, message: dict[str, Any], words: str) -> None:
    panel = kw.Stack(machine)
    panel._receive(None, message, [])
    assert words in panel.error


def test_a_value_too_wide_for_a_word_is_refused(widget_host: Any, send: Callable[..., None]) -> None:
    with kb.Machine(widget_host, mode="real") as machine:
        machine.load_asm("hlt", at=0x7C00)
        panel = kw.Stack(machine)
        send(panel, "write", address="0x7000", value="0x12345")
        assert "word of 16 bits" in panel.error


def test_a_stack_that_is_not_mapped_says_so(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Stack(machine)
    machine.cpu.regs.rsp = 0xFFFF800000000000
    panel.refresh()
    assert panel.view["total"] == 0
    assert "0xffff800000000000 is not mapped" in panel.text()
    machine.cpu.regs.rsp = (1 << 64) - 16
    panel.refresh()
    assert "not mapped" in panel.text()
    machine.cpu.regs.rsp = machine.memory.regions[-1].end - 16
    panel.refresh()
    assert panel.view["total"] == 2
    assert [each["offset"] for each in panel.view["rows"]] == ["+0x0", "+0x8"]


def test_it_saves_its_data_and_its_picture(calling: Any, send: Callable[..., None], tmp_path: Path) -> None:
    panel, controls = kw.Stack(calling), kw.Controls(calling)
    send(controls, "step", count=4)
    panel.save(tmp_path / "s.csv")
    head, data = (tmp_path / "s.csv").read_text().split("address,", 1)
    assert str(calling.host.provenance) in head
    first = next(csv.reader(data.splitlines()[1:]))
    assert first[:3] == ["0x0000000000007ff0", "+0x0", f"0x{0x1017:016x}"]
    assert first[4:7] == ["rsp", "back", "call f"]
    panel.save(tmp_path / "s.svg")
    assert "call f" in (tmp_path / "s.svg").read_text()
