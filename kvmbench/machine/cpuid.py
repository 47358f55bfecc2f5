"""The CPUID that a vcpu gets: what KVM supports, with the vcpu's own identity in it.

KVM_GET_SUPPORTED_CPUID returns the APIC id of whichever processor of the host
it ran on, and the caller must put in the vcpu's (KVM API, KVM_SET_CPUID2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Leaves with an APIC id (SDM volume 2, "CPUID"; APM volume 3, appendix E).
_VERSION, _TOPOLOGY, _TOPOLOGY_V2, _AMD_TOPOLOGY = 0x1, 0xB, 0x1F, 0x8000_001E


def identify(entries: Iterable[Any], vcpu: int, vcpus: int) -> None:
    """Writes a vcpu's APIC id, and how many there are, into ``struct kvm_cpuid_entry2`` values.

    Args:
        entries: changed in place.
        vcpu: the vcpu's id, which KVM makes its APIC id.
        vcpus: of the machine; told as its logical processors.
    """
    for entry in entries:
        if entry.function == _VERSION:
            entry.ebx = entry.ebx & 0xFFFF | (min(vcpus, 0xFF) << 16) | ((vcpu & 0xFF) << 24)
            # HTT: the count above holds.
            entry.edx = entry.edx | 1 << 28 if vcpus > 1 else entry.edx & ~(1 << 28)
        elif entry.function in (_TOPOLOGY, _TOPOLOGY_V2):
            entry.edx = vcpu
        elif entry.function == _AMD_TOPOLOGY:
            entry.eax = vcpu
            entry.ebx = entry.ebx & ~0xFF | vcpu & 0xFF
