"""KVM's exits around a step, and what else of its API a debugger asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from kvmbench.conformance.bare import DONE, HW_BP, Bare
from kvmbench.conformance.point import CannotTry, Layer, Topic
from kvmbench.conformance.points.kvm_steps import step_at
from kvmbench.host.channel import LocalChannel
from kvmbench.uapi import ffi

TOPIC = Topic("Exits and state, by KVM itself", Layer.KVM)
COMPLETION = "KVM API, struct kvm_run: KVM_EXIT_IO and KVM_EXIT_MMIO are complete after the next KVM_RUN"
MMIO_GPA = 0x4000_0000

_OUT = f"mov dx, 0x3f8\np_out: out dx, al\np_next: nop\np_end: nop\n{DONE}"
_IN = f"mov dx, 0x3fd\np_in: in al, dx\np_next: nop\np_end: nop\n{DONE}"
_WRITE = f"mov ebx, {MMIO_GPA:#x}\nm_write: mov [rbx], eax\nm_next: nop\nm_end: nop\n{DONE}"
_READ = f"mov ebx, {MMIO_GPA:#x}\nm_read: mov eax, [rbx]\nm_next: nop\nm_end: nop\n{DONE}"


def _through(host: Any, source: str, answer: bytes, **options: Any) -> Iterator[str]:
    """One step, one over the exit that follows, and one more."""
    with Bare(host, source, **options) as guest:
        yield from guest.steps(1)
        yield guest.step()
        told = guest.run(answer)
        yield told
        if told.startswith("#DB"):
            yield from guest.steps(1)
        if answer:
            yield f"eax {guest.regs.rax:#x}"


def _exit(name: str, what: str, source: str, label: str, told: str, answer: bytes = b"", **options: Any) -> None:
    def attempt(host: Any) -> Iterator[str]:
        return _through(host, source, answer, **options)

    prefix = label[0]
    seen = (f"eax {int.from_bytes(answer, 'little'):#x}",) if answer else ()
    TOPIC.add(
        f"exit.{name}",
        f"a step over {what} leaves with its exit, rip on it, and stops behind it when run on",
        (step_at(label), f"{told} at {label}", step_at(f"{prefix}_next"), step_at(f"{prefix}_end"), *seen),
        attempt,
        item=6,
        source=COMPLETION,
    )


_MAPPED: dict[str, Any] = {"mapped": [(MMIO_GPA, 0x20_0000)]}
_exit("out", "OUT", _OUT, "p_out", "OUT 0x3f8")
_exit("in", "IN", _IN, "p_in", "IN 0x3fd", b"\x5a")
_exit("mmio-write", "an MMIO write", _WRITE, "m_write", f"MMIO write {MMIO_GPA:#x}", **_MAPPED)
_exit("mmio-read", "an MMIO read", _READ, "m_read", f"MMIO read {MMIO_GPA:#x}", b"\x5a\0\0\0", **_MAPPED)


@TOPIC.point(
    "exit.saved-early",
    "registers saved at an OUT exit and put into another vcpu make the same OUT again",
    "OUT 0x3f8 at p_out",
    "OUT 0x3f8 at p_out",
    "done",
    item=6,
    source=COMPLETION,
)
def _saved_early(host: Any) -> Iterator[str]:
    with Bare(host, _OUT) as guest, Bare(host, _OUT) as other:
        yield guest.run()
        # The stop's, not KVM_GET_REGS: the core would complete nothing for it either.
        regs = ffi.new("struct kvm_regs *")
        ffi.memmove(regs, guest.regs, ffi.sizeof("struct kvm_regs"))
        other.vcpu.set_regs(regs)
        told = other.run()
        yield told
        if told != "done":
            yield other.run()


_HLT = f"nop\nh_hlt: hlt\nh_next: nop\nh_end: nop\n{DONE}"


@TOPIC.point(
    "exit.hlt",
    "a step over HLT brings KVM_EXIT_HLT",
    step_at("h_hlt"),
    "HLT at h_next",
    step_at("h_end"),
    item=7,
    source="KVM API, struct kvm_run, KVM_EXIT_HLT",
)
def _hlt(host: Any) -> Iterator[str]:
    with Bare(host, _HLT) as guest:
        for _ in range(3):
            yield guest.step()


@TOPIC.point(
    "exit.hlt-irqchip",
    "with controllers in the kernel a step over HLT stops behind it, as the trap wakes the processor",
    step_at("h_hlt"),
    step_at("h_next"),
    step_at("h_end"),
    item=7,
    source='SDM volume 2, "HLT": a debug exception resumes execution',
)
def _hlt_irqchip(host: Any) -> Iterator[str]:
    with Bare(host, _HLT, irqchip=True) as guest:
        yield from guest.steps(3)


@TOPIC.point(
    "mmio-watchpoint",
    "a data breakpoint on an address without memory stops after the access",
    f"MMIO write {MMIO_GPA:#x} at m_write",
    "#DB at m_next, dr6 0xffff0ff1",
    "done",
    item=12,
    source='SDM volume 3, "Data Memory and I/O Breakpoint Exception Conditions"',
)
def _mmio_watchpoint(host: Any) -> Iterator[str]:
    with Bare(host, _WRITE, **_MAPPED) as guest:
        guest.debug(HW_BP, [MMIO_GPA, 0, 0, 0, 0, 0, 0, 0x402 | (1 | 3 << 2) << 16])
        yield guest.run()
        told = guest.run()
        yield told
        if told.startswith("#DB"):
            yield guest.run()


@TOPIC.point(
    "translate",
    "KVM_TRANSLATE tells a page of user code that may only be read from others",
    "valid 1, writeable 0, usermode 1",
    item=14,
    source="KVM API, KVM_TRANSLATE",
)
def _translate(host: Any) -> Iterator[str]:
    with Bare(host, "nop\n", user=True) as guest:
        memory, table = guest.machine.memory, int(guest.vcpu.get_sregs().cr3)
        for _ in range(2):  # PML4 and PDPT, their first entries
            table = memory.read_u64(table) & 0x000F_FFFF_FFFF_F000
        entry = memory.read_u64(table)
        memory.write(table, (entry & ~2).to_bytes(8, "little"))
        found = guest.vcpu.translate(guest.program.entry)
        yield f"valid {found.valid}, writeable {found.writeable}, usermode {found.usermode}"


_PCID = f"""
        mov rax, cr4
        or eax, 1 << 17                # PCIDE
        mov cr4, rax
        mov rax, cr3
        or rax, 5
        bts rax, 63                    # do not flush
        mov cr3, rax
        mov rbx, cr3
{DONE}
"""


@TOPIC.point(
    "pcid",
    "CR3 as KVM_GET_SREGS shows it holds table and PCID, without the bit that asks for no flush",
    "done",
    "in the guest: table | 0x5",
    "KVM_GET_SREGS: table | 0x5",
    item=15,
    source='SDM volume 3, "Process-Context Identifiers (PCIDs)"',
)
def _pcid(host: Any) -> Iterator[str]:
    with Bare(host, _PCID) as guest:
        leaf = next(entry for entry in guest.vcpu.get_cpuid2().entries if entry.function == 1)
        if not leaf.ecx & 1 << 17:
            raise CannotTry("KVM_GET_SUPPORTED_CPUID has no PCID")
        table = int(guest.vcpu.get_sregs().cr3)
        yield guest.run()
        yield f"in the guest: table | {guest.regs.rbx ^ table:#x}"
        yield f"KVM_GET_SREGS: table | {guest.sregs.cr3 ^ table:#x}"


@TOPIC.point(
    "thread",
    "a vcpu made by one thread steps in another",
    step_at("p_out"),
    item=16,
    source='KVM API, "General description": vcpu ioctls should be issued from the thread that made the vcpu',
)
def _thread(host: Any) -> Iterator[str]:
    if not isinstance(host.core.channel, LocalChannel):
        raise CannotTry("the agent gives each vcpu a thread of its own, which makes all its ioctls")
    seen: list[str] = []
    with Bare(host, _OUT) as guest:
        worker = threading.Thread(target=lambda: seen.extend(guest.steps(1)))
        worker.start()
        worker.join()
    yield from seen
