"""The points themselves: each has a name, a source and an expectation, and nothing that must be tried is left out."""

from __future__ import annotations

from collections import Counter

import pytest

from kvmbench.conformance import ITEMS, POINTS, Layer, chosen
from kvmbench.errors import MisuseError
from kvmbench.host.selfcheck import NAMES

BY_NAME = {point.name: point for point in POINTS}

# What the kernel's selftest asserts (tools/testing/selftests/kvm/x86/debug_regs.c), and the point that does.
SELFTEST = {
    "INT3": "kvm.int3.cpl0",
    **{f"execute DR{n}": f"kvm.execute.dr{n}" for n in range(4)},
    **{f"data DR{n}": f"kvm.write.dr{n}" for n in range(4)},
    "STI, XOR, CPUID, MOV, WRMSR, CLI with an interrupt pending": "kvm.step.selftest",
    "DR7.GD": "kvm.gd",
}


def test_names_are_unique_and_begin_with_their_layer():
    assert [name for name, count in Counter(point.name for point in POINTS).items() if count > 1] == []
    assert all(point.name.startswith(f"{point.layer.lower()}.") for point in POINTS)


def test_both_layers_are_tried():
    assert {point.layer for point in POINTS} == set(Layer)


@pytest.mark.parametrize("item", ITEMS)
def test_everything_that_goes_wrong_has_a_point(item):
    assert [point.name for point in POINTS if point.item == item], f"no point tries {ITEMS[item]!r}"


@pytest.mark.parametrize("assertion", SELFTEST)
def test_everything_that_the_kernel_s_selftest_asserts_has_a_point(assertion):
    assert "debug_regs.c" in BY_NAME[SELFTEST[assertion]].source


def test_the_selftest_s_values_of_dr6_are_expected():
    for n in range(4):
        assert BY_NAME[f"kvm.execute.dr{n}"].expected[0] == f"#DB at hw_bp, dr6 {0xFFFF0FF0 | 1 << n:#x}"
        hits = [told for told in BY_NAME[f"kvm.write.dr{n}"].expected if told != "done"]
        assert hits == [f"#DB at w{size}_hit, dr6 {0xFFFF0FF0 | 1 << n:#x}" for size in (1, 2, 4, 8)]
    assert {told.split(", ")[-1] for told in BY_NAME["kvm.step.selftest"].expected[:-1]} == {"dr6 0xffff4ff0"}
    assert BY_NAME["kvm.gd"].expected[0].endswith("dr6 0xffff2ff0")


def test_each_point_says_what_holds_and_who_says_so():
    for point in POINTS:
        assert all((point.title, point.source, point.expected)), point.name
        assert all(name in NAMES and cpl in (0, 3) for name, cpl in point.needs), point.name


def test_points_are_chosen_by_name_in_their_order():
    assert chosen() == POINTS
    assert [point.name for point in chosen(["kvm.int3.cpl3", "kvm.int3.cpl0"])] == ["kvm.int3.cpl0", "kvm.int3.cpl3"]
    assert {point.layer for point in chosen("kvmbench.*")} == {Layer.KVMBENCH}
    with pytest.raises(MisuseError, match=r"no point fits 'kvm.int4'"):
        chosen("kvm.int4")
