"""What a caller gave: checks that name the argument and its value, and near misses for a name that is not there."""

from __future__ import annotations

import difflib
import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from kvmbench.errors import KvmbenchError, MisuseError

_P = ParamSpec("_P")
_R = TypeVar("_R")


def integer(value: Any, what: str, least: int | None = None, most: int | None = None) -> int:
    """The value as an int; numpy's integers are some too, floats and bools are not.

    Raises:
        MisuseError: not an integer, or not `least` to `most` (both allowed).
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise MisuseError(f"{what}={value!r}: give an integer")
    if (least is not None and number < least) or (most is not None and number > most):
        bounds = [
            f"{word} {bound:#x}" if bound > 1 << 32 else f"{word} {bound}"
            for word, bound in (("at least", least), ("at most", most))
            if bound is not None
        ]
        raise MisuseError(f"{what}={value!r}: give {' and '.join(bounds)}")
    return number


def file_path(value: Any, example: str) -> Path:
    """The name of a file as a path; `example` is one, for the message.

    Raises:
        MisuseError: no name, or one that no file can have.
    """
    name = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise MisuseError(f"path={value!r}: give the name of a file, such as {example!r}")
    return Path(name)


def nearest(word: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Up to `most` of the known words that look like `word`; one alone if it differs in case or order only."""
    folded = {each.lower(): each for each in known}
    word = word.lower()
    if word in folded:
        return [folded[word]]
    # difflib counts rxa as near to rdx as to rax.
    swapped = [each for each in folded if sorted(each) == sorted(word)]
    near = swapped[:1] or difflib.get_close_matches(word, folded, n=most, cutoff=0.6)
    return [folded[each] for each in near]


def instead(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is not there: near misses, or else all that is there."""
    known = list(known)
    near = nearest(word, known) if isinstance(word, str) else []
    if near:
        return f"did you mean {' or '.join(repr(each) for each in near)}?"
    return f"there are {', '.join(known)}" if known else "there are none"


def spelled_out(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a call with other arguments than `function` has a MisuseError that says which it has.

    It costs a tenth of a microsecond a call, so it is for what people type and not for what loops call.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        try:
            return function(*args, **options)
        except TypeError as error:
            # Arguments that do not fit fail before the function has a frame of its own.
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            said = str(error)
        raise MisuseError(_misfit(function, options, said))

    return call


def refused_plainly(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Makes a value that `function` cannot turn into a C integer or struct a MisuseError that shows the call."""

    @functools.wraps(function)
    def call(*args: _P.args, **options: _P.kwargs) -> _R:
        try:
            return function(*args, **options)
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            if isinstance(error, KvmbenchError):
                raise
            given = [*(repr(each) for each in args[1:]), *(f"{name}={each!r}" for name, each in options.items())]
            said = f"{function.__qualname__}({', '.join(given)}): {error}"
            raise MisuseError(_misfit(function, options, said)) from error

    return call


def _misfit(function: Callable[..., Any], options: dict[str, Any], said: str) -> str:
    known = inspect.signature(function).parameters
    parameters = [each for name, each in known.items() if name != "self"]
    name = function.__qualname__.removesuffix(".__init__")
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for option in options:
        if option not in known and not takes_any:
            words = [each.name for each in parameters if each.kind is not each.POSITIONAL_ONLY]
            return f"{name}() has no option {option!r}; {instead(option, words)}"
    bare = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return f"{said}; it is called as {name}{inspect.Signature(bare)}"
