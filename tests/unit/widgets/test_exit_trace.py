"""The ExitTrace panel without a page: what it sends, what it counts, when its thread ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import kvmbench as kb
import kvmbench_widgets as kw
from kvmbench.errors import BusyError, MisuseError
from kvmbench.traces.exits import NOT_TOLD
from kvmbench_widgets import exit_columns
from kvmbench_widgets.exit_columns import COLUMNS, Reasons

OUTS = """
        mov ecx, 3000
again:  out 0x80, al
        in al, 0x99
        out 0x99, al
        loop again
        hlt
"""


@pytest.fixture
def taken(machine: Any) -> Any:
    """A trace of nine thousand exits."""
    machine.load_asm(OUTS, at=0x3000)
    machine.cpu.regs.rip = 0x3000
    with kb.trace(machine) as t:
        machine.cpu.run()
    return t


class Page:
    """A page's half of the talk: asks for what is missing, and keeps it."""

    def __init__(self, panel: kw.ExitTrace) -> None:
        self.panel, self.version, self.messages = panel, 0, 0
        self.columns = {name: np.zeros(0, kind) for name, kind in COLUMNS}
        self.other: list[dict[str, Any]] = []
        panel.send = self.hear  # type: ignore[method-assign]

    def hear(self, message: dict[str, Any], buffers: Any = ()) -> None:
        if message["do"] != "rows":
            self.other.append(message)
            return
        self.messages += 1
        assert sum(len(each) for each in buffers) <= 31 * (1 << 18)
        assert message["first"] <= len(self.columns["time"])
        self.version = message["version"]
        for (name, kind), data in zip(COLUMNS, buffers, strict=True):
            kept = self.columns[name][: message["first"]]
            self.columns[name] = np.concatenate([kept, np.frombuffer(data, kind)])

    def ask(self) -> None:
        self.panel._receive(None, {"do": "rows", "version": self.version, "first": len(self.columns["time"])}, [])
        assert self.panel.error == ""

    def ask_all(self) -> None:
        while self.version != self.panel.view["version"] or len(self.columns["time"]) < self.panel.view["total"]:
            self.ask()


@pytest.fixture
def shown(taken: Any) -> Iterator[kw.ExitTrace]:
    panel = kw.ExitTrace(taken)
    yield panel
    panel.close()


def test_columns_say_what_the_table_says(taken: Any, shown: kw.ExitTrace) -> None:
    page = Page(shown)
    page.ask_all()
    exits, got = taken.exits, page.columns
    assert len(got["time"]) == len(exits) > 3000
    assert (got["time"] + int(exits.time_ns[0]) == exits.time_ns).all()
    assert [shown.view["reasons"][n]["name"] for n in got["reason"]] == exits.reasons.tolist()
    # What exits claim of their neighbours' time is cut off, all else is there.
    kvm = got["before"] + np.maximum(got["after"], 0)
    assert (kvm <= np.maximum(exits.kvm_ns, 0) + 1).all()
    assert got["user"].sum() == pytest.approx(exits.user_ns.sum(), rel=0.02)
    assert ((got["after"] < 0) == ((exits.kvm_ns == NOT_TOLD) & (exits.isa != 0))).all()
    for n in range(len(shown.view["lanes"])):
        mine = got["lane"] == n
        ends = got["time"] + got["before"] + got["user"] + got["outside"] + np.maximum(got["after"], 0)
        assert (ends[mine][:-1] <= (got["time"] - got["guest"])[mine][1:] + 64).all(), "float32 holds 24 bits"


def test_the_picture_has_the_time_that_the_columns_have(shown: kw.ExitTrace) -> None:
    import base64

    picture, columns = shown.view["picture"], shown._columns
    width = (picture["end"] - picture["start"]) / picture["buckets"]
    user = sum(
        np.frombuffer(base64.b64decode(text), np.uint8).sum() / 255 * width
        for kind, text in picture["lanes"][0].items()
        if int(kind) >= exit_columns.FIRST_REASON and int(kind) % 2 == 0
    )
    # Shares are rounded up to 1/255 of a bucket and what is longer than a bucket is cut.
    assert user == pytest.approx(columns["user"].sum(), rel=0.1, abs=width * picture["buckets"] / 100)


def test_a_page_that_has_some_is_sent_only_what_differs(machine: Any, taken: Any) -> None:
    panel = kw.ExitTrace(taken)
    page = Page(panel)
    page.ask_all()
    whole, exits = page.columns, taken.exits
    # As if the trace had been shorter, and one row other than it became.
    changed = exits.take(np.arange(len(exits) - 100))
    changed.user_ns[-10] //= 2
    panel._take(changed)
    panel.view = panel.make_view()
    page.ask_all()
    assert len(page.columns["time"]) == len(exits) - 100
    seen = page.messages
    panel._take(exits)
    panel.view = panel.make_view()
    page.ask()
    assert page.messages == seen + 1
    for name, _ in COLUMNS:
        assert (page.columns[name] == whole[name]).all(), name
    assert panel._kept[-1][1] == len(exits) - 110
    # One that has nothing of this widget's, or of a version long ago, begins anew.
    page.version = 10**6
    page.ask()
    assert len(page.columns["time"]) == len(exits)
    panel.close()


