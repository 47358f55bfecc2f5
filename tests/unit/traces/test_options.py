"""What `kb.trace` is asked for; which events a pattern means."""

from __future__ import annotations

import errno

import pytest

from kvmbench.errors import MisuseError
from kvmbench.traces.options import DEFAULT_EVENTS, advice, check_options, choose_events

THERE = ("kvm/kvm_entry", "kvm/kvm_exit", "kvmmmu/kvm_mmu_set_spte", "sched/sched_switch")
ORDINARY = {
    "log": True,
    "buffer": "4M",
    "log_rows": 1 << 16,
    "limit": "1G",
    "own_only": True,
    "mark_port": 0x80,
}


def test_nothing_asked_for_is_all_of_kvm_without_insisting():
    options = check_options(None, **ORDINARY)
    assert options.patterns == DEFAULT_EVENTS
    assert not options.insist
    assert (options.buffer_bytes, options.limit_bytes, options.log_rows) == (4 << 20, 1 << 30, 1 << 16)


def test_events_by_name_are_insisted_on():
    assert check_options("kvm_exit", **ORDINARY).insist
    assert check_options(["kvm_exit"], **ORDINARY).patterns == ("kvm_exit",)
    assert check_options((name for name in ("a", "b")), **ORDINARY).patterns == ("a", "b")
    assert not check_options((), **ORDINARY).insist


@pytest.mark.parametrize(
    ("rows", "ring"), [(16, 16), (17, 32), (100, 128), (1 << 24, 1 << 24), ((1 << 23) + 1, 1 << 24)]
)
def test_rows_are_rounded_up_to_a_power_of_two(rows, ring):
    assert check_options((), **{**ORDINARY, "log_rows": rows}).log_rows == ring


def test_without_a_log_there_is_no_ring():
    assert check_options(None, **{**ORDINARY, "log": False}).log_rows == 0
    with pytest.raises(MisuseError, match="would hold nothing"):
        check_options((), **{**ORDINARY, "log": False})


@pytest.mark.parametrize("events", [5, 1.5, [None], ["kvm_exit", ""], "", [b"kvm_exit"]])
def test_events_that_are_no_names_are_refused(events):
    with pytest.raises(MisuseError, match="events are names such as 'kvm_exit'"):
        check_options(events, **ORDINARY)


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (("kvm_exit",), ("kvm/kvm_exit",)),
        (("kvm:kvm_exit", "kvm/kvm_exit"), ("kvm/kvm_exit",)),
        (("kvm/*",), ("kvm/kvm_entry", "kvm/kvm_exit")),
        (("kvm_*",), ("kvm/kvm_entry", "kvm/kvm_exit", "kvmmmu/kvm_mmu_set_spte")),
        (("sched_switch", "kvm_entry"), ("kvm/kvm_entry", "sched/sched_switch")),
        (("kvm/kvm_e[nx]*",), ("kvm/kvm_entry", "kvm/kvm_exit")),
        (("*",), THERE),
    ],
)
def test_patterns_choose_events_in_the_kernels_order(patterns, chosen):
    assert choose_events(patterns, THERE) == chosen


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("kvm_exti", r"no event 'kvm_exti': did you mean 'kvm_exit'\?"),
        ("kvm/kvm_entr", r"no event 'kvm/kvm_entr': did you mean 'kvm_entry' or"),
        ("net/*", r"no event 'net/\*': there are kvm/\*, kvmmmu/\*, sched/\*"),
        ("../..", r"there are kvm/\*"),
    ],
)
def test_a_pattern_that_means_nothing_is_told_with_what_there_is(pattern, said):
    with pytest.raises(MisuseError, match=said):
        choose_events(("kvm_exit", pattern), THERE)


def test_advice_is_given_where_it_helps():
    assert "sudo=True" in advice(errno.EPERM)
    assert advice(errno.EACCES) == advice(errno.EPERM)
    assert advice(errno.ENODEV) == ""
