"""Names of CPUID feature bits, KVM's own leaves among them.

Sources: Intel SDM volume 2A, "CPUID - CPU Identification"; AMD APM volume 3, appendix E, "Obtaining
Processor Information Via the CPUID Instruction"; for leaf 0x40000001 the kernel's
``Documentation/virt/kvm/x86/cpuid.rst``. The names are those of the manuals, in lower case. Where both
vendors use a name, the later leaf has another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from kvmbench.uapi import constants

KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"
"""What EBX, ECX and EDX of leaf 0x40000000 spell out."""


class FeatureRegister(NamedTuple):
    """One register of CPUID's answer: leaf, subleaf, and ``eax``, ``ebx``, ``ecx`` or ``edx``."""

    leaf: int
    subleaf: int
    register: str


def _bits(text: str) -> dict[int, str]:
    # "3 pae 6 mce" to {3: "pae", 6: "mce"}
    words = text.split()
    return {int(bit): name for bit, name in zip(words[::2], words[1::2], strict=True)}


_KVM_FEATURES = {
    # Numbers in the header, except the *_BIT ones that name a bit like any other.
    value: name.removeprefix("KVM_FEATURE_").removesuffix("_BIT").lower()
    for name, value in vars(constants).items()
    if name.startswith("KVM_FEATURE_")
}

