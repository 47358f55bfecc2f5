"""What is said of arguments that do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from kvmbench.arguments import instead, integer, nearest, refused_plainly, spelled_out
from kvmbench.errors import MisuseError


def test_an_integer_is_an_integer_of_any_kind() -> None:
    assert integer(5, "n") == 5
    assert integer(np.uint64(5), "n", 0, 5) == 5
    for value in (1.0, "1", None, True):
        with pytest.raises(MisuseError, match=f"n={value!r}: give an integer"):
            integer(value, "n")
    with pytest.raises(MisuseError, match="n=6: give at least 1 and at most 5"):
        integer(6, "n", 1, 5)
    with pytest.raises(MisuseError, match=r"n=-1: give at least 0$"):
        integer(-1, "n", 0)


def test_the_nearest_word_is_the_one_with_two_letters_swapped_or_in_another_case() -> None:
    registers = ["rdx", "rax", "rbx", "rip"]
    assert nearest("rxa", registers) == ["rax"]
    assert nearest("RIP", registers) == ["rip"]
    assert nearest("zz", registers) == []
    assert instead("rxa", registers) == "did you mean 'rax'?"
    assert instead("zz", registers) == "there are rdx, rax, rbx, rip"
    assert instead("zz", []) == "there are none"


class Thing:
    @spelled_out
    def turn(self, angle: int, *, slowly: bool = False) -> int:
        return angle + int("no number") if slowly else angle

    @refused_plainly
    def push(self, force: int, **fields: int) -> int:
        return force + 1


def test_a_call_that_fits_is_passed_on_and_its_own_errors_too() -> None:
    assert Thing().turn(5) == 5
    assert Thing.turn.__name__ == "turn"
    with pytest.raises(ValueError, match="invalid literal"):
        Thing().turn(5, slowly=True)
    with pytest.raises(TypeError):
        Thing().turn("x", slowly=1 + None)  # type: ignore[arg-type, operator]


def test_a_call_that_does_not_fit_says_what_would() -> None:
    with pytest.raises(MisuseError, match=r"Thing.turn\(\) has no option 'slwoly'; did you mean 'slowly'\?"):
        Thing().turn(5, slwoly=True)  # type: ignore[call-arg]
    with pytest.raises(MisuseError, match=r"missing .* 'angle'; it is called as Thing.turn\(angle, \*, slowly=False\)"):
        Thing().turn()  # type: ignore[call-arg]


def test_a_value_of_the_wrong_kind_is_shown_in_its_call() -> None:
    assert Thing().push(1) == 2
    with pytest.raises(
        MisuseError, match=r"Thing.push\('x', mass=1\): .*; it is called as Thing.push\(force, "
    ):
        Thing().push("x", mass=1)  # type: ignore[arg-type]
