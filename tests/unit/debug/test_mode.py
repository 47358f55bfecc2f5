"""The processor's mode as its control state says."""

from __future__ import annotations

from typing import Any

from kvmbench.debug.mode import CodeMode


def test_the_mode_is_read_off_the_control_state(long_sregs: Any, real_sregs: Any) -> None:
    mode = CodeMode.from_kvm(long_sregs, 2)
    assert (mode.name, mode.bits, mode.cpl, mode.paging) == ("long", 64, 0, "4-level")
    assert str(mode) == "long, CPL 0"
    mode = CodeMode.from_kvm(real_sregs, 2)
    assert (mode.name, mode.bits, mode.paging, mode.linear(0x20)) == ("real", 16, "off", 0x10020)


def test_compatibility_protected_and_virtual_8086_modes_are_told_apart(long_sregs: Any) -> None:
    long_sregs.cs.l, long_sregs.cs.db, long_sregs.ss.dpl = 0, 1, 3
    assert str(CodeMode.from_kvm(long_sregs, 2)) == "compatibility, CPL 3"
    long_sregs.efer = 0
    protected = CodeMode.from_kvm(long_sregs, 2)
    assert (protected.name, protected.bits, protected.paging) == ("protected", 32, "PAE")
    assert CodeMode.from_kvm(long_sregs, 2 | 1 << 17).name == "virtual-8086"
    long_sregs.cs.db = 0
    assert str(CodeMode.from_kvm(long_sregs, 2)) == "protected 16-bit, CPL 3"
    long_sregs.cr4 = 0
    assert CodeMode.from_kvm(long_sregs, 2).paging == "32-bit"


def test_the_address_space_wraps_at_4_gib_outside_long_mode(long_sregs: Any) -> None:
    long_sregs.efer, long_sregs.cs.l, long_sregs.cs.db, long_sregs.cs.base = 0, 0, 1, 0xFFFFF000
    assert CodeMode.from_kvm(long_sregs, 2).linear(0x2000) == 0x1000
