"""Panels without a page, on real KVM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import kvmbench as kb
from kvmbench.errors import HostUnavailable

from ...panel_guests import LOOP


@pytest.fixture(scope="session")
def widget_host(request: pytest.FixtureRequest) -> Iterator[Any]:
    """This machine's KVM, else the appliance: what panels need, both have."""
    try:
        host = kb.connect("local", quiet=True)
        if 0 not in host.mechanisms.step:
            host.close()
            raise HostUnavailable("no single step")
    except HostUnavailable:
        try:
            host = kb.connect("appliance", quiet=True)
        except HostUnavailable as error:
            pytest.skip(f"no host: {error}")
    with host:
        yield host


@pytest.fixture
def machine(widget_host: Any) -> Iterator[Any]:
    """A long-mode machine with `LOOP` at 0x1000."""
    with kb.Machine(widget_host, mode="long") as machine:
        machine.load_asm(LOOP, at=0x1000)
        yield machine


@pytest.fixture
def send() -> Callable[..., None]:
    """``send(panel, "step", count=2)``: what a click in the page does; waits until the vcpu rests."""

    def send(panel: Any, what: str, *, wait: bool = True, **options: Any) -> None:
        panel._receive(None, {"do": what, **options}, [])
        if wait:
            assert panel.wait(20), f"{what} does not end"

    return send
