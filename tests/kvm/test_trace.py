"""What a trace says of guests whose exits are known beforehand: counts, times, addresses, whose they were."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import kvmbench as kb
from kvmbench import errors
from kvmbench.machine import Device
from kvmbench.traces.exits import NOT_TOLD
from kvmbench.traces.live import LiveTrace
from kvmbench.uapi import ExitReason

#: As few as the tests need: on the Intel appliance each kind costs a round trip of 45 ms.
EVENTS = ("kvm_exit", "kvm_entry", "kvm_cpuid", "kvm_msr", "kvm_pio", "kvm_userspace_exit")
OUTS, INS, CPUIDS, WRITES, READS, RDMSRS = 8, 3, 30, 4, 2, 7
ANSWERED = OUTS + INS + WRITES + READS
MIXED = f"""
start:  mov esi, {OUTS}
outs:   mov al, 0x11
        out 0x99, al
        dec esi
        jnz outs
        mov esi, {INS}
ins:    in al, 0x99
        dec esi
        jnz ins
        mov esi, {CPUIDS}
ids:    xor eax, eax
        cpuid
        dec esi
        jnz ids
        mov esi, {WRITES}
writes: mov dword ptr [0x40000000], 0x22
        dec esi
        jnz writes
        mov esi, {READS}
reads:  mov eax, [0x40000008]
        dec esi
        jnz reads
        mov esi, {RDMSRS}
        mov ecx, 0x1b
msrs:   rdmsr
        dec esi
        jnz msrs
        hlt
