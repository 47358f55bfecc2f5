"""Registers of a vcpu that is under way: what a device sees that is asked, and what another thread is told."""

from __future__ import annotations

import threading

import pytest

import kvmbench as kb
from kvmbench.errors import BusyError, MisuseError
from kvmbench.machine import Device

COUNT = "again: inc rcx\nout 0x99, al\njmp again"
ONCE = "inc rcx\nout 0x99, al\nspin: inc rcx\njmp spin"


class Asker(Device):
    """Calls a function at each exit."""

    name = "asker"
    ports = (range(0x99, 0x9A),)

    def __init__(self, ask):
        self.ask = ask

    def port_out(self, port, value, size_bytes):
        return self.ask()


@pytest.mark.parametrize("way", ["run", "step"])
def test_a_device_sees_the_registers_of_each_exit(machine, way):
    seen = []

    def ask():
        seen.append(int(machine.cpu.regs.rcx))
        if len(seen) == 5:
            raise RuntimeError("enough")

    machine.attach(Asker(ask))
    machine.load_asm(COUNT, at=0x1000)
    with pytest.raises(RuntimeError, match="enough"):
        machine.cpu.run(deadline_s=10) if way == "run" else machine.cpu.step(100)
    assert seen == [1, 2, 3, 4, 5]
    assert machine.cpu.regs.rcx == machine.cpu.vcpu.get_regs().rcx == 5


def test_another_thread_is_told_that_the_vcpu_runs_even_while_a_device_is_asked(machine):
    asked, looked = threading.Event(), threading.Event()

    def ask():
        asked.set()
        assert looked.wait(30)

    machine.attach(Asker(ask))
    machine.load_asm(ONCE, at=0x1000)
    runner = threading.Thread(target=lambda: machine.cpu.run(deadline_s=30))
    runner.start()
    try:
        assert asked.wait(30)
        for n in range(100):
            with pytest.raises(BusyError, match="running"):
                print(machine.cpu.regs.rcx)
            with pytest.raises(BusyError, match="running"):
                machine.cpu.regs.rcx = 0
            if n == 50:
                looked.set()
    finally:
        looked.set()
        machine.interrupt()
        runner.join()
    assert machine.cpu.regs.rcx == machine.cpu.vcpu.get_regs().rcx > 1


@pytest.mark.parametrize("way", ["run", "step"])
def test_a_device_that_writes_a_register_is_refused_and_asked_once(machine, way):
    asked = []

    def ask():
        asked.append(way)
        machine.cpu.regs.rcx = 7

    machine.attach(Asker(ask))
    machine.load_asm(COUNT, at=0x1000)
    machine.cpu.step()
    with pytest.raises(MisuseError, match="StopRequest"):
        machine.cpu.run(deadline_s=10) if way == "run" else machine.cpu.step()
    assert asked == [way]
    assert machine.cpu.regs.rcx == 1
    machine.cpu.regs.rcx = 9
    assert machine.cpu.step(1).cause is kb.Cause.STEP
    assert machine.cpu.regs.rcx in (9, 10)
