"""The log of exits to user space: each exit once, in order, whatever moved the guest."""

from __future__ import annotations

import threading

import pytest

import kvmbench as kb
from kvmbench.debug.exit_log import ExitLog
from kvmbench.errors import MisuseError

GUEST = """
        mov   dx, 0x3f8
        mov   al, 'a'
        out   dx, al
        in    al, 0x60
        mov   eax, 0x12345678
        out   0x80, eax
        mov   byte ptr [0x300000], 7
        mov   bl, [0x300001]
        mov   esi, offset text
        mov   ecx, 3
        rep   outsb
        hlt
text:   .ascii "xyz"
"""


@pytest.fixture
def machine(host: kb.Host):
    # Protected mode: no page tables stand between the guest and an address without memory.
    with kb.Machine(host, memory="2M", mode="protected") as machine:
        machine.load_asm(GUEST, at=0x1000)
        yield machine


def whole(log: ExitLog) -> list[tuple[str, int | None, int, int | None]]:
    return [(entry.kind, entry.where, entry.size_bytes, entry.value) for entry in log.entries()]


EXPECTED = [
    ("out", 0x3F8, 1, ord("a")),
    ("in", 0x60, 1, None),
    ("out", 0x80, 4, 0x12345678),
    ("mmio write", 0x300000, 1, 7),
    ("mmio read", 0x300001, 1, None),
]


@pytest.mark.parametrize("way", ["run", "step", "record"])
def test_every_exit_is_noted_once_however_the_guest_is_moved(machine: kb.Machine, way: str) -> None:
    cpu = machine.cpu
    log = cpu.log_exits()
    if way == "run":
        cpu.run(deadline_s=20)
    elif way == "step":
        for _ in range(20):
            if cpu.step().cause != "step":
                break
    else:
        cpu.record(steps=20)
    found = [entry for entry in whole(log) if entry[0] != "HLT"]
    assert found[:5] == EXPECTED
    # REP OUTSB to 0x3f8: in one exit of three units, or in three, as KVM likes.
    assert {entry[:2] for entry in found[5:]} == {("out", 0x3F8)}
    assert machine.serial.text == "axyz"
    assert log.total == len(log)
    assert sum(log.counts.values()) == log.total
    times = [entry.time_ns for entry in log.entries()]
    assert times == sorted(times)


def test_a_log_keeps_the_latest_and_counts_all(host: kb.Host) -> None:
    with kb.Machine(host, memory="2M", mode="long") as machine:
        machine.load_asm("mov ecx, 500\nagain: out 0x80, al\ndec ecx\njnz again\nhlt", at=0x1000)
        log = machine.cpu.log_exits(capacity=10)
        stop = machine.cpu.run_until(lambda cpu: cpu.regs.ecx == 480)
        assert log.total == 20
        assert len(log) == 10
        machine.cpu.run(deadline_s=30)
        assert log.counts[("out", 0x80)] == 500
        assert len(log) == 10
        assert stop.cause == "until"


def test_a_log_can_be_read_while_it_is_written(host: kb.Host) -> None:
    with kb.Machine(host, memory="2M", mode="long") as machine:
        machine.load_asm("again: out 0x80, al\njmp again", at=0x1000)
        log = machine.cpu.log_exits(capacity=1000)
        runner = threading.Thread(target=machine.cpu.run, daemon=True)
        runner.start()
        looks = 0
        while (log.total < 3000 or not looks) and runner.is_alive():
            entries = log.entries()
            looks += 1
            assert all(entry.kind == "out" for entry in entries)
            assert [entry.time_ns for entry in entries] == sorted(entry.time_ns for entry in entries)
        machine.cpu.interrupt()
        runner.join(20)
        assert not runner.is_alive()
        assert len(log.entries()) == 1000


@pytest.mark.parametrize("capacity", [0, -1, 10_000_001, "5", True, 1.5])
def test_a_log_of_an_impossible_size_is_refused(capacity: object) -> None:
    with pytest.raises(MisuseError, match="1 to 10,000,000"):
        ExitLog(capacity)  # type: ignore[arg-type]


def test_a_guest_that_touches_every_port_does_not_fill_our_memory() -> None:
    log = ExitLog(10)
    for port in range(10_000):
        log.add("out", port, 1, 0, None)
    assert log.total == 10_000
    assert len(log.counts) == 4097
    assert log.counts[("out", -1)] == 10_000 - 4096
    log.clear()
    assert (log.total, len(log), log.counts) == (0, 0, {})
