"""Breakpoints where several vcpus run: each stops at its own, passes those of others, and misses none."""

from __future__ import annotations

import threading
import time

import pytest

import kvmbench as kb
from kvmbench.errors import MisuseError

# Each vcpu counts its own turns at [r8].
COUNT = """
again:  inc qword ptr [r8]
here:   nop
        jmp again
"""


@pytest.fixture
def pair(host):
    """A machine of two vcpus that count at 0x3000 and 0x3100."""
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm(COUNT, at=0x1000)
        for index, cpu in enumerate(m.cpus):
            cpu.regs.r8 = 0x3000 + 0x100 * index
        yield m


def counts(m):
    return [m.memory.read_u64(0x3000), m.memory.read_u64(0x3100)]


class Running:
    """A vcpu that runs in a thread of its own until the block ends."""

    def __init__(self, cpu):
        self.cpu, self.stop, self.error = cpu, None, None
        self.thread = threading.Thread(target=self._run)

    def _run(self):
        try:
            self.stop = self.cpu.run(deadline_s=60)
        except Exception as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        while not self.cpu.running and self.thread.is_alive():
            time.sleep(0.001)
        return self

    def __exit__(self, *_):
        while self.thread.is_alive():
            self.cpu.interrupt()
            self.thread.join(0.05)
        if self.error is not None:
            raise self.error


def wait_for_more(m, index, more=3):
    """Until a vcpu has counted on."""
    start, deadline = counts(m)[index], time.monotonic() + 20
    while counts(m)[index] < start + more:
        assert time.monotonic() < deadline, "the other vcpu does not run"
        time.sleep(0.002)


def test_a_vcpu_runs_past_the_breakpoint_of_another_and_that_one_stops_each_time(pair, mechanism):
    first, second = pair.cpus
    one = first.breakpoints.add("here", mechanism=mechanism)
    code = pair.memory.read(0x1000, 16)
    with Running(second) as other:
        wait_for_more(pair, 1)
        for turn in range(1, 6):
            stop = first.run(deadline_s=30)
            assert (stop.cause, stop.breakpoint, stop.rip) == (kb.Cause.BREAKPOINT, one, pair.symbols["here"])
            assert counts(pair)[0] == turn, "no turn is missed"
            wait_for_more(pair, 1)
            assert other.thread.is_alive()
        assert pair.memory.read(0x1000, 16) == code
    assert other.stop.cause is kb.Cause.INTERRUPTED
    assert second.step().cause is kb.Cause.STEP


def test_one_that_passes_the_other_s_breakpoints_all_the_time_makes_it_miss_none(pair, written):
    first, second = pair.cpus
    conditions: list[int] = []
    first.breakpoints.add("here", mechanism=written, condition=lambda cpu: conditions.append(1))
    with Running(second):
        stop = first.run(deadline_s=2)
        assert stop.cause is kb.Cause.DEADLINE
        wait_for_more(pair, 1)
    # One turn may be counted that has not come to the breakpoint.
    assert counts(pair)[0] - len(conditions) in (0, 1)
    assert len(conditions) > 3


def test_steps_and_recordings_pass_the_breakpoint_of_a_vcpu_that_runs(pair, written):
    first, second = pair.cpus
    asked = []
    first.breakpoints.add("here", mechanism=written, condition=lambda cpu: asked.append(1))
    turn = [pair.symbols["here"], pair.symbols["here"] + 1, pair.symbols["again"]]
    with Running(first):
        while not asked:
            time.sleep(0.001)
        assert [second.step(deadline_s=20).rip for _ in range(9)] == turn * 3
        stop = second.step(6, deadline_s=20)
        assert (stop.cause, stop.steps, stop.rip) == (kb.Cause.STEP, 6, pair.symbols["again"])
        rec = second.record(9)
        assert [int(rip) for rip in rec.rip] == turn * 3
    assert counts(pair)[1] == 8


def test_both_vcpus_stop_at_one_place_and_its_byte_stays_for_the_one_that_runs(pair, written):
    first, second = pair.cpus
    mine = first.breakpoints.add("here", mechanism=written)
    theirs = second.breakpoints.add("here", mechanism=written, condition=lambda cpu: counts(pair)[1] > 5)
    code = pair.memory.read(0x1000, 16)
    with Running(second) as other:
        assert first.run(deadline_s=30).breakpoint is mine
        other.thread.join(30)
    assert (other.stop.breakpoint, theirs.hits, theirs.passes) == (theirs, 1, 5)
    assert pair.memory.as_array("u1", 0x1000, 16).tobytes() == code
    assert not pair.written


def test_a_shared_breakpoint_stops_whoever_comes_first_and_all_are_held(pair, mechanism):
    shared = pair.breakpoints.add("here", mechanism=mechanism)
    for turn in range(1, 4):
        stops = pair.run(deadline_s=60)
        hit = [stop for stop in stops if stop.cause is kb.Cause.BREAKPOINT]
        assert hit
        assert all(stop.breakpoint in shared.each for stop in hit)
        assert shared.hits >= turn
    assert shared.hits == sum(one.hits for one in shared.each)
    assert sum(counts(pair)) - shared.hits in (0, 1, 2)


