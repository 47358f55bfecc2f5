"""Values that the tests of debug/ share: registers as KVM's structs, and a recorded run computed here."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvmbench.debug.record import StepRecord
from kvmbench.debug.step_rows import ROW
from kvmbench.debug.symbols import Symbols
from kvmbench.host.provenance import Provenance
from kvmbench.uapi import ffi

#: xor rax, rax; loop: add rax, rbx; jmp loop; inc qword ptr [counter]; a byte that is no instruction; hlt
CODE = bytes.fromhex("48 31 c0  48 01 d8  eb fb  48 ff 05 f1 00 00 00  06  f4")


@pytest.fixture
def make_regs() -> Callable[..., Any]:
    def make(**values: int) -> Any:
        regs = ffi.new("struct kvm_regs *")
        regs.rflags = 2
        for name, value in values.items():
            setattr(regs, name, value)
        return regs

    return make


@pytest.fixture
def long_sregs() -> Any:
    """struct kvm_sregs of 64-bit mode at CPL 0 with 4-level paging."""
    sregs = ffi.new("struct kvm_sregs *")
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        is_code = name == "cs"
        segment.selector = 0x8 if is_code else 0x10
        segment.limit = 0xFFFFFFFF
        segment.type = 11 if is_code else 3
        segment.present = segment.s = segment.g = 1
        segment.l, segment.db = int(is_code), int(not is_code)
    sregs.tr.type, sregs.tr.present, sregs.tr.limit = 11, 1, 0x67
    sregs.ldt.unusable = 1
    sregs.gdt.base, sregs.gdt.limit = 0x500, 0x1F
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x80000011, 0x9000, 0x20, 0x500
    sregs.apic_base = 0xFEE00900
    return sregs


@pytest.fixture
def real_sregs() -> Any:
    """struct kvm_sregs of real mode, code segment at 0x10000."""
    sregs = ffi.new("struct kvm_sregs *")
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.limit = 0xFFFF
        segment.type = 11 if name == "cs" else 3
        segment.present = segment.s = 1
    sregs.cs.selector, sregs.cs.base = 0x1000, 0x10000
    sregs.cr0 = 0x10
    return sregs


@pytest.fixture
def code() -> bytes:
    return CODE


@pytest.fixture
def symbols() -> Symbols:
    made = Symbols()
    made.add(
        SimpleNamespace(
            name="demo",
            symbols={"start": 0x1000, "loop": 0x1003, "counter": 0x1100},
            lines={0x1000: (3, "        xor rax, rax"), 0x1003: (4, "loop:   add rax, rbx   # sum")},
        )
    )
    return made


@pytest.fixture
def record(symbols: Symbols) -> StepRecord:
    """Eleven steps of CODE at 0x1000: xor, then add and jmp five times over, with rbx = 3."""
    state = dict.fromkeys(ROW.names or (), 0)
    state.update(rbx=3, rsp=0x8000, rip=0x1000, rflags=2, rax=0xFFFF)
    start = np.array(tuple(state.values()), dtype=ROW)
    rows = []
    state["exit"] = 4
    for step in range(11):
        if step == 0:
            state.update(rax=0, rip=0x1003, rflags=0x46)
        elif step % 2:
            state.update(rax=state["rax"] + 3, rip=0x1006, rflags=2)
        else:
            state.update(rip=0x1003)
        rows.append(tuple(state.values()))
    return StepRecord(
        np.array(rows, dtype=ROW),
        start,
        symbols=symbols,
        code=lambda gva, length: CODE[gva - 0x1000 : gva - 0x1000 + length] if gva >= 0x1000 else b"",
        provenance=Provenance(kind="local", kernel="6.1.0", module="kvm_amd", parameters={"npt": "1"}),
    )
