"""Names of VM exits: what ``exit_reason`` of the tracepoint kvm:kvm_exit means on VMX and on SVM.

The same number means different things on the two, so each event says in ``isa`` which it was (1 VMX, 2 SVM).
Names are the kernel's own, as its trace prints them: ``EPT_VIOLATION`` and ``IO_INSTRUCTION`` on VMX, ``npf`` and
``io`` on SVM. They come from three places; the first that knows a number wins:

1. the ``print fmt`` line in the event's format file, which is that of the kernel that wrote the events
   (`parse_reason_table`);
2. ``<asm/vmx.h>`` and ``<asm/svm.h>``, generated into `kvmbench.uapi.hardware_exits`;
3. `_NEWER` here, for names that came after those headers.

What else an event says is put into words by `kvmbench.traces.qualification`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from kvmbench.uapi.hardware_exits import SVM_EXIT_REASONS, VMX_EXIT_REASON_FLAGS, VMX_EXIT_REASONS

ISA_VMX = 1
ISA_SVM = 2

#: What `parse_reason_table` returns: isa to exit number to name.
ReasonTable = Mapping[int, Mapping[int, str]]

# Bits 15:0 of a VMX exit reason are the reason, those above say how it came (SDM volume 3, "Basic VM-Exit
# Information").
VMX_BASIC = 0xFFFF

# In Linux 6.18 and not in the headers of 6.1 (tests/unit/traces/formats/kvm_exit-6.18.txt).
_NEWER = {
    ISA_VMX: {77: "TDCALL", 84: "MSR_READ_IMM", 85: "MSR_WRITE_IMM"},
    ISA_SVM: {0xA5: "buslock", 0xA6: "idle-halt"},
}

_KNOWN: ReasonTable = {
    ISA_VMX: _NEWER[ISA_VMX] | VMX_EXIT_REASONS,
    ISA_SVM: _NEWER[ISA_SVM] | SVM_EXIT_REASONS,
}

# `(REC->isa == 1) ? __print_symbolic(..., {..}, ...) : __print_symbolic(..., {..}, ...)`; kernels that keep SVM's code
# in 64 bits print it with __print_symbolic_u64 or __print_symbolic64.
_CHOICE = re.compile(r"isa\s*==\s*(\d+)\)?\s*\?\s*(?=__print_symbolic)")
_LIST = re.compile(r"__print_symbolic\w*\(\s*(?:REC->)?exit_(?:reason|code)\b[^{}\"]*")
_PAIR = re.compile(r"\{\s*([^{},\"]+?)\s*,\s*\"((?:[^\"\\]|\\.)*)\"\s*\}\s*,?\s*")
_NUMBER = re.compile(r"([+-]?)\s*(0[xX][0-9a-fA-F]+|\d+)[uUlL]*\s*")


def reason_name(isa: int, reason: int, *, names: ReasonTable | None = None) -> str:
    """Names an exit as KVM's own trace does: ``EPT_VIOLATION``, ``npf``, ``INVALID_STATE FAILED_VMENTRY``.

    Args:
        isa: of the event: 1 VMX, 2 SVM.
        reason: ``exit_reason`` of the event, with its upper bits.
        names: names of the kernel that wrote the event, as `parse_reason_table` returns them.

    Returns:
        The name; after it, on VMX, the flags of the upper bits: as KVM prints them, or in hex. ``exit 0x1f3`` where
        the number has no name.
    """
    number = reason_number(isa, reason)
    name = (names or {}).get(isa, {}).get(number) or _KNOWN.get(isa, {}).get(number) or f"exit {number:#x}"
    if isa != ISA_VMX:
        return name
    flags = reason & 0xFFFFFFFF & ~VMX_BASIC
    words = [name]
    for bit, flag in VMX_EXIT_REASON_FLAGS.items():
        if flags & bit:
            words.append(flag)
            flags &= ~bit
    if flags:
        words.append(f"{flags:#x}")
    return " ".join(words)


def reason_number(isa: int, reason: int) -> int:
    """The part of an event's ``exit_reason`` that names the exit.

    VMX: bits 15:0. SVM: bits 31:0; the code is signed (-1: the processor refused the guest's state) and 32 or 64 bits
    wide in the event, depending on the kernel.
    """
    return reason & (VMX_BASIC if isa == ISA_VMX else 0xFFFFFFFF)


def parse_reason_table(print_format: str) -> dict[int, dict[int, str]]:
    """Takes KVM's own names of exits from a tracepoint's ``print fmt``.

    Args:
        print_format: that line, or the whole format file, of kvm:kvm_exit, kvm:kvm_nested_vmexit or
            kvm:kvm_nested_vmexit_inject.

    Returns:
        isa (1 VMX, 2 SVM) to exit number, as `reason_number` gives it, to name. Empty where the text has no such
        lists; an entry that is not understood is left out.
    """
    tables: dict[int, dict[int, str]] = {}
    for choice in _CHOICE.finditer(print_format):
        first = int(choice[1])
        if first not in (ISA_VMX, ISA_SVM):
            continue
        # The list right after the question mark is for that isa, the one after it for the other.
        position = choice.end()
        for isa in (first, ISA_VMX + ISA_SVM - first):
            start = _LIST.search(print_format, position)
            if start is None:
                break
            table, position = _pairs(print_format, start.end(), isa)
            if table:
                tables[isa] = table
        break
    return tables


def _pairs(text: str, position: int, isa: int) -> tuple[dict[int, str], int]:
    # The {number, "name"} pairs from `position` on, and where they end.
    table: dict[int, str] = {}
    while pair := _PAIR.match(text, position):
        value = _value(pair[1])
        if value is not None:
            table[reason_number(isa, value)] = pair[2]
        position = pair.end()
    return table, position


def _value(expression: str) -> int | None:
    # A number, or a sum of some (SVM's exceptions are `0x040 + 14`); None where it is more than that.
    position, value = 0, 0
    expression = expression.strip("() ")
    while position < len(expression):
        number = _NUMBER.match(expression, position)
        if number is None or (position and not number[1]):
            return None
        try:
            value += int(number[1] + number[2], 0)
        except ValueError:  # 010, which is octal in C
            return None
        position = number.end()
    return value
