"""How a guest's end is shown: a triple fault, a halt, and that the panels go on afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kvmbench_widgets as kw


def test_a_triple_fault_is_named_and_every_panel_still_shows_its_place(machine: Any, send: Callable[..., None]) -> None:
    machine.load_asm("die: ud2", at=0x3000)
    machine.cpu.regs.rip = 0x3000
    bench = kw.Workbench(machine)
    send(bench.controls, "run")
    assert bench.controls.view["cause"] == "shutdown"
    assert machine.cpu.last_stop.cause == "shutdown"
    assert "shutdown" in bench.controls.text()
    for panel in bench.panels.values():
        assert panel.state == "stopped", panel
        assert panel.error == "", panel
        assert panel.text()
    rip = bench.registers.view["rows"]["general"][-1]
    assert int(rip["hex"], 16) == machine.cpu.regs.rip
    assert "die" in bench.disassembly.text()
    # What was wrong is mended: memory as loaded, the vcpu at its entry.
    send(bench.controls, "reset")
    assert bench.controls.error == ""
    machine.cpu.regs.rip = 0x1000
    send(bench.controls, "step")
    assert bench.controls.view["cause"] == "step"
    bench.close()


def test_a_halt_is_named_and_what_the_guest_made_is_shown(machine: Any, send: Callable[..., None]) -> None:
    bench = kw.Workbench(machine)
    send(bench.controls, "run")
    assert bench.controls.view["cause"] == "halt"
    assert "halt" in bench.controls.text()
    rows = {row["name"]: row for row in bench.registers.view["rows"]["general"]}
    assert rows["rbx"]["hex"] == "fedcba9876543211"
    assert "rbx  fedcba9876543211*" in bench.text()
    assert bench.exits.view["rows"][-1]["kind"] == "HLT"
    for panel in bench.panels.values():
        assert (panel.state, panel.error) == ("stopped", ""), panel
    bench.close()
