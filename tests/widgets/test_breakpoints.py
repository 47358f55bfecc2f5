"""The Breakpoints panel, clicked and typed into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

from .guests import MACHINE
from .lab import Notebook


def test_the_form_adds_and_the_row_changes_and_removes(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, "b = kw.Breakpoints(m); b", "c = kw.Controls(m); c", "d = kw.Disassembly(m); d"])
    opened.run_all()
    panel = opened.panel("Breakpoints")
    rows = panel.get_by_role("listitem")
    run = opened.panel("Controls").locator("[data-do=run]")
    place = panel.get_by_label("Place: symbol or address")

    # What is refused is told in words and stays in the form.
    place.fill("lop")
    panel.get_by_role("button", name="Add").click()
    expect(panel.get_by_role("alert")).to_contain_text("did you mean 'loop'")
    expect(place).to_have_value("lop")
    place.fill("loop")
    panel.get_by_label("Condition", exact=True).fill("regs.rax > 20")
    panel.get_by_role("button", name="Add").click()
    expect(rows).to_have_count(1)
    expect(place).to_have_value("")
    expect(rows).to_contain_text("if regs.rax > 20")
    expect(panel.get_by_role("alert")).to_be_hidden()
    run.click()
    expect(rows).to_contain_text("1 hit, 10 passed, stopped here")
    assert opened.python("int(cpu.regs.rax)") == 21

    rows.get_by_label("Condition of breakpoint 1").click()
    page.keyboard.press("Control+a")
    page.keyboard.type("regs.rax == 0x31")
    page.keyboard.press("Enter")
    expect(rows).to_contain_text("if regs.rax == 0x31")
    run.click()
    expect(rows).to_contain_text("2 hits")
    assert opened.python("int(cpu.regs.rax)") == 0x31

    rows.get_by_role("checkbox").uncheck()
    expect(rows).to_have_class("kb-stopper kb-off")
    assert opened.python("cpu.breakpoints[1].enabled") is False
    # A watchpoint: the field for its size appears.
    expect(panel.get_by_label("Bytes watched")).to_be_hidden()
    panel.get_by_label("Kind").select_option("w")
    panel.get_by_label("Bytes watched").fill("4")
    place.fill("0x2000")
    place.press("Enter")
    expect(rows).to_have_count(2)
    assert opened.python("(cpu.breakpoints[2].kind, cpu.breakpoints[2].size_bytes)") == ("w", 4)
    # The name leads to the place.
    rows.nth(0).get_by_role("button", name="loop").click()
    expect(opened.panel("Disassembly").locator("[aria-selected=true] .kb-address")).to_have_text("0x1007")
    panel.get_by_role("button", name="Remove breakpoint 1").click()
    expect(rows).to_have_count(1)
    assert opened.python("[each.number for each in cpu.breakpoints]") == [2]
    # What filters one is to be read without a pointer.
    opened.python("(cpu.breakpoints.add('spin', temporary=True, ignore=3), b.refresh())[0].number")
    expect(rows.nth(0).locator(".kb-notes")).to_be_hidden()
    expect(rows.nth(1).locator(".kb-notes")).to_be_visible()
    expect(rows.nth(1).locator(".kb-notes")).to_have_text("ignores the next 3; temporary")


def test_keys_alone_add_change_and_remove(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, "b = kw.Breakpoints(m); b"])
    opened.run_all()
    panel = opened.panel("Breakpoints")
    rows = panel.get_by_role("listitem")
    panel.get_by_label("Place: symbol or address").focus()
    for number, name in enumerate(("start", "loop", "spin"), 1):
        page.keyboard.type(name)
        page.keyboard.press("Enter")
        expect(rows).to_have_count(number)
    for _ in range(4):
        page.keyboard.press("Tab")  # kind, condition, Add, the first row
    expect(rows.nth(0).get_by_role("checkbox")).to_be_focused()
    page.keyboard.press("Space")
    expect(rows.nth(0)).to_have_class("kb-stopper kb-off")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(rows.nth(0).locator(".kb-condition")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.type("regs.rbx == 1")
    page.keyboard.press("Enter")
    expect(rows.nth(0).locator(".kb-condition")).to_have_text("if regs.rbx == 1")
    expect(rows.nth(0).locator(".kb-condition")).to_be_focused()
    page.keyboard.press("Delete")
    expect(rows.nth(0).locator(".kb-condition")).to_have_text("if…")
    page.keyboard.press("Tab")
    page.keyboard.press("Delete")
    expect(rows).to_have_count(2)
    expect(rows.nth(0).get_by_role("checkbox")).to_be_focused()
    assert opened.python("[each.label for each in cpu.breakpoints]") == ["loop", "spin"]
    assert page.locator(".jp-Cell").count() == 2
