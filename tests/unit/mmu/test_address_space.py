"""The map of an address space: the same as a walk of each address says, however the tables point to each other."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvmbench.errors import MisuseError
from kvmbench.mmu import paging as p
from kvmbench.mmu import table_scan
from kvmbench.mmu.address_space import map_tables
from kvmbench.mmu.guest_walk import End, walk_tables
from kvmbench.mmu.paging import Processor

LONG = {0x1000: 0x2027, 0x2000: 0x3027, 0x3000: 0x4027, 0x3008: 0x40_00E7}
NX = 1 << 63


def rows(space):
    return [(one.gva, one.gpa, one.size_bytes, one.page_bytes, one.rights) for one in space]


def test_neighbours_with_the_same_rights_are_one_range(pages, make_paging):
    ptes = {0x4000 + n * 8: 0x9003 + n * 0x1000 for n in range(5)}
    ptes[0x4000 + 3 * 8] |= 4
    space = map_tables(pages.put({**LONG, **ptes}), make_paging())
    assert rows(space) == [
        (0x0, 0x9000, 0x3000, 0x1000, "rwx supervisor"),
        (0x3000, 0xC000, 0x1000, 0x1000, "rwx user"),
        (0x4000, 0xD000, 0x1000, 0x1000, "rwx supervisor"),
        (0x20_0000, 0x40_0000, 0x20_0000, 0x20_0000, "rwx user"),
    ]
    assert (space.tables, space.entries, space.cut_at, space.warnings) == (4, 9, None, ())


def test_ranges_go_on_from_one_table_to_the_next(pages, make_paging):
    pages.put({**LONG, 0x3008: 0x5027})
    pages.put({0x4000 + n * 8: 0x10_0003 + n * 0x1000 for n in range(512)})
    pages.put({0x5000 + n * 8: 0x30_0003 + n * 0x1000 for n in range(512)})
    assert rows(map_tables(pages, make_paging())) == [(0, 0x10_0000, 0x40_0000, 0x1000, "rwx supervisor")]


@pytest.mark.parametrize("bits", [0x20, 0x40, 0x200, 1 << 55, 0x60])
def test_flags_and_bits_without_meaning_do_not_part_a_range(pages, make_paging, bits):
    space = map_tables(pages.put({**LONG, 0x4000: 0x9003, 0x4008: 0xA003 | bits}), make_paging())
    assert len(space) == 2


@pytest.mark.parametrize(
    ("bits", "options"),
    [(0x8, {}), (0x10, {}), (0x80, {}), (0x100, {"pge": True}), (NX, {"nxe": True}), (1 << 60, {"pke": True})],
)
def test_whatever_is_told_parts_a_range(pages, make_paging, bits, options):
    space = map_tables(pages.put({**LONG, 0x4000: 0x9003, 0x4008: 0xA003 | bits}), make_paging(**options))
    assert len(space) == 3


def test_rights_are_those_of_all_levels(pages, make_paging):
    pages.put({**LONG, 0x3000: 0x4025, 0x2000: NX | 0x3023, 0x4000: 0x9007})
    space = map_tables(pages, make_paging(nxe=True))
    assert [one.rights for one in space] == ["r-- supervisor", "rw- supervisor"]


def test_a_recursive_entry_shows_the_tables_and_does_not_run_wild(pages, make_paging):
    space = map_tables(pages.put({**LONG, 0x1FF8: 0x1003}), make_paging())
    top = space.find(0xFFFF_FFFF_FFFF_F000)
    assert (top.gpa, top.size_bytes) == (0x1000, 0x1000)
    assert space.gvas_of(0x2000) == [0xFFFF_FFFF_FFE0_0000]
    assert space.gvas_of(0x3000) == [0xFFFF_FFFF_C000_0000]
    assert space.gvas_of(0x4010) == [0xFFFF_FF80_0000_0010]
    assert space.cut_at is None


def everything_everywhere(pages):
    """One table at every level, all of whose entries lead to itself."""
    return pages.put({0x1000 + n * 8: 0x1007 for n in range(512)})


def test_a_table_that_is_all_loops_is_cut_and_says_so(pages, make_paging):
    everything_everywhere(pages)
    space = map_tables(pages, make_paging(), limit=5000)
    assert 1000 < len(space) <= 5000
    assert space.cut_at == space[-1].end
    assert f"cut at gva {space.cut_at:#x}: there are too many ranges" in repr(space)
    assert space.translate(0x3123) == 0x1123
    assert pages.reads < 50


def test_a_table_that_is_used_512_times_is_read_once(pages, make_paging):
    pages.put({**LONG, **{0x3000 + n * 8: 0x4027 for n in range(512)}, 0x4000: 0x9003})
    space = map_tables(pages, make_paging())
    assert len(space) == 512
    assert pages.reads == 4
    assert space.gvas_of(0x9010) == [n * 0x20_0000 + 0x10 for n in range(512)]


def test_empty_tables_without_end_cost_nothing(pages, make_paging):
    # 512 ** 3 ways to a table with nothing in it.
    for table in (0x1000, 0x2000, 0x3000):
        pages.put({table + n * 8: table + 0x1027 for n in range(512)})
    space = map_tables(pages, make_paging())
    assert (len(space), space.tables) == (0, 4)
    assert repr(space).startswith("0 ranges, 0 bytes mapped by 4 tables; 4-level paging")


def test_tables_outside_of_memory_are_told(pages, make_paging):
    space = map_tables(pages.put({**LONG, 0x3010: 0x7000_0007, 0x3018: 0x10_0007}), make_paging())
    assert len(space) == 1
    assert space.warnings == ("2 tables of PTEs are not guest memory, the first at gpa 0x100000",)
    wild = map_tables(pages, make_paging(cr3=0x7000_0000))
    assert (len(wild), wild.warnings) == (
        0, ("the table at gpa 0x70000000, where CR3 points, is not guest memory",),
    )  # fmt: skip


def test_entries_with_reserved_bits_are_told_and_map_nothing(pages, make_paging):
    pages.put({**LONG, 0x4000: 0x9003, 0x4008: 1 << 45 | 0xA003, 0x3010: 0x60_20E7})
    space = map_tables(pages, make_paging())
    assert space.find(0x1000) is None
    assert space.find(0x40_0000) is None
    assert space.warnings == (
        "1 PDEs have reserved bits set: what they map faults",
        "1 PTEs have reserved bits set: what they map faults",
    )


def test_too_many_tables_are_told(pages, make_paging, monkeypatch):
    monkeypatch.setattr(table_scan, "MOST_TABLES", 1)
    space = map_tables(pages.put({**LONG, 0x3008: 0x5007, 0x4000: 0x9003, 0x5000: 0x9003}), make_paging())
    assert len(space) == 1
    assert space.warnings == ("of 2 tables of PTEs the first 1 were read",)


def test_too_many_entries_are_told(pages, make_paging, monkeypatch):
    monkeypatch.setattr(table_scan, "MOST_ITEMS", 1)
    monkeypatch.setattr(table_scan, "_BATCH", 1)
    pages.put({**LONG, 0x3008: 0x5007, 0x4000: 0x9003, 0x4010: 0x9003, 0x5000: 0x9003})
    space = map_tables(pages, make_paging())
    assert len(space) == 2
    assert space.warnings == ("of 2 tables of PTEs the first 1 were read",)


def test_without_paging_there_is_no_map(pages, make_paging):
    with pytest.raises(MisuseError, match=r"paging is off \(CR0.PG is clear\), so there are no tables"):
        map_tables(pages, make_paging("off"))


def test_pae_starts_at_four_entries_of_registers(pages, make_paging):
    paging = make_paging("PAE", pdptes=(0x3001, 0, 0, 0x3001), pdptes_from="registers")
    space = map_tables(pages.put({0x3008: 0x40_00E3}), paging)
    assert rows(space) == [
        (0x20_0000, 0x40_0000, 0x20_0000, 0x20_0000, "rwx supervisor"),
        (0xC020_0000, 0x40_0000, 0x20_0000, 0x20_0000, "rwx supervisor"),
    ]


def test_32_bit_tables_with_a_page_above_4_gib(pages, make_paging):
    pages.put({0x1000: 0x2007, 0x1004: 0x80_2083, 0x2FFC: 0x9005}, 4)
    space = map_tables(pages, make_paging("32-bit", pse=True))
    assert rows(space) == [
        (0x3F_F000, 0x9000, 0x1000, 0x1000, "r-x user"),
        (0x40_0000, 0x1_0080_0000, 0x40_0000, 0x40_0000, "rwx supervisor"),
    ]


def test_a_map_is_a_sequence_that_is_looked_up_both_ways(pages, make_paging):
    space = map_tables(pages.put({**LONG, 0x4000: 0x9003, 0x4010: 0x9003}), make_paging())
    assert [one.gva for one in space] == [0, 0x2000, 0x20_0000]
    assert space[-1] == space[2]
    assert [one.gva for one in space[:2]] == [0, 0x2000]
    assert space.find(0xFFF) == space[0]
    assert space.find(0x1000) is None
    assert space.translate(0x2345) == 0x9345
    assert space.gvas_of(0x9345) == [0x345, 0x2345]
    assert space.mapped_bytes == 0x20_2000
    with pytest.raises(IndexError, match=r"there are 3 ranges, and no 3; find\(gva\) looks for an address"):
        space[3]
    with pytest.raises(MisuseError, match="gva=-1"):
        space.find(-1)


def test_its_frame_has_a_row_a_range(pages, make_paging):
    frame = map_tables(pages.put({**LONG, 0x4000: 0x9003}), make_paging()).to_dataframe()
    assert list(frame.gva) == [0, 0x20_0000]
    assert list(frame.user) == [False, True]


def test_text_and_html_have_the_ranges_and_what_is_missing(pages, make_paging):
    pages.put({**LONG, 0x3010: 0x7000_0007, **{0x4000 + n * 16: 0x9003 for n in range(100)}})
    space = map_tables(pages, make_paging())
    text, page = repr(space), space._repr_html_()
    assert text.splitlines()[0].startswith("101 ranges, 2448K mapped by 4 tables; 4-level paging")
    assert "71 ranges more" in text
    for said in ("0x9000", "rwx supervisor", "71 ranges more", "not guest memory"):
        assert said in text
        assert said in page


def drawn(pages, rng, mode):
    """Tables that lead to each other at random, loops and all; half of memory is behind the end."""
    width, entries = (4, 1024) if mode == "32-bit" else (8, 512)
    wide = mode != "32-bit"
    for table in range(1, 7):
        slots = rng.sample(range(entries), 6)
        slots += [slot + 1 for slot in slots[:3] if slot + 1 < entries]
        for slot in slots:
            target = rng.choice([*range(1, 7), rng.randrange(300)]) << 12
            entry = target | (rng.random() < 0.9) | rng.getrandbits(8) << 1 & (0x1FE if rng.random() < 0.4 else 0x17E)
            if wide and rng.random() < 0.3:
                entry |= rng.getrandbits(1) << 63 | rng.getrandbits(12) << 51
            pages.put({(table << 12) + slot * width: entry}, width)


@pytest.mark.parametrize("mode", ["32-bit", "PAE", "4-level", "5-level"])
@pytest.mark.parametrize("seed", range(12))
def test_a_map_says_what_a_walk_of_each_address_says(pages, make_paging, mode, seed):
    rng = random.Random(f"{mode} {seed}")
    drawn(pages, rng, mode)
    long = mode in ("4-level", "5-level")
    paging = make_paging(
        mode,
        pse=mode == "32-bit",
        pge=rng.random() < 0.5,
        nxe=mode != "32-bit" and rng.random() < 0.5,
        pke=long and rng.random() < 0.5,
        processor=Processor(physical_bits=40, gib_pages=rng.random() < 0.5, amd=rng.random() < 0.5),
        pdptes=tuple(rng.randrange(1, 9) << 12 | (rng.random() < 0.8) for _ in range(4)) if mode == "PAE" else (),
        pdptes_from="registers" if mode == "PAE" else "",
    )
    space = map_tables(pages, paging)
    assert list(space.gva) == sorted(set(space.gva.tolist()))
    chosen = list(space) if len(space) < 300 else [space[n] for n in sorted(rng.sample(range(len(space)), 300))]
    for one in chosen:
        for gva in (one.gva, one.end - 1):
            walk = walk_tables(pages, paging, gva)
            assert (walk.end, walk.page_bytes) == (End.PAGE, one.page_bytes)
            assert walk.gpa == one.gpa + gva - one.gva
            rights = [entry.raw for entry in walk.entries if entry.has_rights]
            assert one.writable == all(raw & p.WRITABLE for raw in rights)
            assert one.user == all(raw & p.USER for raw in rights)
            assert one.executable == (not (paging.nxe and any(raw & NX for raw in rights)))
            assert (one.is_global, one.pat_index, one.key) == (walk.is_global, walk.pat_index, walk.key or 0)
    # And the other way round: what a walk finds is in the map. Beside ranges, and anywhere.
    near = [gva & (1 << 64) - 1 for one in chosen[:100] for gva in (one.gva - 1, one.end)]
    anywhere = [rng.getrandbits(64 if long else 32) for _ in range(50)]
    for gva in (one for one in near + anywhere if long or not one >> 32):
        assert space.translate(gva) == walk_tables(pages, paging, gva).gpa
    assert int(space.size_bytes.astype(object).sum() if len(space) else 0) == space.mapped_bytes
    assert np.all(space.page_bytes[space.size_bytes % space.page_bytes != 0] == 0)
