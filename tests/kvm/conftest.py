"""The hosts of the contract suite: every test here runs on each of them.

Real KVM everywhere: this machine's own, through the library and through an agent
(also one built with sanitizers), and the appliance with nested and with shadow paging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvmbench as kb
from kvmbench import errors

GUESTS = Path(__file__).parent / "guests"

HOSTS = {
    "local": ("local", {}),
    "agent": ("local", {"agent": True}),
    "npt1": ("appliance", {"npt": 1}),
    "npt0": ("appliance", {"npt": 0}),
}
_NEEDS = {"local": "local", "agent": "local", "npt1": "amd", "npt0": "amd"}


@pytest.fixture(scope="session", params=HOSTS)
def host(request: pytest.FixtureRequest, need) -> Iterator[kb.Host]:
    """A host, opened once for all tests; they must leave it usable."""
    spec, options = HOSTS[request.param]
    try:
        host = kb.connect(spec, quiet=True, **options)
    except errors.HostUnavailable as error:
        need(_NEEDS[request.param], f"no {request.param} host: {error}")
    with host:
        yield host
        assert host.lost is None, f"the tests lost the host: {host.lost}"


@pytest.fixture
def fresh_host(request: pytest.FixtureRequest, host: kb.Host) -> Iterator[kb.Host]:
    """Another host like `host`, for tests that ruin it."""
    spec, options = HOSTS[request.node.callspec.params["host"]]
    with kb.connect(spec, quiet=True, **options) as mine:
        yield mine


@pytest.fixture
def machine(host: kb.Host) -> Iterator[kb.Machine]:
    """A 64-bit machine of 2 MiB at CPL 0."""
    with kb.Machine(host, memory="2M") as machine:
        yield machine


@pytest.fixture
def require(host: kb.Host) -> Callable[[str, int], None]:
    """Skips the test where the host's self-check saw that a mechanism does not work at a CPL."""

    def check(name: str, cpl: int = 0) -> None:
        if cpl not in getattr(host.mechanisms, name):
            note = host.mechanisms.notes.get(f"{name}@{cpl}", "not tried")
            pytest.skip(f"{host.info.describe()} has no {name} at CPL {cpl}: {note}")

    return check


@pytest.fixture
def guest() -> Callable[[str], str]:
    """The source of a guest program of tests/kvm/guests, by file name."""
    return lambda name: (GUESTS / name).read_text()