_FEATURES: dict[FeatureRegister, dict[int, str]] = {
    FeatureRegister(0x1, 0, "edx"): _bits(
        "0 fpu 1 vme 2 de 3 pse 4 tsc 5 msr 6 pae 7 mce 8 cx8 9 apic 11 sep 12 mtrr 13 pge 14 mca "
        "15 cmov 16 pat 17 pse36 18 psn 19 clfsh 21 ds 22 acpi 23 mmx 24 fxsr 25 sse 26 sse2 27 ss "
        "28 htt 29 tm 31 pbe"
    ),
    FeatureRegister(0x1, 0, "ecx"): _bits(
        "0 sse3 1 pclmulqdq 2 dtes64 3 monitor 4 ds_cpl 5 vmx 6 smx 7 eist 8 tm2 9 ssse3 10 cnxt_id "
        "11 sdbg 12 fma 13 cmpxchg16b 14 xtpr 15 pdcm 17 pcid 18 dca 19 sse4_1 20 sse4_2 21 x2apic "
        "22 movbe 23 popcnt 24 tsc_deadline 25 aesni 26 xsave 27 osxsave 28 avx 29 f16c 30 rdrand "
        "31 hypervisor"
    ),
    FeatureRegister(0x6, 0, "eax"): _bits(
        "0 dts 1 turbo_boost 2 arat 4 pln 5 ecmd 6 ptm 7 hwp"
    ),
    FeatureRegister(0x7, 0, "ebx"): _bits(
        "0 fsgsbase 1 tsc_adjust 2 sgx 3 bmi1 4 hle 5 avx2 7 smep 8 bmi2 9 erms 10 invpcid 11 rtm "
        "12 rdt_m 14 mpx 15 rdt_a 16 avx512f 17 avx512dq 18 rdseed 19 adx 20 smap 21 avx512_ifma "
        "23 clflushopt 24 clwb 25 intel_pt 26 avx512pf 27 avx512er 28 avx512cd 29 sha 30 avx512bw "
        "31 avx512vl"
    ),
    FeatureRegister(0x7, 0, "ecx"): _bits(
        "0 prefetchwt1 1 avx512_vbmi 2 umip 3 pku 4 ospke 5 waitpkg 6 avx512_vbmi2 7 cet_ss 8 gfni "
        "9 vaes 10 vpclmulqdq 11 avx512_vnni 12 avx512_bitalg 13 tme_en 14 avx512_vpopcntdq 16 la57 "
        "22 rdpid 23 kl 24 bus_lock_detect 25 cldemote 27 movdiri 28 movdir64b 29 enqcmd 30 sgx_lc "
        "31 pks"
    ),
    FeatureRegister(0x7, 0, "edx"): _bits(
        "1 sgx_keys 2 avx512_4vnniw 3 avx512_4fmaps 4 fsrm 5 uintr 8 avx512_vp2intersect 10 md_clear "
        "11 rtm_always_abort 13 rtm_force_abort 14 serialize 15 hybrid 16 tsxldtrk 18 pconfig "
        "19 arch_lbr 20 cet_ibt 22 amx_bf16 23 avx512_fp16 24 amx_tile 25 amx_int8 26 ibrs_ibpb "
        "27 stibp 28 l1d_flush 29 arch_capabilities 30 core_capabilities 31 ssbd"
    ),
    FeatureRegister(0x7, 1, "eax"): _bits(
        "0 sha512 1 sm3 2 sm4 3 rao_int 4 avx_vnni 5 avx512_bf16 6 lass 7 cmpccxadd 10 fzrm 11 fsrs "
        "12 fsrc 17 fred 18 lkgs 19 wrmsrns 21 amx_fp16 22 hreset 23 avx_ifma 26 lam 27 msrlist"
    ),
    FeatureRegister(0xD, 1, "eax"): _bits("0 xsaveopt 1 xsavec 2 xgetbv_ecx1 3 xsaves 4 xfd"),
    FeatureRegister(constants.KVM_CPUID_FEATURES, 0, "eax"): dict(sorted(_KVM_FEATURES.items())),
    FeatureRegister(constants.KVM_CPUID_FEATURES, 0, "edx"): {constants.KVM_HINTS_REALTIME: "hints_realtime"},
    FeatureRegister(0x80000001, 0, "ecx"): _bits(
        "0 lahf_lm 1 cmp_legacy 2 svm 3 extapic 4 cr8_legacy 5 abm 6 sse4a 7 misalignsse "
        "8 3dnowprefetch 9 osvw 10 ibs 11 xop 12 skinit 13 wdt 15 lwp 16 fma4 17 tce 19 nodeid_msr "
        "21 tbm 22 topoext 23 perfctr_core 24 perfctr_nb 26 bpext 27 ptsc 28 perfctr_llc 29 mwaitx"
    ),
    FeatureRegister(0x80000001, 0, "edx"): _bits(
        "11 syscall 19 mp 20 nx 22 mmxext 25 fxsr_opt 26 pdpe1gb 27 rdtscp 29 lm 30 3dnowext 31 3dnow"
    ),
    FeatureRegister(0x80000007, 0, "edx"): _bits(
        "0 ts 1 fid 2 vid 3 ttp 4 htc 6 100mhzsteps 7 hwpstate 8 invtsc 9 cpb"
    ),
    FeatureRegister(0x80000008, 0, "ebx"): _bits(
        "0 clzero 1 irperf 2 xsaveerptr 3 invlpgb 4 rdpru 8 mcommit 9 wbnoinvd 12 amd_ibpb "
        "14 amd_ibrs 15 amd_stibp 17 stibp_always_on 24 amd_ssbd 25 virt_ssbd 26 amd_ssb_no"
    ),
    FeatureRegister(0x8000000A, 0, "edx"): _bits(
        "0 npt 1 lbrv 2 svm_lock 3 nrip_save 4 tsc_scale 5 vmcb_clean 6 flushbyasid 7 decodeassists "
        "10 pausefilter 12 pfthreshold 13 avic 15 v_vmsave_vmload 16 vgif 17 gmet 18 x2avic "
        "19 ssscheck 20 v_spec_ctrl 23 host_mce_override 24 tlbictl 25 vnmi 26 ibsvirt"
    ),
    FeatureRegister(0x8000001F, 0, "eax"): _bits(
        "0 sme 1 sev 2 vmpage_flush 3 sev_es 4 sev_snp 5 vmpl"
    ),
}

FEATURES: Mapping[FeatureRegister, Mapping[int, str]] = MappingProxyType(_FEATURES)
"""Bit to name for each feature register that has names here."""


def feature_names(
    leaf: int, subleaf: int, *, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0
) -> list[str]:
    """Names the bits that are set in one answer of CPUID; bits without a name here are left out."""
    values = {"eax": eax, "ebx": ebx, "ecx": ecx, "edx": edx}
    return [
        name
        for register, value in values.items()
        for bit, name in FEATURES.get(FeatureRegister(leaf, subleaf, register), {}).items()
        if value >> bit & 1
    ]


def find_feature(name: str) -> tuple[FeatureRegister, int]:
    """Finds the register and bit of a feature.

    Raises:
        KeyError: no feature has that name here.
    """
    for register, bit, known in _all_features():
        if known == name:
            return register, bit
    raise KeyError(name)


def _all_features() -> Iterator[tuple[FeatureRegister, int, str]]:
    for register, bits in FEATURES.items():
        for bit, name in bits.items():
            yield register, bit, name
