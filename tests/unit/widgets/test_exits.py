"""The Exits panel, without a page."""

from __future__ import annotations

import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvmbench_widgets as kw

OUTS = """
        mov   ecx, 300
        mov   dx, 0x3f8
again:  mov   al, 'x'
        out   dx, al
        dec   ecx
        jnz   again
stop:   jmp   stop
storm:  out   0x80, al
        jmp   storm
"""


@pytest.fixture
def chatty(machine: Any) -> Any:
    machine.load_asm(OUTS, at=0x4000)
    machine.cpu.regs.rip = 0x4000
    return machine


def test_exits_are_listed_counted_and_placed_in_time(chatty: Any, send: Callable[..., None]) -> None:
    exits, controls = kw.Exits(chatty), kw.Controls(chatty)
    assert exits.view["total"] == 0
    assert exits.view["lanes"] == []
    send(controls, "until", where="stop")
    view = exits.view
    assert view["all"] == "300"
    assert view["places"] == [{"kind": "out", "where": "0x3f8", "count": "300"}]
    assert len(view["rows"]) == 200, "follows the newest"
    last = view["rows"][-1]
    assert (last["n"], last["kind"], last["value"], last["device"]) == (299, "out", "0x78", "serial at 0x3f8")
    (lane,) = view["lanes"]
    assert (lane["name"], lane["count"], sum(lane["bins"])) == ("out 0x3f8", "300", 300)
    send(exits, "show", first=0, count=5)
    assert [row["n"] for row in exits.view["rows"]][-1] == 299, "while it follows it stays at the end"
    exits.follow = False
    send(exits, "show", first=0, count=5)
    assert [row["n"] for row in exits.view["rows"]] == [0, 1, 2, 3, 4]
    send(exits, "clear")
    assert exits.view["all"] == "0"


def test_a_storm_of_exits_is_drawn_a_few_times_a_second(chatty: Any, send: Callable[..., None]) -> None:
    exits, controls = kw.Exits(chatty), kw.Controls(chatty)
    chatty.cpu.regs.rip = chatty.symbols["storm"]
    drawn: list[float] = []
    exits.observe(lambda _: drawn.append(time.monotonic()), "view")
    send(controls, "run", wait=False)
    end = time.monotonic() + 20
    while "rate" not in exits.view:
        assert time.monotonic() < end
        time.sleep(0.01)
    send(controls, "pause")
    gaps = [after - before for before, after in itertools.pairwise(drawn[:-1])]
    assert all(gap > 0.2 for gap in gaps), gaps
    assert exits.log.total > 200, "many to a picture"
    assert "rate" not in exits.view, "a rate is of a guest that runs"


def test_it_saves_all_it_kept_with_where_it_came_from(chatty: Any, send: Callable[..., None], tmp_path: Path) -> None:
    exits, controls = kw.Exits(chatty), kw.Controls(chatty)
    send(controls, "until", where="stop")
    exits.save(tmp_path / "e.csv")
    text = (tmp_path / "e.csv").read_text()
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert len(rows) == 300
    assert rows[0]["kind"] == "out"
    assert rows[0]["value"] == "0x78"
    assert str(chatty.host.provenance) in text
    exits.save(tmp_path / "e.png")
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    assert "out 0x3f8" in exits.text()


@pytest.mark.parametrize("options", [{"first": -1, "count": 5}, {"first": "0", "count": 5}, {"first": 0}])
def test_bad_windows_are_told_in_words(chatty: Any, send: Callable[..., None], options: dict[str, Any]) -> None:
    exits = kw.Exits(chatty)
    send(exits, "show", **options)
    assert exits.error


def test_a_log_without_exits_is_not_replaced(chatty: Any, send: Callable[..., None]) -> None:
    log = chatty.cpu.log_exits(50)
    exits, controls = kw.Exits(chatty), kw.Controls(chatty)
    assert exits.log is log
    send(controls, "until", where="stop")
    assert (log.total, len(log), exits.view["all"]) == (300, 50, "300")
