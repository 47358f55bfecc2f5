"""The Controls panel: a guest that spins, a page that reloads, a kernel and a host that go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from .guests import APPLIANCE, MACHINE
from .lab import Notebook


def button(opened: Notebook, name: str) -> Any:
    return opened.panel("Controls").locator(f"[data-do={name}]")


def test_a_spinning_guest_leaves_the_notebook_free_and_pause_stops_it(notebook: Callable[..., Notebook]) -> None:
    opened = notebook(
        [MACHINE, "c = kw.Controls(m); c", "r = kw.Registers(m); r", "cpu.regs.rip = cpu.symbols['spin']"]
    )
    opened.run_all()
    button(opened, "run").click()
    expect(opened.panel("Controls").get_by_role("status")).to_have_text("running")
    expect(opened.panel("Registers").get_by_role("status")).to_have_text("running")
    expect(button(opened, "step")).to_be_disabled()
    assert opened.python("6 * 7") == 42, "the kernel answers while the guest runs"
    button(opened, "pause").click()
    expect(opened.panel("Controls").locator(".kb-cause")).to_have_text("interrupted")
    expect(opened.panel("Registers").get_by_role("status")).to_have_text("")
    assert opened.python("cpu.symbols.label(cpu.regs.rip)") == "spin"
    button(opened, "step").click()
    expect(opened.panel("Controls").locator(".kb-cause")).to_have_text("step")


def test_pause_is_heard_while_a_cell_runs_the_guest(notebook: Callable[..., Notebook]) -> None:
    opened = notebook([MACHINE, "c = kw.Controls(m); c", "cpu.regs.rip = cpu.symbols['spin']\nstop = cpu.run()"])
    opened.run_all(wait=False)
    prompts = opened.page.locator(".jp-InputPrompt")
    expect(prompts.nth(1)).to_have_text("[2]:")
    # The kernel's main thread is in cpu.run() now, or about to be: a pause before it is none.
    for _ in range(100):
        button(opened, "pause").click()
        if prompts.nth(2).inner_text() == "[3]:":
            break
    expect(prompts.nth(2)).to_have_text("[3]:")
    assert opened.python("str(stop.cause)") == "interrupted"


def test_a_reloaded_page_shows_the_same_and_works(notebook: Callable[..., Notebook]) -> None:
    opened = notebook([MACHINE, "c = kw.Controls(m); c", "r = kw.Registers(m); r"])
    opened.run_all()
    button(opened, "step").click()
    expect(opened.panel("Registers").locator("[data-register=rax]")).to_have_text(f"{1:016x}")
    opened.command("docmanager:save")
    opened.reload()
    expect(opened.panel("Registers").locator("[data-register=rax]")).to_have_text(f"{1:016x}")
    button(opened, "step").click()
    expect(opened.panel("Registers").locator("[data-register=rax]")).to_have_text(f"{3:016x}")


def test_a_restarted_kernel_starts_afresh(notebook: Callable[..., Notebook]) -> None:
    opened = notebook([MACHINE, "c = kw.Controls(m); c"])
    opened.run_all()
    opened.restart_kernel()
    opened.run_all()
    button(opened, "step").click()
    expect(opened.panel("Controls").locator(".kb-cause")).to_have_text("step")
    assert opened.python("cpu.regs.rax") == 1


@pytest.mark.usefixtures("amd")
def test_a_killed_host_is_shown_as_lost_on_every_panel(notebook: Callable[..., Notebook]) -> None:
    opened = notebook([APPLIANCE, "c = kw.Controls(m); c", "r = kw.Registers(m); r"])
    opened.run_all()
    button(opened, "step").click()
    expect(opened.panel("Registers").locator("[data-register=rax]")).to_have_text(f"{1:016x}")
    opened.python("__import__('os').kill(host._closer.__self__.pid, 9)")
    button(opened, "step").click()
    for title in ("Controls", "Registers"):
        expect(opened.panel(title).get_by_role("status")).to_have_text("host lost")
        expect(opened.panel(title).get_by_role("alert")).not_to_be_empty()
    expect(button(opened, "step")).to_be_disabled()
    # What was seen last stays.
    expect(opened.panel("Registers").locator("[data-register=rax]")).to_have_text(f"{1:016x}")
