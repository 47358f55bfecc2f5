"""BTF: what is read out of a file that was written by hand, and out of what is none."""

from __future__ import annotations

import random

import pytest

from kvmbench.errors import LoadError
from kvmbench.host.kernel.btf import Btf, Kind, Member

from .made_up import Writer


def written() -> tuple[Writer, Writer]:
    """A kernel's BTF and a module's."""
    kernel = Writer()
    word = kernel.add("unsigned int", Kind.INT, 4, 32)
    pages = kernel.text("kvm_mmu_page")
    page = kernel.add(
        "page", Kind.STRUCT, 16,
        kernel.text("flags"), word, 0,
        kernel.text("level"), word, 4 << 24 | 32,
        kernel.text("direct"), word, 1 << 24 | 36,
        vlen=3, flag=True,
    )  # fmt: skip
    kernel.add("", Kind.PTR, page)
    kernel.add("sorts", Kind.ENUM, 4, kernel.text("FIRST"), 1, kernel.text("BELOW"), 0xFFFFFFFF, vlen=2, flag=True)
    module = Writer(kernel)
    assert pages
    again = module.add("table", Kind.STRUCT, 24, module.text("page"), page, 0, module.text("n"), word, 128, vlen=2)
    module.add("table_t", Kind.TYPEDEF, again)
    module.add("wide", Kind.ENUM64, 8, module.text("HUGE"), 1, 0x80, vlen=1)
    return kernel, module


def test_members_with_and_without_bits():
    kernel = Btf(written()[0].data())
    page = kernel.find("page", Kind.STRUCT)
    assert page.size_or_type == 16
    assert kernel.members(page) == [
        Member("flags", 1, 0, 0), Member("level", 1, 32, 4), Member("direct", 1, 36, 1),
    ]  # fmt: skip


def test_a_name_that_is_the_end_of_another_is_found():
    # "page" comes after "kvm_mmu_page" among the names, and may be its end.
    kernel = Btf(written()[0].data())
    assert kernel.find("page", Kind.STRUCT).number == 2
    assert kernel.find("kvm_mmu_page", Kind.STRUCT) is None
    assert kernel.find("age", Kind.STRUCT) is None


def test_a_module_s_types_refer_to_the_kernel_s():
    kernel, module = written()
    base = Btf(kernel.data())
    both = Btf(module.data(), base)
    table = both.find("table", Kind.STRUCT)
    assert table.number == base.end
    assert [both.type(member.type).name for member in both.members(table)] == ["page", "unsigned int"]
    assert both.find("table_t", Kind.TYPEDEF).size_or_type == table.number
    assert both.find("page", Kind.STRUCT).number == 2
    assert base.find("table", Kind.STRUCT) is None


def test_constants_have_their_sign_and_width():
    kernel, module = written()
    both = Btf(module.data(), Btf(kernel.data()))
    assert both.enumerators(both.find_enumerator("BELOW")) == {"FIRST": 1, "BELOW": -1}
    assert both.enumerators(both.find_enumerator("HUGE")) == {"HUGE": 0x80_0000_0001}
    assert both.find_enumerator("level") is None


@pytest.mark.parametrize("data", [b"", b"\x9f\xeb", b"\x7fELF" + bytes(60), bytes(64)])
def test_what_is_no_btf_says_so(data):
    with pytest.raises(LoadError, match="BTF"):
        Btf(data)


def test_cut_anywhere_is_an_error():
    data = written()[0].data()
    for size in range(len(data)):
        with pytest.raises(LoadError):
            Btf(data[:size])


def test_damage_is_an_error_or_other_types():
    kernel, module = written()
    base = Btf(kernel.data())
    data = module.data()
    chance = random.Random(1)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            one = Btf(bytes(damaged), base)
            for number in range(base.end, one.end):
                described = one.type(number)
                if described.kind in (Kind.STRUCT, Kind.UNION):
                    one.members(described)
                elif described.kind in (Kind.ENUM, Kind.ENUM64):
                    one.enumerators(described)
            one.find("table", Kind.STRUCT)
            one.find_enumerator("HUGE")
        except LoadError:
            refused += 1
    assert 300 < refused < 3000
