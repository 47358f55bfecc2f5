"""What an event's text says: the fields of KVM's events, as kernels from 4.x to 6.x and trace-cmd print them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache

from kvmbench.traces.hardware_exits import ISA_SVM, ISA_VMX, VMX_BASIC, reason_name
from kvmbench.uapi.hardware_exits import VMX_EXIT_REASON_FLAGS

#: Fields by name; of text that is not understood there is none.
Values = Mapping[str, int]
#: Names of exits that no table here has get numbers from here on.
FIRST_UNKNOWN = 0xF000

_HEX = r"(?:0x)?([0-9a-f]{1,16})\b"
_EXIT = re.compile(
    rf"(?:vcpu (\d{{1,9}}),? )?reason (\S.{{0,200}}?) rip {_HEX}(?: info1? {_HEX}(?: info2)? {_HEX})?"
    rf"(?: intr_info {_HEX})?(?: error_code {_HEX})?(?: requests {_HEX})?"
)
_ENTRY = re.compile(rf"vcpu (\d{{1,9}})(?:,? rip {_HEX})?(?: intr_info {_HEX})?(?: error_code {_HEX})?")
_PIO = re.compile(rf"pio_(read|write) at {_HEX} size (\d{{1,9}}) count (\d{{1,9}})(?: val {_HEX})?")
_MMIO = re.compile(rf"mmio (unsatisfied-read|read|write) len (\d{{1,9}}) gpa {_HEX} val {_HEX}")
_MSR = re.compile(rf"msr_(read|write) {_HEX} = {_HEX}( \(#GP\))?")
_USERSPACE = re.compile(r"reason (\S+) \((-?\d{1,9})\)")
_PAGE_FAULT = re.compile(rf"(?:vcpu (\d{{1,9}}) )?(?:rip {_HEX} )?address {_HEX} error_code {_HEX}")
_PAIRS = re.compile(r"(?:[A-Za-z_]\w*=(?:0x[0-9a-fA-F]{1,16}|-?\d{1,19})(?:\s+|$))+")
_PAIR = re.compile(r"(\w+)=(\S+)")
_UNKNOWN = re.compile(r"(?:unknown )?\(?(0x[0-9a-f]{1,16}|\d{1,9})\)?$", re.IGNORECASE)

# Names that differ from the kernel's of today: older kernels' and those of trace-cmd's own tables, which are the macros
# of <asm/svm.h>.
_OLDER_VMX = {"PENDING_INTERRUPT": 7, "ACCESS_GDTR_OR_IDTR": 46, "ACCESS_LDTR_OR_TR": 47, "VMX_PREEMPTION_TIMER": 52}
_OTHER_SVM = {
    "ioio": "io", "intr": "interrupt", "vmmcall": "hypercall", "err": "invalid_guest_state",
    "idtr_read": "read_idtr", "gdtr_read": "read_gdtr", "ldtr_read": "read_ldtr", "tr_read": "read_rt",
    "idtr_write": "write_idtr", "gdtr_write": "write_gdtr", "ldtr_write": "write_ldtr", "tr_write": "write_rt",
}  # fmt: skip
_FLAGS = {name: bit for bit, name in VMX_EXIT_REASON_FLAGS.items()}


@cache
def _numbers() -> dict[str, tuple[int, int]]:
    # Name to (isa, number), of all that reason_name() has.
    numbers: dict[str, tuple[int, int]] = {}
    places = {
        ISA_VMX: range(0x80),
        ISA_SVM: (*range(0x100), *range(0x400, 0x410), *range(0x8000_0000, 0x8001_0000), 0xFFFF_FFFF),
    }
    for isa, several in places.items():
        for number in several:
            if not (name := reason_name(isa, number)).startswith("exit "):
                numbers.setdefault(name, (isa, number))
    numbers |= {name: (ISA_VMX, number) for name, number in _OLDER_VMX.items()}
    return numbers


class Reasons:
    """Names of exits back into isa and number; names that no table has are kept.

    Attributes:
        unknown: by isa, those names and the numbers they were given.
    """

    def __init__(self) -> None:
        self.unknown: dict[int, dict[str, int]] = {ISA_VMX: {}, ISA_SVM: {}}
        self._isa = ISA_VMX
        self._found: dict[str, tuple[int, int]] = {}

    def __call__(self, name: str) -> tuple[int, int]:
        """(isa, number) of a name such as "EPT_VIOLATION", "npf", "EXIT_NPF", "INVALID_STATE FAILED_VMENTRY"."""
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = self._find(name)
        self._isa = found[0]
        return found

    def _find(self, name: str) -> tuple[int, int]:
        known = _numbers()
        plain = name.removeprefix("EXIT_").lower() if name.startswith("EXIT_") else name
        if found := known.get(plain) or known.get(_OTHER_SVM.get(plain, "")):
            return found
        words, flags = name.split(), 0
        while len(words) > 1 and words[-1] in _FLAGS:
            flags |= _FLAGS[words.pop()]
        if flags and (found := known.get(" ".join(words))):
            return found[0], found[1] | flags
        if number := _UNKNOWN.match(name):
            # A number says nothing of whose it is: as the exits before it.
            text = number[1].lower()
            return self._isa, int(text, 16 if text.startswith("0x") else 10) & 0xFFFF_FFFF
        isa = ISA_VMX if name == name.upper() and not name.startswith("EXIT_") else ISA_SVM
        names = self.unknown[isa]
        names.setdefault(name, min(FIRST_UNKNOWN + len(names), VMX_BASIC))
        return isa, names[name]

    def print_format(self) -> str:
        """The names that no table has, as a format file would have them: `parse_reason_table` reads it."""
        if not any(self.unknown.values()):
            return ""

        def table(isa: int) -> str:
            pairs = ", ".join(f'{{ {n:#x}, "{_quoted(name)}" }}' for name, n in self.unknown[isa].items())
            return f"__print_symbolic(REC->exit_reason, {pairs})"

        return f"(REC->isa == {ISA_VMX}) ? {table(ISA_VMX)} : {table(ISA_SVM)}"


def _quoted(name: str) -> str:
    return name.replace("\\", "/").replace('"', "'")


def _of(names: tuple[str, ...], groups: tuple[str | None, ...], base: int = 16) -> dict[str, int]:
    return {name: int(text, base) for name, text in zip(names, groups, strict=True) if text is not None}


def _exit(text: str, reasons: Reasons) -> Values | None:
    found = _EXIT.match(text)
    if found is None:
        return None
    isa, number = reasons(found[2])
    values = {"exit_reason": number, "isa": isa}
    if found[1] is not None:
        values["vcpu_id"] = int(found[1])
    names = ("guest_rip", "info1", "info2", "intr_info", "error_code", "requests")
    return values | _of(names, found.groups()[2:])


def _entry(text: str, _: Reasons) -> Values | None:
    found = _ENTRY.match(text)
    if found is None:
        return None
    return {"vcpu_id": int(found[1])} | _of(("rip", "intr_info", "error_code"), found.groups()[1:])


def _pio(text: str, _: Reasons) -> Values | None:
    found = _PIO.match(text)
    if found is None:
        return None
    values = {"rw": int(found[1] == "write"), "port": int(found[2], 16), "size": int(found[3]), "count": int(found[4])}
    return values | _of(("val",), (found[5],))


def _mmio(text: str, _: Reasons) -> Values | None:
    found = _MMIO.match(text)
    if found is None:
        return None
    kind = ("unsatisfied-read", "read", "write").index(found[1])
    return {"type": kind, "len": int(found[2]), "gpa": int(found[3], 16), "val": int(found[4], 16)}


def _msr(text: str, _: Reasons) -> Values | None:
    found = _MSR.match(text)
    if found is None:
        return None
    exception = int(found[4] is not None)
    values = {"write": int(found[1] == "write"), "ecx": int(found[2], 16), "data": int(found[3], 16)}
    return values | {"exception": exception}


def _userspace(text: str, _: Reasons) -> Values | None:
    found = _USERSPACE.match(text)
    if found is None:
        return None
    # "restart (4)" and "error (14)": KVM_RUN failed, and the number is errno.
    if found[1] in ("restart", "error"):
        return {"reason": 0, "errno": -abs(int(found[2]))}
    return {"reason": int(found[2]) & 0xFFFF_FFFF, "errno": 0}


def _page_fault(text: str, _: Reasons) -> Values | None:
    found = _PAGE_FAULT.match(text)
    if found is None:
        return None
    values = {} if found[1] is None else {"vcpu_id": int(found[1])}
    return values | _of(("guest_rip", "fault_address", "error_code"), found.groups()[1:])


_PARSERS: dict[str, Callable[[str, Reasons], Values | None]] = {
    "kvm_exit": _exit,
    "kvm_entry": _entry,
    "kvm_pio": _pio,
    "kvm_mmio": _mmio,
    "kvm_msr": _msr,
    "kvm_userspace_exit": _userspace,
    "kvm_page_fault": _page_fault,
}


def values_of(event: str, text: str, reasons: Reasons) -> Values | None:
    """The fields of an event.

    Args:
        event: its name, "kvm_exit".
        text: what is printed behind the name.
        reasons: gives names of exits their numbers.

    Returns:
        The fields that the text tells; none where only the text itself is kept; None where the event is one of those
        that are understood and the text is not.
    """
    parse = _PARSERS.get(event)
    if parse is not None and (values := parse(text, reasons)) is not None:
        return values
    if "=" in text and _PAIRS.fullmatch(text):
        # trace-cmd report -R, perf script of kernels without a printer: "vcpu_id=0 rip=0x1000".
        pairs = {name: int(value, 0) for name, value in _PAIR.findall(text) if not _is_octal(value)}
        is_whole = event != "kvm_exit" or {"exit_reason", "isa"} <= pairs.keys()
        if is_whole and all(-(1 << 63) <= value < 1 << 64 for value in pairs.values()):
            return pairs
    return {} if parse is None else None


def _is_octal(value: str) -> bool:
    return len(value) > 1 and value[0] == "0" and value[1] != "x"
