"""The paging mode and its bits, read off control registers and CPUID."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvmbench.errors import MisuseError
from kvmbench.mmu.paging import LEVELS, Paging, Processor

PG, WP, PSE, PAE, PGE, LA57 = 1 << 31, 1 << 16, 1 << 4, 1 << 5, 1 << 7, 1 << 12
SMEP, SMAP, PKE, PKS, LMA, NXE, AC = 1 << 20, 1 << 21, 1 << 22, 1 << 24, 1 << 10, 1 << 11, 1 << 18


def sregs(cr0=PG, cr3=0x1000, cr4=PAE, efer=LMA, dpl=0):
    return SimpleNamespace(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer, ss=SimpleNamespace(dpl=dpl))


def entry(function, index=0, **registers):
    return SimpleNamespace(function=function, index=index, **{"eax": 0, "ebx": 0, "ecx": 0, "edx": 0, **registers})


@pytest.mark.parametrize(
    ("state", "mode", "root"),
    [
        (sregs(cr0=0), "off", 0x1000),
        (sregs(cr4=0, efer=0, cr3=0x1FFF), "32-bit", 0x1000),
        (sregs(efer=0, cr3=0x103F), "PAE", 0x1020),
        (sregs(cr3=0x8000_0000_0000_1FFF), "4-level", 0x1000),
        (sregs(cr4=PAE | LA57), "5-level", 0x1000),
    ],
)
def test_the_mode_and_the_root_follow_from_the_control_registers(state, mode, root):
    paging = Paging.from_kvm(state, Processor())
    assert (paging.mode, paging.root) == (mode, root)
    assert paging.levels == LEVELS[mode]


@pytest.mark.parametrize(
    ("state", "on"),
    [
        (sregs(cr0=PG | WP), {"wp"}),
        (sregs(cr4=PAE | SMEP), {"smep", "fetch_told"}),
        (sregs(cr4=PAE | SMAP | PGE), {"smap", "pge"}),
        (sregs(cr4=PAE | PKE | PKS), {"pke", "pks"}),
        (sregs(cr4=PAE | PKE | PKS, efer=0), set()),
        (sregs(efer=LMA | NXE), {"nxe", "fetch_told"}),
        (sregs(cr4=PAE | PSE, efer=0), set()),
        (sregs(cr4=PSE, efer=NXE), {"pse"}),
        (sregs(cr4=0, efer=NXE), set()),
    ],
)
def test_control_bits_count_only_where_they_mean_something(state, on):
    paging = Paging.from_kvm(state, Processor())
    names = ("wp", "pse", "smep", "smap", "pke", "pks", "pge", "nxe", "fetch_told", "ac")
    assert {name for name in names if getattr(paging, name)} == on


def test_ac_and_the_privilege_level_come_from_flags_and_stack_segment():
    paging = Paging.from_kvm(sregs(dpl=3), Processor(), rflags=AC | 2)
    assert (paging.ac, paging.cpl) == (True, 3)
    assert Paging.from_kvm(sregs(dpl=3), Processor(), cpl=0).cpl == 0


@pytest.mark.parametrize(
    ("entries", "processor"),
    [
        ([], Processor(physical_bits=32, gib_pages=False, pse36=False)),
        ([entry(1, edx=1 << 6 | 1 << 17)], Processor(physical_bits=36, gib_pages=False, pse36=True)),
        (
            [
                entry(0, ebx=0x68747541, edx=0x69746E65, ecx=0x444D4163),
                entry(0x8000_0001, edx=1 << 26),
                entry(0x8000_0008, eax=0x3028),
                entry(0xD, 9, ebx=0xA80),
            ],
            Processor(physical_bits=40, gib_pages=True, pse36=False, amd=True, pkru_offset=0xA80),
        ),
        ([entry(0x8000_0008, eax=0x3040)], Processor(physical_bits=52, gib_pages=False, pse36=False)),
    ],
)
def test_cpuid_tells_what_the_processor_has(entries, processor):
    assert Processor.from_cpuid(entries) == processor


def bits(*spans):
    return sum(1 << bit for low, high in spans for bit in range(low, high + 1))


@pytest.mark.parametrize(
    ("mode", "options", "level", "leaf", "mask"),
    [
        ("4-level", {}, "PML4E", False, bits((7, 7), (40, 51), (63, 63))),
        ("4-level", {"nxe": True}, "PML4E", False, bits((7, 7), (40, 51))),
        ("4-level", {"nxe": True}, "PDPTE", False, bits((40, 51))),
        ("4-level", {"nxe": True}, "PDPTE", True, bits((13, 29), (40, 51))),
        ("4-level", {"nxe": True}, "PDE", True, bits((13, 20), (40, 51))),
        ("4-level", {"nxe": True}, "PTE", True, bits((40, 51))),
        ("5-level", {"nxe": True}, "PML5E", False, bits((7, 7), (40, 51))),
        ("PAE", {"nxe": True}, "PDPTE", False, bits((1, 2), (5, 8), (40, 63))),
        ("PAE", {}, "PTE", True, bits((40, 63))),
        ("PAE", {"nxe": True}, "PDE", True, bits((13, 20), (40, 62))),
        ("32-bit", {"pse": True}, "PDE", True, bits((21, 21))),
        ("32-bit", {"pse": True}, "PDE", False, 0),
        ("32-bit", {}, "PTE", True, 0),
    ],
)
def test_reserved_bits_are_those_of_the_manual(make_paging, mode, options, level, leaf, mask):
    paging = make_paging(mode, **options)
    found = next(one for one in paging.levels if one.name == level)
    assert paging.reserved(found, leaf=leaf) == mask


@pytest.mark.parametrize(
    ("processor", "mode", "level", "leaf", "mask"),
    [
        (Processor(physical_bits=52, amd=True), "4-level", "PML4E", False, bits((7, 8))),
        (Processor(physical_bits=52, amd=True), "4-level", "PDPTE", False, 0),
        (Processor(physical_bits=52, gib_pages=False), "4-level", "PDPTE", False, bits((7, 7))),
        (Processor(physical_bits=36), "32-bit", "PDE", True, bits((17, 21))),
        (Processor(physical_bits=52), "32-bit", "PDE", True, bits((21, 21))),
        (Processor(pse36=False), "32-bit", "PDE", True, bits((13, 21))),
    ],
)
def test_some_reserved_bits_depend_on_the_processor(make_paging, processor, mode, level, leaf, mask):
    paging = make_paging(mode, processor=processor, nxe=True, pse=mode == "32-bit")
    found = next(one for one in paging.levels if one.name == level)
    assert paging.reserved(found, leaf=leaf) == mask


@pytest.mark.parametrize(
    ("mode", "gva", "canonical"),
    [
        ("4-level", 0x7FFF_FFFF_FFFF, True),
        ("4-level", 0x8000_0000_0000, False),
        ("4-level", 0xFFFF_8000_0000_0000, True),
        ("4-level", 0xFFFE_8000_0000_0000, False),
        ("5-level", 0x8000_0000_0000, True),
        ("5-level", 0x0100_0000_0000_0000, False),
        ("5-level", 0xFF00_0000_0000_0000, True),
        ("PAE", 0xFFFF_FFFF, True),
    ],
)
def test_canonical_addresses_are_told_from_others(make_paging, mode, gva, canonical):
    assert make_paging(mode).is_canonical(gva) is canonical


def test_an_address_of_more_than_32_bits_is_refused_where_there_are_32(make_paging):
    with pytest.raises(MisuseError, match="gva=0x100000000: linear addresses have 32 bits with PAE paging; mask it"):
        make_paging("PAE").check_linear(1 << 32)


def test_its_text_names_mode_root_and_what_is_on(make_paging):
    assert str(make_paging(wp=True, smep=True, cpl=3)) == "4-level paging, CR3 0x1000, WP SMEP, CPL 3"
    assert str(make_paging("PAE", pdptes_from="registers")) == (
        "PAE paging, CR3 0x1000, PDPTEs from registers, no control bits, CPL 0"
    )
    assert str(make_paging("off")) == "paging off"