def test_a_shared_breakpoint_is_changed_and_removed_as_one(pair):
    shared = pair.breakpoints.add("here")
    assert [len(cpu.breakpoints) for cpu in pair.cpus] == [1, 1]
    shared.enabled = False
    assert not any(one.enabled for one in shared.each)
    assert pair.cpus[0].run(deadline_s=0.2).cause is kb.Cause.DEADLINE
    shared.enabled = True
    assert pair.cpus[1].run(deadline_s=30).breakpoint is shared.each[1]
    assert "shared breakpoint 1 at here" in repr(shared)
    assert "1 hits: 0 of vcpu 0, 1 of vcpu 1" in repr(shared)
    pair.breakpoints.remove(1)
    assert [len(cpu.breakpoints) for cpu in pair.cpus] == [0, 0]
    assert repr(pair.breakpoints) == "no shared breakpoints"
    with pytest.raises(MisuseError, match="no shared breakpoint 1; there are none"):
        pair.breakpoints.remove(1)
    with pytest.raises(MisuseError, match="did you mean 'condition'"):
        pair.breakpoints.add("here", conditoin=print)
    assert [len(cpu.breakpoints) for cpu in pair.cpus] == [0, 0]


def test_a_temporary_shared_breakpoint_is_gone_from_all_after_the_first_stop(pair):
    pair.breakpoints.add("here", temporary=True, ignore=2)
    stops = pair.run(deadline_s=60)
    assert any(stop.cause is kb.Cause.BREAKPOINT for stop in stops)
    assert sum(counts(pair)) >= 3
    assert [len(cpu.breakpoints) for cpu in pair.cpus] == [0, 0]
    assert len(pair.breakpoints) == 0


def test_a_shared_watchpoint_stops_each_vcpu(pair):
    shared = pair.breakpoints.watch(0x3100, 8)
    stop = pair.cpus[1].run(deadline_s=30)
    assert (stop.cause, stop.breakpoint) == (kb.Cause.WATCHPOINT, shared.each[1])
    assert pair.cpus[0].run(deadline_s=0.3).cause is kb.Cause.DEADLINE
    shared.remove()
    assert pair.protected == {}


def test_a_watchpoint_is_set_while_another_vcpu_runs(pair, require):
    require("readonly_slot")
    first, second = pair.cpus
    with Running(second) as other:
        for _ in range(10):
            wait_for_more(pair, 1)
            one = first.breakpoints.watch(0x5000, 8, mechanism="read-only slot")
            wait_for_more(pair, 1)
            first.breakpoints.remove(one)
        assert other.thread.is_alive(), other.stop
    assert other.stop.cause is kb.Cause.INTERRUPTED
    assert pair.protected == {}


def test_breakpoints_are_added_and_removed_while_another_vcpu_runs(pair, mechanism):
    first, second = pair.cpus
    with Running(second) as other:
        for turn in range(1, 6):
            one = first.breakpoints.add("here", mechanism=mechanism)
            assert first.run(deadline_s=30).breakpoint is one
            first.breakpoints.remove(one)
            assert counts(pair)[0] == turn
        wait_for_more(pair, 1)
        assert other.thread.is_alive(), other.stop
    assert not pair.written


def test_a_breakpoint_disabled_by_another_thread_stops_nothing_any_more(pair, mechanism):
    first, _ = pair.cpus
    one = first.breakpoints.add("here", mechanism=mechanism, condition=lambda cpu: False)
    with Running(first):
        while not one.passes:
            time.sleep(0.001)
        one.enabled = False
        deadline = time.monotonic() + 20
        while True:  # from the next time on that the vcpu leaves the guest
            passes = one.passes
            time.sleep(0.1)
            if one.passes == passes:
                break
            assert time.monotonic() < deadline
        wait_for_more(pair, 0)


def test_guests_that_make_exits_pass_the_breakpoints_of_others_as_well(host, written):
    source = "again: inc qword ptr [r8]\nout 0x80, al\nhere: nop\njmp again"
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm(source, at=0x1000)
        for index, cpu in enumerate(m.cpus):
            cpu.regs.r8 = 0x3000 + 0x100 * index
        one = m.cpus[0].breakpoints.add("here", mechanism=written)
        with Running(m.cpus[1]) as other:
            for turn in range(1, 6):
                assert m.cpus[0].run(deadline_s=30).breakpoint is one
                assert counts(m)[0] == turn
                wait_for_more(m, 1)
            assert other.thread.is_alive()


def test_what_is_removed_from_one_vcpu_alone_leaves_the_shared_breakpoint(pair):
    first, second = pair.cpus
    shared = pair.breakpoints.add("here", ignore=1)
    assert "; ignores the next 1; 0 hits: 0 of vcpu 0, 0 of vcpu 1>" in repr(shared)
    first.breakpoints.clear()
    assert shared.each == tuple(second.breakpoints)
    assert "0 of vcpu 0 (removed), 0 of vcpu 1" in repr(pair.breakpoints)
    shared.enabled = False
    shared.enabled = True
    shared.ignore = 0
    stops = pair.run(deadline_s=30)
    assert [stop.cause for stop in stops] == [kb.Cause.INTERRUPTED, kb.Cause.BREAKPOINT]
    second.breakpoints.remove(shared.each[0])
    assert (shared.each, shared.hits, shared.ended, len(pair.breakpoints)) == ((), 1, True, 0)
    assert shared.address == pair.symbols["here"]
    assert "shared breakpoint" in repr(shared)
    shared.remove()
    whole = pair.breakpoints.add("here", temporary=True)
    pair.breakpoints.clear()
    assert (len(whole.each), whole.ended) == (2, True)
    assert [len(cpu.breakpoints) for cpu in pair.cpus] == [0, 0]


def test_what_is_assigned_to_a_shared_breakpoint_is_checked(pair):
    shared = pair.breakpoints.add("here")
    for name, value in (("ignore", "a"), ("ignore", -1), ("enabled", "no")):
        with pytest.raises(MisuseError, match=name):
            setattr(shared, name, value)
    assert (shared.ignore, shared.enabled) == (0, True)
