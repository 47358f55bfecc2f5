"""The marks over handlers' first bytes: of which tables they are made, which bytes they are, and who sees them."""

from __future__ import annotations

import dataclasses
import threading

import pytest

import kvmbench as kb
from kvmbench.machine.segment import encode_gate

from .interrupt_table import HIGH, IDT, gate, guest, guest_that_maps_high, steps

UPPER_HALF = HIGH >> 39 & 0x1FF


def map_upper_half(machine: kb.Machine) -> None:
    """The low addresses once more, at HIGH."""
    tables = machine.cpu.regs.cr3
    machine.memory.write(tables + 8 * UPPER_HALF, machine.memory.read(tables, 8))


def vectors(record: kb.StepRecord) -> list[int]:
    return record.entered_vector[record.entered_vector >= 0].tolist()


def test_a_gate_that_only_moves_to_the_upper_half_is_seen_at_once(host):
    source = "mov dword ptr [0x5000 + 6*16 + 8], 0xffff8000\nud2\nhlt\nud: nop\nhlt\n"
    with guest(host, source, {6: "ud"}) as m:
        map_upper_half(m)
        rec = m.cpu.record(20)
        assert vectors(rec) == [6]
        assert rec.rip.tolist()[2:4] == [HIGH + m.symbols["ud"], HIGH + m.symbols["ud"] + 1]
        assert m.cpu.last_stop.cause is kb.Cause.HALT


def test_a_table_that_is_mapped_after_it_was_loaded_is_seen(host):
    with guest_that_maps_high(host, {6: "ud"}, idt=HIGH + IDT) as m:
        assert vectors(m.cpu.record(20)) == [6]
        assert m.cpu.last_stop.cause is kb.Cause.HALT


def test_the_last_vector_of_a_real_mode_table_is_compared_too(host):
    source = """
start:  lidt [table]
        mov ax, 0
        mov ss, ax
        mov sp, 0x9000
        mov word ptr [0], offset new
        xor cx, cx
        div cx
        hlt
old:    hlt
new:    nop
        hlt
table:  .word 3
        .long 0
"""
    with guest(host, source, {0: "old"}, mode="real", tables=False) as m:
        assert vectors(m.cpu.record(20)) == [0]
        assert m.cpu.last_stop.cause is kb.Cause.HALT


def test_a_handler_of_two_addresses_runs_its_own_first_byte_at_each(host):
    source = """
        ud2
        xor ecx, ecx
        div ecx
        hlt
both:   nop
        add qword ptr [rsp], 2
        iretq
"""
    with guest(host, source, {6: "both"}) as m:
        map_upper_half(m)
        m.memory.write(0x5000, gate(m, HIGH + m.symbols["both"]))
        both = m.symbols["both"]
        rips = [stop.rip for stop in steps(m)]
        assert rips[1:4] == [both, both + 1, both + 6]
        assert rips[6:9] == [HIGH + both, HIGH + both + 1, HIGH + both + 6]


def test_code_in_a_segment_that_wraps_around_is_stepped_into_its_handlers(host):
    base, wrapped = 0x4000_0000, 0xC000_0000
    with guest(host, "ud2\nhlt\nud: nop\nhlt\n", {}, mode="protected") as m:
        if host.info.module == "kvm_pvm":
            pytest.skip("kvm_pvm does not fetch from a segment that wraps around")
        regs = m.cpu.regs
        selector = int(regs.cs.selector)
        m.memory.write(0x5000 + 6 * 8, encode_gate(wrapped + m.symbols["ud"], selector, bits=32))
        m.cpu.step()
        m.memory.write(regs.gdt.base + selector + 7, bytes([base >> 24]))
        regs.cs = dataclasses.replace(regs.cs, base=base)
        regs.rip = wrapped + regs.rip
        stop = m.cpu.step()
        assert (stop.rip, stop.entered_vector) == (wrapped + m.symbols["ud"], 6)
        stop = m.cpu.step()
        assert (stop.cause, stop.rip) == (kb.Cause.STEP, wrapped + m.symbols["ud"] + 1)


