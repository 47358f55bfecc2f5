"""Where KVM modules differ, and what is made of it: the facts of docs/facts.md, keyed by module.

A module that is not in a table has not been looked at; its test is skipped and says so.
"""

from __future__ import annotations

from typing import Any

import pytest

import kvmbench as kb


def expected(host: kb.Host, by_module: dict[str, Any]) -> Any:
    """What this host's module was seen to do."""
    if host.info.module not in by_module:
        pytest.skip(f"nobody has looked at {host.info.module} yet; found on {', '.join(by_module)}")
    return by_module[host.info.module]


def test_a_step_over_mov_ss_takes_the_next_instruction_along_in_hardware_only(host):
    rips = expected(host, {"kvm_amd": [0x1003, 0x1008, 0x1009], "kvm_pvm": [0x1003, 0x1005, 0x1008]})
    with kb.Machine(host, memory="2M", mode="real") as m:
        # 3, 2, 3 and 1 bytes: MOV SS holds off the debug trap until after the instruction behind it.
        m.load_asm("mov ax, 0\nmov ss, ax\nmov sp, 0x8000\nnop\nhlt", at=0x1000)
        assert [m.cpu.step().rip for _ in range(3)] == rips


def test_the_exit_of_a_stepped_hlt_is_lost_by_the_instruction_emulator_and_the_cause_is_not(host, machine):
    reason = expected(host, {"kvm_amd": "HLT", "kvm_pvm": "DEBUG"})
    machine.load_asm("nop\nhlt\nnop", at=0x1000)
    rec = machine.cpu.record(10)
    assert (len(rec), int(rec.rip[-1])) == (2, 0x1002)
    assert list(rec[1:].exit_counts()) == [reason]
    assert machine.cpu.last_stop.cause is kb.Cause.HALT


def test_at_an_out_exit_rip_is_still_on_the_instruction_in_hardware_only(host, machine):
    rip = expected(host, {"kvm_amd": 0x1006, "kvm_pvm": 0x1007})
    machine.load_asm("mov dx, 0x3f8\nmov al, 'A'\nout dx, al\nnop\nhlt", at=0x1000)
    cpu = machine.cpu
    cpu.catches.add("io", port=0x3F8)
    assert cpu.run(deadline_s=10).rip == rip
    # Where rip has moved on the OUT is over, and the next step is the NOP's. Either way the byte arrives once.
    cpu.catches.clear()
    assert cpu.step().rip == (0x1007 if rip == 0x1006 else 0x1008)
    assert machine.serial.text == "A"


def test_after_a_triple_fault_kvm_amd_has_reset_the_vcpu_and_a_recording_still_shows_the_way(host):
    rip = expected(host, {"kvm_amd": 0xFFF0, "kvm_pvm": 0x1005})
    with kb.Machine(host, memory="2M") as m:
        m.load_asm("mov eax, 5\nud2", at=0x1000)
        rec = m.cpu.record(10)
        assert m.cpu.last_stop.cause is kb.Cause.SHUTDOWN
        assert m.cpu.last_stop.rip == rip
        assert rec.rip.tolist() == [0x1005], "the last row is the state before the fault"


def test_a_mode_that_kvm_does_not_run_is_refused_by_name(host):
    if expected(host, {"kvm_amd": True, "kvm_pvm": False}):
        kb.Machine(host, memory="2M", mode="pae").close()
    else:
        with pytest.raises(kb.KvmbenchError, match="kvm_pvm does not run pae mode: it made cr0"):
            kb.Machine(host, memory="2M", mode="pae")