"""
#: What the processor's exits are called, by KVM's module: of each its names and how many the guest makes at least.
NAMES = {
    "kvm_amd": {
        ("io",): OUTS + INS,
        ("cpuid",): CPUIDS,
        ("npf", "PF excp"): WRITES + READS,
        ("msr",): RDMSRS,
        ("hlt",): 1,
    },
    "kvm_intel": {
        ("IO_INSTRUCTION",): OUTS + INS,
        ("CPUID",): CPUIDS,
        ("EPT_VIOLATION", "EPT_MISCONFIG"): WRITES + READS,
        ("MSR_READ",): RDMSRS,
        ("HLT",): 1,
    },
}


class Sink(Device):
    """Memory-mapped registers that read 0, which no write changes."""

    name = "sink"
    mmio = (range(0x4000_0000, 0x4000_1000),)

    def mmio_write(self, gpa: int, value: int, size_bytes: int) -> None:
        """Nothing."""

    def mmio_read(self, gpa: int, size_bytes: int) -> int:
        return 0


SPIN = "again: inc qword ptr [0x3000]\nout 0x99, al\njmp again"


@dataclasses.dataclass
class Taken:
    """A trace that has ended, and the machine it was of."""

    trace: LiveTrace
    machine: kb.Machine
    stop: kb.Stop


@pytest.fixture(scope="module")
def mixed(host: kb.Host) -> Iterator[Taken]:
    """MIXED, run once from its beginning to HLT."""
    with kb.Machine(host, memory="2M", devices=[Sink()]) as m:
        m.load_asm(MIXED, at=0x1000)
        with kb.trace(m, EVENTS) as t:
            stop = m.cpu.run(deadline_s=30)
        assert stop.cause is kb.Cause.HALT
        yield Taken(t, m, stop)


def module_of(host: kb.Host) -> str:
    return host.info.module


def counted(t: kb.trace.trace.Trace | LiveTrace, *names: str) -> int:
    return sum(int(np.count_nonzero(t.exits.reasons == name)) for name in names)


def log_count(t: LiveTrace, reason: ExitReason) -> int:
    return int(np.count_nonzero((t.log["exit"] == reason) & (t.log["error"] == 0)))


# Counts


def test_the_log_has_each_exit_to_user_space(mixed):
    assert log_count(mixed.trace, ExitReason.IO) == OUTS + INS
    assert log_count(mixed.trace, ExitReason.MMIO) == WRITES + READS
    assert log_count(mixed.trace, ExitReason.HLT) == 1
    assert mixed.trace.log.lost == 0
    # What else there is are KVM_RUNs that only finish an instruction.
    rest = mixed.trace.log.data[~np.isin(mixed.trace.log["exit"], [ExitReason.IO, ExitReason.MMIO, ExitReason.HLT])]
    assert np.isin(rest["error"], [4]).all() or not len(rest)


def test_the_log_says_what_each_exit_was_about(mixed):
    data = mixed.trace.log.data
    answered = data[mixed.trace.log.answered]
    io, mmio = answered[answered["exit"] == ExitReason.IO], answered[answered["exit"] == ExitReason.MMIO]
    one_byte, four_bytes, write = 1 | 1 << 16, 4 | 1 << 16, 1 << 8
    assert io["where"].tolist() == [0x99] * (OUTS + INS)
    assert io["detail"].tolist() == [one_byte | write] * OUTS + [one_byte] * INS
    assert io["value"].tolist() == [0x11] * OUTS + [0] * INS
    assert mmio["where"].tolist() == [0x4000_0000] * WRITES + [0x4000_0008] * READS
    assert mmio["detail"].tolist() == [four_bytes | write] * WRITES + [four_bytes] * READS
    assert mmio["value"].tolist() == [0x22] * WRITES + [0] * READS


def test_the_processors_exits_are_those_of_the_guest(mixed):
    wanted = NAMES.get(module_of(mixed.machine.host))
    if wanted is None:
        pytest.skip(f"{module_of(mixed.machine.host)} runs CPL 0 in its emulator: it tells no exits of a processor")
    t = mixed.trace
    for names, count in wanted.items():
        found = counted(t, *names)
        # Memory that is met for the first time faults, too.
        assert found >= count if "npf" in names or "EPT_VIOLATION" in names else found == count, names
    assert len(t.exits) == len(t.events["kvm_exit"]) + int(np.count_nonzero(t.exits.isa == 0))
    assert len(t.events["kvm_cpuid"]) == CPUIDS
    assert len(t.events["kvm_msr"]) == RDMSRS
    assert len(t.events["kvm_pio"]) == OUTS + INS


def test_counts_are_those_of_kvms_own_statistics(mixed):
    t, (statistics,) = mixed.trace, mixed.trace.statistics
    events = t.events.counts
    assert events["kvm_cpuid"] == CPUIDS
    assert events["kvm_userspace_exit"] == len(t.log)
    assert statistics.get("signal_exits", 0) == int(np.count_nonzero(t.log["error"] == 4))
    assert statistics["mmio_exits"] == log_count(t, ExitReason.MMIO)
    assert statistics["halt_exits"] == 1
    if module_of(mixed.machine.host) not in NAMES:
        # KVM counts I/O where the processor's exit is dealt with, and not in its emulator, which runs CPL 0 there. Each
        # turn of that is an exit of which no kvm_exit tells.
        assert "io_exits" not in statistics
        assert statistics["exits"] >= len(t.log)
        return
    assert statistics["exits"] == events["kvm_exit"] == events["kvm_entry"]
    assert statistics["io_exits"] == log_count(t, ExitReason.IO)
    assert statistics.get("irq_exits", 0) == counted(t, "interrupt", "EXTERNAL_INTERRUPT")


# Times


def test_the_parts_add_up_to_what_the_log_says_the_run_took(mixed):
    exits, log = mixed.trace.exits, mixed.trace.log
    parts = sum(int(c[c != NOT_TOLD].sum()) for c in (exits.guest_ns, exits.kvm_ns, exits.user_ns, exits.outside_ns))
    entered = int(log["enter_ns"][0])
    if exits.isa.any():
        entered = int(mixed.trace.events["kvm_entry"].time_ns[0])
    whole = int(log["leave_ns"][-1]) - entered
    assert abs(whole - parts) <= len(exits) * 1000 + mixed.trace.clock_error_ns, "a microsecond an exit"
    for column in (exits.guest_ns, exits.kvm_ns, exits.user_ns, exits.outside_ns):
        assert ((column >= 0) | (column == NOT_TOLD)).all()


def test_times_are_in_order_and_within_the_trace(mixed):
    t = mixed.trace
    assert (np.diff(t.exits.time_ns) >= 0).all()
    log = t.log.data
    assert (log["leave_ns"] >= log["enter_ns"]).all()
    assert (log["enter_ns"][1:] >= log["leave_ns"][:-1]).all(), "one vcpu's KVM_RUNs do not overlap"
    error = t.clock_error_ns
    for columns in t.events.values():
        assert (np.diff(columns.time_ns) >= 0).all()
        mine = columns.time_ns[columns.vcpu == 0]
        assert (mine >= log["enter_ns"][0] - error).all(), columns.name
        assert (mine <= log["leave_ns"][-1] + error).all(), columns.name


def test_each_event_lies_in_the_kvm_run_that_made_it(mixed):
    t = mixed.trace
    inside = t.events["kvm_userspace_exit"].time_ns
    assert (inside >= t.log["enter_ns"]).all()
    assert (inside <= t.log["leave_ns"]).all()


def test_most_exits_have_a_time(mixed):
    summary = mixed.trace.summary()
    assert summary.untimed <= 1, "all but the last"
    assert summary.exits == len(mixed.trace.exits)
    assert sum(row.total_ns or 0 for row in summary) == summary.kvm_ns + summary.user_ns


# Addresses


def test_rips_are_those_of_the_instructions(mixed):
    t, symbols = mixed.trace, mixed.machine.symbols
    if t.exits.isa.any():
        ids = np.isin(t.exits.reasons, ["cpuid", "CPUID"])
        assert set(t.exits.rip[ids].tolist()) == {symbols["ids"] + 2}
        assert set(t.exits.rip[np.isin(t.exits.reasons, ["msr", "MSR_READ"])].tolist()) == {symbols["msrs"]}
        assert set(t.exits.rip[np.isin(t.exits.reasons, ["io", "IO_INSTRUCTION"])].tolist()) == {
            symbols["outs"] + 2,
            symbols["ins"],
        }
    # The log's are those of KVM_RUN's end; some KVMs have an OUT behind them by then.
    io = t.log.data[(t.log["exit"] == ExitReason.IO) & (t.log["error"] == 0)]
    assert set(io["rip"][OUTS:].tolist()) == {symbols["ins"]}
    assert set(io["rip"][:OUTS].tolist()) in ({symbols["outs"] + 2}, {symbols["outs"] + 4})


def test_a_summary_by_symbol_names_the_loops(mixed):
    rows = {row.key: row.count for row in mixed.trace.summary(by=("symbol", "user_exit"))}
    assert rows["outs", "IO"] == OUTS
    assert rows["ins", "IO"] == INS
    assert rows["writes", "MMIO"] == WRITES
    assert rows["reads", "MMIO"] == READS


def test_exits_are_told_in_words(mixed):
    exits = mixed.trace.exits
    said = [exits.words(n) for n in range(len(exits)) if exits.user_exit[n] == ExitReason.IO]
    assert len(said) == OUTS + INS
    assert all("0x99" in words for words in said)
    assert sum("out 0x11 to port 0x99, 1 byte" in words for words in said) == OUTS


# Marks and the clock


def test_marks_of_host_and_guest_are_in_order_of_time(host):
    with kb.Machine(host, memory="2M") as m:
        m.load_asm("mov al, 1\nout 0x80, al\nout 0x99, al\nmov al, 2\nout 0x80, al\nhlt", at=0x1000)
        with kb.trace(m, ("kvm_userspace_exit",)) as t:
            t.mark("before")
            m.cpu.run(deadline_s=20)
            t.mark("after")
        assert [(mark.text, mark.source) for mark in t.marks] == [
            ("before", "host"),
            ("0x1", "guest"),
            ("0x2", "guest"),
            ("after", "host"),
        ]
        assert [mark.vcpu for mark in t.marks] == [-1, 0, 0, -1]
        times = [mark.time_ns for mark in t.marks]
        assert times == sorted(times)
        # The kernel's clock and the core's are one: 10 us here, more where an emulator runs the host.
        assert 0 < t.clock_error_ns < (1_000_000 if host.info.emulated else 100_000)
        # Ours are not among the events, and the caller's are.
        assert [t.events["print"].text(n) for n in range(2)] == ["before", "after"]
        assert t.events["print"].time_ns.tolist() == [times[0], times[3]], "the kernel's own times"


def test_a_trace_without_events_has_marks_too(machine):
    machine.load_asm("out 0x80, al\nhlt", at=0x1000)
    with kb.trace(machine, (), mark_port=None) as t:
        t.mark("one")
        machine.cpu.run(deadline_s=20)
    assert [mark.text for mark in t.marks] == ["one"]
    assert t.clock_error_ns is None
    assert len(t.events) == 0
    assert t.notes == ()
    assert log_count(t, ExitReason.IO) == 1
    with pytest.raises(errors.MisuseError, match="the trace does not run"):
        t.mark("too late")


@pytest.mark.parametrize("text", ["", "x" * 1001, "kvmbench: clock 1", None, 5])
def test_a_mark_that_is_none_is_refused(machine, text):
    with kb.trace(machine, ()) as t, pytest.raises(errors.MisuseError, match="a mark is a text of 1 to 1000 bytes"):
        t.mark(text)


# Whose each was


def of_vcpu(t: LiveTrace, vcpu: int) -> int:
    mine = t.log.of_vcpu(vcpu)
    return int(np.count_nonzero((mine["exit"] == ExitReason.IO) & (mine["error"] == 0)))


@pytest.fixture
def pio(host: kb.Host) -> tuple[str, ...]:
    """The event of an OUT; none on the Intel appliance, where its kernel takes 4 s to make and remove a directory."""
    return () if "Bochs" in host.info.emulator else ("kvm_pio",)


def check_attribution(t: LiveTrace, outs: list[int]) -> None:
    """That each vcpu's OUTs are its own, in the log and among the events."""
    for vcpu, count in enumerate(outs):
        assert of_vcpu(t, vcpu) == count
        if not t.requested:
            continue
        events = t.events["kvm_pio"]
        assert int(np.count_nonzero(events.vcpu == vcpu)) == count
        # Port 0x90 + n is vcpu n's.
        assert set(events["port"][events.vcpu == vcpu].tolist()) <= {0x90 + vcpu}


