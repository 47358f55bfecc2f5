"""Hosts for the differential test, opened once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from kvmbench import errors

from .hosts import open_host
from .runner import Runner

_NEEDS = {"local": "local", "npt=1": "amd", "npt=0": "amd", "ept=1": "intel", "ept=0": "intel"}


@pytest.fixture(scope="session")
def runner(need) -> Iterator[Callable[[str], Runner | None]]:
    """The runner of a host by its short name; None where there is no such host."""
    opened: dict[str, Runner | None] = {}
    with contextlib.ExitStack() as stack:

        def get(name: str) -> Runner | None:
            if name not in opened:
                opened[name] = None
                try:
                    opened[name] = Runner(stack.enter_context(open_host(name)), name)
                except errors.HostUnavailable as error:
                    with contextlib.suppress(pytest.skip.Exception):
                        need(_NEEDS[name], f"no {name} host: {error}")
            return opened[name]

        yield get


@pytest.fixture
def runners(runner) -> Callable[..., list[Runner]]:
    """Those of the hosts named that there are; skips if fewer than two."""

    def get(*names: str) -> list[Runner]:
        found = [each for each in map(runner, names) if each is not None]
        if len(found) < 2:
            pytest.skip(f"of the hosts {', '.join(names)} fewer than two are here")
        return found

    return get
