"""The Controls panel and the session behind it: who runs the guest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import kvmbench as kb
import kvmbench_widgets as kw
from kvmbench_widgets.session import Session


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def spinning(machine: Any) -> Any:
    machine.load_asm("jmp $", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    return machine


def test_each_button_moves_the_guest(machine: Any, send: Callable[..., None]) -> None:
    controls, cpu = kw.Controls(machine), machine.cpu
    send(controls, "step", count=3)
    assert cpu.regs.rip == 0x100F
    send(controls, "until", where="loop")
    assert cpu.regs.rip == machine.cpu.symbols["loop"]
    assert controls.view["cause"] == "until"
    send(controls, "record", steps=5)
    assert len(controls.record_made) == 5
    send(controls, "reset")
    assert cpu.regs.rip == 0x1000
    assert controls.view["cause"] == ""
    send(controls, "over")
    assert cpu.regs.rax == 1


def test_a_running_guest_blocks_nobody_and_pause_stops_it(spinning: Any, send: Callable[..., None]) -> None:
    controls, registers = kw.Controls(spinning), kw.Registers(spinning)
    began = time.monotonic()
    send(controls, "run", wait=False)
    assert time.monotonic() - began < 1
    wait_for(lambda: controls.state == "running" and registers.state == "running")
    send(controls, "step", wait=False)
    assert "running" in controls.error
    send(registers, "set", wait=False, name="rax", value="1")
    assert "pause it first" in registers.error
    send(controls, "pause")
    assert controls.state == registers.state == "stopped"
    assert controls.view["cause"] == "interrupted"
    assert spinning.cpu.regs.rip == 0x3000


def test_a_step_by_one_panel_is_shown_by_every_panel_of_the_machine(machine: Any, send: Callable[..., None]) -> None:
    one, two, registers = kw.Controls(machine), kw.Controls(machine), kw.Registers(machine)
    send(one, "step")
    assert one.view == two.view
    assert registers.view["rows"]["general"][0]["hex"] == f"{1:016x}"
    assert Session.of(machine) is one.session is two.session


def test_a_deadline_ends_a_run(spinning: Any, send: Callable[..., None]) -> None:
    controls = kw.Controls(spinning, deadline_s=0.05)
    send(controls, "run")
    assert controls.view["cause"] == "deadline"


@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        ("step", {"count": 0}, "0 instructions"),
        ("step", {"count": "7"}, "'7'"),
        ("step", {"count": True}, "True"),
        ("record", {"steps": -1}, "-1"),
        ("until", {"where": "nowhere"}, "nowhere"),
        ("until", {"where": None}, "None"),
        ("choose", {"vcpu": 1}, "there is no vcpu 1"),
        ("choose", {"vcpu": "0"}, "there is no vcpu '0'"),
        ("fly", {}, "cannot do 'fly'"),
        ("step", {"speed": 3}, "speed"),
    ],
)
def test_bad_orders_are_told_in_words(
    machine: Any, send: Callable[..., None], what: str, options: dict[str, Any], words: str
) -> None:
    controls = kw.Controls(machine)
    send(controls, what, **options)
    assert words in controls.error
    send(controls, "step")
    assert controls.error == ""


def test_a_closed_machine_is_shown_as_closed(widget_host: Any, send: Callable[..., None]) -> None:
    with kb.Machine(widget_host, mode="long") as machine:
        machine.load_asm("hlt", at=0x1000)
        controls = kw.Controls(machine)
    send(controls, "step")
    assert controls.state == "closed"
    assert "closed" in controls.error
    assert "0x1000" in controls.text(), "what was seen last stays"


def test_vcpus_are_chosen_and_run_at_once(widget_host: Any, send: Callable[..., None]) -> None:
    with kb.Machine(widget_host, mode="long", vcpus=2) as machine:
        machine.load_asm("again: inc rax\njmp again", at=0x1000)
        controls = kw.Controls(machine)
        send(controls, "choose", vcpu=1)
        assert controls.vcpu == 1
        assert controls.cpu is machine.cpus[1]
        send(controls, "run_all", wait=False)
        wait_for(lambda: machine.cpus[0].running and machine.cpus[1].running)
        send(controls, "pause")
        assert not any(cpu.running for cpu in machine.cpus)


def test_a_session_does_not_keep_its_machine(widget_host: Any) -> None:
    import gc
    import weakref

    machine = kb.Machine(widget_host, mode="long")
    machine.load_asm("hlt", at=0x1000)
    controls = kw.Controls(machine)
    known = weakref.ref(machine)
    controls.close()
    machine.close()
    del controls, machine
    gc.collect()
    assert known() is None


def test_a_pause_right_after_run_is_not_lost(spinning: Any) -> None:
    controls = kw.Controls(spinning)
    for _ in range(20):
        controls.run()
        controls.pause()  # the vcpu's thread has mostly not begun
        assert controls.wait(5), "the pause was not heard"


def test_quick_clicks_all_count(machine: Any, send: Callable[..., None]) -> None:
    controls, before = kw.Controls(machine), machine.cpu.stop_serial
    for _ in range(10):
        send(controls, "step", wait=False)
    assert controls.wait(20)
    assert controls.error == ""
    assert machine.cpu.stop_serial - before == 10


def test_a_panel_that_cannot_be_drawn_ends_neither_the_thread_nor_the_others(
    machine: Any, send: Callable[..., None]
) -> None:
    class Broken(kw.Stack):
        def make_view(self) -> dict[str, Any]:
            raise ZeroDivisionError("drawn wrongly")

        def tick(self) -> None:
            raise ZeroDivisionError("live wrongly")

    broken, controls = Broken(machine), kw.Controls(machine)
    for _ in range(2):
        send(controls, "step")
    assert machine.cpu.regs.rip == 0x100B
    assert controls.view["rip"] == "0x100b"
    assert "drawn wrongly" in broken.error
    machine.load_asm("jmp $", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    send(controls, "run", wait=False)
    wait_for(lambda: controls.state == "running" and "live wrongly" in broken.error)
    send(controls, "pause")


def test_nothing_is_asked_of_a_vcpu_between_two_pieces_of_a_job(machine: Any) -> None:
    controls, asked = kw.Controls(machine), threading.Event()
    going, made = threading.Event(), []

    class Watched(kw.Stack):
        def make_view(self) -> dict[str, Any]:
            made.append(threading.current_thread().name)
            return super().make_view()

    watched = Watched(machine)
    made.clear()

    def job() -> None:
        machine.cpu.step()
        going.set()
        assert asked.wait(20)
        machine.cpu.step()

    controls.session.start(controls, machine.cpu, job)
    assert going.wait(20)
    watched.refresh()
    assert made == []
    asked.set()
    assert controls.wait(20)
    assert made == ["kvmbench vcpu 0"]


def test_an_error_that_quotes_what_came_stays_short(machine: Any, send: Callable[..., None]) -> None:
    controls = kw.Controls(machine)
    for what, options in (("x" * 1_000_000, {}), ("step", {"count": [1] * 100_000}), ("until", {"where": "y" * 10**6})):
        send(controls, what, **options)
        assert 0 < len(controls.error) < 1000
