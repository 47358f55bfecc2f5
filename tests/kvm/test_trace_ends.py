"""Traces that do not go smoothly: events lost, a full log, ends of every sort, hosts that give no events."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import kvmbench as kb
from kvmbench import errors
from kvmbench.core.agent import agent_binary
from kvmbench.host import trace_messages
from kvmbench.host.cache import cache_directory
from kvmbench.uapi import ExitReason

from .test_trace import SPIN, log_count

TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")
CPUIDS = "mov esi, {count}\n0: xor eax, eax\ncpuid\ndec esi\njnz 0b\nhlt"
FOREVER = "again: inc qword ptr [0x3000]\nxor eax, eax\ncpuid\njmp again"


@pytest.fixture(autouse=True)
def in_time(request: pytest.FixtureRequest) -> None:
    """Not in Bochs, whose kernel takes 4 s for each trace with events: nothing here depends on the processor."""
    if "host" in request.fixturenames and request.getfixturevalue("host").info.emulator.startswith("Bochs"):
        pytest.skip("the same kernel is tested in QEMU, where it is 20 times as fast")


def folder() -> Path:
    """The directory instances/ of this machine, where tracefs is mounted; elsewhere it is not to be seen."""
    found = (Path(path) / "instances" for path in TRACEFS)
    return next((path for path in found if path.is_dir()), Path(TRACEFS[0]) / "instances")


def instances() -> set[str]:
    return {path.name for path in folder().iterdir()} if folder().is_dir() else set()


def instances_of(*pids: int) -> set[str]:
    return {name for name in instances() if name.startswith(tuple(f"kvmbench-{pid}-" for pid in pids))}


@pytest.fixture
def nothing_left(host: kb.Host) -> Iterator[None]:
    """The test leaves no directory in instances/ of this machine; others may trace meanwhile."""
    pids = (os.getpid(), host.core.hello()["agent_pid"])
    assert not instances_of(*pids)
    yield
    assert not instances_of(*pids)


@pytest.fixture
def spinning(machine: kb.Machine) -> Iterator[Callable[[str], threading.Thread]]:
    """Runs a guest on a thread of its own until the end of the test."""
    threads = []

    def start(source: str) -> threading.Thread:
        machine.load_asm(source, at=0x1000)

        def run() -> None:
            with contextlib.suppress(errors.HostLost, errors.ClosedError):
                machine.cpu.run(deadline_s=100)

        thread = threading.Thread(target=run)
        threads.append(thread)
        thread.start()
        while machine.memory.read_u64(0x3000) < 3:
            assert thread.is_alive()
        return thread

    yield start
    for thread in threads:
        while thread.is_alive():
            with contextlib.suppress(errors.ClosedError, errors.HostLost):
                machine.cpu.interrupt()
            thread.join(0.01)


# What one KVM_RUN and one thread do


def test_a_kvm_run_that_began_before_the_trace_and_lasts_is_seen(machine, spinning):
    # All its exits stay in KVM, so but for the trace KVM_RUN would not return.
    thread = spinning(FOREVER)
    with kb.trace(machine, ("kvm_cpuid",), own_only=False) as t:
        while np.count_nonzero(t.events["kvm_cpuid"].vcpu == 0 if "kvm_cpuid" in t.events else []) < 100:
            assert thread.is_alive()
    assert thread.is_alive(), "it was not stopped"
    events = t.events["kvm_cpuid"]
    assert set(events.vcpu.tolist()) <= {0, -1}
    assert np.count_nonzero(events.vcpu == 0) >= 100
    # Whose it is shows once KVM_RUN begins anew, and is known from then on.
    assert np.all(np.diff(events.vcpu) >= 0)
    assert set(t.exits.vcpu.tolist()) <= {0}


def test_events_without_the_log_are_told_apart_too(machine):
    machine.load_asm(CPUIDS.format(count=5), at=0x1000)
    with kb.trace(machine, ("kvm_cpuid",), log=False) as t:
        machine.cpu.run(deadline_s=30)
    assert len(t.log) == 0
    assert t.events["kvm_cpuid"].vcpu.tolist() == [0] * 5
    assert not any("lost" in note for note in t.notes)


def test_events_of_vcpus_on_one_thread_are_not_left_out_silently_without_the_log(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm(CPUIDS.format(count=5), at=0x1000)
        with kb.trace(m, ("kvm_cpuid",), log=False) as t:
            for cpu in m.cpus:
                cpu.regs.rip = 0x1000
                cpu.run(deadline_s=30)
    told = t.events["kvm_cpuid"].vcpu.tolist() if t.events.count else []
    assert told == [0] * 5 + [1] * 5 or "without the log nothing tells whose 10 events were: left out" in t.notes


def test_another_machine_on_the_same_thread_is_not_traced(host):
    with kb.Machine(host, memory="2M") as a, kb.Machine(host, memory="2M") as b:
        for m, count in ((a, 4), (b, 9)):
            m.load_asm(CPUIDS.format(count=count), at=0x1000)
        with kb.trace(a, ("kvm_cpuid",), own_only=True) as t:
            b.cpu.run(deadline_s=30)
            a.cpu.run(deadline_s=30)
            b.reset()
            b.load_asm(CPUIDS.format(count=9), at=0x1000)
            b.cpu.run(deadline_s=30)
        assert t.events["kvm_cpuid"].vcpu.tolist() == [0] * 4


@pytest.mark.parametrize("log", [True, False])
def test_another_machine_on_the_same_thread_is_not_traced_where_rows_are_lost(host, log):
    count = 60
    with kb.Machine(host, memory="2M") as a, kb.Machine(host, memory="2M") as b:
        for m, port in ((a, 0x99), (b, 0x98)):
            m.load_asm(f"mov ecx, {count}\n0: out {port:#x}, al\nloop 0b\nhlt", at=0x1000)
        with kb.trace(a, ("kvm_pio",), own_only=True, log_rows=16, log=log) as t:
            assert t._collector is not None
            with t._collector._reading:  # a reader that comes too late
                b.cpu.run(deadline_s=30)
                a.cpu.run(deadline_s=30)
    ports = t.events["kvm_pio"]["port"].tolist()
    if log or host.core.channel.__class__.__name__ != "LocalChannel":
        assert set(ports) == {0x99}
    if host.core.channel.__class__.__name__ == "LocalChannel":
        assert any("other machines are in this process" in note for note in t.notes)
    else:
        assert len(ports) == count


# Too much


def test_events_that_found_no_room_are_counted(machine):
    count = 8000
    machine.load_asm(CPUIDS.format(count=count), at=0x1000)
    with kb.trace(machine, ("kvm_cpuid",), buffer="64K") as t:
        collector, opened = t._collector, t._opened
        assert collector is not None
        assert opened is not None
        with collector._reading:  # a reader that comes too late
            machine.cpu.run(deadline_s=60)
            overrun = sum(
                trace_messages.ring_statistics(machine.host.core, opened.handle, cpu).get("overrun", 0)
                for cpu in range(opened.cpus)
            )
    kept = len(t.events["kvm_cpuid"])
    assert 0 < kept < count
    assert t.events.lost == overrun > 0
    # What was lost is the oldest, of our own marks perhaps some: nine are written before the guest runs.
    assert count <= kept + t.events.lost <= count + 9
    assert any(f"{t.events.lost:,} events lost" in note for note in t.notes)
    assert f"{t.events.lost:,} events lost" in repr(t.summary())
    assert t.events.bad_pages == 0


def test_a_log_that_is_full_counts_what_it_loses(machine):
    machine.load_asm("mov ecx, 60\n0: out 0x99, al\nloop 0b\nhlt", at=0x1000)
    with kb.trace(machine, (), log_rows=16) as t:
        collector = t._collector
        assert collector is not None
        with collector._reading:
            machine.cpu.run(deadline_s=60)
    assert len(t.log) == 16
    machine.reset()
    machine.load_asm("mov ecx, 60\n0: out 0x99, al\nloop 0b\nhlt", at=0x1000)
    with kb.trace(machine, ()) as whole:
        machine.cpu.run(deadline_s=60)
    assert t.log.lost == len(whole.log) - 16
    assert t.notes == (f"{t.log.lost:,} rows of the log were lost: take more log_rows",)
    # The first are kept: they tell how it came to that.
    assert t.log["rip"].tolist() == whole.log["rip"].tolist()[:16]


def test_a_trace_ends_at_its_limit_and_says_so(machine, spinning):
    thread = spinning(FOREVER)
    with kb.trace(machine, ("kvm_cpuid", "kvm_emulate_insn"), limit="1M") as t:
        collector = t._collector
        assert collector is not None
        while not collector.full:
            assert thread.is_alive()
        taken = collector.taken_bytes
    assert collector.taken_bytes == taken >= 1 << 20
    assert thread.is_alive()
    assert any("the limit of 1,048,576 bytes was reached" in note for note in t.notes)
    assert t.events.count > 1000


# Ends


def test_an_exception_in_the_body_ends_the_trace_and_keeps_it(machine, nothing_left):
    machine.load_asm("out 0x99, al\nhlt", at=0x1000)
    t = kb.trace(machine, ("kvm_cpuid",))

    def body() -> None:
        with t:
            machine.cpu.run(deadline_s=30)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert not t.running
    assert log_count(t, ExitReason.IO) == 1
    with kb.trace(machine, ()):
        pass


def test_ctrl_c_while_the_guest_runs_keeps_what_there_was(machine, nothing_left):
    machine.load_asm(SPIN, at=0x1000)
    stopped = threading.Event()

    def press() -> None:
        while not stopped.wait(0.01):
            if machine.cpu.running and machine.memory.read_u64(0x3000) > 5:
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), kb.trace(machine, ("kvm_cpuid",)) as t:
            machine.cpu.run(deadline_s=60)
    finally:
        stopped.set()
        thread.join()
    assert log_count(t, ExitReason.IO) >= 5
    assert not t.running


def test_a_machine_closed_within_the_body_ends_the_trace(host, nothing_left):
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(SPIN, at=0x1000)
        with kb.trace(m, ("kvm_pio",)) as t:
            m.cpu.run(deadline_s=0.2)
            seen = len(t.log)
            m.close()
            assert len(t.log) >= seen, "what there is can be looked at"
    assert len(t.log) >= seen > 0
    assert any("the trace ends here: " in note for note in t.notes), t.notes
    assert t.summary().exits == len(t.exits)
    with pytest.raises(errors.ClosedError, match="the machine is closed"), kb.trace(m, ()):
        pass


def test_a_host_closed_within_the_body_ends_the_trace(fresh_host, nothing_left):
    m = kb.Machine(fresh_host, memory="2M")
    m.load_asm(SPIN, at=0x1000)
    with kb.trace(m, ("kvm_pio",)) as t:
        m.cpu.run(deadline_s=0.2)
        seen = len(t.log)
        fresh_host.close()
    assert len(t.log) >= seen > 0
    assert any("the trace ends here: " in note for note in t.notes), t.notes
    assert t.exits.time_ns[0] > 0


def test_a_host_that_dies_leaves_what_was_read(need):
    try:
        host = kb.connect("local", agent=True, quiet=True)
    except errors.HostUnavailable as error:
        need("local", f"no agent: {error}")
    with host, kb.Machine(host, memory="2M") as m:
        m.load_asm(SPIN, at=0x1000)
        t = kb.trace(m)
        seen = [0]

        def body() -> None:
            with t:
                m.cpu.run(deadline_s=0.2)
                seen[0] = len(t.log)
                os.kill(host.core.hello()["agent_pid"], signal.SIGKILL)
                while True:
                    m.cpu.run(deadline_s=0.2)

        with pytest.raises(errors.HostLost):
            body()
        assert len(t.log) >= seen[0] > 0
        assert any("the trace ends here: " in note for note in t.notes), t.notes
        assert t.summary().exits > 0


# What is left


_TRACE_AND_WAIT = """
import sys, time
import kvmbench as kb
with kb.connect("local") as host, kb.Machine(host, memory="2M") as m, kb.trace(m, ("kvm_cpuid",)) as t:
    print(t.requested, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def traced(need) -> None:
    """This machine's own tracefs can be used."""
    if not os.access(folder(), os.W_OK) or not os.access("/dev/kvm", os.W_OK):
        pytest.skip(f"no tracefs mounted at {' or '.join(TRACEFS)}, or no KVM, that this user may use")


def trace_once() -> set[str]:
    """The directories there are while this process traces."""
    with kb.connect("local", quiet=True) as host, kb.Machine(host, memory="2M") as m, kb.trace(m, ("kvm_exit",)):
        assert len(instances_of(os.getpid())) == 1
        return instances()


def test_what_a_killed_process_left_is_removed_by_the_next_trace(traced):
    with subprocess.Popen([sys.executable, "-c", _TRACE_AND_WAIT], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            assert b"kvm_cpuid" in child.stdout.readline()
            (left,) = instances_of(child.pid)
            assert left in trace_once(), "its process lives"
        finally:
            child.kill()
    assert left in instances()
    assert (folder() / left / "tracing_on").read_text() == "1\n"
    assert left not in trace_once()


# Where a process got the number of one that was killed.
OLD = "kvmbench-1-000000010"


def test_what_was_left_is_removed_where_another_process_has_the_number(traced):
    (folder() / OLD).mkdir()
    assert OLD not in trace_once()


def test_directories_of_others_and_of_the_living_are_left_alone(traced):
    now = int(time.clock_gettime(time.CLOCK_MONOTONIC))
    others = {"somebodys", "kvmbench", "kvmbench-", "kvmbench-1-fffff", "kvmbench-x1", f"{OLD}x", f"{OLD}-1"}
    others |= {"kvmbench--1-000000010", "kvmbench-+1-000000010", "kvmbench- 1-000000010", "kvmbench-1-00000001g"}
    young = f"kvmbench-1-{now:x}00000000"
    made = []
    with contextlib.ExitStack() as stack:
        try:
            for name in (*others, young, OLD):
                (folder() / name).mkdir()
                made.append(name)
            stack.enter_context((folder() / OLD / "per_cpu/cpu0/trace_pipe_raw").open("rb"))
            assert trace_once() >= others | {young, OLD}
        finally:
            stack.close()
            for name in made:
                with contextlib.suppress(FileNotFoundError):
                    (folder() / name).rmdir()


def test_the_systems_own_tracing_is_left_alone(traced):
    top = folder().parent
    told = ("tracing_on", "trace_clock", "buffer_size_kb", "set_event", "set_event_pid", "current_tracer")
    before = {name: (top / name).read_text() for name in told}
    with kb.connect("local", quiet=True) as host, kb.Machine(host, memory="2M") as m:
        with kb.trace(m, ("kvm_exit", "sched/sched_switch")):
            assert {name: (top / name).read_text() for name in told} == before
        descriptors = sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with kb.trace(m, ("kvm_exit",)):
                pass
        assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert {name: (top / name).read_text() for name in told} == before


# Without privilege


_WITHOUT = """
import sys
import kvmbench as kb
from kvmbench.errors import KvmbenchError
with kb.connect("local", **({"agent": True} if sys.argv[1] == "agent" else {})) as host:
    with kb.Machine(host, memory="2M") as m:
        m.load_asm("mov ecx, 7\\n0: out 0x99, al\\nloop 0b\\nhlt", at=0x1000)
        with kb.trace(m) as t:
            m.cpu.run(deadline_s=30)
        print("log", {row.key[0]: row.count for row in t.summary()}, len(t.events))
        print("notes", t.notes)
        try:
            with kb.trace(m, "kvm_exit"):
                print("traced")
        except KvmbenchError as error:
            print(type(error).__name__, error)
"""
# Another /sys/kernel/tracing and .../debug, empty; no right to mount.
_HIDE = """
set -e
for folder in /sys/kernel/tracing /sys/kernel/debug; do [ ! -d $folder ] || mount -t tmpfs none $folder; done
exec setpriv --bounding-set -sys_admin --inh-caps -sys_admin "$@"
"""


@pytest.fixture
def open_cache() -> Iterator[Path]:
    """A cache with the agent in it that anybody may read; pytest's own folders are for one user."""
    with tempfile.TemporaryDirectory() as folder:
        binary = agent_binary(cache_directory())
        to = Path(folder) / "agents" / binary.parent.name
        to.mkdir(parents=True)
        shutil.copy(binary, to)
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("host_kind", ["library", "agent"])
@pytest.mark.parametrize("why", ["hidden", "denied"])
def test_without_the_right_to_trace_the_log_works_and_the_note_says_what_to_do(host_kind, why, need, open_cache):
    if os.geteuid() != 0 or not os.access("/dev/kvm", os.W_OK):
        pytest.skip("only root can give its rights up, and there has to be a /dev/kvm")
    prefix = ["unshare", "--mount", "sh", "-c", _HIDE, "sh"]
    if why == "denied":
        # As somebody else, who may use /dev/kvm only.
        group = Path("/dev/kvm").stat().st_gid
        prefix = ["setpriv", "--reuid", "65534", "--regid", str(group), "--clear-groups", "--inh-caps", "-all"]
    code = f"import os; os.open('/dev/kvm', os.O_RDWR); import {kb.__name__}"
    tried = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        need("namespaces", f"no process with fewer rights: {tried.stderr.strip()[-200:]}")
    done = subprocess.run(
        [*prefix, sys.executable, "-c", _WITHOUT, host_kind],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "KVMBENCH_CACHE": str(open_cache)},
    )
    assert done.returncode == 0, done.stderr
    log, notes, refused = done.stdout.splitlines()
    assert log.startswith("log {")
    assert "'IO': 7" in log
    assert "'HLT': 1" in log
    assert log.endswith(" 0")
    for said in (notes, refused):
        assert "no events of the kernel: " in said
        assert 'tracing takes root: kb.connect("local", sudo=True), or kb.connect("appliance")' in said
    assert refused.startswith("UnsupportedError ")
