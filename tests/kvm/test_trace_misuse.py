"""Traces asked for in ways that cannot be: each is told in words, and the machine can be traced afterwards."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench import errors
from kvmbench.uapi import ExitReason

from .test_trace import log_count


def test_a_machine_has_one_trace_at_a_time(machine):
    machine.load_asm("nop\nhlt", at=0x1000)
    with kb.trace(machine, ()), pytest.raises(errors.BusyError, match="traced already"), kb.trace(machine, ()):
        pass
    with kb.trace(machine, ()) as t:
        machine.cpu.run(deadline_s=20)
    assert log_count(t, ExitReason.HLT) == 1


def test_a_trace_is_used_once(machine):
    t = kb.trace(machine, ())
    assert repr(t)
    assert t.stop() is t
    with t:
        assert t.start() is t
    assert t.stop() is t
    with pytest.raises(errors.MisuseError, match="make a new one"), t:
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"events": ""}, "events are names"),
        ({"events": [1]}, "events are names"),
        ({"events": 5}, "events are names"),
        ({"log": 2}, "log is True or False"),
        ({"log": False, "events": ()}, "would hold nothing"),
        ({"buffer": "63K"}, "buffer is"),
        ({"buffer": "2G"}, "buffer is"),
        ({"buffer": "many"}, "buffer"),
        ({"log_rows": 15}, "log_rows"),
        ({"log_rows": 1 << 25}, "log_rows"),
        ({"limit": "100K"}, "limit is"),
        ({"own_only": "no"}, "own_only"),
        ({"mark_port": 0x10000}, "mark_port"),
        ({"mark_port": "0x80"}, "mark_port"),
        ({"event": "kvm_exit"}, "events"),
    ],
)
def test_an_option_that_cannot_be_is_named(machine, options, said):
    with pytest.raises((errors.MisuseError, TypeError), match=said):
        kb.trace(machine, **options)


@pytest.mark.parametrize(
    ("events", "suggestion"),
    [
        ("kvm_exti", "kvm_exit"),
        (["kvm/kvm_entr"], "kvm_entry"),
        ("kvmm/kvm_exit", "kvm_exit"),
        ("net/*", r"there are .*kvm/\*, kvmmmu/\*"),
        ("../../x", r"there are .*kvm/\*"),
        ("kvm/kvm_exit\n", "kvm_exit"),
    ],
)
def test_an_event_that_is_none_is_suggested(machine, events, suggestion):
    with pytest.raises(errors.MisuseError, match=f"this kernel has no event.*{suggestion}"), kb.trace(machine, events):
        pass
    # Nothing of it is left.
    with kb.trace(machine, ()):
        pass


def test_what_is_no_machine_is_refused(machine):
    for given in (None, machine.host, machine.cpu):
        with pytest.raises(errors.MisuseError, match=r"machine=.*: give the machine"):
            kb.trace(given)


def test_a_trace_that_was_not_started_says_so(machine):
    t = kb.trace(machine, ())
    assert "Trace, not started" in repr(t)
    for said in (repr(t), repr(t.summary()), t.summary()._repr_html_()):
        assert "nothing is traced yet: with kb.trace(m) as t" in said
    with t:
        assert not any("nothing is traced" in note for note in t.notes)
    assert "not started" not in repr(t)


def test_a_mark_that_is_no_text_of_the_kernels_is_refused(machine):
    with kb.trace(machine, ()) as t, pytest.raises(errors.MisuseError, match="a mark is a text"):
        t.mark("\ud800")


def test_a_trace_that_is_saved_while_it_runs_says_so(machine, tmp_path):
    with kb.trace(machine, ()) as t:
        machine.load_asm("hlt", at=0x1000)
        machine.cpu.run(deadline_s=20)
        early = kb.open_trace(t.save(tmp_path / "early.npz"))
    assert any("saved while the trace ran" in note for note in early.notes)
    assert not kb.open_trace(t.save(tmp_path / "whole.npz")).notes
