"""Guest memory through the core: ranges, regions, the dirty log."""

from __future__ import annotations

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import AddressError, ClosedError, MisuseError


def test_bytes_written_are_read_back_and_seen_by_the_guest(machine):
    machine.load_asm("mov rax, [0x3000]\nmov [0x3008], rax\nhlt", at=0x1000)
    machine.memory.write_u64(0x3000, 0x1122334455667788)
    machine.cpu.run(deadline_s=10)
    assert machine.memory[0x3008:0x3010] == bytes.fromhex("8877665544332211")


def test_a_large_block_survives_the_way_through_the_core(machine):
    block = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8).tobytes()
    machine.memory.write(0x80000, block)
    assert machine.memory.read(0x80000, len(block)) == block


def test_changes_since_a_snapshot_are_exact(machine):
    machine.load_asm("mov byte ptr [0x3005], 9\nmov word ptr [0x4000], 0x0101\nhlt", at=0x1000)
    before = machine.memory.snapshot(0x3000, 0x2000)
    machine.cpu.run(deadline_s=10)
    assert machine.memory.changes(before) == [(0x3005, 1), (0x4000, 2)]
    machine.memory.restore(before)
    assert machine.memory.changes(before) == []


def test_an_array_is_the_guest_s_memory_or_says_that_it_is_a_copy(machine):
    words = machine.memory.as_array("u8", gpa=0x3000, count=4)
    machine.load_asm("mov qword ptr [0x3010], 77\nhlt", at=0x1000)
    machine.cpu.run(deadline_s=10)
    assert words.flags.writeable == (words[2] == 77)


def test_an_array_outlives_its_machine(host):
    with kb.Machine(host, memory="2M") as m:
        m.memory.write(0x3000, b"stays")
        array = m.memory.as_array("u1", gpa=0x3000, count=5)
    assert array.tobytes() == b"stays"


def test_a_range_outside_memory_is_refused_with_what_there_is(machine):
    for gpa, size in ((0x20_0000, 1), (0x1F_FFFF, 2), (1 << 60, 8), (1 << 64, 1)):
        with pytest.raises(AddressError, match="is not guest memory; there is 0x0 to 0x1fffff"):
            machine.memory.read(gpa, size)
    with pytest.raises(AddressError):
        machine.memory.write(0x1F_FFFF, b"ab")
    assert machine.memory.read(0x1F_FFFF, 1) == b"\0"


def test_overlapping_and_unaligned_regions_are_refused_and_memory_stays(machine):
    with pytest.raises(AddressError, match="overlaps"):
        machine.memory.map(0x10_0000, "2M")
    with pytest.raises(MisuseError, match="page"):
        machine.memory.map(0x40_0100, "1M")
    with pytest.raises(MisuseError, match="4096"):
        machine.memory.map(0x40_0000, 1000)
    added = machine.memory.map(0x40_0000, "1M")
    machine.memory.write(0x40_0000, b"new")
    machine.memory.unmap(added)
    with pytest.raises(AddressError):
        machine.memory.read(0x40_0000, 1)


def test_the_dirty_log_names_the_pages_that_the_guest_wrote(host):
    with kb.Machine(host, memory="2M", mode="protected") as m:
        region = m.memory.map(0x20_0000, "1M", log_dirty=True)
        m.load_asm("mov byte ptr [0x203000], 1\nmov byte ptr [0x205abc], 1\nhlt", at=0x1000)
        m.memory.dirty_pages(region)
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.HALT
        assert m.memory.dirty_pages(region) == [0x20_3000, 0x20_5000]
        assert m.memory.dirty_pages(region) == []


def test_a_closed_machine_says_that_it_is_closed(host):
    m = kb.Machine(host, memory="2M")
    m.load_asm("hlt", at=0x1000)
    m.close()
    m.close()
    for use in (lambda: m.memory.read(0, 1), lambda: m.cpu.step(), lambda: m.cpu.run(), lambda: m.load_asm("nop")):
        with pytest.raises(ClosedError):
            use()


@pytest.mark.parametrize("memory", ["0", "1000", "-4096", "many", 4097])
def test_a_memory_size_of_no_sense_is_refused(host, memory):
    with pytest.raises(MisuseError):
        kb.Machine(host, memory=memory)
