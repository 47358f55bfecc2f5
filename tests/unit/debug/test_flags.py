"""Flags and control registers are ints whose bits have names."""

from __future__ import annotations

import pytest

from kvmbench.debug.control import CONTROL_CLASSES, ApicBase, Cr0, Cr3, Cr4, Cr8, Efer
from kvmbench.debug.flags import Flags
from kvmbench.debug.register_table import CONTROL
from kvmbench.errors import MisuseError


def test_flags_are_an_int_with_named_bits() -> None:
    flags = Flags(0x246)
    assert flags == 0x246
    assert (flags.ZF, flags.PF, flags.IF, flags.CF, flags.IOPL) == (True, True, True, False, 0)
    assert flags + 1 == 0x247
    assert type(flags + 1) is int


def test_the_repr_spells_out_the_set_flags() -> None:
    assert repr(Flags(0x246)) == "0x246 [PF ZF IF]"
    assert repr(Flags(0x3202)) == "0x3202 [IF IOPL=3]"
    assert repr(Flags(2)) == "0x2"
    assert f"{Flags(0x46)}" == "0x46 [PF ZF]"
    assert f"{Flags(0x46):#06x}" == "0x0046"


@pytest.mark.parametrize(
    ("bit", "name"), [(0, "CF"), (7, "SF"), (8, "TF"), (11, "OF"), (17, "VM"), (21, "ID")]
)
def test_each_flag_is_at_its_bit(bit: int, name: str) -> None:
    assert Flags(1 << bit).names == (name,)
    assert getattr(Flags(1 << bit), name) is True


def test_replacing_a_bit_leaves_the_others() -> None:
    assert Flags(0x246).replace(ZF=0, CF=1) == 0x207
    assert Flags(2).replace(IOPL=3).IOPL == 3
    assert isinstance(Flags(2).replace(ZF=1), Flags)


def test_replacing_an_unknown_bit_names_the_known_ones() -> None:
    with pytest.raises(MisuseError, match=r"no bit 'XF'; it has CF, PF"):
        Flags(2).replace(XF=1)


def test_replacing_a_field_with_too_large_a_value_is_refused() -> None:
    with pytest.raises(MisuseError, match="IOPL = 4 does not fit 2"):
        Flags(2).replace(IOPL=4)


def test_an_unknown_bit_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Flags has no bit 'XYZ'"):
        Flags(2).XYZ  # noqa: B018


def test_tab_completion_offers_the_bits() -> None:
    assert {"ZF", "IOPL"} <= set(dir(Flags(0)))
    assert {"PE", "PG", "WP"} <= set(dir(Cr0(0)))


def test_every_control_register_of_the_table_has_a_class() -> None:
    assert tuple(CONTROL_CLASSES) == CONTROL


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Cr0(0x80000011), "0x80000011 [PE ET PG]"),
        (Cr3(0x9000), "0x9000"),
        (Cr3(0x9018), "0x9018 [low=0x18]"),
        (Cr4(0x620), "0x620 [PAE OSFXSR OSXMMEXCPT]"),
        (Cr8(0xF), "0xf [TPL=0xf]"),
        (Efer(0x1500), "0x1500 [LME LMA SVME]"),
        (ApicBase(0xFEE00900), "0xfee00900 [BSP EN]"),
    ],
)
def test_control_registers_spell_out_their_bits(value: int, shown: str) -> None:
    assert repr(value) == shown


def test_the_page_table_address_is_free_of_pcid_and_flags() -> None:
    assert Cr3(0x8000_0000_1234_5FFF).table_gpa == 0x1234_5000
    assert ApicBase(0xFEE00900).apic_gpa == 0xFEE00000
