"""Walks through tables made by hand: what is read, where it leads, and what is told of it."""

from __future__ import annotations

import pytest

from kvmbench.errors import MisuseError
from kvmbench.mmu.guest_walk import End, walk_tables
from kvmbench.mmu.paging import Processor

LONG = {0x1000: 0x2027, 0x2000: 0x3027, 0x3000: 0x4027, 0x3008: 0x40_00E7, 0x4028: 0x9063, 0x2008: 0x4000_0087}
NX, AMD = 1 << 63, Processor(physical_bits=40, amd=True)


@pytest.mark.parametrize(
    ("mode", "options", "entries", "gva", "names", "gpa", "size"),
    [
        ("4-level", {}, LONG, 0x5123, ["PML4E", "PDPTE", "PDE", "PTE"], 0x9123, 1 << 12),
        ("4-level", {}, LONG, 0x20_0123, ["PML4E", "PDPTE", "PDE"], 0x40_0123, 1 << 21),
        ("4-level", {}, LONG, 0x4765_4321, ["PML4E", "PDPTE"], 0x4765_4321, 1 << 30),
        (
            *("5-level", {"cr3": 0x8000}, {**LONG, 0x8FF8: 0x1027}, 0xFFFF_0000_0000_5123),
            *(["PML5E", "PML4E", "PDPTE", "PDE", "PTE"], 0x9123, 1 << 12),
        ),
        ("PAE", {"cr3": 0x1020}, {0x1038: 0x3001, 0x3000: 0x4007, 0x4008: 0x9007}, 0xC000_1234, ["PDPTE", "PDE", "PTE"],
         0x9234, 1 << 12),
        ("PAE", {"pdptes": (0x3001, 0, 0, 0), "pdptes_from": "registers"}, {0x3000: 0x40_0087}, 0x1234,
         ["PDPTE", "PDE"], 0x40_1234, 1 << 21),
        ("off", {}, {}, 0x1234, [], 0x1234, None),
    ],
)  # fmt: skip
def test_an_address_is_followed_to_its_page(pages, make_paging, mode, options, entries, gva, names, gpa, size):
    walk = walk_tables(pages.put(entries), make_paging(mode, **options), gva)
    assert ([one.level for one in walk.entries], walk.gpa, walk.page_bytes) == (names, gpa, size)
    assert walk.end is End.PAGE
    assert not walk.why


@pytest.mark.parametrize(
    ("options", "entries", "gva", "gpa"),
    [
        ({}, {0x1004: 0x2007, 0x2004: 0x9007}, 0x40_1123, 0x9123),
        ({"pse": True}, {0x1004: 0x80_2083}, 0x40_1123, 0x1_0080_1123),
        ({}, {0x1004: 0x2087, 0x2004: 0x9087}, 0x40_1123, 0x9123),  # without PSE bit 7 means nothing
    ],
)
def test_32_bit_tables_have_two_levels(pages, make_paging, options, entries, gva, gpa):
    walk = walk_tables(pages.put(entries, 4), make_paging("32-bit", **options), gva)
    assert walk.gpa == gpa


def test_an_entry_tells_its_place_its_value_and_its_bits(pages, make_paging):
    walk = walk_tables(pages.put({**LONG, 0x4028: NX | 0x9163}), make_paging(nxe=True, pge=True), 0x5123)
    top, leaf = walk.entries[0], walk.entries[-1]
    assert (top.level, top.index, top.gpa, top.raw, top.target) == ("PML4E", 0, 0x1000, 0x2027, 0x2000)
    assert top.words == ("present", "writable", "user", "accessed")
    assert str(leaf) == (
        f"PTE at gpa 0x4028 {NX | 0x9163:#x} -> 0x9000: present writable supervisor no-execute accessed dirty global"
    )
    assert (walk.is_global, walk.dirty, walk.accessed, walk.leaf) == (True, True, True, leaf)


def test_a_pdpte_of_a_register_says_so(pages, make_paging):
    paging = make_paging("PAE", pdptes=(0, 0x3001, 0, 0), pdptes_from="registers")
    walk = walk_tables(pages.put({0x1008: 0x7001}), paging, 0x4000_0000)
    assert walk.entries[0].register == "PDPTE1"
    assert walk.entries[0].raw == 0x3001, "what memory has by now is not what the processor uses"
    assert "PDPTEs from registers" in repr(walk)


