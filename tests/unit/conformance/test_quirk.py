"""Quirks: which hosts and points they are about, and that they explain one difference and no other."""

from __future__ import annotations

import fnmatch
from types import SimpleNamespace

import pytest

from kvmbench.conformance import POINTS, QUIRKS, Cause, Quirk, Where
from kvmbench.conformance.quirk import changed, explain, instead, numbers, only

EXPECTED = ("#DB at a, dr6 0xffff4ff0", "#DB at b, dr6 0xffff4ff0", "done")


def info(module: str = "kvm_amd", emulator: str = "QEMU (TCG)", version: str = "7.2.22", kernel: str = "6.1.0-56"):
    return SimpleNamespace(module=module, emulator=emulator, emulator_version=version, kernel=kernel)


def quirk(sees, *, where: Where | None = None, name: str = "q") -> Quirk:
    return Quirk(name, Cause.KVM, where or Where(), "why", "source", {"kvm.*": sees})


@pytest.mark.parametrize(
    ("where", "has"),
    [
        (Where(), True),
        (Where(modules=("kvm_amd", "kvm_intel")), True),
        (Where(modules=("kvm_pvm",)), False),
        (Where(emulator="QEMU"), True),
        (Where(emulator="Bochs"), False),
        (Where(emulator="QEMU", emulator_before=(9, 1)), True),
        (Where(emulator="QEMU", emulator_before=(7, 2)), False),
        (Where(kernel_before=(6, 2)), True),
        (Where(kernel_before=(5, 12)), False),
    ],
)
def test_a_quirk_is_about_the_hosts_that_it_names(where, has):
    assert where.has(info()) is has


def test_versions_compare_as_numbers():
    assert numbers("10.0.2") > numbers("9.1")
    assert numbers("6.1.0-56-cloud-amd64") == (6, 1, 0)
    assert numbers("") == ()


def test_a_quirk_explains_exactly_what_it_says_is_seen():
    one = quirk(changed(("at b", "at c")))
    seen = ("#DB at a, dr6 0xffff4ff0", "#DB at c, dr6 0xffff4ff0", "done")
    assert explain("kvm.x", EXPECTED, seen, info(), [one]) == (one,)


@pytest.mark.parametrize("seen", [("SHUTDOWN",), (), EXPECTED[:2], (*EXPECTED, "done")])
def test_another_difference_on_the_same_host_and_point_stays_unexplained(seen):
    assert explain("kvm.x", EXPECTED, seen, info(), [quirk(changed(("at b", "at c")))]) == ()


def test_a_quirk_of_another_host_or_point_explains_nothing():
    seen = ("done",)
    assert explain("kvm.x", EXPECTED, seen, info(), [quirk(only("done"), where=Where(modules=("kvm_pvm",)))]) == ()
    assert explain("kvmbench.x", EXPECTED, seen, info(), [quirk(only("done"))]) == ()


def test_the_fewest_quirks_that_together_explain_are_named():
    moved, lost = quirk(changed(("at b", "at c")), name="moved"), quirk(lambda seen: seen[:-1], name="lost")
    seen = ("#DB at a, dr6 0xffff4ff0", "#DB at c, dr6 0xffff4ff0")
    assert explain("kvm.x", EXPECTED, seen, info(), [quirk(instead("x")), lost, moved]) == (lost, moved)
    assert explain("kvm.x", EXPECTED, EXPECTED[:2], info(), [moved, lost]) == (lost,)


def test_text_to_be_changed_has_to_be_there():
    assert changed(("at z", "at c"))(EXPECTED) == ()


def test_every_quirk_is_about_a_point_that_there_is_and_has_a_source():
    names = [point.name for point in POINTS]
    assert len({one.name for one in QUIRKS}) == len(QUIRKS)
    for one in QUIRKS:
        assert one.why
        assert one.source
        for pattern in one.points:
            assert fnmatch.filter(names, pattern), f"{one.name}: no point fits {pattern!r}"


def test_no_quirk_expects_what_the_manual_does():
    for point in POINTS:
        for one in QUIRKS:
            if any(fnmatch.fnmatchcase(point.name, pattern) for pattern in one.points):
                seen = one.sees(point.name, point.expected)
                assert seen not in ((), point.expected), f"{one.name} on {point.name}"
