"""The paging state of a vcpu, asked of KVM: registers, CPUID, MSRs, PKRU and the PDPTEs of PAE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from kvmbench.arguments import integer
from kvmbench.errors import AddressError, BusyError, UnsupportedError
from kvmbench.kvm import VCPU
from kvmbench.machine.memory import Memory
from kvmbench.mmu.paging import PAGE_BYTES, Paging, Processor, root_of
from kvmbench.uapi import Capability, constants, ffi

_IA32_PAT, _IA32_PKRS = 0x277, 0x6E1
_XSTATE_BV, _PKRU_COMPONENT = 512, 9
# Of vcpus that have run: KVM_SET_CPUID2 takes no other answers then.
_PROCESSORS: WeakKeyDictionary[VCPU, Processor] = WeakKeyDictionary()


def paging_of(cpu: Any, cr3: int | None = None) -> Paging:
    """The state of a `kvmbench.debug.cpu.Cpu` (that package stands on this one), or with another CR3.

    Raises:
        BusyError: the vcpu is running.
        AddressError: the table that `cr3` names is not memory.
    """
    if cpu.running and not cpu.engine.is_under_way():
        raise BusyError(f"vcpu {cpu.index} is running; cpu.interrupt() stops it")
    if cr3 is not None:
        cr3 = integer(cr3, "cr3", 0, (1 << 64) - 1)
    processor = _PROCESSORS.get(cpu.vcpu)
    if processor is None:
        processor = read_processor(cpu.vcpu)
        if cpu.last_stop is not None:
            _PROCESSORS[cpu.vcpu] = processor
    # No frame that may raise holds these structs: cffi 2.1 crashes when what `from_buffer` made of a memoryview is in a
    # traceback that the garbage collector takes.
    state, cpl = cpu.state, cpu.mode.cpl
    now = Paging.from_kvm(state.get_sregs(), processor, rflags=int(state.get_regs().rflags), cpl=cpl)
    # APM volume 2, "Legacy PAE Mode" under nested paging: PDPTEs are read at each walk, and are in no registers. What
    # KVM_GET_SREGS2 tells is KVM's copy then (test_pdptes_are_those_that_the_processor_uses_...).
    kept = cpu.machine.host.info.parameters.get("kvm_amd.npt") not in ("Y", "1")
    return read_paging(cpu.vcpu, cpu.machine.memory, now, cr3=cr3, kept=kept)


def read_processor(vcpu: VCPU) -> Processor:
    """Asks KVM what CPUID says in a vcpu."""
    answers = vcpu.get_cpuid2()
    return Processor.from_cpuid(answers.entries[0 : answers.nent])


def read_paging(vcpu: VCPU, memory: Memory, now: Paging, *, cr3: int | None = None, kept: bool = True) -> Paging:
    """Adds what special registers do not tell: MSRs, PKRU and PDPTEs; of another address space, if `cr3` names one.

    Args:
        now: what they tell.
        kept: the processor keeps the PDPTEs of PAE in registers.

    Raises:
        AddressError: the table that `cr3` names is not memory.
    """
    if now.mode == "off":
        return now
    more: dict[str, Any] = {"pkru": _pkru(vcpu, now.processor) if now.pke else 0, **_msrs(vcpu, now)}
    if cr3 is not None:
        root = root_of(now.mode, cr3)
        if not memory.holds(root, 32 if now.mode == "PAE" else PAGE_BYTES):
            there = ", ".join(str(region) for region in memory.regions[:3])
            raise AddressError(f"cr3={cr3:#x}: its table at gpa {root:#x} is not guest memory; there is {there}")
    if now.mode == "PAE":
        more["pdptes_kept"] = kept
        more |= _pdptes(vcpu, memory, now.root if cr3 is None else root_of(now.mode, cr3), kept=kept and cr3 is None)
    return replace(now, cr3=now.cr3 if cr3 is None else cr3, **more)


def _msrs(vcpu: VCPU, paging: Paging) -> dict[str, Any]:
    wanted = {"pat": _IA32_PAT, **({"pkrs": _IA32_PKRS} if paging.pks else {})}
    try:
        values = vcpu.get_msrs(wanted.values())
    except UnsupportedError:
        return {}
    return {name: values[index] for name, index in wanted.items()}


def _pkru(vcpu: VCPU, processor: Processor) -> int:
    if processor.pkru_offset is None:
        return 0
    area = bytes(ffi.buffer(vcpu.get_xsave().region))
    # A component whose bit is clear is in its initial state: no key forbids anything.
    if not int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little") >> _PKRU_COMPONENT & 1:
        return 0
    return int.from_bytes(area[processor.pkru_offset : processor.pkru_offset + 4], "little")


def _pdptes(vcpu: VCPU, memory: Memory, root: int, *, kept: bool) -> dict[str, Any]:
    # From the last MOV to CR3 on.
    if kept and vcpu.vm.check_extension(Capability.SREGS2):
        state = vcpu.get_sregs2()
        if int(state.flags) & constants.KVM_SREGS2_FLAGS_PDPTRS_VALID:
            return {"pdptes": tuple(int(one) for one in state.pdptrs), "pdptes_from": "registers"}
    if not memory.holds(root, 32):
        return {"pdptes": (), "pdptes_from": "memory"}
    data = memory.read(root, 32)
    return {
        "pdptes": tuple(int.from_bytes(data[at : at + 8], "little") for at in range(0, 32, 8)),
        "pdptes_from": "memory",
    }
