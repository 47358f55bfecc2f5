"""The AMD appliance itself: cold and warm starts, states that are no good, and every way it can end."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvmbench as kb
from kvmbench import errors
from kvmbench.core import wire
from kvmbench.host import image as images
from kvmbench.host import monitor, tsc
from kvmbench.host.appliance import Appliance, start_appliance
from kvmbench.host.cache import cache_directory
from kvmbench.host.client import Core
from kvmbench.host.initramfs import Archive
from kvmbench.host.monitor import Monitor
from kvmbench.host.qemu import find_qemu
from kvmbench.host.saved_state import SavedStates


def copy_of_the_cache(folder: Path, need: Callable[[str, str], None]) -> Path:
    try:
        find_qemu()
        images.build()
    except errors.HostUnavailable as error:
        need("amd", f"no appliance: {error}")
    folder.mkdir()
    for name in ("kernels", "images", "agents"):
        shutil.copytree(cache_directory() / name, folder / name)
    shutil.copy(cache_directory() / "default", folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need: Callable[[str, str], None]) -> Path:
    """A cache of the test's own, with this machine's kernel and agent and no saved state."""
    folder = copy_of_the_cache(tmp_path / "cache", need)
    monkeypatch.setenv("KVMBENCH_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def cache_with_a_state(tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, str], None]) -> Path:
    folder = copy_of_the_cache(tmp_path_factory.mktemp("shared") / "cache", need)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMBENCH_CACHE", str(folder))
        start_appliance().close()
    return folder


@pytest.fixture
def warm(cache_with_a_state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a saved state, for tests that leave it as it is."""
    monkeypatch.setenv("KVMBENCH_CACHE", str(cache_with_a_state))
    return cache_with_a_state


def state_of(cache: Path) -> Path:
    (path,) = (cache / "states").glob("*.state")
    return path


def works(appliance: Appliance) -> bool:
    """Whether the appliance's KVM makes a VM with memory and a vcpu; closes the appliance."""
    try:
        core = Core(appliance.channel)
        vm = core.create_vm()
        core.add_region(vm, 0, 1 << 20)
        vcpu = core.create_vcpu(vm, 0)
        return len(core.ioctl(vcpu, "KVM_GET_REGS")[1]) == 144 and core.host_info()["module.kvm_amd"] == "1"
    finally:
        appliance.close()


def wait_for_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(20_000), f"process {pid} is still there"
    finally:
        os.close(descriptor)


def test_the_first_start_boots_and_the_second_loads_what_the_first_saved(cache: Path) -> None:
    first = start_appliance()
    assert not first.warm
    # The one that was saved from goes on.
    assert works(first)
    second = start_appliance()
    assert second.warm
    assert works(second)
    assert [path.suffix for path in (cache / "states").iterdir()] == [".state"]
    assert state_of(cache).stat().st_mode & 0o777 == 0o600


def test_two_appliances_start_from_one_state_and_know_nothing_of_each_other(warm: Path) -> None:
    one, other = start_appliance(), start_appliance()
    assert one.warm
    assert other.warm
    vm = Core(one.channel).create_vm()
    with pytest.raises(errors.ClosedError):
        Core(other.channel).create_vcpu(vm, 0)
    one.close()
    assert works(other)


def test_what_an_appliance_does_is_not_written_to_the_state_it_was_started_from(warm: Path) -> None:
    before = state_of(warm).read_bytes()
    appliance = start_appliance()
    assert appliance.warm
    core = Core(appliance.channel)
    region = core.add_region(core.create_vm(), 0, 8 << 20)
    core.fill_region(region, 0, 8 << 20, 0xA5)
    appliance.close()
    assert state_of(warm).read_bytes() == before


def test_a_state_is_little_more_than_the_memory_that_the_appliance_used(warm: Path) -> None:
    status = state_of(warm).stat()
    assert 256 << 20 < status.st_size < 260 << 20
    assert status.st_blocks * 512 < 200 << 20


