"""Which way to stop a guest is chosen, and what is said of it."""

from __future__ import annotations

import pytest

from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.mechanism import BOTH, Mechanism, Place, choose
from kvmbench.errors import MisuseError, UnsupportedError
from kvmbench.host.selfcheck import Mechanisms

ZERO = frozenset({0})
ALL = Mechanisms(BOTH, BOTH, ZERO, BOTH, BOTH, BOTH, BOTH, BOTH)
# The appliance with QEMU 7.2, and a KVM whose guests run at CPL 0 through its instruction emulator.
QEMU_7 = Mechanisms(step=BOTH, hlt=ZERO, readonly_slot=BOTH, no_slot=BOTH)
EMULATED = Mechanisms(step=ZERO, hlt=ZERO, hw_execute=ZERO, readonly_slot=BOTH, no_slot=BOTH)


@pytest.mark.parametrize(
    ("host", "place", "mechanism", "why"),
    [
        (ALL, Place("x"), "INT3", "the quickest"),
        (ALL, Place("x", mapped=False), "debug register", "INT3: the address is not mapped"),
        (ALL, Place("x", overwritten="it is"), "debug register", "INT3: it is"),
        (QEMU_7, Place("x", levels=ZERO), "HLT", "INT3 does not work on this host; debug register does not"),
        (QEMU_7, Place("x"), "stepping loop", "HLT: the address may be reached at CPL 3, where HLT is #GP"),
        (QEMU_7, Place("x", levels=ZERO, irqchip=True), "stepping loop", "in the kernel, where a HLT waits"),
        (QEMU_7, Place("x", levels=ZERO, overwritten="it is"), "stepping loop", "HLT: it is"),
        (QEMU_7, Place("x", levels=ZERO, mapped=False), "stepping loop", "HLT: the address is not mapped"),
        (EMULATED, Place("x", levels=ZERO), "debug register", "INT3 does not work on this host"),
        (EMULATED, Place("x", levels=ZERO, free_debug_registers=0), "HLT", "debug register: all four are taken"),
        (EMULATED, Place("x"), "debug register", "INT3 does not work on this host"),
        (ALL, Place("w", size_bytes=8), "debug register", "the quickest"),
        (ALL, Place("w", size_bytes=8, free_debug_registers=0), "read-only slot", "all four are taken"),
        (ALL, Place("w", size_bytes=3), "read-only slot", "takes 1, 2, 4 or 8 aligned bytes, not 3"),
        (ALL, Place("rw", 0x1001, 2), "absent slot", "aligned bytes, not 2 at 0x1001"),
        (QEMU_7, Place("w"), "read-only slot", "debug register does not work on this host"),
    ],
)  # fmt: skip
def test_the_quickest_that_works_wherever_the_guest_may_come_is_chosen_and_why_is_said(host, place, mechanism, why):
    choice = choose(place, host)
    assert choice.mechanism == mechanism
    assert why in choice.why
    assert "\n" not in choice.why


def test_of_ways_that_work_in_part_the_one_that_covers_most_is_taken():
    half = Mechanisms(step=BOTH, int3=ZERO, hw_execute=BOTH)
    choice = choose(Place("x"), half)
    assert (choice.mechanism, choice.why) == ("debug register", "INT3 does not work on this host at CPL 3")
    assert choose(Place("x", levels=ZERO), half).mechanism == "INT3"


def test_what_was_asked_for_is_taken_or_refused_in_words():
    assert choose(Place("x"), QEMU_7, wanted=Mechanism.HLT).why == "asked for"
    with pytest.raises(MisuseError, match="'HLT' cannot stop on 'w'; 'debug register', 'read-only slot'"):
        choose(Place("w"), ALL, wanted=Mechanism.HLT)
    with pytest.raises(UnsupportedError, match="HLT: the interrupt controllers are in the kernel"):
        choose(Place("x", irqchip=True), ALL, wanted=Mechanism.HLT)
    with pytest.raises(UnsupportedError, match="INT3 does not work on this host"):
        choose(Place("x"), QEMU_7, wanted=Mechanism.INT3)


def test_where_nothing_works_each_way_is_named():
    with pytest.raises(UnsupportedError, match=r"stop on 'x' at 0x10: INT3 does not work .*; stepping loop does not"):
        choose(Place("x", 0x10), Mechanisms())


def make(mechanism: Mechanism = Mechanism.INT3, levels: frozenset[int] = BOTH, **more) -> Breakpoint:
    return Breakpoint(1, 0x1000, more.pop("kind", "x"), 1, mechanism, levels, "loop", 0x1000, **more)


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (
            make(why="the quickest"),
            "1 at loop by INT3 (the quickest); the running guest can read its byte;",
        ),
        (make(Mechanism.HLT, ZERO), "works only at CPL 0 on this host"),
        (make(Mechanism.STEPPING), "slow: every instruction is stepped"),
        (make(Mechanism.READONLY_SLOT, kind="w"), "slower: every write to its page leaves the guest"),
        (make(Mechanism.NO_SLOT, kind="rw"), "slower: every access to its page leaves the guest"),
        (make(cr3=0x5000, elsewhere=3), "in the address space of cr3 0x5000 only, 3 times reached elsewhere"),
        (make(ignore=2), "ignores the next 2"),
        (make(temporary=True), "temporary"),
        (make(remarks=["moved from HLT"]), "moved from HLT"),
        (make(conflict="the guest has"), "the guest has"),
        (make(enabled=False), "disabled"),
    ],
)
def test_a_breakpoint_says_what_it_does_not_cover_and_what_happened_to_it(one, said):
    assert said in repr(one)
    assert repr(one).endswith("; 0 hits>")


@pytest.mark.parametrize(
    ("mine", "isolation", "now", "same"),
    [
        (None, False, 0x1234_5000, True),
        (0x5000, False, 0x5000, True),
        (0x5000, False, 0x5FFF, True),
        (0x5018, False, 0x5001 | 1 << 63, True),
        (0x5000 | 1 << 63, False, 0x5000, True),
        (0x5000, False, 0x4000, False),
        (0x5000, True, 0x4000, True),
        (0x4000, True, 0x5801, True),
        (0x5000, True, 0x6000, False),
        (0x5000, False, 0x1_0000_5000, False),
    ],
)
def test_address_spaces_are_compared_by_the_table_s_address(mine, isolation, now, same):
    assert make(cr3=mine, page_table_isolation=isolation).is_in(now) is same
