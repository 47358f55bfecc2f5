"""Arguments of doorbells, interrupts and coalesced ranges that cannot be right: refused before anything is asked."""

from __future__ import annotations

import pytest

from kvmbench.errors import MisuseError
from kvmbench.host.client import Core
from kvmbench.kvm import VM


class Nowhere:
    """A channel that nothing may go through."""

    lost = None

    def call(self, request: bytes, **options: object) -> bytes:
        raise AssertionError("something was asked of the host")


@pytest.fixture
def vm():
    return VM(Core(Nowhere()), 0x10002)


@pytest.mark.parametrize("eventfd", [None, 3, "fd", 0x10002])
def test_a_number_is_no_eventfd(vm, eventfd):
    for call in (
        lambda: vm.ioeventfd(eventfd, 0x80, 1, pio=True),
        lambda: vm.irqfd(eventfd, 4),
    ):
        with pytest.raises(MisuseError, match=r"give an EventFd, as VM\.create_eventfd"):
            call()


@pytest.mark.parametrize(
    ("addr", "size_bytes", "pio"),
    [
        *((-1, 1, False), (1 << 64, 1, False), (1.5, 1, False), ("0", 1, False), (True, 1, False)),
        *((0, 0, False), (0, -1, False), (0, 1 << 32, False), ((1 << 64) - 1, 2, False), (0, None, False)),
        *((0x10000, 1, True), (0xFFFF, 2, True), (0, 0x10001, True)),
    ],
)
def test_a_range_that_is_none_is_refused(vm, addr, size_bytes, pio):
    for call in (vm.register_coalesced_mmio, vm.unregister_coalesced_mmio):
        with pytest.raises(MisuseError, match=r"addr=|size_bytes="):
            call(addr, size_bytes, pio=pio)
