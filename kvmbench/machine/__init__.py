"""A PC around the vcpus of one VM: memory, boot modes, loaders, devices.

`kvmbench.Machine` is the class here with debugging added.
"""

from __future__ import annotations

from kvmbench.machine.assembly import assemble
from kvmbench.machine.bus import Bus
from kvmbench.machine.device import Device, StopRequest
from kvmbench.machine.elf import load_elf
from kvmbench.machine.flat import load_flat
from kvmbench.machine.machine import Machine
from kvmbench.machine.memory import Memory
from kvmbench.machine.multiboot import load_multiboot
from kvmbench.machine.program import Program
from kvmbench.machine.region import Region
from kvmbench.machine.snapshot import Snapshot

__all__ = [
    "Bus",
    "Device",
    "Machine",
    "Memory",
    "Program",
    "Region",
    "Snapshot",
    "StopRequest",
    "assemble",
    "load_elf",
    "load_flat",
    "load_multiboot",
]
