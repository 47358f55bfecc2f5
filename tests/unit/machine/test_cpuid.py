"""CPUID: each vcpu is told its own identity and nothing else changes."""

from __future__ import annotations

from kvmbench.machine.cpuid import identify
from kvmbench.uapi import ffi


def test_every_vcpu_gets_its_own_apic_id() -> None:
    leaves = (0x0, 0x1, 0xB, 0xB, 0x1F, 0x8000_001E)
    cpuid = ffi.new("struct kvm_cpuid2 *", {"nent": len(leaves), "entries": len(leaves)})
    for entry, function in zip(cpuid.entries, leaves, strict=True):
        entry.function = function
        entry.eax, entry.ebx, entry.ecx, entry.edx = 0x11111111, 0x22222222, 0x33333333, 0x44444444
    identify(cpuid.entries, 5, 6)
    entries = cpuid.entries
    assert (entries[0].eax, entries[0].ebx, entries[0].edx) == (0x11111111, 0x22222222, 0x44444444)
    assert entries[1].ebx == 0x05_06_2222
    assert entries[1].edx == 0x54444444, "several logical processors"
    assert [entries[n].edx for n in (2, 3, 4)] == [5, 5, 5]
    assert (entries[5].eax, entries[5].ebx) == (5, 0x22222205)
    identify(cpuid.entries, 0, 1)
    assert entries[1].edx == 0x44444444
