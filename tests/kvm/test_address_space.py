"""The map of a guest's address space, against walks, KVM_TRANSLATE and what the guest itself finds there."""

from __future__ import annotations

import random

import pytest

import kvmbench as kb
from kvmbench.errors import BusyError, UnsupportedError
from kvmbench.machine.page_tables import identity_tables
from kvmbench.mmu.guest_walk import End

from .random_tables import MODES, Controls, Draw, Features, Guest


@pytest.mark.parametrize("mode", ["pae", "long"])
@pytest.mark.parametrize("page_bytes", [4096, 2 << 20])
def test_a_fresh_machine_maps_its_memory_to_itself(host, mode, page_bytes):
    try:
        machine = kb.Machine(host, memory="4M", mode=mode, page_bytes=page_bytes, user=True)
    except UnsupportedError as error:
        pytest.skip(str(error))
    with machine as m:
        (one,) = m.cpu.address_space()
        assert (one.gva, one.gpa, one.size_bytes, one.page_bytes) == (0, 0, 4 << 20, page_bytes)
        assert one.rights == "rwx user"


@pytest.mark.parametrize("mode", MODES)
def test_a_map_of_random_tables_says_what_walks_and_kvm_say(host, request, mode):
    has = Features.of(host)
    if mode == "5-level" and "la57" not in has.names:
        pytest.skip(f"{host.info.module} has no 5-level paging here")
    local = request.node.callspec.params["host"] == "local"
    for n in range(20 if local else 2):
        rng = random.Random(f"map {mode} {n}")
        controls = Controls.draw(rng, mode, has)
        draw = Draw(rng, controls, has, paths=20)
        try:
            guest = Guest(host, controls, draw.drawn)
        except UnsupportedError as error:
            pytest.skip(str(error))
        with guest:
            cpu = guest.machine.cpu
            space = cpu.address_space()
            assert len(space) > 2
            for probe in draw.probes(10):
                walk = cpu.walk(probe.gva)
                assert space.translate(probe.gva) == walk.gpa
                if walk.gpa is None:
                    continue
                one = space.find(probe.gva)
                assert (one.page_bytes, one.pat_index) == (walk.page_bytes, walk.pat_index)
                assert probe.gva in space.gvas_of(walk.gpa)
                if walk.can("read", user=False) and walk.gpa < 1 << 36:
                    assert cpu.translate(probe.gva) == space.translate(probe.gva)


def test_another_address_space_is_mapped_by_its_cr3(machine):
    tables = identity_tables(0x10_0000, [(0x4000, 0x3000)], long=True, page_bytes=4096)
    for gpa, data in tables.placements():
        machine.memory.write(gpa, data)
    space = machine.cpu.address_space(cr3=0x10_0000 | 1 << 63 | 0xFFF)
    assert [(one.gva, one.size_bytes, one.rights) for one in space] == [(0x4000, 0x3000, "rwx supervisor")]
    assert machine.cpu.walk(0x4123, cr3=0x10_0000).gpa == 0x4123
    assert machine.cpu.walk(0x7123, cr3=0x10_0000).end is End.NOT_PRESENT
    assert machine.cpu.walk(0x7123).gpa == 0x7123
    assert len(machine.cpu.address_space()) == 1


def test_what_the_guest_maps_itself_is_in_the_next_map(host):
    with kb.Machine(host, memory="2M") as m:
        m.load_asm("mov rax, [rdi]; mov [rdi + 256*8], rax; hlt", at=0x1000)
        before = m.cpu.address_space()
        m.cpu.regs.rdi = m.cpu.regs.cr3
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.HALT
        assert [one.gva for one in m.cpu.address_space()] == [0, 0xFFFF_8000_0000_0000]
        assert m.cpu.address_space().gvas_of(0x1000) == [0x1000, 0xFFFF_8000_0000_1000]
        assert len(before) == 1


def test_a_map_of_a_recursive_entry_has_the_tables_at_their_addresses(machine):
    root = int(machine.cpu.regs.cr3)
    machine.memory.write_u64(root + 511 * 8, root | 3)
    space = machine.cpu.address_space()
    assert space.translate(0xFFFF_FFFF_FFFF_F000) == root
    for one in space:
        assert machine.cpu.walk(one.gva).gpa == one.gpa


def test_a_map_of_loops_without_end_is_cut_and_the_machine_goes_on(machine):
    root = 0x10_0000
    machine.memory.write(root, (root | 7).to_bytes(8, "little") * 512)
    space = machine.cpu.address_space(cr3=root)
    assert space.cut_at is not None
    assert "there are too many ranges" in repr(space)
    assert space.tables == 4
    machine.load_asm("hlt", at=0x1000)
    assert machine.cpu.step().cause is kb.Cause.HALT


def test_a_vcpu_that_runs_is_not_mapped(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("spin: jmp spin", at=0x1000)
        with m.others_running(m.cpu):
            with pytest.raises(BusyError, match="vcpu 1 is running"):
                m.cpus[1].address_space()
            assert len(m.cpu.address_space()) == 1