TWO = """
first:  mov ecx, {first}
0:      out 0x90, al
        loop 0b
        hlt
second: mov ecx, {second}
0:      out 0x91, al
        loop 0b
        hlt
"""


@pytest.fixture
def two(host: kb.Host) -> Iterator[kb.Machine]:
    """Two vcpus with 5 and 9 OUTs before them."""
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm(TWO.format(first=5, second=9), at=0x1000)
        m.cpus[0].regs.rip, m.cpus[1].regs.rip = m.symbols["first"], m.symbols["second"]
        yield m


def test_vcpus_that_run_at_once_are_told_apart(two, pio):
    with kb.trace(two, pio) as t:
        threads = [threading.Thread(target=cpu.run, kwargs={"deadline_s": 30}) for cpu in two.cpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    check_attribution(t, [5, 9])
    assert {row.key: row.count for row in t.summary(by=("vcpu", "user_exit")) if "IO" in row.key} == {
        ("vcpu 0", "IO"): 5,
        ("vcpu 1", "IO"): 9,
    }


def test_vcpus_that_one_thread_runs_in_turn_are_told_apart(two, pio):
    with kb.trace(two, pio) as t:
        for cpu in two.cpus:
            assert cpu.run(deadline_s=30).cause is kb.Cause.HALT
    check_attribution(t, [5, 9])
    with pytest.raises(errors.MisuseError, match="vcpu 7 has no exits"):
        t.summary(vcpu=7)
    assert t.summary(vcpu=1).exits == len(t.exits.take(t.exits.vcpu == 1))


def test_vcpus_in_lockstep_are_told_apart(two, pio):
    with kb.trace(two, pio) as t:
        two.lockstep(40, progress=False)
    check_attribution(t, [5, 9])


def test_m_run_is_traced(two, pio):
    with kb.trace(two, pio) as t:
        two.run(deadline_s=30)
    # One that halts holds the other wherever that is.
    assert of_vcpu(t, 0) <= 5
    assert of_vcpu(t, 1) <= 9
    assert of_vcpu(t, 0) == 5 or of_vcpu(t, 1) == 9


def test_two_machines_traced_at_once_do_not_mix(host, pio):
    with kb.Machine(host, memory="2M") as a, kb.Machine(host, memory="2M") as b:
        for m, count, port in ((a, 3, 0x90), (b, 6, 0x95)):
            m.load_asm(f"mov ecx, {count}\n0: out {port:#x}, al\nloop 0b\nhlt", at=0x1000)
        with kb.trace(a, pio) as ta, kb.trace(b, pio, own_only=True) as tb:
            a.cpu.run(deadline_s=20)
            b.cpu.run(deadline_s=20)
        for t, count, port in ((ta, 3, 0x90), (tb, 6, 0x95)):
            assert log_count(t, ExitReason.IO) == count
            if pio:
                events = t.events["kvm_pio"]
                assert events["port"][events.vcpu == 0].tolist() == [port] * count
        assert len(tb.events.get("kvm_pio", ())) == (6 if pio else 0), "what was not asked for is not there"


# Stepping, recording, reading while it runs


def test_stepping_and_recording_while_traced(machine, pio):
    machine.load_asm("again: inc eax\nout 0x99, al\njmp again", at=0x1000)
    plain = machine.cpu.record(30, progress=False).rip.tolist()
    machine.reset()
    machine.load_asm("again: inc eax\nout 0x99, al\njmp again", at=0x1000)
    with kb.trace(machine, pio) as t:
        machine.cpu.step(6)
        assert machine.cpu.record(24, progress=False).rip.tolist() == plain[6:]
    assert log_count(t, ExitReason.IO) == 10
    assert len(t.events.get("kvm_pio", ())) == (10 if pio else 0)
    assert log_count(t, ExitReason.DEBUG) + log_count(t, ExitReason.IO) >= 30


def test_a_vcpu_that_runs_already_is_traced_and_can_be_watched(machine):
    machine.load_asm(SPIN, at=0x1000)
    thread = threading.Thread(target=machine.cpu.run, kwargs={"deadline_s": 60})
    thread.start()
    try:
        while machine.memory.read_u64(0x3000) < 3:
            assert thread.is_alive()
        with kb.trace(machine, ("kvm_pio",)) as t:
            assert t.running
            seen = [0]
            while len(seen) < 4:
                count = len(t.events.get("kvm_pio", ()))
                assert count >= seen[-1]
                if count > seen[-1]:
                    seen.append(count)
                assert thread.is_alive()
            assert "Trace, running" in repr(t)
            assert len(t.exits) > 0
    finally:
        while thread.is_alive():
            machine.cpu.interrupt()
            thread.join(0.01)
    assert not t.running
    assert len(t.events["kvm_pio"]) >= seen[-1]
    assert log_count(t, ExitReason.IO) - len(t.events["kvm_pio"]) <= 1, "one may be under way at the end"


def test_a_summary_of_something_else_is_refused(mixed):
    for by, said in (
        ("resaon", "did you mean 'reason'"),
        (("reason", "reason"), "'reason' is there twice"),
        ((), "one or several of reason, vcpu, rip"),
        ("rip ", "did you mean 'rip'"),
        ("everything", "there are reason, vcpu, rip"),
    ):
        with pytest.raises(errors.MisuseError, match=said):
            mixed.trace.summary(by=by)
