"""The Intel appliance itself: its channel, its saved state, what is mended of Bochs, and every way it can end.

The contract suite runs on it besides (conftest.py).
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvmbench as kb
from kvmbench.core import wire
from kvmbench.errors import HostLost, HostUnavailable, MisuseError
from kvmbench.host import image as images
from kvmbench.host.bochs import find_bochs
from kvmbench.host.cache import cache_directory
from kvmbench.host.disc_cache import DISCS
from kvmbench.host.initramfs import Archive
from kvmbench.host.intel import STATES, start_intel

# Each boots the kernel: a minute for all of them on an idle machine.
every_end = pytest.mark.skipif(os.environ.get("KVMBENCH_INTEL") != "all", reason="KVMBENCH_INTEL=all tries it")
HELLO = struct.pack("<IIIi", 16, 0, wire.KB_HELLO, 0)


@pytest.fixture(scope="module")
def intel(need: Callable[[str, str], None]) -> Iterator[kb.Host]:
    try:
        host = kb.connect("appliance:intel", quiet=True, ept=0)
    except HostUnavailable as error:
        need("intel", f"no Intel appliance: {error}")
    with host:
        yield host


@pytest.fixture
def cache(intel: kb.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, with what this machine's has, saved states included."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("kernels", "images", "agents", DISCS, STATES):
        shutil.copytree(cache_directory() / name, folder / name)
    shutil.copy(cache_directory() / "default", folder)
    monkeypatch.setenv("KVMBENCH_CACHE", str(folder))
    return folder


def pid_of(host: kb.Host) -> int:
    return int(host._closer.__self__.pid)


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_the_intel_appliance_stops_guests_in_every_way(intel: kb.Host) -> None:
    assert intel.mechanisms.shortcomings == []
    assert intel.info.module == "kvm_intel"
    assert intel.info.parameters["kvm_intel.ept"] == "N"
    assert intel.provenance.emulator.startswith("Bochs 2")


def test_an_option_of_another_appliance_is_refused() -> None:
    with pytest.raises(MisuseError, match="npt"):
        kb.connect("appliance:intel", npt=0)


# The channel (core/port.h).


def test_memory_of_every_size_passes_the_channel_as_it_is(intel: kb.Host) -> None:
    # Words of four bytes, a buffer of 4096 and announcements of 64 KiB at most: each has an edge.
    with kb.Machine(intel, memory="2M") as m:
        for size in (0x10000, 1, 2, 3, 5, 4095, 4097, 0x10000 - 24, 0x10001, 0x100000 + 3):
            data = os.urandom(size)
            m.memory.write(0x80000, data)
            assert m.memory.read(0x80000, size) == data


def test_ten_thousand_exchanges_lose_nothing(intel: kb.Host) -> None:
    for _ in range(10_000):
        assert len(intel.core.channel.call(HELLO)) == 16 + 24


def test_a_long_recording_comes_whole(intel: kb.Host) -> None:
    with kb.Machine(intel, memory="1M") as m:
        m.load_asm("xor eax, eax\nloop: inc rax\njmp loop\n")
        assert [m.cpu.step().rip for _ in range(4)] == [0x1002, 0x1005, 0x1002, 0x1005]
        rec = m.cpu.record(20_000, progress=False)
        assert list(rec.rip) == [0x1002, 0x1005] * 10_000
        assert m.cpu.regs.rax == 10_002


def test_requests_of_others_are_answered_while_a_guest_runs(intel: kb.Host) -> None:
    with kb.Machine(intel, memory="1M") as m:
        m.load_asm("again: inc qword ptr [0x3000]\njmp again\n")
        running = threading.Thread(target=m.cpu.run)
        running.start()
        seen = [m.memory.read(0x3000, 8) for _ in range(200)]
        m.cpu.interrupt()
        running.join()
        assert m.cpu.last_stop.cause is kb.Cause.INTERRUPTED
        assert len(set(seen)) > 2


def test_between_requests_the_emulator_uses_no_processor(intel: kb.Host) -> None:
    with kb.Machine(intel, memory="1M") as m:
        m.load_asm("nop\njmp 0x1000\n")
        m.cpu.step(100)
        before = processor_ticks(pid_of(intel))
        time.sleep(1.0)  # what is measured is a stretch of time
        assert processor_ticks(pid_of(intel)) - before < 10  # of 100


# What is mended of Bochs 2.7 (host/bochs_port.c).


@pytest.mark.parametrize("code", ["jmp 0x1000", "l: inc rax\njmp l"])
def test_a_guest_that_holds_interrupts_off_does_not_hold_off_the_deadline(intel: kb.Host, code: str) -> None:
    with kb.Machine(intel, memory="1M") as m:
        m.load_asm(code)
        assert not m.cpu.regs.rflags & 0x200
        assert m.cpu.run(deadline_s=0.2).cause is kb.Cause.DEADLINE


@pytest.mark.parametrize("code", ["out 0xe9, al", "cpuid"])
def test_a_stepped_exit_leaves_no_trap_behind(intel: kb.Host, code: str) -> None:
    with kb.Machine(intel, memory="2M") as m:
        m.load_asm(f"{code}\nnop\nhlt\n")
        m.cpu.log_exits()
        assert m.cpu.step().rip == 0x1002
        # A trap left behind would stop the next step where it is, or be the guest's, which has no IDT.
        assert m.cpu.step().rip == 0x1003
        m.reset()
        m.cpu.step()
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.HALT


# Its starts and its ends.


def test_a_saved_state_starts_with_what_was_found_when_it_was_saved(intel: kb.Host) -> None:
    warm = start_intel(ept=0)
    try:
        assert warm.warm
        assert warm.note["mechanisms"] == intel.mechanisms.to_json()
        assert warm.emulator_version == intel.info.emulator_version
    finally:
        warm.close()


def test_a_state_with_a_changed_byte_is_replaced(cache: Path) -> None:
    for memory in (cache / STATES).glob("*/memory.ram"):
        with memory.open("r+b") as file:
            file.seek(0x2000000)
            data = file.read(64)
            file.seek(0x2000000)
            file.write(bytes(byte ^ 0x55 for byte in data))
    for warm in (False, True):
        host = start_intel(ept=0)
        host.close()
        assert host.warm is warm


@every_end
def test_a_state_that_bochs_cannot_load_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmbench.host.bochs_state.BochsState.intact", lambda state: True)
    for text in (cache / STATES).glob("*/cpu0"):
        text.write_text("nothing of the kind".ljust(text.stat().st_size))
    host = start_intel(ept=0)
    host.close()
    assert not host.warm


@every_end
def test_a_full_disk_costs_the_state_and_nothing_else(cache: Path) -> None:
    shutil.rmtree(cache / STATES)
    (cache / STATES).write_text("in the way")
    host = start_intel(ept=0)
    host.close()
    assert not host.warm
    assert (cache / STATES).is_file()


def test_a_kernel_that_panics_is_reported_with_its_words(cache: Path) -> None:
    image = images.current()
    assert image is not None
    empty = Archive()
    empty.add_directory("dev")
    image.initramfs.write_bytes(empty.finish())
    with pytest.raises(HostUnavailable, match=r"(?s)did not come up.*Kernel panic"):
        start_intel(parameters={"kvm_intel.vpid": 0})  # of which there is no state


@every_end
def test_a_module_that_does_not_load_is_reported_with_its_words(cache: Path) -> None:
    with pytest.raises(HostUnavailable, match=r"(?s)without /dev/kvm.*kvm-intel with ept=7 .*Invalid argument"):
        start_intel(parameters={"kvm_intel.ept": 7})


@every_end
def test_a_bochs_without_what_is_called_in_it_says_so(
    intel: kb.Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "bochs"
    script.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {find_bochs().path} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("KVMBENCH_BOCHS", str(script))
    with pytest.raises(HostUnavailable, match=r"(?s)did not come up.*this Bochs has no channel: No such device"):
        start_intel(warm=False)


def test_a_bochs_that_was_killed_is_a_lost_host_and_leaves_nothing(intel: kb.Host) -> None:
    with kb.connect("appliance:intel", quiet=True, ept=0) as host:
        pid = pid_of(host)
        with kb.Machine(host, memory="1M") as m:
            m.load_asm("nop\nhlt\n")
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(HostLost, match="Bochs was ended by SIGKILL"):
                m.cpu.step(1000)
    assert not Path(f"/proc/{pid}").exists()


def test_the_appliance_ends_when_its_channel_does(intel: kb.Host) -> None:
    appliance = start_intel(ept=0)
    appliance.channel.close()
    limit = time.monotonic() + 20
    while appliance._running.process.running and time.monotonic() < limit:
        time.sleep(0.05)
    assert not appliance._running.process.running
    appliance.close()
