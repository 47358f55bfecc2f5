"""The Registers panel, clicked and typed into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

from .guests import MACHINE
from .lab import Notebook


def test_a_step_marks_what_changed_and_a_click_edits_it(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, "r = kw.Registers(m); r", "c = kw.Controls(m); c"])
    opened.run_all()
    step = opened.panel("Controls").get_by_role("button", name="Execute one instruction")
    registers = opened.panel("Registers")
    rax = registers.locator("[data-register=rax]")

    step.click()
    expect(rax).to_have_text("0000000000000001")
    expect(rax).to_have_class("kb-value kb-changed")
    expect(rax).to_have_attribute("title", "was 0000000000000000")
    assert opened.python("cpu.regs.rax") == 1

    # A value of 64 bits is exact to the last digit, there and back.
    rax.click()
    page.keyboard.type("0xfedcba9876543211")
    page.keyboard.press("Enter")
    expect(rax).to_have_text("fedcba9876543211")
    assert opened.python("cpu.regs.rax") == 0xFEDCBA9876543211

    # Escape gives up; a name is no number: told in words, nothing written.
    rax.click()
    page.keyboard.type("7")
    page.keyboard.press("Escape")
    expect(rax).to_have_text("fedcba9876543211")
    rax.click()
    page.keyboard.type("nowhere")
    page.keyboard.press("Enter")
    expect(registers.get_by_role("alert")).to_contain_text("nowhere")
    assert opened.python("cpu.regs.rax") == 0xFEDCBA9876543211

    registers.get_by_role("button", name="CF", exact=True).click()
    expect(registers.get_by_role("button", name="CF", exact=True)).to_have_attribute("aria-pressed", "true")
    assert opened.python("bool(cpu.regs.rflags.CF)") is True
    expect(registers.get_by_role("alert")).to_be_hidden()


def test_keys_alone_reach_edit_and_unfold(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, "r = kw.Registers(m); r"])
    opened.run_all()
    registers = opened.panel("Registers")
    registers.locator("[data-register=rbx]").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("loop")
    page.keyboard.press("Enter")
    expect(registers.locator("[data-register=rbx]")).to_have_text(f"{0x1007:016x}")
    expect(registers.locator("[data-register=rbx]")).to_be_focused()
    # JupyterLab's own keys stay out: b would insert a cell below, dd delete this one.
    page.keyboard.type("bdd")
    assert page.locator(".jp-Cell").count() == 2

    registers.locator("summary", has_text="Debug").focus()
    page.keyboard.press("Enter")
    expect(registers.locator("[data-register=dr7]")).to_have_text(f"{0x400:016x}")
    assert "debug" in opened.python("r.sections")


def test_what_cells_do_is_shown_too(notebook: Callable[..., Notebook]) -> None:
    opened = notebook([MACHINE, "r = kw.Registers(m); r", "cpu.step(2); cpu.regs.rcx = 0x77"])
    opened.run_all()
    registers = opened.panel("Registers")
    expect(registers.locator("[data-register=rcx]")).to_have_text(f"{0x77:016x}")
    expect(registers.locator("[data-register=rax]")).to_have_text(f"{3:016x}")
