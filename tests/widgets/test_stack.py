"""The Stack panel, clicked and typed into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

from .guests import MACHINE
from .lab import Notebook

CALLS = """
m.load_asm('''
        mov rsp, 0x8000
        push 0x1122
        call f
back:   hlt
f:      push rbp
        mov rbp, rsp
        ret
''', at=0x1000)
"""


def word(panel: Any, index: int) -> Any:
    return panel.locator(f".kb-word[data-row='{index}']")


def test_a_call_shows_where_it_returns_and_a_click_edits_a_word(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, CALLS, "s = kw.Stack(cpu); s", "c = kw.Controls(m); c"])
    opened.run_all()
    panel = opened.panel("Stack")
    step = opened.panel("Controls").locator("[data-do=step]")
    expect(word(panel, 0)).to_be_visible()
    for expected in ("push 0x1122", "call f", "push rbp", "mov rbp", "ret"):
        step.click()
        expect(opened.panel("Controls").locator(".kb-place")).to_contain_text(expected)
    expect(word(panel, 0).locator(".kb-marks")).to_have_text("rsp,rbp →")
    expect(word(panel, 1).locator(".kb-meaning")).to_have_text("↩ back after call f")
    expect(word(panel, 2).locator(".kb-value")).to_have_text(f"{0x1122:016x}")
    word(panel, 2).locator(".kb-value").click()
    page.keyboard.type("0xfedcba9876543211")
    page.keyboard.press("Enter")
    expect(word(panel, 2).locator(".kb-value")).to_have_text("fedcba9876543211")
    expect(word(panel, 2).locator(".kb-value")).to_have_class("kb-value kb-changed")
    assert opened.python("m.memory.read_u64(0x7ff8)") == 0xFEDCBA9876543211
    word(panel, 2).locator(".kb-value").click()
    page.keyboard.type("nowhere")
    page.keyboard.press("Enter")
    expect(panel.get_by_role("alert")).to_contain_text("nowhere")

    # Keys alone: the cursor is where the last edit was; two up is the top.
    expect(panel.locator(".kb-scroller")).to_be_focused()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.keyboard.type("back+1")
    page.keyboard.press("Enter")
    expect(word(panel, 0).locator(".kb-value")).to_have_text(f"{0x1012:016x}")
    page.keyboard.press("End")
    expect(word(panel, 511)).to_be_visible()
    expect(word(panel, 511).locator(".kb-value")).to_have_text("0" * 16)
    assert opened.python("s.view['total']") == 512
