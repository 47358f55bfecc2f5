"""`cpu.regs`: what is read is what the structs hold, and what is written reaches the source at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvmbench.debug.flags import Flags
from kvmbench.debug.register_file import RegisterFile
from kvmbench.debug.register_view import changes_text
from kvmbench.debug.registers import Registers
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError
from kvmbench.kvm.segment import DescriptorTable, Segment


class Copies:
    """The structs kept since a stop, and what was written."""

    def __init__(self, regs: Any, sregs: Any, previous: RegisterFile | None = None) -> None:
        self.regs, self.sregs, self.previous = regs, sregs, previous
        self.written: list[str] = []

    def get_regs(self) -> Any:
        return self.regs

    def get_sregs(self) -> Any:
        return self.sregs

    def get_previous(self) -> RegisterFile | None:
        return self.previous

    def set_regs(self, regs: Any) -> None:
        self.written.append("regs")
        self.regs = regs

    def set_sregs(self, sregs: Any) -> None:
        self.written.append("sregs")
        self.sregs = sregs


@pytest.fixture
def copies(make_regs: Callable[..., Any], long_sregs: Any) -> Copies:
    return Copies(make_regs(rax=0x1122334455667788, rip=0x1003, rflags=0x246, r15=7), long_sregs)


@pytest.fixture
def regs(copies: Copies, symbols: Symbols) -> Registers:
    return Registers(copies, symbols)


def test_registers_and_their_parts_are_attributes(regs: Registers) -> None:
    assert regs.rax == 0x1122334455667788
    assert (regs.eax, regs.ax, regs.ah, regs.al) == (0x55667788, 0x7788, 0x77, 0x88)
    assert (regs.r15d, regs.r15w, regs.r15b, regs.rip) == (7, 7, 7, 0x1003)
    assert regs["rax"] == regs.rax


def test_flags_segments_and_control_registers_are_decoded(regs: Registers) -> None:
    assert isinstance(regs.rflags, Flags)
    assert regs.rflags.ZF
    assert not regs.rflags.CF
    assert regs.cs.words == "code64 execute/read"
    assert (regs.gdt.base, regs.gdt.limit) == (0x500, 0x1F)
    assert regs.cr0.PG
    assert regs.efer.LMA
    assert regs.cr3.table_gpa == 0x9000
    assert regs.apic_base.BSP
    assert regs.mode.bits == 64


def test_a_write_goes_to_the_source_at_once(regs: Registers, copies: Copies) -> None:
    regs.rbx = 5
    assert copies.written == ["regs"]
    assert copies.regs.rbx == 5
    assert copies.regs.rax == 0x1122334455667788
    regs.cr3 = 0xA000
    assert copies.written == ["regs", "sregs"]
    assert copies.sregs.cr3 == 0xA000


def test_a_write_leaves_the_struct_of_the_stop_alone(regs: Registers, copies: Copies) -> None:
    shown_by_a_stop = copies.regs
    regs.rax = 1
    assert shown_by_a_stop.rax == 0x1122334455667788
    assert regs.rax == 1


def test_writing_32_bits_clears_the_upper_half_and_less_does_not(regs: Registers) -> None:
    regs.al = 0xFF
    assert regs.rax == 0x11223344556677FF
    regs.ah = 0
    assert regs.rax == 0x11223344556600FF
    regs.ax = 0xABCD
    assert regs.rax == 0x112233445566ABCD
    regs.eax = 3
    assert regs.rax == 3


def test_one_flag_is_set_through_replace(regs: Registers) -> None:
    regs.rflags = regs.rflags.replace(CF=1)
    assert regs.rflags == 0x247


def test_a_segment_and_a_table_are_replaced_whole(regs: Registers, copies: Copies) -> None:
    regs.ds = dataclasses.replace(regs.ds, base=0x1000)
    assert copies.sregs.ds.base == 0x1000
    assert copies.sregs.ds.selector == 0x10
    regs.idt = DescriptorTable(base=0x600, limit=0xFFF)
    assert (copies.sregs.idt.base, copies.sregs.idt.limit) == (0x600, 0xFFF)


def test_several_registers_are_written_in_one_go(regs: Registers, copies: Copies) -> None:
    regs.set(rax=1, rip=0x2000)
    assert (regs.rax, regs.rip, copies.written) == (1, 0x2000, ["regs"])


def test_nothing_is_written_when_one_of_several_values_does_not_fit(regs: Registers, copies: Copies) -> None:
    with pytest.raises(MisuseError, match="rip = "):
        regs.set(rax=1, rip=1 << 64)
    assert copies.written == []
    assert regs.rax == 0x1122334455667788


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rax", 1 << 64, r"rax = 0x10000000000000000 does not fit its 64 bits"),
        ("al", 0x100, r"al = 0x100 does not fit its 8 bits"),
        ("eip", 1 << 32, r"eip = 0x100000000 does not fit its 32 bits"),
        ("rax", -1, r"rax = -0x1 does not fit its 64 bits; mask it with & 0xffffffffffffffff"),
        ("rax", 1.5, r"rax = 1.5: a register takes an integer"),
        ("cr0", "on", r"cr0 = 'on': a register takes an integer"),
        ("cs", 8, r"cs = 8: give a Segment"),
    ],
)
def test_a_bad_value_is_refused_by_name_value_and_width(
    regs: Registers, copies: Copies, name: str, value: object, message: str
) -> None:
    with pytest.raises(MisuseError, match=message):
        setattr(regs, name, value)
    assert copies.written == []


def test_numpy_integers_are_integers(regs: Registers) -> None:
    regs.rip = np.uint64(0xFFFFFFFF81000000)
    assert regs.rip == 0xFFFFFFFF81000000


def test_a_misspelt_register_is_not_silently_created(regs: Registers) -> None:
    with pytest.raises(AttributeError, match=r"no register 'raz'; did you mean rax"):
        regs.raz = 1
    with pytest.raises(AttributeError, match=r"no register 'raz'"):
        regs.raz  # noqa: B018
    with pytest.raises(MisuseError, match=r"no register 'raz'"):
        regs["raz"]


def test_tab_completion_offers_every_name(regs: Registers) -> None:
    assert {"rax", "eax", "al", "rflags", "cs", "gdt", "cr0", "efer", "snapshot"} <= set(dir(regs))
    assert all(hasattr(regs, name) for name in dir(regs))


def test_a_snapshot_does_not_follow_later_writes(regs: Registers) -> None:
    before = regs.snapshot()
    regs.rax = 1
    regs.cr3 = 0xA000
    regs.fs = Segment(selector=0, base=0x7000, limit=0xFFFF)
    after = regs.snapshot()
    assert before.rax == 0x1122334455667788
    assert before.diff(after)["rax"] == (0x1122334455667788, 1)
    assert list(before.diff(after)) == ["rax", "fs", "cr3"]
    assert before.diff(before) == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.rax = 2  # type: ignore[misc]


def test_the_text_marks_what_changed_and_nothing_else(
    make_regs: Callable[..., Any], long_sregs: Any, symbols: Symbols
) -> None:
    before = RegisterFile.from_kvm(make_regs(rax=1, rip=0x1000), long_sregs)
    text = repr(Registers(Copies(make_regs(rax=2, rip=0x1003, rflags=0x46), long_sregs, before), symbols))
    assert text.count("*") == 3
    assert "rax 0000000000000002*" in text
    assert "rip 0x1003* loop" in text
    assert "rflags 0x46 [PF ZF]*" in text
    assert "rbx 0000000000000000 " in text


def test_the_text_fits_a_page_and_groups_equal_segments(regs: Registers) -> None:
    lines = repr(regs).splitlines()
    assert len(lines) <= 14
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("ds es fs gs ss 0x0010") for line in lines)
    assert any("cr0  0x80000011 [PE ET PG]" in line for line in lines)
    assert any("(long, CPL 0, 4-level paging)" in line for line in lines)


def test_real_mode_shows_eight_short_registers(make_regs: Callable[..., Any], real_sregs: Any) -> None:
    text = repr(Registers(Copies(make_regs(rax=0x1234, rip=0x20), real_sregs)))
    assert "eax 00001234" in text
    assert "r12" not in text
    assert "rax" not in text
    assert "(linear 0x10020)" in text


def test_real_mode_hides_no_value_left_from_long_mode(make_regs: Callable[..., Any], real_sregs: Any) -> None:
    text = repr(Registers(Copies(make_regs(r9=1 << 40), real_sregs)))
    assert "r9  0000010000000000" in text


def test_the_html_marks_changes_by_more_than_colour(make_regs: Callable[..., Any], long_sregs: Any) -> None:
    before = RegisterFile.from_kvm(make_regs(rax=1), long_sregs)
    html = Registers(Copies(make_regs(rax=2), long_sregs, before))._repr_html_()
    assert html.count("kb-changed'") == 1
    assert 'title="was 0000000000000001"' in html
    assert "text-decoration: underline" in html
    assert "--jp-" in html


def test_changes_are_told_in_one_line(make_regs: Callable[..., Any], long_sregs: Any) -> None:
    before = RegisterFile.from_kvm(make_regs(rax=1, rip=0x1000), long_sregs)
    now = RegisterFile.from_kvm(make_regs(rax=2, rip=0x1003, rflags=0x46), long_sregs)
    assert changes_text(before, now) == "rax 0x1 -> 0x2, rflags 0x2 -> 0x46 [PF ZF]"
