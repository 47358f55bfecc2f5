"""The marks over handlers' first bytes follow what their addresses are made of: descriptors and page tables."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench.machine import segment

from .interrupt_table import HIGH, IDT, gate, guest, guest_that_maps_high

OWN, OTHER = 0x08, 0x10
SOURCE = """
        mov byte ptr [ebx + 3], 1
        ud2
        hlt
ud:     hlt
        .org ud - start + 0x100
moved:  nop
        nop
        hlt
"""


@pytest.mark.parametrize("selector", [OWN, OTHER])
def test_a_descriptor_whose_base_the_guest_moves_is_seen_at_once(host, selector):
    with guest(host, SOURCE, {}, mode="protected") as m:
        descriptor = m.cpu.regs.gdt.base + selector
        m.memory.write(descriptor, segment.encode_descriptor(segment.flat_code(selector, bits=32)))
        ud = m.symbols["ud"]
        m.memory.write(0x5000 + 6 * 8, segment.encode_gate(ud, selector, bits=32))
        m.cpu.regs.rbx = descriptor
        rec = m.cpu.record(20)
        assert m.cpu.last_stop.cause is kb.Cause.HALT
        assert rec.entered_vector[rec.entered_vector >= 0].tolist() == [6]
        assert rec.rip.tolist()[2:5] == [ud, ud + 1, ud + 2]


def test_a_handler_that_is_mapped_by_the_guest_is_entered(host):
    with guest_that_maps_high(host, {}) as m:
        ud = HIGH + m.symbols["ud"]
        m.memory.write(IDT + 6 * 16, gate(m, ud))
        rec = m.cpu.record(20)
        assert rec.entered_vector[rec.entered_vector >= 0].tolist() == [6]
        assert rec.rip.tolist()[3:5] == [ud, ud + 1]
        assert m.cpu.last_stop.cause is kb.Cause.HALT


@pytest.mark.parametrize("ring", [False, True])
def test_a_handler_that_the_guest_writes_is_entered_and_runs_as_written(host, ring):
    source = "mov byte ptr [ud], 0xf9\nnop\nud2\nhlt\nud: nop\nnop\ninc rcx\nnop\nhlt\n"
    with guest(host, source, {6: "ud"}) as m:
        ud = m.symbols["ud"]
        if ring:  # the byte behind is marked, too
            m.vm.register_coalesced_mmio(m.memory.read(ud + 1, 1)[0], 1, pio=True)
        rec = m.cpu.record(20)
        assert m.cpu.last_stop.cause is kb.Cause.HALT
        assert [int(rip) - ud for rip in rec.rip.tolist()[3:8]] == [0, 1, 2, 5, 6]
        assert (m.cpu.regs.rcx, m.memory.read(ud, 3)) == (1, b"\xf9\x90\x48")
