"""Whatever a page sends to whichever panel: an error in words under the panel at most, and the panel lives on."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

import kvmbench_widgets as kw
from kvmbench_widgets.panel import Panel

PANELS: list[type[Panel]] = [getattr(kw, name) for name in kw.__all__ if hasattr(getattr(kw, name), "MODULE")]
ACTIONS = [
    (kind, name)
    for kind in PANELS
    for name in dir(kind)
    if getattr(inspect.getattr_static(kind, name), "is_action", False)
]
ODD: list[Any] = [
    None, True, 0, -1, 10**30, 1.5, math.nan, -math.inf, "", "x", "0x", "\0", "\ud800", "9" * 5000, "a" * 100_000,
    "(" * 3000, "rip+" + "1" * 5000, "0x1" + "0" * 40, [], [["0x1000", 5]], {"a": [1]}, [[[[[["x"]]]]]], "rflags",
    "xmm\u0663", "-1", "../../x",
]  # fmt: skip
# Of Python's, which mean nothing to who looks at a panel. What a page sends may hold such words, quoted.
NOT_WORDS = re.compile(r"^\w*(Error|Exception)\b|Traceback|positional argument.*given")


def odd_options(method: Any) -> Iterator[dict[str, Any]]:
    """Each parameter odd by itself, and all of them; one missing, and one too many."""
    names = [name for name in inspect.signature(method).parameters if name != "self"]
    yield {"zzz": 2}
    yield {"self": 1}
    yield from ({one: odd} for one in names for odd in ODD)
    yield from ({**dict.fromkeys(names, "loop"), one: odd} for one in names for odd in ODD)
    yield from (dict.fromkeys(names, odd) for odd in ODD if names)


@pytest.mark.parametrize(("kind", "name"), ACTIONS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_an_odd_message_is_told_in_words(
    machine: Any, caplog: pytest.LogCaptureFixture, kind: type[Panel], name: str
) -> None:
    panel = kind(machine)
    told = 0
    for options in odd_options(getattr(kind, name)):
        if name == "out" and "zzz" not in options:
            continue  # there is nothing to return from
        panel._receive(None, {"do": name, **options}, [])
        machine.cpu.interrupt()
        assert panel.wait(20), options
        error = panel.error
        assert not NOT_WORDS.search(error), (options, error)
        assert len(error) < 700, options
        json.dumps(panel.get_state(), ensure_ascii=False).encode()
        told += bool(error)
    assert told, "not one of these can be right"
    assert not caplog.records
    # It lives on: it draws, and an order that is right clears the error.
    panel._receive(None, {"do": "download", "format": "txt"}, [])
    assert panel.error == ""
    assert panel.state == "stopped"
    assert panel.view
    assert panel.text()


@pytest.mark.parametrize("kind", PANELS)
def test_a_message_that_is_none_changes_nothing(machine: Any, kind: type[Panel]) -> None:
    panel = kind(machine)
    view = panel.view
    for name in (None, 5, [["x"]], {"a": 1}, "nothing", "refresh", "__init__", "close", "save", "\ud800", "z" * 10**6):
        panel._receive(None, {"do": name}, [])
        assert f"{panel.TITLE} cannot do" in panel.error
        assert len(panel.error) < 700
    for message in (None, 5, "step", ["do"], {}):
        panel._receive(None, message, [])
    assert panel.comm is not None
    assert panel.view == view


@pytest.mark.parametrize("kind", PANELS)
def test_a_page_sets_only_what_is_its_to_set(machine: Any, kind: type[Panel], caplog: pytest.LogCaptureFixture) -> None:
    panel = kind(machine)
    before = {name: panel.get_state()[name] for name in panel.keys}
    for name in before:
        for odd in ({}, [], None, -1, 10**30, math.nan, "zz", ["zz"], {"a": 1}):
            its_own = {"arrangement": isinstance(odd, dict), "sections": odd == [], "looked_at": True}
            if its_own.get(name) or name == "_view_count":
                continue
            caplog.clear()
            panel._handle_msg(
                {"content": {"data": {"method": "update", "state": {name: odd}, "buffer_paths": []}}, "buffers": []}
            )
            assert not [each for each in caplog.records if each.levelno >= logging.WARNING], (name, odd)
            assert not NOT_WORDS.search(panel.error), panel.error
            state = panel.get_state()
            if not (name == "deadline_s" and odd == 10**30):
                assert state[name] == before[name], (name, odd)
            panel.error = ""
    assert panel.text()