def test_more_exits_than_are_shown_are_the_latest_and_it_says_so(taken: Any) -> None:
    panel = kw.ExitTrace(taken, most=1000)
    page = Page(panel)
    page.ask_all()
    exits = taken.exits
    assert len(page.columns["time"]) == 1000
    assert (page.columns["time"] == exits.time_ns[-1000:] - panel._zero).all()
    assert f"only the latest 1,000 of {len(exits):,} exits" in panel.text()
    assert panel.words(999).startswith(exits.reasons[-1])
    panel.close()


def test_numbers_of_reasons_stay_when_others_come(taken: Any) -> None:
    reasons, exits = Reasons(), taken.exits
    some = exits.take(exits.reason == exits.reason[0])
    reasons.number(some)
    first = list(reasons.names)
    numbers = reasons.number(exits)
    assert reasons.names[: len(first)] == first
    assert [reasons.names[n] for n in numbers] == exits.reasons.tolist()


def test_what_is_chosen_is_counted_as_the_summary_does(taken: Any, shown: kw.ExitTrace) -> None:
    zero, end = shown._zero, float(taken.exits.time_ns[-1] - shown._zero)
    shown.choose(-1e9, end + 1)
    assert shown.counts["exits"] == f"{len(taken.exits):,}"
    assert {row[0]: row[1] for row in shown.counts["rows"]} == {
        name: f"{count:,}" for name, count in taken.summary().counts.items()
    }
    shown.choose(end / 4, end / 2)
    inside = taken.exits.between(zero + int(end / 4), zero + int(end / 2) + 1)
    assert len(shown.selected) == pytest.approx(len(inside), abs=1)
    first = shown.view["reasons"][0]["name"]
    shown.hidden = [first]
    assert first not in [row[0] for row in shown.counts["rows"]]
    assert first not in shown.selected.reasons.tolist()
    shown.forget()
    assert (shown.chosen, shown.counts) == ([], {})


def test_it_shows_a_trace_or_a_machine_and_says_so(machine: Any) -> None:
    wrongs: list[Any] = [None, 5, "trace", [], machine.host]
    for wrong in wrongs:
        with pytest.raises(MisuseError, match="ExitTrace shows a trace"):
            kw.ExitTrace(wrong)
    odd: list[Any] = [0, True, 1.5, 10**9]
    for most in odd:
        with pytest.raises(MisuseError, match="most is how many exits"):
            kw.ExitTrace(machine, most=most)


def test_a_misspelt_option_is_an_error_and_no_trace_begins(machine: Any, taken: Any) -> None:
    with pytest.raises(MisuseError, match=r"ExitTrace has no option 'hiden'; did you mean 'hidden'\?"):
        kw.ExitTrace(taken, hiden=["IO"])
    with pytest.raises(MisuseError, match="ExitTrace has no option 'colour'; there are hidden, layout, most, span"):
        kw.ExitTrace(machine, colour="red")
    with kb.trace(machine):  # which nothing else holds
        pass
    with pytest.raises(MisuseError, match="Registers has no option 'colour'"):
        kw.Registers(machine.cpu, colour="red")
    assert kw.ExitTrace(taken, hidden=["IO"]).hidden == ["IO"]


def test_of_a_machine_it_begins_a_trace_and_closing_ends_it_and_its_thread(machine: Any) -> None:
    panel = kw.ExitTrace(machine)
    t: Any = panel.trace
    assert t.running
    with pytest.raises(BusyError, match="one trace at a time"):
        kw.ExitTrace(machine)
    machine.cpu.run()
    thread = panel._thread
    assert thread is not None
    assert thread.is_alive()
    panel.close()
    assert not thread.is_alive()
    assert not t.running
    assert len(t.exits) > 0
    kw.ExitTrace(machine).close()
    assert not [each for each in threading.enumerate() if each.name == "kvmbench exit trace"]


def test_it_grows_with_the_trace_and_its_thread_ends_with_it(machine: Any) -> None:
    machine.load_asm(OUTS, at=0x3000)
    machine.cpu.regs.rip = 0x3000
    t = kb.trace(machine)
    panel = kw.ExitTrace(t)
    page = Page(panel)
    assert not panel.view["begun"]
    assert "has not begun" in panel.text()
    with t:
        machine.cpu.run()
        panel.refresh()
        page.ask_all()
        assert len(page.columns["time"]) > 3000
        assert panel.view["live"]
    assert panel._thread is not None
    panel._thread.join(20)
    assert not panel._thread.is_alive()
    assert not panel.view["live"]
    page.ask_all()
    assert len(page.columns["time"]) == len(t.exits)
    panel.close()


def test_of_a_large_trace_that_runs_only_the_end_is_looked_at(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.load_asm("spin: out 0x99, al\n jmp spin", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    monkeypatch.setattr("kvmbench_widgets.exit_trace._LIVE_BYTES", 100_000)
    with kb.trace(machine) as t:
        panel = kw.ExitTrace(t)
        # Readings of their own: what is left out is whole pieces.
        for _ in range(8):
            machine.cpu.run(deadline_s=0.2)
            panel.refresh()
        assert "while the trace runs, only its latest" in panel.text()
        end, whole = panel._table, t.exits
        assert end is not None
        assert 0 < len(end) < len(whole)
        # All from its beginning on, as in the whole.
        late = whole.between(int(end.time_ns[0]), 1 << 62)
        assert len(end) <= len(late)
        assert (late.time_ns[: len(end)] == end.time_ns).all()
    assert panel._thread is not None
    panel._thread.join(20)
    assert len(panel._columns["time"]) == len(t.exits)
    assert panel.view["notes"] == list(t.notes)
    panel.close()
