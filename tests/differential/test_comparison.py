"""The comparison itself: a host that lies about one thing is found out, and the guest shrunk to what shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from .compare import compare
from .effects import AF, ZF
from .guest import Guest, generate, written
from .report import describe
from .runner import Outcome, Runner
from .session import Session
from .setting import BY_NAME

Lie = Callable[[Guest, Outcome], Outcome]


class Liar:
    """A second look at a host, whose outcomes are changed on the way."""

    def __init__(self, runner: Runner, lie: Lie) -> None:
        self._runner = runner
        self._lie = lie
        self.kind = runner.kind
        self.name = "liar"
        self.supports = runner.supports

    def run(self, guest: Guest) -> Outcome:
        """What the guest did, and the lie."""
        return self._lie(guest, self._runner.run(guest))


@pytest.fixture
def honest(runner) -> Runner:
    """A host, whichever there is."""
    found = runner("local") or runner("npt=1")
    if found is None:
        pytest.skip("no host is here")
    return found


def after(name: str, column: str, bit: int) -> Lie:
    """A lie about a register, in the row of each instruction of that name and all behind."""

    def lie(guest: Guest, outcome: Outcome) -> Outcome:
        rows = outcome.rows.copy()
        rips = [int(outcome.start["rip"]), *(int(rip) for rip in rows["rip"][:-1])]
        ran = [at for at, rip in enumerate(rips) if guest.image.instructions[rip].name == name]
        if ran:
            rows[column][ran[0] :] ^= bit
        return replace(outcome, host="liar", rows=rows)

    return lie


def guests_with(name: str, count: int) -> list[Guest]:
    setting = BY_NAME["real"]
    made = (generate(5, number, setting) for number in range(2000))
    found = [guest for guest in made if any(each.name == name for each in guest.image.instructions.values())]
    return found[:count]


def test_a_planted_divergence_is_found_and_shrunk_to_the_one_piece_that_shows_it(honest: Runner):
    session = Session([honest, Liar(honest, after("xadd", "rdx", 1 << 4))], at_once=False)
    found = session.run(guests_with("xadd", 3)).divergences
    assert session.result.counts.total() == 3
    assert [each.names for each in found] == [("rdx",)] * len(found)
    assert all(each.instruction is not None and each.instruction.name == "xadd" for each in found)
    assert [len(each.guest.pieces) for each in found] == [1] * len(found)
    assert "xadd" in describe(found[0])


def test_the_test_that_a_report_prints_makes_the_divergence_again(honest: Runner):
    liar = Liar(honest, after("xadd", "rdx", 1 << 4))
    found = Session([honest, liar], at_once=False).run(guests_with("xadd", 1)).divergences[0]
    text = describe(found)
    seen = []
    scope = {"agree": lambda *args, **options: seen.append(written(*args, **options))}
    code = text[text.index("def test_guest_") :]
    exec(code + "\n" + code.split("(")[0].removeprefix("def ") + "(agree)", scope)
    divergence, _ = compare(seen[0], honest.run(seen[0]), liar.run(seen[0]), (honest.kind, honest.kind))
    assert divergence is not None
    assert divergence.names == ("rdx",)


def test_a_flag_is_compared_only_where_it_is_defined(honest: Runner):
    guest = written("real", [("and", "21d8"), ("mov", "b80100"), ("cmp", "3c05"), ("nop", "90")])
    truth = honest.run(guest)
    kinds = (honest.kind, honest.kind)

    def seen(row: int, bit: int) -> int | None:
        rows = truth.rows.copy()
        rows["rflags"][row] ^= bit
        divergence, _ = compare(guest, truth, replace(truth, rows=rows), kinds)
        return None if divergence is None else divergence.step

    # AF is undefined behind AND until CMP gives it a value; ZF never is.
    assert [seen(row, AF) for row in range(4)] == [None, None, 2, 3]
    assert [seen(row, ZF) for row in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("memory", lambda truth: {"window": truth.window[:7] + bytes([truth.window[7] ^ 1]) + truth.window[8:]}),
        ("end", lambda truth: {"end": "shutdown"}),
        ("access 0 to devices", lambda truth: {"log": (("out", 0x93, 0x12, 1),)}),
        ("cr2", lambda truth: {"special": truth.special | {"cr2": 5}}),
        ("steps", lambda truth: {"rows": truth.rows[:-1]}),
    ],
)
def test_what_a_guest_leaves_behind_is_compared(honest: Runner, what: str, change: Callable[[Outcome], dict]):
    guest = written("real", [("mov", "b81200"), ("out", "e692"), ("nop", "90")])
    truth = honest.run(guest)
    divergence, _ = compare(guest, truth, replace(truth, **change(truth)), (honest.kind, honest.kind))
    assert divergence is not None
    assert what in divergence.names


def test_a_guest_does_the_same_again_on_the_same_host(honest: Runner):
    for number in range(30):
        guest = generate(6, number, BY_NAME["protected32"], exceptions=number % 2 == 1)
        divergence, met = compare(guest, honest.run(guest), honest.run(guest), (honest.kind, honest.kind))
        assert divergence is None, describe(divergence)
        assert not [each for each in met if each.ends]
