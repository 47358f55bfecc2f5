"""KVM's own tables, read out of the kernel's memory, against all else that is known of them."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import ClosedError, MisuseError, UnsupportedError
from kvmbench.mmu.spte import Sptes
from kvmbench.mmu.xray import KINDS
from kvmbench.mmu.xray_text import entry_in_words

LEAF, MMIO = KINDS.index("leaf"), KINDS.index("MMIO")
# Writes the number of each page into it, and reads a page beyond.
TOUCH = """
    mov ecx, 700
    mov rdi, 0x100000
again: mov [rdi], rdi
    add rdi, 4096
    loop again
    mov rax, [0x3c3000]
end: hlt
"""


@pytest.fixture
def touched(host: kb.Host):
    """A machine whose guest has written 700 pages, where the kernel's memory can be read."""
    try:
        assert host.host_kernel
    except UnsupportedError as error:
        pytest.skip(str(error))
    with kb.Machine(host, memory="16M") as machine:
        machine.load_asm(TOUCH, at=0x1000)
        assert machine.cpu.run(deadline_s=60).cause is kb.Cause.HALT
        yield machine


def test_a_host_without_the_kernel_s_memory_says_what_is_missing(host):
    if host.info.kcore:
        pytest.skip("this host has it")
    with kb.Machine(host, memory="2M") as machine, pytest.raises(UnsupportedError, match="/proc/kcore"):
        machine.xray()


def test_each_leaf_s_page_in_the_host_s_memory_is_the_guest_s(touched):
    x = touched.xray()
    assert x.whole, x
    leaves = x.sptes[x.sptes["kind"] == LEAF]
    inside = leaves[(leaves["gfn"] >= 0x100) & (leaves["gfn"] < 0x100 + 700) & (leaves["level"] == 1)]
    assert len(np.unique(inside["gfn"])) == 700
    kernel = touched.host.host_kernel
    base = np.uint64(kernel.u64(kernel.symbol("page_offset_base")))
    words = kernel.reader.read_many(Sptes(x.masks, inside["value"], 1).hpa + base, 8)
    assert [int.from_bytes(word or b"", "little") for word in words] == [int(gfn) << 12 for gfn in inside["gfn"]]


def test_the_number_of_leaves_is_that_of_kvm_s_statistics(touched):
    with touched.vm.get_stats_fd() as stats:
        before = stats.read()
        x = touched.xray()
        assert stats.read().since(before) == {}, "the X-ray changes nothing"
    for level, name in ((1, "pages_4k"), (2, "pages_2m"), (3, "pages_1g")):
        mine = ((x.sptes["kind"] == LEAF) & (x.sptes["level"] == level)).sum()
        assert int(mine) == before[name], name


def test_a_walk_leads_to_the_page(touched):
    x = touched.xray()
    root = x.root()
    if root is None:
        pytest.skip("this KVM takes the root away when the vcpu leaves the guest")
    for gfn in (0x1, 0x100, 0x200, 0x300):
        steps = x.walk(gfn << 12)
        assert [int(step["level"]) for step in steps] == list(range(root.level, root.level - len(steps), -1))
        last = steps[-1]
        assert int(last["kind"]) == LEAF
        size = 1 << 9 * (int(last["level"]) - 1)
        assert int(last["gfn"]) <= gfn < int(last["gfn"]) + size
        assert last in x.maps(gfn)
    assert int(x.walk(0x7000_0000)[-1]["kind"]) == 0


def entry(x, gfn: int) -> str:
    """The one leaf of a guest page, in words."""
    found = x.maps(gfn)
    assert len(found) == 1, found
    return entry_in_words(x, found[0])


def is_shadow(x) -> bool:
    """Whether KVM keeps shadow page tables for the machine."""
    return not x.pages["tdp_mmu"].any()


