"""Random guests on every pair of hosts, and those that have found something, written down.

A thousand guests in CI; any number by hand: ``python -m tests.differential --count 100000 --seed 5``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from .compare import Divergence
from .guest import Guest, generate, written
from .report import describe
from .runner import Runner
from .session import Session
from .setting import BY_NAME, SETTINGS, leaf_entry

QUICK = ("npt=1", "npt=0", "local")


def some(seed: int, count: int, *, exceptions: bool = False) -> Iterator[Guest]:
    for number in range(count):
        yield generate(seed, number, SETTINGS[number % len(SETTINGS)], exceptions=exceptions)


def agreed(runners: Sequence[Runner], guests: Iterator[Guest]) -> int:
    """Fails with the reports of all divergences that nothing explains; how many guests were compared."""
    found: list[Divergence] = []
    result = Session(runners).run(guests, found=found.append)
    if result.counts:
        told = "\n\n".join(map(describe, found))
        pytest.fail(f"{result.counts.total()} divergences of {len(result.counts)} sorts:\n\n{told}", pytrace=False)
    return sum(result.compared.values())


def test_guests_agree_on_local_and_amd(runners):
    hosts = runners(*QUICK)
    assert agreed(hosts, some(1, 700)) >= 350


def test_guests_with_exceptions_agree_on_local_and_amd(runners):
    hosts = runners(*QUICK)
    assert agreed(hosts, some(1, 300, exceptions=True)) >= 150


def test_guests_agree_on_amd_and_intel(runners):
    hosts = runners("npt=1", "ept=1")
    assert agreed(hosts, some(1, 100)) == 100
    assert agreed(hosts, some(1, 50, exceptions=True)) == 50


def test_guests_agree_on_amd_and_intel_with_shadow_paging(runners):
    hosts = runners("npt=1", "ept=0")
    assert agreed(hosts, some(5, 50)) == 50


def test_steps_go_on_after_a_write_to_a_page_table_that_kvm_shadows(runners):
    entry, _ = leaf_entry(BY_NAME["pae32"])
    change = f"81 35 {entry.to_bytes(4, 'little').hex()} 00 06 00 00"
    guest = written(
        "pae32",
        [("xor", change), ("invlpg", "0f 01 7d 00"), ("mov", "b8 01 00 00 00"), ("mov", "bb 02 00 00 00"),
         ("xor", change)],
    )  # fmt: skip
    agreed(runners("npt=1", "ept=0"), iter([guest] * 3))


@pytest.fixture
def agree(runners) -> Callable[..., None]:
    """Runs a guest that is written down on the quick hosts and compares; arguments as `guest.written`."""
    hosts = runners(*QUICK)

    def check(setting: str, instructions: Sequence[tuple[str, str]], rflags: int = 2, **registers: int) -> None:
        guest = written(setting, instructions, rflags, **registers)
        agreed(hosts, iter([guest] * 3))

    return check


# What the differential test has found, and was mended. The exit of an access is completed by KVM's instruction
# emulator, which keeps TF only at the rip where it was armed.


@pytest.mark.parametrize("setting", ["long64", "protected32"])
def test_steps_go_on_after_a_read_of_a_device_in_memory(agree, setting):
    # mov ax, [hole]; then something that leaves the guest with npt=0 only, so that a lost step shows.
    move = "66 8b 04 25 10 00 20 00" if setting == "long64" else "66 a1 10 00 20 00"
    agree(setting, [("mov", move), ("mov", "b8 01 00 00 00"), ("mov_cr", "0f 20 d8"), ("nop", "90")])


def test_steps_go_on_after_string_input(agree):
    agree(
        "protected32",
        [("mov", "ba 16 03 00 00"), ("mov", "bf b1 20 00 00"), ("mov", "b9 03 00 00 00"), ("ins", "f3 6d"),
         ("nop", "90"), ("mov_cr", "0f 20 d8"), ("mov", "b8 01 00 00 00")],
    )  # fmt: skip


def test_steps_go_on_after_a_string_moved_to_a_device(agree):
    agree(
        "protected32",
        [("mov", "be e5 20 00 00"), ("mov", "bf 28 01 20 00"), ("mov", "b9 01 00 00 00"), ("movs", "66 f3 a5"),
         ("smsw", "66 0f 01 e1"), ("nop", "90"), ("nop", "90")],
    )  # fmt: skip


def test_an_input_that_sti_took_along_is_no_exit_of_its_own(agree):
    agree("real", [("sti", "fb"), ("in", "66 e5 94"), ("nop", "90"), ("pushf", "9c"), ("pop", "58")])


def test_steps_go_on_when_pause_took_along_what_kvm_emulates(agree):
    agree("real", [("pause", "f3 90"), ("clts", "0f 06"), ("mov", "b8 01 00"), ("mov", "bb 02 00")])


def test_a_guest_at_cpl_3_may_end_in_an_instruction_that_was_taken_along(agree):
    agree("long64-user", [("nop", "90"), ("pause", "f3 90")], rflags=0x3002)


def test_a_stepped_halt_is_not_told_again_at_the_next_exception(agree):
    # Resumes at the end; the second and third run would halt at UD2 on kvm_pvm.
    agree("real", [("mov", "c7 06 40 26 8a 26"), ("cmp", "3c 01"), ("ud2", "0f 0b")])
