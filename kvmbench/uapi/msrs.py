"""Names of model-specific registers: architectural, AMD, and KVM's paravirtual ones.

Sources: Intel SDM volume 4, chapter 2, "Architectural MSRs"; AMD APM volume 2, appendix A, "MSR Cross-
Reference", and AMD's processor programming references for 0xc001_xxxx; ``<asm/kvm_para.h>`` for the MSRs
that KVM adds (through `kvmbench.uapi.constants`). Where both vendors name a register, the name is
Intel's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from kvmbench.uapi import constants

_ARCHITECTURAL = {
    0x0000: "IA32_P5_MC_ADDR",
    0x0001: "IA32_P5_MC_TYPE",
    0x0006: "IA32_MONITOR_FILTER_SIZE",
    0x0010: "IA32_TIME_STAMP_COUNTER",
    0x0017: "IA32_PLATFORM_ID",
    0x001B: "IA32_APIC_BASE",
    0x003A: "IA32_FEATURE_CONTROL",
    0x003B: "IA32_TSC_ADJUST",
    0x0048: "IA32_SPEC_CTRL",
    0x0049: "IA32_PRED_CMD",
    0x0079: "IA32_BIOS_UPDT_TRIG",
    0x008B: "IA32_BIOS_SIGN_ID",
    0x009B: "IA32_SMM_MONITOR_CTL",
    0x009E: "IA32_SMBASE",
    0x00CE: "MSR_PLATFORM_INFO",
    0x00CF: "IA32_CORE_CAPABILITIES",
    0x00E1: "IA32_UMWAIT_CONTROL",
    0x00E7: "IA32_MPERF",
    0x00E8: "IA32_APERF",
    0x00FE: "IA32_MTRRCAP",
    0x010A: "IA32_ARCH_CAPABILITIES",
    0x010B: "IA32_FLUSH_CMD",
    0x0122: "IA32_TSX_CTRL",
    0x0140: "MSR_MISC_FEATURES_ENABLES",
    0x0174: "IA32_SYSENTER_CS",
    0x0175: "IA32_SYSENTER_ESP",
    0x0176: "IA32_SYSENTER_EIP",
    0x0179: "IA32_MCG_CAP",
    0x017A: "IA32_MCG_STATUS",
    0x017B: "IA32_MCG_CTL",
    0x0198: "IA32_PERF_STATUS",
    0x0199: "IA32_PERF_CTL",
    0x019A: "IA32_CLOCK_MODULATION",
    0x019B: "IA32_THERM_INTERRUPT",
    0x019C: "IA32_THERM_STATUS",
    0x01A0: "IA32_MISC_ENABLE",
    0x01B0: "IA32_ENERGY_PERF_BIAS",
    0x01C4: "IA32_XFD",
    0x01C5: "IA32_XFD_ERR",
    0x01D9: "IA32_DEBUGCTL",
    0x01DB: "MSR_LASTBRANCHFROMIP",
    0x01DC: "MSR_LASTBRANCHTOIP",
    0x01DD: "MSR_LASTINTFROMIP",
    0x01DE: "MSR_LASTINTTOIP",
    0x0277: "IA32_PAT",
    0x02FF: "IA32_MTRR_DEF_TYPE",
    0x0345: "IA32_PERF_CAPABILITIES",
    0x038D: "IA32_FIXED_CTR_CTRL",
    0x038E: "IA32_PERF_GLOBAL_STATUS",
    0x038F: "IA32_PERF_GLOBAL_CTRL",
    0x0390: "IA32_PERF_GLOBAL_OVF_CTRL",
    0x03F1: "IA32_PEBS_ENABLE",
    0x04D0: "IA32_MCG_EXT_CTL",
    0x0560: "IA32_RTIT_OUTPUT_BASE",
    0x0561: "IA32_RTIT_OUTPUT_MASK_PTRS",
    0x0570: "IA32_RTIT_CTL",
    0x0571: "IA32_RTIT_STATUS",
    0x0572: "IA32_RTIT_CR3_MATCH",
    0x0600: "IA32_DS_AREA",
    0x06A0: "IA32_U_CET",
    0x06A2: "IA32_S_CET",
    0x06A4: "IA32_PL0_SSP",
    0x06A5: "IA32_PL1_SSP",
    0x06A6: "IA32_PL2_SSP",
    0x06A7: "IA32_PL3_SSP",
    0x06A8: "IA32_INTERRUPT_SSP_TABLE_ADDR",
    0x06E0: "IA32_TSC_DEADLINE",
    0x0DA0: "IA32_XSS",
    0xC0000080: "IA32_EFER",
    0xC0000081: "IA32_STAR",
    0xC0000082: "IA32_LSTAR",
    0xC0000083: "IA32_CSTAR",
    0xC0000084: "IA32_FMASK",
    0xC0000100: "IA32_FS_BASE",
    0xC0000101: "IA32_GS_BASE",
    0xC0000102: "IA32_KERNEL_GS_BASE",
    0xC0000103: "IA32_TSC_AUX",
}

_AMD = {
    0xC0000104: "TSC_RATIO",
    0xC0010010: "SYSCFG",
    0xC0010015: "HWCR",
    0xC0010016: "IORR_BASE0",
    0xC0010017: "IORR_MASK0",
    0xC0010018: "IORR_BASE1",
    0xC0010019: "IORR_MASK1",
    0xC001001A: "TOP_MEM",
    0xC001001D: "TOP_MEM2",
    0xC001001F: "NB_CFG",
    0xC0010055: "INT_PENDING_MSG",
    0xC0010058: "MMIO_CONFIG_BASE",
    0xC0010061: "PSTATE_CURRENT_LIMIT",
    0xC0010062: "PSTATE_CONTROL",
    0xC0010063: "PSTATE_STATUS",
    0xC0010111: "SMM_BASE",
    0xC0010112: "SMM_ADDR",
    0xC0010113: "SMM_MASK",
    0xC0010114: "VM_CR",
    0xC0010115: "IGNNE",
    0xC0010117: "VM_HSAVE_PA",
    0xC001011F: "VIRT_SPEC_CTRL",
    0xC0010130: "SEV_ES_GHCB",
    0xC0010131: "SEV_STATUS",
    0xC0010140: "OSVW_ID_LENGTH",
    0xC0010141: "OSVW_STATUS",
    0xC0011022: "DC_CFG",
    0xC0011029: "DE_CFG",
}


def _numbered() -> dict[int, str]:
    # Families: index arithmetic as the manual gives it, the counts as far as any processor has gone.
    names: dict[int, str] = {}
    for i in range(8):
        names[0x0C1 + i] = f"IA32_PMC{i}"
        names[0x186 + i] = f"IA32_PERFEVTSEL{i}"
        names[0x4C1 + i] = f"IA32_A_PMC{i}"
    for i in range(4):
        names[0x309 + i] = f"IA32_FIXED_CTR{i}"
        names[0x580 + 2 * i] = f"IA32_RTIT_ADDR{i}_A"
        names[0x581 + 2 * i] = f"IA32_RTIT_ADDR{i}_B"
    for i in range(10):
        names[0x200 + 2 * i] = f"IA32_MTRR_PHYSBASE{i}"
        names[0x201 + 2 * i] = f"IA32_MTRR_PHYSMASK{i}"
    names[0x250] = "IA32_MTRR_FIX64K_00000"
    for i, base in enumerate((0x80000, 0xA0000)):
        names[0x258 + i] = f"IA32_MTRR_FIX16K_{base:05X}"
    for i in range(8):
        names[0x268 + i] = f"IA32_MTRR_FIX4K_{0xC0000 + i * 0x8000:05X}"
    for i in range(32):
        names[0x280 + i] = f"IA32_MC{i}_CTL2"
        for j, part in enumerate(("CTL", "STATUS", "ADDR", "MISC")):
            names[0x400 + 4 * i + j] = f"IA32_MC{i}_{part}"
    vmx = (
        "BASIC", "PINBASED_CTLS", "PROCBASED_CTLS", "EXIT_CTLS", "ENTRY_CTLS", "MISC", "CR0_FIXED0",
        "CR0_FIXED1",
        "CR4_FIXED0", "CR4_FIXED1", "VMCS_ENUM", "PROCBASED_CTLS2", "EPT_VPID_CAP", "TRUE_PINBASED_CTLS",
        "TRUE_PROCBASED_CTLS", "TRUE_EXIT_CTLS", "TRUE_ENTRY_CTLS", "VMFUNC", "PROCBASED_CTLS3", "EXIT_CTLS2",
    )  # fmt: skip
    names |= {0x480 + i: f"IA32_VMX_{name}" for i, name in enumerate(vmx)}
    x2apic = {
        0x02: "APICID", 0x03: "VERSION", 0x08: "TPR", 0x0A: "PPR", 0x0B: "EOI", 0x0D: "LDR", 0x0F: "SIVR",
        0x28: "ESR", 0x2F: "LVT_CMCI", 0x30: "ICR", 0x32: "LVT_TIMER", 0x33: "LVT_THERMAL", 0x34: "LVT_PMI",
        0x35: "LVT_LINT0", 0x36: "LVT_LINT1", 0x37: "LVT_ERROR", 0x38: "INIT_COUNT", 0x39: "CUR_COUNT",
        0x3E: "DIV_CONF", 0x3F: "SELF_IPI",
    }  # fmt: skip
    names |= {0x800 + i: f"IA32_X2APIC_{name}" for i, name in x2apic.items()}
    for i in range(8):
        names[0x810 + i] = f"IA32_X2APIC_ISR{i}"
        names[0x818 + i] = f"IA32_X2APIC_TMR{i}"
        names[0x820 + i] = f"IA32_X2APIC_IRR{i}"
    for i in range(4):
        names[0xC0010000 + i] = f"PERF_LEGACY_CTL{i}"
        names[0xC0010004 + i] = f"PERF_LEGACY_CTR{i}"
    for i in range(8):
        names[0xC0010064 + i] = f"PSTATE_DEF{i}"
    for i in range(6):
        names[0xC0010200 + 2 * i] = f"PERF_CTL{i}"
        names[0xC0010201 + 2 * i] = f"PERF_CTR{i}"
    return names


# 0x11 and 0x12 lie in Intel's range but belong to KVM: the first kvmclock, older than the range it now uses.
_KVM = {value: name for name, value in vars(constants).items() if name.startswith("MSR_KVM_")}

_ALL = _ARCHITECTURAL | _numbered() | _AMD | _KVM

MSR_NAMES: Mapping[int, str] = MappingProxyType(dict(sorted(_ALL.items())))
"""MSR index to name."""

MSR_INDICES: Mapping[str, int] = MappingProxyType({name: index for index, name in MSR_NAMES.items()})
"""MSR name to index."""


def msr_name(index: int) -> str:
    """Names an MSR: ``IA32_EFER``, or its index in hex when it has no name here."""
    return MSR_NAMES.get(index, f"{index:#x}")
