"""The Console panel, without a page."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmbench as kb
import kvmbench_widgets as kw

from ...panel_guests import ECHO


class Page:
    """What a page would have received."""

    def __init__(self, panel: Any) -> None:
        self.messages: list[dict[str, Any]] = []
        panel.send = lambda message, buffers=None: self.messages.append(message)

    def text(self, stream: str = "serial") -> str:
        return "".join(each["text"] for each in self.messages if each["do"] == "text" and each["stream"] == stream)


@pytest.fixture
def echo(widget_host: Any) -> Iterator[Any]:
    with kb.Machine(widget_host, mode="long") as machine:
        machine.load_asm(ECHO, at=0x1000)
        yield machine


def sends(machine: Any, text: str) -> None:
    for byte in text.encode():
        machine.serial.port_out(0x3F8, byte, 1)


def test_a_running_guest_answers_what_is_typed(echo: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Console(echo), kw.Controls(echo)
    page = Page(panel)
    send(controls, "run", wait=False)
    send(panel, "write", wait=False, text="hello")
    end = time.monotonic() + 20
    while page.text() != "hello\r" or page.text("debug") != "......":
        assert time.monotonic() < end, page.messages
        time.sleep(0.001)
    panel.newline = "lf"
    send(panel, "write", wait=False, text="ü")
    send(panel, "control", wait=False, key="C")
    send(panel, "control", wait=False, key="Esc")
    while page.text() != "hello\rü\n\x03\x1b":
        assert time.monotonic() < end, page.messages
        time.sleep(0.001)
    send(controls, "pause")
    assert echo.serial.text == page.text()
    assert panel.get_state()["tail"]["serial"] == {"text": page.text(), "end": len(page.text()), "cut": False}
    assert "hello" in panel.text()


def test_only_what_is_new_is_sent_and_a_character_is_never_cut(machine: Any) -> None:
    panel = kw.Console(machine)
    page = Page(panel)
    sends(machine, "one ")
    panel.refresh()
    for byte in "é".encode():
        machine.serial.port_out(0x3F8, byte, 1)
        panel.refresh()
    panel.refresh()
    assert [(each["from"], each["text"]) for each in page.messages] == [(0, "one "), (4, ""), (4, "é")]


def test_a_flood_is_cut_to_what_can_be_read(machine: Any) -> None:
    panel = kw.Console(machine)
    page = Page(panel)
    sends(machine, "first\n")
    panel.refresh()
    machine.serial.output.extend(b"x" * 10_000_000)
    began = time.monotonic()
    panel.refresh()
    assert time.monotonic() - began < 1
    assert len(page.messages) == 2
    assert page.messages[1]["skipped"] == 10_000_000 - 65536
    assert len(page.messages[1]["text"]) == 65536
    state = panel.get_state()["tail"]["serial"]
    assert len(state["text"]) == 65536
    assert state["cut"]
    assert state["end"] == page.messages[1]["from"] + 65536


def test_a_reset_machine_begins_anew(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Console(machine)
    page = Page(panel)
    sends(machine, "before")
    panel.refresh()
    machine.reset()
    sends(machine, "and something longer after")
    panel.refresh()
    assert page.messages[-1] == page.messages[-1] | {"reset": True, "from": 0, "text": "and something longer after"}
    send(panel, "again")
    assert page.messages[-2] == page.messages[-2] | {"again": True, "from": 0, "text": "and something longer after"}
    send(panel, "clear")
    assert page.messages[-1] == {"do": "clear", "stream": "serial"}
    assert "something" not in panel.text()
    assert machine.serial.text == "and something longer after"


def test_what_the_guest_has_not_read_is_counted(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Console(machine, newline="none")
    send(panel, "write", text="two\nlines")
    assert panel.view["waiting"] == 9


def test_control_sequences_stay_out_of_texts_and_files(machine: Any, tmp_path: Path) -> None:
    sends(machine, "\x1b[1;31mred\x1b[0m <b>\r\n\x1b]0;title\x07second\tline\x1b(B\x00\n")
    panel = kw.Console(machine)
    assert panel.text().endswith("\nred <b>\nsecond  line")
    assert "\x1b" not in panel.text()
    panel.save(tmp_path / "c.csv")
    assert "serial,1,red <b>\nserial,2,second\tline\n" in (tmp_path / "c.csv").read_text()
    assert str(machine.host.provenance) in (tmp_path / "c.csv").read_text()
    panel.save(tmp_path / "c.svg")
    assert "red &lt;b&gt;" in (tmp_path / "c.svg").read_text()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"do": "write", "text": 5}, "not 5"),
        ({"do": "write", "text": "x" * 70000}, "70,000 characters"),
        ({"do": "control", "key": "1"}, "'1'"),
        ({"do": "control", "key": ""}, "''"),
        ({"do": "control", "key": None}, "None"),
        ({"do": "clear", "stream": "tape"}, "no stream 'tape'; there are serial, debug"),
        ({"do": "clear", "stream": []}, "no stream"),
    ],
)
def test_bad_orders_are_told_in_words(machine: Any, message: dict[str, Any], words: str) -> None:
    panel = kw.Console(machine)
    panel._receive(None, message, [])
    assert words in panel.error
    assert machine.serial.waiting == 0


def test_the_last_words_of_a_closed_machine_are_shown(widget_host: Any, send: Callable[..., None]) -> None:
    with kb.Machine(widget_host, mode="long") as machine:
        machine.load_asm("hlt", at=0x1000)
        panel = kw.Console(machine)
        sends(machine, "last words")
    panel.refresh()
    assert panel.state == "closed"
    assert "last words" in panel.text()
    send(panel, "write", text="hello?")
    assert "closed" in panel.error
