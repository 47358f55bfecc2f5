"""What a VM exit says of itself, in words: exit qualification on VMX, EXITINFO on SVM.

The tracepoint kvm:kvm_exit has five fields for it, and what they hold depends on the event's ``isa`` (in Linux since
5.10; ``vmx_get_exit_info`` and ``svm_get_exit_info``):

============== ================================================ ==========================================
field          VMX                                              SVM
============== ================================================ ==========================================
``info1``      exit qualification                               EXITINFO1
``info2``      IDT-vectoring information: the event that was    EXITINFO2
               being delivered
``intr_info``  VM-exit interruption information: the event      EXITINTINFO bits 31:0: the event that was
               that made the exit                               being delivered
``error_code`` that event's                                     that event's
============== ================================================ ==========================================

So on SVM an exception's error code is in ``info1``, and on VMX the guest-physical address of an EPT violation is not in
the event at all: kvm:kvm_page_fault, right behind it, has it. An MSR's number is in the guest's ECX: see kvm:kvm_msr.

Sources: Intel SDM volume 3, "Basic VM-Exit Information" with its tables of exit qualifications, "Information for VM
Exits Due to Vectored Events" and "... That Occur During Event Delivery"; AMD APM volume 2, "SVM Intercept Exit Codes"
(appendix C) and the sections on intercepts, "Decode Assists" and "Nested Paging".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmbench.traces.hardware_exits import ISA_SVM, ISA_VMX, reason_number
from kvmbench.uapi.msrs import MSR_NAMES
from kvmbench.uapi.vectors import vector_name

_REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip

# Interruption information and EXITINTINFO have one layout: vector 7:0, type 10:8, error code valid 11, valid 31.
_VALID = 1 << 31
_HAS_ERROR_CODE = 1 << 11

_PAGE_FAULT = 14
_DOUBLE_FAULT = 8
# Their error code names a segment or a gate.
_SELECTOR_FAULTS = (10, 11, 12, 13)
_WITH_ERROR_CODE = (_DOUBLE_FAULT, *_SELECTOR_FAULTS, _PAGE_FAULT, 17, 21, 29, 30)


def describe_exit(isa: int, reason: int, info1: int, info2: int, intr_info: int, error_code: int) -> str:
    """Puts into words what an exit says beyond its name: ``out 1 byte to port 0x3f8``.

    Never raises for what hardware or another kernel may have written: a reason without further facts, or one that is
    not known here, gives only what every exit may have (the event that was being delivered).

    Args:
        isa: of the event kvm:kvm_exit: 1 VMX, 2 SVM.
        reason: its ``exit_reason``.
        info1: its ``info1``.
        info2: its ``info2``.
        intr_info: its ``intr_info``.
        error_code: its ``error_code``.

    Returns:
        One line, facts separated by commas; empty where there is none.
    """
    number = reason_number(isa, reason)
    if isa == ISA_VMX:
        words = _vmx_flags(reason)
        words += _VMX[number](info1, info2, intr_info, error_code) if number in _VMX else []
        if info2 & _VALID:
            words.append(f"while delivering {_event(info2)}")
        return ", ".join(words)
    if isa == ISA_SVM:
        words = _svm(number, info1, info2)
        if intr_info & _VALID:
            code = f" with {_error_code(intr_info & 0xFF, error_code)}" if intr_info & _HAS_ERROR_CODE else ""
            words.append(f"while delivering {_event(intr_info)}{code}")
        return ", ".join(words)
    return ""


def describe_msr(number: int) -> str:
    """Names an MSR with its number: ``IA32_EFER (0xc0000080)``; the number alone where it has no name."""
    return f"{MSR_NAMES[number]} ({number:#x})" if number in MSR_NAMES else f"{number:#x}"


def describe_page_fault_error(code: int) -> str:
    """Puts a page fault's error code into words: ``user write, not present``.

    Takes #PF's code, that of a nested page fault (EXITINFO1), and the one in kvm:kvm_page_fault, which has the same
    layout on SVM and with shadow paging; with EPT that event holds the exit qualification (`describe_ept_violation`).
    """
    access = "fetch" if code & 1 << 4 else "write" if code & 1 << 1 else "read"
    if code >> 32 & 3:
        # Nested: bit 2 is always set, whatever the guest's privilege, as a nested walk counts as a user's.
        words = [f"{access} {'of the final address' if code >> 32 & 1 else 'during the page walk'}"]
    else:
        words = [f"{'user' if code & 1 << 2 else 'supervisor'} {access}"]
    words.append("access not allowed" if code & 1 else "not present")
    words += _bits(code, {
        3: "reserved bit set", 5: "protection key", 6: "shadow stack", 7: "HLAT paging", 15: "SGX", 31: "RMP check",
        34: "encrypted page", 35: "RMP size mismatch", 36: "VMPL check", 37: "supervisor shadow stack",
    })  # fmt: skip
    return ", ".join(words)


def describe_ept_violation(qualification: int) -> str:
    """Puts the exit qualification of an EPT violation into words: ``write of the final address, not present``."""
    kinds = [word for bit, word in enumerate(("read", "write", "fetch")) if qualification & 1 << bit]
    words = [" and ".join(kinds) or "access"]
    if qualification & 1 << 7:
        # A walk reads the guest's tables; where EPT has accessed and dirty bits, it counts as writing them too.
        words[0] += " of the final address" if qualification & 1 << 8 else " during the page walk"
    else:
        words[0] += " without a linear address"
    allowed = [word for bit, word in ((3, "read"), (4, "write"), (5, "fetch")) if qualification & 1 << bit]
    words.append(f"EPT allows {' and '.join(allowed)}" if allowed else "not present")
    if qualification & 3 << 7 == 3 << 7:
        # 11:9 describe the guest's translation; zero on processors that do not report it.
        words += _bits(qualification, {9: "user address", 10: "writable in the guest", 11: "no-execute in the guest"})
    return ", ".join(
        words + _bits(qualification, {12: "NMIs unblocked by IRET", 13: "shadow stack", 16: "asynchronous"})
    )


def _bits(value: int, names: dict[int, str]) -> list[str]:
    return [name for bit, name in names.items() if value >> bit & 1]


def _event(info: int) -> str:
    vector, kind = info & 0xFF, info >> 8 & 7
    match kind:
        case 0:
            return f"interrupt {vector}"
        case 2:
            return "NMI"
        case 4:
            return f"software interrupt {vector:#x}"
        case 5:
            return "INT1"
        case 6:
            return f"software exception {vector_name(vector)}"
        case 7:
            return f"event {vector}"
        case _:
            return f"vector {vector_name(vector)}"


def _error_code(vector: int, code: int) -> str:
    if vector == _PAGE_FAULT:
        return f"error code {code:#x} ({describe_page_fault_error(code)})"
    if vector in _SELECTOR_FAULTS and code:
        # SDM volume 3, "Error Code": EXT 0, IDT 1, TI 2, index 15:3.
        index = code >> 3 & 0x1FFF
        table = f"IDT vector {index}" if code & 2 else f"{'LDT' if code & 4 else 'GDT'} selector {code & 0xFFF8:#x}"
        return f"error code {code:#x} ({table}{', external event' if code & 1 else ''})"
    return f"error code {code:#x}"


def _exception(vector: int, code: int | None, address: int) -> list[str]:
    words = [f"vector {vector_name(vector)}"]
    if code is not None:
        words.append(_error_code(vector, code))
    if vector == _PAGE_FAULT:
        words.append(f"address {address:#x}")
    return words


def _io(port: int, size: int, is_in: bool, is_string: bool, is_repeated: bool) -> list[str]:
    amount = f"{size} byte" if size == 1 else f"{size} bytes"
    words = [f"in {amount} from port {port:#x}" if is_in else f"out {amount} to port {port:#x}"]
    return words + ["string instruction"] * is_string + ["repeated"] * is_repeated


def _move(target: str, register: int | None, *, to: bool) -> list[str]:
    name = "" if register is None else f" {'from' if to else 'to'} {_REGISTERS[register & 15]}"
    return [f"mov {'to' if to else 'from'} {target}{name}"]


def _apic_register(offset: int) -> str:
    # The x2APIC's MSRs are the registers of the page, 16 bytes each; two have no MSR.
    name = MSR_NAMES.get(0x800 + (offset >> 4), "").removeprefix("IA32_X2APIC_")
    name = name or {0xE0: "DFR", 0x310: "ICR2"}.get(offset & ~0xF, "")
    return f"APIC register {offset:#x}" + (f" ({name})" if name else "")


def _task_switch(selector: int, source: str) -> list[str]:
    return [f"{source} to TSS selector {selector & 0xFFFF:#x}"]


# VMX: basic exit reason to a function of (exit qualification, IDT-vectoring information, interruption information,
# error code). Reasons that are missing have no qualification.

_Words = Callable[[int, int, int, int], list[str]]


def _vmx_flags(reason: int) -> list[str]:
    words = {
        25: "shadow stack left busy", 26: "bus lock", 27: "in an enclave", 28: "MTF exit pending",
        29: "from VMX root operation", 31: "entry failed",
    }  # fmt: skip
    return _bits(reason & 0xFFFFFFFF, words)


def _vmx_exception(qualification: int, vectoring: int, info: int, code: int) -> list[str]:
    if not info & _VALID:
        return []
    vector, kind = info & 0xFF, info >> 8 & 7
    if kind == 2:
        return ["NMI"]
    words = _exception(vector, code if info & _HAS_ERROR_CODE else None, qualification)
    if vector == 1:
        # As in DR6, but for these bits every one says what happened by being set.
        words += [f"breakpoint {slot} met" for slot in range(4) if qualification >> slot & 1]
        words += _bits(qualification, {11: "bus lock", 13: "debug register access", 14: "single step", 16: "RTM"})
    # Bit 12 is not defined for #DF, nor while another event is delivered.
    if info & 1 << 12 and vector != _DOUBLE_FAULT and not vectoring & _VALID:
        words.append("NMIs unblocked by IRET")
    return words


def _vmx_interrupt(_qualification: int, _vectoring: int, info: int, _code: int) -> list[str]:
    # The vector is the host's: the interrupt has nothing to do with the guest.
    return [f"host interrupt {info & 0xFF}"] if info & _VALID else []


def _vmx_control_register(qualification: int) -> list[str]:
    number, kind = qualification & 0xF, qualification >> 4 & 3
    if kind < 2:
        return _move(f"cr{number}", qualification >> 8, to=kind == 0)
    if kind == 2:
        return ["clts"]
    operand = "memory" if qualification & 1 << 6 else "a register"
    return [f"lmsw {qualification >> 16 & 0xFFFF:#x} from {operand}"]


def _vmx_debug_register(qualification: int) -> list[str]:
    return _move(f"dr{qualification & 7}", qualification >> 8, to=not qualification & 1 << 4)


def _vmx_io(qualification: int) -> list[str]:
    flags = (bool(qualification & 1 << bit) for bit in (3, 4, 5))
    return _io(qualification >> 16 & 0xFFFF, (qualification & 7) + 1, *flags)


def _vmx_task_switch(qualification: int) -> list[str]:
    return _task_switch(qualification, ("CALL", "IRET", "JMP", "task gate")[qualification >> 30 & 3])


def _vmx_apic_access(qualification: int) -> list[str]:
    kind = qualification >> 12 & 0xF
    linear = ("read", "write", "fetch", "access during event delivery", "monitoring")
    if kind < len(linear):
        return [f"{linear[kind]} of {_apic_register(qualification & 0xFFF)}"]
    physical = {10: "event delivery", 11: "monitoring", 15: "an instruction"}
    # The offset is not defined here.
    return [f"guest-physical access during {physical[kind]}"] if kind in physical else []


def _vmx_invalid_state(qualification: int) -> list[str]:
    reasons = {2: "PDPTEs not valid", 3: "NMI in the shadow of STI", 4: "VMCS link pointer not valid"}
    return [reasons[qualification]] if qualification in reasons else []


def _vmx_displacement(qualification: int) -> list[str]:
    value = qualification - (1 << 64) if qualification >> 63 & 1 else qualification
    return [f"displacement {value:#x}"] if value else []


def _of(words: Callable[[int], Sequence[str]]) -> _Words:
    # For the many that need the qualification alone.
    return lambda qualification, _vectoring, _info, _code: list(words(qualification))


_VMX: dict[int, _Words] = {
    0: _vmx_exception,
    1: _vmx_interrupt,
    4: _of(lambda qualification: [f"vector {qualification & 0xFF:#x}"]),
    9: _of(_vmx_task_switch),
    14: _of(lambda qualification: [f"address {qualification:#x}"]),
    28: _of(_vmx_control_register),
    29: _of(_vmx_debug_register),
    30: _of(_vmx_io),
    31: _of(lambda _: ["read of an MSR"]),
    32: _of(lambda _: ["write of an MSR"]),
    33: _of(_vmx_invalid_state),
    34: _of(lambda qualification: [f"entry {qualification} of the MSR list"]),
    36: _of(lambda qualification: ["monitor armed" if qualification & 1 else "monitor not armed"]),
    44: _of(_vmx_apic_access),
    45: _of(lambda qualification: [f"vector {qualification & 0xFF}"]),
    48: _of(lambda qualification: [describe_ept_violation(qualification)]),
    56: _of(lambda qualification: [f"write of {_apic_register(qualification & 0xFFF)}"]),
    75: _of(lambda qualification: ["VM context not valid"] if qualification & 1 else []),
    84: _of(lambda qualification: [f"read of {describe_msr(qualification & 0xFFFFFFFF)}"]),
    85: _of(lambda qualification: [f"write of {describe_msr(qualification & 0xFFFFFFFF)}"]),
}
# VMCLEAR, VMPTRLD, VMPTRST, VMREAD, VMWRITE, VMXON, LGDT and the like, LLDT and the like, INVEPT, INVVPID, INVPCID,
# XSAVES, XRSTORS: the displacement of their operand, zero without one.
_VMX |= {number: _of(_vmx_displacement) for number in (19, 21, 22, 23, 25, 27, 46, 47, 50, 53, 58, 63, 64)}


# SVM. What only processors with decode assists fill in is zero on others, and said only where it is not.


def _svm(number: int, info1: int, info2: int) -> list[str]:
    if number < 0x20:
        to = number >= 0x10
        return _svm_control_register(f"cr{number & 0xF}", info1, to=to)
    if number < 0x40:
        return _move(f"dr{number & 0xF}", info1 & 0xF or None, to=number >= 0x30)
    if number < 0x60:
        vector = number - 0x40
        return _exception(vector, info1 if vector in _WITH_ERROR_CODE else None, info2)
    if 0x90 <= number < 0xA0:
        return [f"cr{number & 0xF} becomes {info1:#x}"]
    return _SVM[number](info1, info2) if number in _SVM else []


def _svm_control_register(name: str, info1: int, *, to: bool) -> list[str]:
    # Bit 63: a MOV, whose register is in 3:0. Without it CLTS, LMSW or SMSW, or a processor that does not say.
    if info1 >> 63 & 1:
        return _move(name, info1 & 0xF, to=to)
    return [f"{'write' if to else 'read'} of {name}"]


def _svm_io(info1: int, _info2: int) -> list[str]:
    # Bit 0 type (1 IN), 2 string, 3 repeated, 6:4 size, 31:16 port.
    flags = (bool(info1 & 1 << bit) for bit in (0, 2, 3))
    return _io(info1 >> 16 & 0xFFFF, info1 >> 4 & 7, *flags)


def _svm_task_switch(info1: int, info2: int) -> list[str]:
    # A CALL and a task gate differ only in EXITINTINFO, which describe_exit() puts into words behind this.
    source = "IRET" if info2 >> 36 & 1 else "JMP" if info2 >> 38 & 1 else "CALL or task gate"
    words = _task_switch(info1, source)
    return [*words, f"error code {info2 & 0xFFFFFFFF:#x}"] if info2 >> 44 & 1 else words


def _svm_incomplete_ipi(info1: int, info2: int) -> list[str]:
    reasons = (
        "kind of interrupt not handled", "target not running", "target not valid", "backing page not valid",
        "vector not valid",
    )  # fmt: skip
    identifier = info2 >> 32
    words = [reasons[identifier]] if identifier < len(reasons) else []
    return [*words, f"ICR {info1:#x}"]


def _svm_apic_access(info1: int, info2: int) -> list[str]:
    offset = info1 & 0xFF0
    words = [f"{'write' if info1 >> 32 & 1 else 'read'} of {_apic_register(offset)}"]
    return [*words, f"vector {info2 & 0xFF}"] if offset == 0xB0 else words


def _address(info1: int, _info2: int) -> list[str]:
    return [f"address {info1:#x}"] if info1 else []


_SVM: dict[int, Callable[[int, int], list[str]]] = {
    0x65: lambda info1, _: _svm_control_register("cr0", info1, to=True),
    0x75: lambda info1, _: [f"int {info1 & 0xFF:#x}"] if info1 else [],
    0x79: _address,
    0x7B: _svm_io,
    0x7C: lambda info1, _: ["write of an MSR" if info1 & 1 else "read of an MSR"],
    0x7D: _svm_task_switch,
    0x8F: lambda info1, _: [f"efer becomes {info1:#x}"],
    0xA2: lambda info1, info2: [f"type {info2}", f"descriptor at {info1:#x}"],
    0x400: lambda info1, info2: [describe_page_fault_error(info1), f"gpa {info2:#x}"],
    0x401: _svm_incomplete_ipi,
    0x402: _svm_apic_access,
    0x80000001: lambda info1, info2: [f"gpa {info1:#x}", f"{info2} bytes"],
    0x80000002: lambda info1, info2: [f"gpa {info1:#x}", f"{info2} bytes"],
}
