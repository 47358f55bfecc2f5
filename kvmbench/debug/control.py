"""Control registers, EFER and the APIC base with their bits named.

Bit names follow the SDM, volume 3, "Control Registers" and "Extended Feature
Enable Register (EFER)"; SVME, LMSLE and FFXSR are from AMD's APM volume 2,
"Extended Feature Enable Register".
"""

from __future__ import annotations

from typing import ClassVar

from kvmbench.debug.flags import NamedBits


class ControlRegister(NamedBits):
    """A control register's value: an int whose bits have names (``cr0.PE``)."""

    __slots__ = ()


class Cr0(ControlRegister):
    """CR0: protection, paging, floating point and cache switches."""

    BITS: ClassVar[dict[str, int]] = {
        "PE": 0, "MP": 1, "EM": 2, "TS": 3, "ET": 4, "NE": 5, "WP": 16, "AM": 18, "NW": 29, "CD": 30,
        "PG": 31,
    }  # fmt: skip
    __slots__ = ()


class Cr2(ControlRegister):
    """CR2: the linear address of the last page fault. It has no bits of its own."""

    __slots__ = ()


class Cr3(ControlRegister):
    """CR3: where the top page table is, and what travels with it.

    Bits 0 to 11 are a PCID when CR4.PCIDE is set, else PWT and PCD; bit 63 is
    read as zero. Compare page tables by `table_gpa`, never by the whole value.
    """

    BITS: ClassVar[dict[str, int]] = {"PWT": 3, "PCD": 4, "LAM_U57": 61, "LAM_U48": 62}
    FIELDS: ClassVar[dict[str, tuple[int, int]]] = {"PCID": (0, 12)}
    __slots__ = ()

    @property
    def table_gpa(self) -> int:
        """Guest-physical address of the top table's page; PAE's four entries may start within it."""
        return int(self) & 0x000F_FFFF_FFFF_F000

    def describe(self) -> str:
        """The bits around the address. PCID, PWT and PCD share a place; only CR4 says which is meant."""
        words = [name for name in self.names if self.BITS[name] > 12]
        low = int(self) & 0xFFF
        return " ".join([*words, *([f"low={low:#x}"] if low else [])])


class Cr4(ControlRegister):
    """CR4: extensions that the operating system has switched on."""

    BITS: ClassVar[dict[str, int]] = {
        "VME": 0, "PVI": 1, "TSD": 2, "DE": 3, "PSE": 4, "PAE": 5, "MCE": 6, "PGE": 7, "PCE": 8, "OSFXSR": 9,
        "OSXMMEXCPT": 10, "UMIP": 11, "LA57": 12, "VMXE": 13, "SMXE": 14, "FSGSBASE": 16, "PCIDE": 17,
        "OSXSAVE": 18, "KL": 19, "SMEP": 20, "SMAP": 21, "PKE": 22, "CET": 23, "PKS": 24, "UINTR": 25,
        "LASS": 27, "LAM_SUP": 28, "FRED": 32,
    }  # fmt: skip
    __slots__ = ()


class Cr8(ControlRegister):
    """CR8: the task priority, bits 7 to 4 of the local APIC's TPR."""

    FIELDS: ClassVar[dict[str, tuple[int, int]]] = {"TPL": (0, 4)}
    __slots__ = ()


class Efer(ControlRegister):
    """IA32_EFER: long mode, SYSCALL, no-execute, and AMD's SVM switch."""

    BITS: ClassVar[dict[str, int]] = {
        "SCE": 0, "LME": 8, "LMA": 10, "NXE": 11, "SVME": 12, "LMSLE": 13, "FFXSR": 14, "TCE": 15,
        "AUTOIBRS": 21,
    }  # fmt: skip
    __slots__ = ()


class ApicBase(ControlRegister):
    """IA32_APIC_BASE: where the local APIC is, and whether it is on."""

    BITS: ClassVar[dict[str, int]] = {"BSP": 8, "X2APIC": 10, "EN": 11}
    __slots__ = ()

    @property
    def apic_gpa(self) -> int:
        """Guest-physical address of the local APIC's page."""
        return int(self) & 0x000F_FFFF_FFFF_F000


#: Name in ``struct kvm_sregs`` to the class of its value.
CONTROL_CLASSES: dict[str, type[ControlRegister]] = {
    "cr0": Cr0, "cr2": Cr2, "cr3": Cr3, "cr4": Cr4, "cr8": Cr8, "efer": Efer, "apic_base": ApicBase,
}  # fmt: skip
