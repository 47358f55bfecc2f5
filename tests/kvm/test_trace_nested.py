"""A trace of nested virtualization: a guest's own guest leaves to KVM, which hands its exits on to the guest."""

from __future__ import annotations

import numpy as np
import pytest

import kvmbench as kb

ROUNDS = 40
# L1 makes a VMCB at 0x200000 that intercepts CPUID and HLT but no I/O, with L1's own paging, and runs L2, which makes
# CPUID and OUT in turn and halts. Offsets are those of AMD's manual, volume 2, appendix B.
SOURCE = """
start:
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x1000
    wrmsr
    mov ecx, 0xC0010117
    mov eax, 0x300000
    xor edx, edx
    wrmsr
    mov edi, 0x200000
    mov dword ptr [rdi+0xC], 0x01040000
    mov dword ptr [rdi+0x10], 3
    mov dword ptr [rdi+0x58], 1
    mov ebx, 0x400
segments:
    mov dword ptr [rdi+rbx], 0x0c930018
    mov dword ptr [rdi+rbx+4], 0xffffffff
    add ebx, 16
    cmp ebx, 0x440
    jne segments
    mov dword ptr [rdi+0x410], 0x0a9b0010
    mov rax, cr0
    mov [rdi+0x558], rax
    mov rax, cr4
    mov [rdi+0x548], rax
    mov ecx, 0xC0000080
    rdmsr
    mov [rdi+0x4D0], eax
    mov rax, cr3
    mov [rdi+0x550], rax
    mov dword ptr [rdi+0x560], 0x400
    mov dword ptr [rdi+0x568], 0xffff0ff0
    mov dword ptr [rdi+0x570], 2
    mov dword ptr [rdi+0x578], offset l2
    mov dword ptr [rdi+0x5D8], 0x400000
    mov esi, 1
enter_l2:
    mov rax, rdi
vmrun_here:
    .byte 0x0f, 0x01, 0xd8
    cmp dword ptr [rdi+0x70], 0x72
    jne finish
    add dword ptr [rdi+0x578], 2
    push rbx
save:
    mov eax, 0x201000
    .byte 0x0f, 0x01, 0xdb
own_cpuid:
    xor eax, eax
    cpuid
    pop rbx
    jmp enter_l2
finish:
    .byte 0x0f, 0x01, 0xdc
    mov eax, [rdi+0x70]
done:
    hlt
l2:
    mov ebp, 40
l2_loop:
    xor eax, eax
l2_cpuid:
    cpuid
    mov edx, 300
l2_spin:
    dec edx
    jnz l2_spin
    mov dx, 0x3f8
l2_out:
    out dx, al
    dec ebp
    jnz l2_loop
l2_halt:
    hlt
"""
CPUID, IO, HLT = 0x72, 0x7B, 0x78


@pytest.fixture
def nested(host):
    if host.info.module != "kvm_amd" or host.info.parameters.get("kvm_amd.nested", "1") not in ("1", "Y"):
        pytest.skip("the guest is for kvm_amd with nested=1")
    with kb.Machine(host, memory="16M") as m:
        m.load_asm(SOURCE, at=0x1000)
        with kb.trace(m) as t:
            stop = m.cpu.run(deadline_s=60)
        assert (stop.cause, m.cpu.regs.rax) == (kb.Cause.HALT, HLT)
        yield t


def test_exits_of_a_guest_s_guest_are_counted_and_told_from_its_own(nested):
    l2 = nested.events["kvm_nested_vmexit"]["exit_reason"]
    assert {number: int((l2 == number).sum()) for number in (CPUID, IO, HLT)} == {CPUID: ROUNDS, IO: ROUNDS, HLT: 1}
    handed_on = nested.events["kvm_nested_vmexit_inject"]["exit_code"]
    assert (handed_on == CPUID).sum() == ROUNDS
    assert not (handed_on == IO).any(), "L1 did not ask for I/O"
    # Each round: L2's CPUID, L1's own, L2's OUT; and VMRUN, which is an exit of L1's.
    exits = nested.exits
    counts = dict(zip(*np.unique(exits.number, return_counts=True), strict=True))
    assert counts[CPUID] == 2 * ROUNDS
    assert counts[IO] == ROUNDS
    (grown,) = nested.statistics
    assert len(exits) == grown["exits"]


def test_a_flame_chart_has_what_the_guest_did_for_its_guest_below_that_one_s_exit(nested):
    texts = [text.get_text() for text in kb.plot.exit_flame(nested)[0].axes.texts]
    assert any(text.startswith("L2") for text in texts), texts
