"""An eventfd: a count that a guest's write raises without leaving the guest, or whose rise interrupts the guest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmbench.arguments import integer
from kvmbench.errors import MisuseError
from kvmbench.kvm.descriptor import Descriptor

if TYPE_CHECKING:
    from kvmbench.kvm.vm import VM

MOST = (1 << 64) - 2


class EventFd(Descriptor):
    """An eventfd of the host that a VM runs on; `VM.create_eventfd` makes it.

    It works for its VM only, and is closed with it. KVM keeps what it was given: close it while `VM.ioeventfd` has
    it and the guest's writes go on to vanish there; take it back with ``deassign=True`` first. An interrupt of
    `VM.irqfd` ends with its eventfd.

    Source: eventfd(2).
    """

    _noun = "eventfd"

    def __init__(self, vm: VM) -> None:
        super().__init__(vm.core, vm.core.create_eventfd(vm._open_handle()), vm)
        self.vm = vm

    def read(self) -> int:
        """The count since it was last read; 0 when there was none. Never waits."""
        return self.core.read_eventfd(self._open_handle())

    def write(self, add: int = 1) -> None:
        """Raises the count.

        Args:
            add: by how much: 0 to 2**64 - 2.

        Raises:
            MisuseError: the count would pass 2**64 - 2.
        """
        self.core.write_eventfd(self._open_handle(), integer(add, "add", 0, MOST))

    def handle_for(self, vm: VM) -> int:
        """The handle, to be handed to KVM for a VM.

        Raises:
            ClosedError: it is closed.
            MisuseError: it was made for another VM.
        """
        handle = self._open_handle()
        if vm is not self.vm:
            raise MisuseError("this eventfd was made for another VM: use that VM's create_eventfd()")
        return handle
