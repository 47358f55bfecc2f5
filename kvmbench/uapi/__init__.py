"""The x86 KVM ABI as data: structs, ioctls, capabilities, exit reasons, and names of MSRs and CPUID bits.

    from kvmbench import uapi

    regs = uapi.ffi.new("struct kvm_regs *")     # cffi, with the layout the kernel has
    uapi.IOCTLS["KVM_GET_REGS"].number
    uapi.Capability.SYNC_REGS, uapi.ExitReason.HLT
    uapi.constants.KVM_GUESTDBG_ENABLE

The layouts and numbers are generated from ``<linux/kvm.h>`` (`kvmbench.uapi.generate`) and committed, so neither
a compiler nor a kernel header is needed, and the package imports on any system. The names of MSRs and CPUID bits
are in `kvmbench.uapi.msrs` and `kvmbench.uapi.cpuid`, which are not imported here.
"""

from __future__ import annotations

from typing import Any

from kvmbench.uapi import _kvm, constants
from kvmbench.uapi.capabilities import Capability
from kvmbench.uapi.exit_reasons import ExitReason
from kvmbench.uapi.ioctl import IOCTLS, Ioctl, ioctl_by_number

ffi: Any = _kvm.ffi

__all__ = ["IOCTLS", "Capability", "ExitReason", "Ioctl", "constants", "ffi", "ioctl_by_number"]
