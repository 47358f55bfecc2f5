"""`Registers`: every register of a vcpu, decoded, what changed marked, editable.

Registers that come with a stop cost nothing to show. Debug registers, MSRs and
vector registers cost an ioctl each, so they are asked for only while their
section is unfolded.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import traitlets

from kvmbench.debug.control import CONTROL_CLASSES
from kvmbench.debug.debug_registers import Dr6, Dr7
from kvmbench.debug.flags import Flags, NamedBits
from kvmbench.debug.register_file import RegisterFile
from kvmbench.debug.register_table import GENERAL, SEGMENTS, TABLES
from kvmbench.errors import KvmbenchError, MisuseError
from kvmbench.kvm import System
from kvmbench.uapi import constants as c
from kvmbench.uapi import ffi
from kvmbench.uapi.msrs import msr_name
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.panel import Panel, action

#: In the order they are shown; the first four are unfolded at first.
SECTIONS = ("general", "flags", "segments", "control", "debug", "msrs", "vector")

# MSRs that software sets or that tell why it runs as it does; those KVM refuses here are left out.
_MSRS = (
    0x10, 0x1B, 0x3A, 0x3B, 0x174, 0x175, 0x176, 0x1A0, 0x1D9, 0x277, 0x6E0,
    0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103,
    c.MSR_KVM_WALL_CLOCK_NEW, c.MSR_KVM_SYSTEM_TIME_NEW,
)  # fmt: skip
_DEBUG = ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
# Where xmm registers and the upper halves of the ymm registers are in the standard format of the XSAVE area, and
# what says that they are there (SDM volume 1, "XSAVE Area"; bits of XCR0 and XSTATE_BV).
_XMM_AT, _XSTATE_BV_AT, _YMM_HIGH_AT = 160, 512, 576
_SSE, _AVX, _AVX512 = 1 << 1, 1 << 2, 7 << 5
_VECTOR = re.compile(r"([xy]mm)([0-9]|1[0-5])")
_BITS: dict[str, type[NamedBits]] = {**CONTROL_CLASSES, "rflags": Flags, "dr6": Dr6, "dr7": Dr7}


class Registers(Panel):
    """The registers of a vcpu: ``kw.Registers(cpu)``.

    Attributes:
        sections: which sections are unfolded, of `SECTIONS`.
    """

    MODULE = "registers"
    TITLE = "Registers"
    THEIRS: ClassVar[frozenset[str]] = frozenset({"sections"})

    sections = traitlets.List(traitlets.Enum(SECTIONS), list(SECTIONS[:4])).tag(sync=True)

    # Values at the stop shown before, of what does not come with a stop: section to (serial, now, before).
    _kept: dict[str, Any]

    def __init__(self, target: Any, **traits: Any) -> None:
        self._kept = {}
        super().__init__(target, **traits)
        self.observe(lambda _: self.refresh(), "sections")

    def make_view(self) -> dict[str, Any]:
        cpu = self.cpu
        source = cpu.state
        now = RegisterFile.from_kvm(source.get_regs(), source.get_sregs())
        before = source.get_previous() or now
        mode = now.mode
        paging = "" if mode.paging == "off" else f", {mode.paging} paging"
        rows = {
            "general": [_integer(name, getattr(now, name), getattr(before, name)) for name in (*GENERAL, "rip")],
            "flags": [_integer("rflags", now.rflags, before.rflags)],
            "segments": [_described(name, getattr(now, name), getattr(before, name)) for name in (*SEGMENTS, *TABLES)],
            "control": [_integer(name, getattr(now, name), getattr(before, name)) for name in CONTROL_CLASSES],
        }
        linear = mode.linear(now.rip)
        rows["general"][-1]["remark"] = cpu.symbols.label(linear)
        for section, read in (("debug", self._debug), ("msrs", self._msrs), ("vector", self._vector)):
            if section in self.sections:
                rows[section] = self._compared(section, read)
        if "vector" in rows:
            rows["vector"] += [{"name": name, "note": words} for name, words in self._wider().items()]
        return {"mode": f"{mode}{paging}", "vcpu": cpu.index, "rows": rows}

    def _compared(self, section: str, read: Callable[[], dict[str, tuple[int, int]]]) -> list[dict[str, Any]]:
        serial = self.cpu.stop_serial
        key = f"{section} {self.cpu.index}"
        last_serial, last, before = self._kept.get(key, (None, {}, {}))
        try:
            now = read()
        except KvmbenchError as error:
            return [{"name": section, "note": str(error)}]
        if serial != last_serial:
            before = last
        self._kept[key] = (serial, now, before)
        return [
            _integer(name, value, before.get(name, (value, 0))[0], digits=digits)
            for name, (value, digits) in now.items()
        ]

    def _debug(self) -> dict[str, tuple[int, int]]:
        found = self.cpu.vcpu.get_debugregs()
        values = [*(int(found.db[n]) for n in range(4)), int(found.dr6), int(found.dr7)]
        return {name: (value, 16) for name, value in zip(_DEBUG, values, strict=True)}

    def _msrs(self) -> dict[str, tuple[int, int]]:
        known = self._kept.get("known msrs")
        if known is None:
            with System(self.machine.host.core) as system:
                listed = set(system.get_msr_index_list())
            known = self._kept["known msrs"] = [index for index in _MSRS if index in listed]
        return {msr_name(index): (value, 16) for index, value in self.cpu.vcpu.get_msrs(known).items()}

    def _vector(self) -> dict[str, tuple[int, int]]:
        fpu = self.cpu.vcpu.get_fpu()
        low = [bytes(fpu.xmm[n]) for n in range(16)]
        if "ymm" in self._wider():
            found = {f"xmm{n}": (int.from_bytes(low[n], "little"), 32) for n in range(16)}
        else:
            area = bytes(ffi.buffer(self.cpu.vcpu.get_xsave()))
            (present,) = struct.unpack_from("<Q", area, _XSTATE_BV_AT)
            high = area[_YMM_HIGH_AT:] if present & _AVX else bytes(256)
            each = [low[n] + high[16 * n : 16 * n + 16] for n in range(16)]
            found = {f"ymm{n}": (int.from_bytes(each[n], "little"), 64) for n in range(16)}
        found |= {f"st{n}": (int.from_bytes(bytes(fpu.fpr[n])[:10], "little"), 20) for n in range(8)}
        return found | {"mxcsr": (int(fpu.mxcsr), 8), "fcw": (int(fpu.fcw), 4), "fsw": (int(fpu.fsw), 4)}

    def _wider(self) -> dict[str, str]:
        """What of the vector registers is not shown, and why."""
        try:
            xcr0 = next(int(each.value) for each in self.cpu.vcpu.get_xcrs().xcrs if each.xcr == 0)
            if not xcr0 & _AVX:
                return {"ymm": f"not shown: AVX is not enabled in the guest's XCR0, which is {xcr0:#x} by KVM"}
            self.cpu.vcpu.get_xsave()
        except KvmbenchError as error:
            return {"ymm": f"not shown: {error}"}
        return {"zmm": f"not shown, nor k0 to k7 (XCR0 = {xcr0:#x})"} if xcr0 & _AVX512 else {}

    def _set_vector(self, kind: str, number: int, value: str) -> None:
        vcpu = self.cpu.vcpu
        if kind == "xmm":
            fpu = vcpu.get_fpu()
            fpu.xmm[number] = list(_number(value, 128, f"xmm{number}").to_bytes(16, "little"))
            vcpu.set_fpu(fpu)
            return
        data = _number(value, 256, f"ymm{number}").to_bytes(32, "little")
        missing = self._wider().get("ymm")
        if missing:
            raise MisuseError(f"ymm{number} is {missing}")
        xsave = vcpu.get_xsave()
        area = ffi.buffer(xsave)
        area[_XMM_AT + 16 * number : _XMM_AT + 16 * number + 16] = data[:16]
        area[_YMM_HIGH_AT + 16 * number : _YMM_HIGH_AT + 16 * number + 16] = data[16:]
        (present,) = struct.unpack_from("<Q", area, _XSTATE_BV_AT)
        struct.pack_into("<Q", area, _XSTATE_BV_AT, present | _SSE | _AVX)
        vcpu.set_xsave(xsave)

    @action
    def set(self, name: str, value: str) -> None:
        """Writes a register: ``rax``, ``cs.base``, ``dr0``, ``xmm3``, ``ymm3``, an MSR's name.

        Args:
            value: a number (0x..., decimal) or a symbol expression.

        Raises:
            MisuseError: no such register, or the value does not fit.
        """
        if not isinstance(name, str) or not isinstance(value, str):
            raise MisuseError(f"set takes a register's name and a value as text, not {name!r} and {value!r}")
        cpu = self.cpu
        if self.session.is_busy(cpu):
            raise MisuseError(f"{name} cannot be written while vcpu {cpu.index} runs; pause it first")
        vcpu = cpu.vcpu
        vector = _VECTOR.fullmatch(name)
        if vector is not None:
            self._set_vector(vector[1], int(vector[2]), value)
        elif name in _DEBUG:
            found, number = vcpu.get_debugregs(), cpu.symbols.resolve(value)
            if name in ("dr6", "dr7"):
                setattr(found, name, number)
            else:
                found.db[int(name[2])] = number
            vcpu.set_debugregs(found)
        elif (index := {msr_name(each): each for each in _MSRS}.get(name)) is not None:
            vcpu.set_msrs({index: cpu.symbols.resolve(value)})
        elif "." in name:
            owner, field = name.split(".", 1)
            described = cpu.regs[owner]
            if field not in {each.name for each in dataclasses.fields(described)}:
                raise MisuseError(f"{owner} has no field {field!r}")
            cpu.regs[owner] = dataclasses.replace(described, **{field: cpu.symbols.resolve(value)})
        else:
            cpu.regs[name] = cpu.symbols.resolve(value)
        self.session.changed()

    @action
    def flip(self, name: str, bit: str) -> None:
        """Inverts a named bit: ``flip("rflags", "ZF")``."""
        kind = _BITS.get(name) if isinstance(name, str) else None
        if kind is None or not isinstance(bit, str) or bit not in kind.BITS:
            raise MisuseError(f"{name} has no bit {bit!r}")
        rows = {row["name"]: row for section in self.view["rows"].values() for row in section}
        if name not in rows:
            raise MisuseError(f"{name} is not shown; unfold its section first")
        self.set(name, hex(int(rows[name]["hex"], 16) ^ 1 << kind.BITS[bit]))

    def lines(self) -> list[Line]:
        if not self.view:
            return [[Span("nothing seen yet", "dim")]]
        rows = self.view["rows"]
        lines: list[Line] = [[Span(f"vcpu {self.view['vcpu']}, {self.view['mode']}", "dim")]]
        general = rows["general"]
        for n in range(4):
            lines.append([span for row in general[n:16:4] for span in _spans(row, 5)])
        lines.append([*_spans(general[16], 5), Span(general[16].get("remark", ""), "name")])
        for section in SECTIONS[1:]:
            for row in rows.get(section, ()) if section in self.sections else ():
                lines.append(_line(row))
        return lines

    def table(self) -> Table:
        rows = []
        for section, each in self.view.get("rows", {}).items():
            for row in each:
                if "fields" in row:
                    for field in row["fields"]:
                        rows.append(
                            (
                                section,
                                f"{row['name']}.{field['name']}",
                                field["hex"],
                                field.get("was", ""),
                                row["words"],
                            )
                        )
                elif "note" in row:
                    rows.append((section, row["name"], "", "", row["note"]))
                elif "hex" in row:
                    bits = " ".join(bit["name"] for bit in row.get("bits", ()) if bit["set"])
                    rows.append(
                        (section, row["name"], "0x" + row["hex"], "0x" + row["was"] if "was" in row else "", bits)
                    )
        return Table(("section", "register", "value", "before", "meaning"), rows)


def _integer(name: str, value: int, before: int, *, digits: int = 16) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "hex": f"{int(value):0{digits}x}"}
    if value != before:
        row["was"] = f"{int(before):0{digits}x}"
    kind = _BITS.get(name)
    if kind is not None:
        row["bits"] = [
            {"name": bit, "set": value >> n & 1, "changed": int((value ^ before) >> n & 1)}
            for bit, n in kind.BITS.items()
        ]
        row["more"] = " ".join(
            f"{field}={getattr(kind(value), field)}" for field in kind.FIELDS if getattr(kind(value), field)
        )
    return row


def _described(name: str, now: Any, before: Any) -> dict[str, Any]:
    fields = []
    for field in ("selector", "base", "limit"):
        if not hasattr(now, field):
            continue
        each = {"name": field, "hex": f"{getattr(now, field):#x}"}
        if getattr(now, field) != getattr(before, field):
            each["was"] = f"{getattr(before, field):#x}"
        fields.append(each)
    words = f"DPL {now.dpl} {now.words}" if hasattr(now, "words") else ""
    row: dict[str, Any] = {"name": name, "fields": fields, "words": words}
    if now != before:
        row["changed"] = 1
    return row


def _number(text: str, bits: int, name: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise MisuseError(f"{name} = {text!r}: a number such as 0x10") from None
    if not 0 <= value < 1 << bits:
        raise MisuseError(f"{name} = {text} does not fit its {bits} bits")
    return value


def _spans(row: dict[str, Any], width: int) -> Line:
    return [
        Span(f"{row['name']:{width}}", "name"),
        Span(row["hex"], "changed" if "was" in row else ""),
        Span("* " if "was" in row else "  "),
    ]


def _line(row: dict[str, Any]) -> Line:
    line = [Span(f"{row['name']:10}", "name")]
    if "note" in row:
        return [*line, Span(row["note"], "bad")]
    if "fields" in row:
        for field in row["fields"]:
            line += [Span(f"{field['name']} ", "dim"), Span(f"{field['hex']:12}", "changed" if "was" in field else "")]
        return [*line, Span(row["words"])]
    line += [Span(row["hex"], "changed" if "was" in row else ""), Span("* " if "was" in row else "  ")]
    for bit in row.get("bits", ()):
        if bit["set"] or bit["changed"]:
            line.append(
                Span(f"{bit['name'] if bit['set'] else bit['name'].lower()} ", "changed" if bit["changed"] else "")
            )
    return [*line, Span(row.get("more", ""))]
