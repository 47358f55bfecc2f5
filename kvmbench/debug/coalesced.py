"""Writes that KVM kept back, handed to the devices in the order in which the guest made them."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from kvmbench.kvm import CoalescedWrite
from kvmbench.machine import StopRequest

if TYPE_CHECKING:
    from kvmbench.kvm import VCPU
    from kvmbench.machine.bus import Bus


class CoalescedWrites:
    """What is between the ring of a machine's VM and its bus (`Machine.coalesce`).

    The ring is one for all vcpus. Whoever takes writes out of it holds the lock until the devices have them, so that
    another vcpu's exit, which came later, is served later.

    Attributes:
        delivered: how many writes have reached the bus.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._lock = threading.RLock()
        self._taken: deque[CoalescedWrite] = deque()
        self.delivered = 0

    def deliver(self, vcpu: VCPU) -> StopRequest | None:
        """Hands on all there is; the first wish of a device that the run ends.

        What a device raises comes through: that write is over, those after it come with the next call. One that Ctrl-C
        cut short comes again.
        """
        wanted: StopRequest | None = None
        with self._lock:
            self._taken.extend(vcpu.take_coalesced())
            while self._taken:
                write = self._taken[0]
                size = len(write.data)
                try:
                    if write.pio:
                        wish = self._bus.port_out[write.addr](write.addr, write.value, size)
                    else:
                        wish = self._bus.mmio_write(write.addr, write.value, size)
                except Exception:
                    self._over()
                    raise
                self._over()
                wanted = wanted or wish
        return wanted

    def _over(self) -> None:
        self._taken.popleft()
        self.delivered += 1
