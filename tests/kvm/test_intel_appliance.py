"""The Intel appliance with shadow paging; with nested paging it runs part of the contract suite (conftest.py)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmbench as kb
from kvmbench.errors import HostLost, HostUnavailable, MisuseError


@pytest.fixture(scope="module")
def intel(need) -> Iterator[kb.Host]:
    try:
        host = kb.connect("appliance:intel", quiet=True, ept=0)
    except HostUnavailable as error:
        need("intel", f"no Intel appliance: {error}")
    with host:
        yield host


def test_the_intel_appliance_stops_guests_in_every_way(intel):
    assert intel.mechanisms.shortcomings == []
    assert intel.info.module == "kvm_intel"
    assert intel.info.parameters["kvm_intel.ept"] == "N"
    assert intel.provenance.emulator.startswith("Bochs 2")


def test_each_step_moves_on_and_a_recording_has_them_all(intel):
    with kb.Machine(intel, memory="1M") as m:
        m.load_asm("xor eax, eax\nloop: inc rax\njmp loop\n")
        assert [m.cpu.step().rip for _ in range(4)] == [0x1002, 0x1005, 0x1002, 0x1005]
        rec = m.cpu.record(500)
        assert list(rec.rip) == [0x1002, 0x1005] * 250
        assert m.cpu.regs.rax == 252


def test_an_option_of_another_appliance_is_refused():
    with pytest.raises(MisuseError, match="npt"):
        kb.connect("appliance:intel", npt=0)


def test_a_bochs_that_was_killed_is_a_lost_host_and_leaves_nothing(need):
    try:
        host = kb.connect("appliance:intel", quiet=True)
    except HostUnavailable as error:
        need("intel", f"no Intel appliance: {error}")
    with host:
        bochs = host._closer.__self__
        with kb.Machine(host, memory="1M") as m:
            m.load_asm("nop\nhlt\n")
            os.kill(bochs.pid, signal.SIGKILL)
            with pytest.raises(HostLost, match="Bochs was ended by SIGKILL"):
                m.cpu.step(1000)
    assert not Path(f"/proc/{bochs.pid}").exists()