@pytest.mark.parametrize(
    ("entries", "gva", "end", "count", "why"),
    [
        ({}, 0x5123, End.NOT_PRESENT, 1, "P is clear in the PML4E at gpa 0x1000"),
        ({**LONG, 0x4028: 0x9062}, 0x5123, End.NOT_PRESENT, 4, "P is clear in the PTE at gpa 0x4028"),
        ({**LONG, 0x1000: 0x20A7}, 0x5123, End.RESERVED, 1, "reserved bits of the PML4E at gpa 0x1000 are set: 7"),
        ({**LONG, 0x3008: 0x40_60E7}, 0x20_0000, End.RESERVED, 3, "PDE at gpa 0x3008 are set: 13, 14"),
        ({**LONG, 0x4028: 1 << 40 | 0x9062}, 0x5123, End.NOT_PRESENT, 4, "P is clear"),
        ({**LONG, 0x4028: NX | 0x9063}, 0x5123, End.RESERVED, 4, "the PTE at gpa 0x4028 are set: 63"),
        ({**LONG, 0x3000: 0x10_0027}, 0x5123, End.OUTSIDE, 3,
         "the PTE would be at gpa 0x100028, which is not guest memory (the PDE at gpa 0x3000 leads there)"),
        (LONG, 0x8000_0000_0000, End.NOT_CANONICAL, 0, "it is not canonical: bits 63 to 47 differ"),
    ],
)  # fmt: skip
def test_a_walk_that_leads_nowhere_says_where_and_why(pages, make_paging, entries, gva, end, count, why):
    walk = walk_tables(pages.put(entries), make_paging(), gva)
    assert (walk.end, len(walk.entries), walk.gpa) == (end, count, None)
    assert why in walk.why


def test_bit_8_of_a_pml4e_is_reserved_on_amd_processors_only(pages, make_paging):
    pages.put({**LONG, 0x1000: 0x2127})
    assert walk_tables(pages, make_paging(), 0x5123).end is End.PAGE
    assert walk_tables(pages, make_paging(processor=AMD), 0x5123).end is End.RESERVED


def test_a_cr3_outside_of_memory_is_told_as_such(pages, make_paging):
    walk = walk_tables(pages, make_paging(cr3=0x7000_0000), 0x5123)
    assert walk.why == "the PML4E would be at gpa 0x70000000, which is not guest memory (CR3 leads there)"
    verdict = walk.can("read")
    assert (bool(verdict), verdict.vector, verdict.exception) == (False, None, "")


@pytest.mark.parametrize(
    ("entry", "index", "kind"), [(0x9063, 0, "WB"), (0x907B, 3, "UC"), (0x90EB, 5, "WT"), (0x90FB, 7, "UC")]
)
def test_the_memory_type_is_a_byte_of_the_pat(pages, make_paging, entry, index, kind):
    walk = walk_tables(pages.put({**LONG, 0x4028: entry}), make_paging(pat=0x0007_0406_0007_0406), 0x5123)
    assert (walk.pat_index, walk.memory_type) == (index, kind)
    assert walk_tables(pages, make_paging(), 0x5123).memory_type == ""


def test_the_pat_bit_of_a_large_page_is_bit_12(pages, make_paging):
    walk = walk_tables(pages.put({**LONG, 0x3008: 0x40_10E7}), make_paging(), 0x20_0000)
    assert (walk.pat_index, walk.gpa) == (4, 0x40_0000)


def test_keys_are_told_where_there_are_some(pages, make_paging):
    pages.put({**LONG, 0x4028: 5 << 59 | 0x9067})
    assert walk_tables(pages, make_paging(pke=True), 0x5123).key == 5
    assert walk_tables(pages, make_paging(), 0x5123).key is None


def test_no_walk_writes(pages, make_paging):
    pages.put(LONG)
    before = pages.read(0, 1 << 16)
    walk_tables(pages, make_paging(), 0x5123).can("write")
    assert pages.read(0, 1 << 16) == before


def test_text_and_html_have_every_entry(pages, make_paging):
    walk = walk_tables(pages.put(LONG), make_paging(wp=True), 0x5123)
    text, page = repr(walk), walk._repr_html_()
    assert text.splitlines()[0] == "gva 0x5123 -> gpa 0x9123, a page of 4K"
    for entry in walk.entries:
        assert f"{entry.raw:016x}" in text
        assert f"{entry.raw:016x}" in page
    assert "supervisor rwx, user ---" in text
    assert "4-level paging, CR3 0x1000, WP, CPL 0" in page


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("wirte", "access='wirte': did you mean 'write'?"),
        (3, "access=3: there are read, write, execute"),
        ("", "access='': there are read, write, execute"),
    ],
)
def test_a_misspelt_access_is_told_what_there_is(pages, make_paging, word, message):
    walk = walk_tables(pages.put(LONG), make_paging(), 0x5123)
    with pytest.raises(MisuseError) as caught:
        walk.can(word)
    assert str(caught.value) == message


def test_an_implicit_access_is_no_user_s(pages, make_paging):
    walk = walk_tables(pages.put(LONG), make_paging(cpl=3), 0x5123)
    with pytest.raises(MisuseError, match="what the processor does on its own"):
        walk.can("read", user=True, implicit=True)
    assert walk.can("read", implicit=True).user is False
    assert walk.can("read").user is True