def test_a_halt_in_a_handler_that_is_stepped_over_is_no_step_of_the_program(host):
    with guest(host, "ud2\nhlt\nud: hlt\n", {6: "ud"}) as m:
        m.cpu.handlers = "over"
        rec = m.cpu.record(10)
        assert m.cpu.last_stop.cause is kb.Cause.HALT
        assert [m.symbols.label(int(rip)) for rip in rec.rip] == ["start+0x8"]


LOOPS = """
again:  jmp again
ud:     nop
        iretq
free:   nop
        jmp free
"""


def while_it_steps(machine, act):
    """Calls act() again and again while the first vcpu records a long loop."""
    thread = threading.Thread(target=lambda: machine.cpu.record(3000, deadline_s=30))
    thread.start()
    try:
        while thread.is_alive():
            act()
    finally:
        machine.interrupt()
        thread.join()


def test_the_marks_of_another_vcpu_are_no_write_to_what_is_watched(host):
    with guest(host, LOOPS, {6: "ud"}, vcpus=2) as m:
        other = m.cpus[1]
        other.regs.rip = m.symbols["free"]
        other.watch(m.symbols["ud"], 1, "w", mechanism="stepping loop")
        causes = []
        while_it_steps(m, lambda: causes.append(other.step().cause))
        assert set(causes) == {kb.Cause.STEP}


def test_what_is_written_over_a_mark_is_there_when_it_is_gone(host):
    if host.name == "local":
        pytest.skip("memory is mapped here, and marks show through it while another thread steps (docs/guest-debug.md)")
    with guest(host, LOOPS, {6: "ud"}) as m:
        ud = m.symbols["ud"]
        read = []

        def act():
            for value in (b"\xe6", b"\x90"):  # a mark is e6, too
                m.memory.write(ud, value)
                read.append(m.memory.read(ud, 1) == value)

        while_it_steps(m, act)
        assert all(read)
        m.memory.write(ud, b"\x90")
        m.cpu.step()
        while_it_steps(m, lambda: m.memory.write(ud, b"\xe6"))
        assert m.memory.read(ud, 1) == b"\xe6"


def test_a_region_that_comes_and_goes_takes_no_mark_away_from_under_a_step(host):
    source = "again: ud2\njmp again\nud: add qword ptr [rsp], 2\niretq\n"
    with guest(host, source, {6: "ud"}) as m:
        steps_made = {m.symbols["again"], m.symbols["again"] + 2, m.symbols["ud"], m.symbols["ud"] + 5}
        thread = threading.Thread(target=lambda: m.cpu.record(3000, deadline_s=30))
        thread.start()
        try:
            while thread.is_alive():
                m.vm.add_region(0x4000_0000, 0x1000).close()
        finally:
            m.interrupt()
            thread.join()
        assert set(m.cpu.last_record.rip.tolist()) == steps_made


@pytest.mark.parametrize("sort", ["eventfd", "ring"])
def test_a_mark_is_no_out_to_a_port_that_the_kernel_answers(host, sort):
    with guest(host, "ud2\nhlt\nud: add qword ptr [rsp], 2\niretq\n", {6: "ud"}) as m:
        port = m.memory.read(m.symbols["ud"] + 1, 1)[0]
        if sort == "ring":
            m.vm.register_coalesced_mmio(port, 1, pio=True)
        else:
            m.vm.ioeventfd(m.vm.create_eventfd(), port, 1, pio=True)
        m.cpu.step()
        stop = m.cpu.step()
        assert (stop.rip, stop.entered_vector) == (m.symbols["ud"], 6)
        assert m.cpu.step().rip == m.symbols["ud"] + 5
        assert m.cpu.step().rip == m.symbols["start"] + 10
