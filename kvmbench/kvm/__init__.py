"""KVM's API, one class a descriptor and one method an ioctl, named after it.

`System` is /dev/kvm, `VM`, `VCPU` and `Device` what it makes. ``KVM_GET_SREGS`` is `VCPU.get_sregs()`.
Structs are cffi's, with the kernel's member names (`kvmbench.uapi`). Every object works the same whether
KVM is on this machine or behind an agent.
"""

from __future__ import annotations

from kvmbench.kvm.coalesced import CoalescedWrite
from kvmbench.kvm.device import Device
from kvmbench.kvm.eventfd import EventFd
from kvmbench.kvm.exits import Exit, UnknownExit, decode_exit
from kvmbench.kvm.region import Region
from kvmbench.kvm.stats import Stats
from kvmbench.kvm.system import System
from kvmbench.kvm.vcpu import VCPU
from kvmbench.kvm.vm import VM

__all__ = [
    "VCPU",
    "VM",
    "CoalescedWrite",
    "Device",
    "EventFd",
    "Exit",
    "Region",
    "Stats",
    "System",
    "UnknownExit",
    "decode_exit",
]