def test_a_cold_start_on_request_saves_nothing(cache: Path) -> None:
    appliance = start_appliance(warm=False)
    assert not appliance.warm
    appliance.close()
    assert not (cache / "states").exists()


def test_options_reach_kernel_and_modules_in_cold_and_in_warm_starts(cache: Path) -> None:
    for warm in (False, True):
        options = {"npt": 0, "vcpus": 2, "memory": "192M", "parameters": {"kvm.enable_vmware_backdoor": True}}
        appliance = start_appliance(**options)
        assert appliance.warm == warm
        info = Core(appliance.channel).host_info()
        appliance.close()
        assert info["parameter.kvm_amd.npt"] == "N"
        assert info["parameter.kvm.enable_vmware_backdoor"] == "Y"
        assert info["cpu.count"] == "2"
    assert state_of(cache).is_file()


def test_a_qemu_that_saved_and_does_not_go_on_is_no_appliance(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It would be one that stands still, and every call would wait for half a minute.
    execute, stopped = Monitor.execute, list[int]()
    others = set(qemus())  # of fixtures that last for the session

    def stop_before_cont(self: Monitor, name: str, **options: Any) -> Any:
        if name == "cont":
            (pid,) = set(qemus()) - others
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
        return execute(self, name, **options)

    monkeypatch.setattr(monitor, "_ANSWER_WITHIN_S", 3.0)
    monkeypatch.setattr(Monitor, "execute", stop_before_cont)
    with pytest.raises(errors.HostUnavailable, match="QEMU saved the machine and does not answer"):
        start_appliance().close()
    (pid,) = stopped
    wait_for_end(pid)
    assert set(qemus()) == others


def qemus() -> list[int]:
    """The emulators that this process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            ours = entry.name.isdigit() and f"PPid:\t{os.getpid()}\n" in (entry / "status").read_text()
            if ours and "qemu-system" in os.readlink(entry / "exe"):
                found.append(int(entry.name))
    return found


def test_a_qemu_behind_a_script_works_and_nothing_is_kept_of_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "my-qemu"
    script.write_text(f'#!/bin/sh\nexec {find_qemu().path} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("KVMBENCH_QEMU", str(script))
    appliance = start_appliance()
    appliance.write_note({"step": [0]})
    assert appliance.read_note() == {}
    assert not appliance.warm
    assert works(appliance)
    assert not (cache / "states").exists()


def test_notes_outlive_the_appliance(warm: Path) -> None:
    with contextlib.closing(start_appliance()) as appliance:
        assert appliance.read_note() == {}
        appliance.write_note({"step": [0, 3]})
    with contextlib.closing(start_appliance()) as again:
        assert again.read_note() == {"step": [0, 3]}


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def put_another_stream(path: Path) -> None:
    SavedStates(path.parent).save(path.stem, lambda descriptor: os.write(descriptor, bytes(100_000)) and None)


def end_the_stream_early(path: Path) -> None:
    half = path.read_bytes()[: path.stat().st_size // 2]
    SavedStates(path.parent).save(path.stem, lambda descriptor: os.write(descriptor, half) and None)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, put_another_stream, end_the_stream_early])
def test_a_damaged_state_falls_back_to_a_cold_start_and_is_replaced(
    cache: Path, damage: Callable[[Path], None]
) -> None:
    start_appliance().close()
    damage(state_of(cache))
    fallen_back = start_appliance()
    assert not fallen_back.warm
    assert works(fallen_back)
    again = start_appliance()
    assert again.warm
    assert works(again)


def test_a_cache_without_room_for_states_does_not_matter(cache: Path) -> None:
    (cache / "states").write_text("a file in the way")
    for _ in range(2):
        appliance = start_appliance()
        assert not appliance.warm
        assert works(appliance)


def test_a_killed_qemu_is_host_lost_at_the_next_call(warm: Path) -> None:
    appliance = start_appliance()
    core = Core(appliance.channel)
    os.kill(appliance.pid, signal.SIGKILL)
    with pytest.raises(errors.HostLost, match="the appliance is gone: QEMU was ended by SIGKILL"):
        core.hello()
    appliance.close()


def test_close_ends_qemu_and_may_be_repeated(warm: Path) -> None:
    appliance = start_appliance()
    appliance.close()
    with pytest.raises(ProcessLookupError):
        os.kill(appliance.pid, 0)
    appliance.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_qemu_does_not_outlive_a_killed_python(warm: Path, how: signal.Signals) -> None:
    script = (
        "import threading\n"
        "from kvmbench.host.appliance import start_appliance\n"
        "started = []\n"
        "thread = threading.Thread(target=lambda: started.append(start_appliance()))\n"
        "thread.start(); thread.join()\n"
        "print(started[0].pid, flush=True)\n"
        "input()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, 0)
        parent.send_signal(how)
    wait_for_end(pid)


def test_the_appliance_ends_when_its_channel_does(warm: Path) -> None:
    appliance = start_appliance()
    appliance.channel.close()
    wait_for_end(appliance.pid)
    appliance.close()


def test_a_kernel_that_panics_is_reported_with_its_words(cache: Path) -> None:
    image = images.current()
    assert image is not None
    empty = Archive()
    empty.add_directory("dev")
    image.initramfs.write_bytes(empty.finish())
    with pytest.raises(errors.HostUnavailable, match=r"(?s)did not come up.*Kernel panic"):
        start_appliance()


def test_a_module_that_does_not_load_is_reported_with_its_words(cache: Path) -> None:
    with pytest.raises(errors.HostUnavailable, match=r"(?s)without /dev/kvm.*kvm-amd with npt=7 .*Invalid argument"):
        start_appliance(parameters={"kvm_amd.npt": 7})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"parameters": {"kvm_amd.ntp": 0}}, r"'kvm_amd\.ntp': no such parameter of kvm_amd; did you mean 'npt'"),
        ({"parameters": {"kvm_arm.x": 0}}, r"'kvm_arm\.x': the appliance's modules are .*kvm_amd"),
        ({"parameters": {"npt": 0}}, "the appliance's modules are"),
        ({"parameters": {"kvm_amd.npt": "0 init=/bin/sh"}}, "is not a word"),
        ({"vcpus": 0}, "1 to 64"),
        ({"vcpus": 65}, "1 to 64"),
        ({"memory": "lots"}, "such as '256M'"),
        ({"memory": "64M"}, "128M at least"),
        ({"memory": 1000}, "128M at least"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(warm: Path, options: dict[str, object], match: str) -> None:
    with pytest.raises(errors.MisuseError, match=match):
        start_appliance(**options)


def test_memory_beyond_the_appliances_own_is_refused_and_the_appliance_lives_on(warm: Path) -> None:
    appliance = start_appliance()
    core = Core(appliance.channel)
    vm = core.create_vm()
    with pytest.raises(errors.HostError):
        core.add_region(vm, 0, 1 << 30)
    region = core.add_region(vm, 0, 64 << 20)
    core.fill_region(region, 0, 64 << 20, 0xA5)
    assert core.read_region(region, (64 << 20) - 16, 16) == b"\xa5" * 16
    assert works(appliance)


def test_many_calls_from_many_threads_reach_the_agent(warm: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    appliance = start_appliance()
    core = Core(appliance.channel)
    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(lambda _: core.hello()["wire_version"], range(400)))
    assert answers == {wire.KB_WIRE_VERSION}
    appliance.close()


def test_the_appliance_knows_the_rate_of_its_counter_however_busy_the_machine_is(cache: Path) -> None:
    khz = tsc.tsc_khz()
    assert khz is not None, "the agent measures it on x86-64 Linux"
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        with kb.connect("appliance", warm=False, quiet=True) as host, kb.Machine(host, memory="2M") as m:
            m.load_asm("mov eax, 1\nhlt", at=0x1000)
            assert m.cpu.step().rip == 0x1005
            assert m.vcpus[0].get_tsc_khz() == pytest.approx(khz, rel=0.001)
    finally:
        for process in busy:
            process.kill()
            process.wait()
