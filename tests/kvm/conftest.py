"""The hosts of the contract suite: every test here runs on each of them.

Real KVM everywhere: this machine's own, through the library and through an agent
(also one built with sanitizers, and one behind a real sshd), and the AMD and the Intel appliance, each
with nested and with shadow paging.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvmbench as kb
from kvmbench import errors

from ..conftest import missing
from ..ssh_server import URL, ssh_server
from .mechanisms import MECHANISMS, WRITTEN
from .sanitized import sanitized_host

GUESTS = Path(__file__).parent / "guests"

HOSTS = {
    "local": ("local", {}),
    "agent": ("local", {"agent": True}),
    "sanitized": ("local", {}),
    "ssh": (URL, {}),
    "npt1": ("appliance", {"npt": 1}),
    "npt0": ("appliance", {"npt": 0}),
    "intel": ("appliance:intel", {"ept": 1}),
    "intel0": ("appliance:intel", {"ept": 0}),
}
_NEEDS = {
    "local": "local",
    "agent": "local",
    "sanitized": "local",
    "ssh": "local",
    "npt1": "amd",
    "npt0": "amd",
    "intel": "intel",
    "intel0": "intel",
}


# The Intel appliance with shadow paging: guest debug only, for the rest differs from nested paging in nothing but time.
# KVMBENCH_INTEL=all runs everything there too.
INTEL0_MODULES = (
    *("test_breakpoints", "test_breakpoint_bytes", "test_breakpoint_filters", "test_breakpoint_vcpus"),
    *("test_step", "test_handlers", "test_held_interrupts", "test_trap_flag", "test_halt"),
    *("test_modes", "test_conformance", "test_xray", "test_guest_walk"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what CI has no time for on the Intel appliance with shadow paging."""
    if os.environ.get("KVMBENCH_INTEL") == "all":
        return
    left_out = [
        item
        for item in items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("host") == "intel0"
        and item.path.stem not in INTEL0_MODULES
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def open_host(
    name: str, folders: pytest.TempPathFactory, *, cut_off: bool = False
) -> contextlib.AbstractContextManager[kb.Host]:
    """Opens one of HOSTS; `cut_off`: it may be closed while it is busy."""
    if name == "sanitized":
        return sanitized_host(folders.mktemp("sanitized"), cut_off=cut_off)
    if name == "ssh":
        return ssh_host(folders.mktemp("ssh"))
    spec, options = HOSTS[name]
    return kb.connect(spec, quiet=True, **options)


@contextlib.contextmanager
def ssh_host(folder: Path) -> Iterator[kb.Host]:
    """This machine, reached through an sshd of its own."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(ssh_server(folder))
        except errors.HostUnavailable as error:
            missing("ssh", str(error))
        yield stack.enter_context(kb.connect(URL, quiet=True, ssh_options=[*server.options, *server.key]))


@pytest.fixture(scope="session", params=HOSTS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, need) -> Iterator[kb.Host]:
    """A host, opened once for all tests; they must leave it usable."""
    with contextlib.ExitStack() as stack:
        try:
            host = stack.enter_context(open_host(request.param, tmp_path_factory))
        except errors.HostUnavailable as error:
            need(_NEEDS[request.param], f"no {request.param} host: {error}")
        yield host
        assert host.lost is None, f"the tests lost the host: {host.lost}"


@pytest.fixture
def fresh_host(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, host: kb.Host
) -> Iterator[kb.Host]:
    """Another host like `host`, for tests that ruin it."""
    with open_host(request.node.callspec.params["host"], tmp_path_factory, cut_off=True) as mine:
        yield mine


@pytest.fixture(params=["memory", "races"])
def sanitized(request: pytest.FixtureRequest, tmp_path: Path, need) -> Iterator[kb.Host]:
    """A sanitized agent for one test: it must end in good order, with nothing leaked and no data race."""
    races = request.param == "races"
    with contextlib.ExitStack() as stack:
        try:
            host = stack.enter_context(sanitized_host(tmp_path, races=races))
        except errors.HostUnavailable as error:
            need("sanitizers" if races else "local", f"no sanitized host: {error}")
        yield host


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


@pytest.fixture(params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest, require: Callable[..., None]) -> str:
    """Each mechanism of execute breakpoints that works on the host at CPL 0."""
    require(MECHANISMS[request.param])
    return str(request.param)


@pytest.fixture(params=WRITTEN)
def written(request: pytest.FixtureRequest, require: Callable[..., None]) -> str:
    """Each that writes a byte."""
    require(WRITTEN[request.param])
    return str(request.param)


@pytest.fixture
def guest() -> Callable[[str], str]:
    """The source of a guest program of tests/kvm/guests, by file name."""
    return lambda name: (GUESTS / name).read_text()