def test_the_guest_s_tables_are_write_protected_only_where_they_are_shadowed(touched):
    tables = touched.cpu.vcpu.get_sregs().cr3 >> 12
    touched.load_asm(f"mov eax, [{tables << 12:#x}]\nhlt", at=0x2000)
    touched.cpu.regs.rip = 0x2000
    assert touched.cpu.run(deadline_s=20).cause is kb.Cause.HALT
    x = touched.xray()
    protected = "write-protected as a page table of the guest"
    assert (protected in entry(x, tables)) == is_shadow(x)
    assert " rw" in entry(x, 0x100)


def test_shadow_entries_wait_for_the_guest_s_dirty_bit(touched):
    # A 2-MiB page of the guest's that it has only read: the first write sets its dirty bit. Nor has the host memory of
    # its own for it yet, but all it has of zeros.
    at = 0x600000
    touched.load_asm(f"mov eax, [{at:#x}]\nhlt\nmov [{at:#x}], eax\nhlt", at=0x2000)
    touched.cpu.regs.rip = 0x2000
    assert touched.cpu.run(deadline_s=20).cause is kb.Cause.HALT
    before = touched.xray()
    if is_shadow(before):
        assert "or no dirty bit is set yet" in entry(before, at >> 12)
    else:
        assert "the host maps it read-only" in entry(before, at >> 12)
    assert touched.cpu.run(deadline_s=20).cause is kb.Cause.HALT
    after = touched.xray()
    # The read-only one may stay beside it: role.access of its table is another.
    assert any(" rw" in entry_in_words(after, one) for one in after.maps(at >> 12))


def test_what_is_one_large_page_to_the_guest_is_a_direct_table_below_a_shadowed_one(touched):
    x = touched.xray()
    if not is_shadow(x):
        pytest.skip("nothing is shadowed")
    told = x.tree()
    assert "shadows the guest's table" in told
    assert "direct: splits what the guest maps large" in told
    leaf = x.maps(0x100)[0]
    assert (int(x.pages[leaf["page"]]["level"]), bool(x.pages[leaf["page"]]["direct"])) == (1, True)


def test_each_vcpu_has_a_root_of_its_own_cr3(host):
    try:
        assert host.host_kernel
    except UnsupportedError as error:
        pytest.skip(str(error))
    with kb.Machine(host, memory="4M", vcpus=2) as machine:
        machine.load_asm("mov eax, 1\nhlt", at=0x1000)
        for cpu in machine.cpus:
            assert cpu.run(deadline_s=20).cause is kb.Cause.HALT
        x = machine.xray()
        assert [root.vcpu for root in x.roots if root.current] == [0, 1]
        if is_shadow(x):
            assert {root.pgd for root in x.roots if root.current} == {machine.cpu.vcpu.get_sregs().cr3}
        assert machine.cpus[1].step().cause is kb.Cause.STEP


def test_two_machines_are_kept_apart(touched):
    with kb.Machine(touched.host, memory="2M") as other:
        other.load_asm("hlt", at=0x1000)
        other.cpu.run(deadline_s=20)
        mine, others = touched.xray(), other.xray()
    assert not set(mine.pages["address"].tolist()) & set(others.pages["address"].tolist())
    assert len(others.sptes) < len(mine.sptes)


def test_a_vcpu_that_runs_is_held_for_as_long_as_it_takes(touched):
    touched.load_asm("again: inc rax\njmp again", at=0x2000)
    cpu = touched.cpu
    cpu.regs.rip = 0x2000
    stops = []
    thread = threading.Thread(target=lambda: stops.append(cpu.run(deadline_s=60)))
    thread.start()
    try:
        looks = [touched.xray() for _ in range(5)]
        assert all(look.whole for look in looks), looks
        assert thread.is_alive()
    finally:
        cpu.interrupt()
        thread.join(30)
    assert stops[0].cause is kb.Cause.INTERRUPTED


def test_a_closed_machine_has_none(touched):
    touched.close()
    with pytest.raises(ClosedError):
        touched.xray()


def test_a_table_that_is_not_there_is_named(touched):
    x = touched.xray()
    with pytest.raises(MisuseError, match=f"no table {len(x.pages)}"):
        x.describe(len(x.pages))
