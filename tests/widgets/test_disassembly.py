"""The Disassembly panel, clicked, typed into and scrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

from .guests import MACHINE
from .lab import Notebook

MANY = (
    MACHINE
    + """
lines = (f"l{i}: add rax, {i}\\n mov [rbx+{i}], rcx\\n jne l{max(0, i - 3)}" for i in range(4000))
m.load_asm("\\n".join(lines), at=0x100000)
"""
)
PANEL = "d = kw.Disassembly(m); d"


def row(opened: Notebook, address: int) -> Any:
    """The row of code at an address."""
    return opened.panel("Disassembly").locator(".kb-is-code").filter(
        has=opened.page.locator(".kb-address", has_text=f"{address:#x}")
    )  # fmt: skip


def test_the_gutter_sets_breakpoints_and_the_current_row_follows_rip(
    notebook: Callable[..., Notebook], page: Any
) -> None:
    opened = notebook([MACHINE, PANEL, "c = kw.Controls(m); c", "b = kw.Breakpoints(m); b"])
    opened.run_all()
    panel = opened.panel("Disassembly")
    step = opened.panel("Controls").get_by_role("button", name="Execute one instruction")
    expect(panel.locator(".kb-now .kb-address")).to_have_text("0x1000")
    expect(panel.locator(".kb-is-label", has_text="loop:")).to_be_visible()

    row(opened, 0x1007).locator(".kb-mark").click()
    expect(row(opened, 0x1007).locator(".kb-mark")).to_have_text("●")
    assert opened.python("[each.address for each in cpu.breakpoints]") == [0x1007]
    stopper = opened.panel("Breakpoints").get_by_role("listitem")
    expect(stopper).to_contain_text("loop")
    # Another panel disables it: the mark is hollow here.
    stopper.get_by_role("checkbox").click()
    expect(row(opened, 0x1007).locator(".kb-mark")).to_have_text("○")
    row(opened, 0x1007).locator(".kb-mark").click()
    expect(stopper).to_have_count(0)
    assert opened.python("len(cpu.breakpoints)") == 0

    for _ in range(3):
        step.click()
    expect(panel.locator(".kb-now .kb-address")).to_have_text("0x100f")
    expect(panel.locator(".kb-now .kb-taken")).to_have_text("jumps")
    expect(panel.locator("path.kb-arrow-here")).to_have_count(1)
    opened.python("cpu.regs.__setattr__('rax', 101)")
    opened.python("(cpu.regs.__setattr__('rip', 0x100b), d.session.changed())")
    step.click()
    expect(panel.locator(".kb-now .kb-taken")).to_have_text("falls through")
    expect(panel.locator("path.kb-arrow-not")).to_have_count(1)

    # A click on the target goes there and stops following; the buttons go back and forth.
    row(opened, 0x100F).locator(".kb-target").click()
    expect(panel.get_by_label("follow")).not_to_be_checked()
    expect(row(opened, 0x1007)).to_have_attribute("aria-selected", "true")
    panel.get_by_role("button", name="Go back").click()
    expect(row(opened, 0x100F)).to_have_attribute("aria-selected", "true")
    # A double click on an address runs there.
    row(opened, 0x101B).locator(".kb-address").dblclick()
    expect(panel.locator(".kb-now .kb-address")).to_have_text("0x101b")
    assert opened.python("cpu.regs.rip") == 0x101B


def test_keys_alone_do_everything(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, PANEL])
    opened.run_all()
    panel = opened.panel("Disassembly")
    rows = panel.get_by_role("listbox")
    rows.focus()
    for _ in range(2):
        page.keyboard.press("ArrowDown")  # over the label
    expect(row(opened, 0x1007)).to_have_attribute("aria-selected", "true")
    chosen = row(opened, 0x1007).get_attribute("id")
    expect(rows).to_have_attribute("aria-activedescendant", chosen)
    page.keyboard.press("b")
    expect(row(opened, 0x1007).locator(".kb-mark")).to_have_text("●")
    expect(row(opened, 0x1007)).to_have_attribute("aria-label", "breakpoint 0x1007 add rax, 2")
    page.keyboard.press("b")
    expect(row(opened, 0x1007).locator(".kb-mark")).to_have_text("")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("t")
    expect(panel.locator(".kb-now .kb-address")).to_have_text("0x100b")
    assert opened.python("cpu.regs.rip") == 0x100B
    page.keyboard.press("g")
    page.keyboard.type("spin")
    page.keyboard.press("Enter")
    expect(panel.locator("[aria-selected=true] .kb-operands")).to_have_text("spin")
    expect(rows).to_be_focused()
    page.keyboard.press("-")
    expect(row(opened, 0x100B)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("+")
    expect(panel.locator("[aria-selected=true] .kb-operands")).to_have_text("spin")
    page.keyboard.press("f")
    expect(panel.get_by_label("follow")).to_be_checked()
    expect(row(opened, 0x100B)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("g")
    page.keyboard.type("nowhere")
    page.keyboard.press("Enter")
    expect(panel.get_by_role("alert")).to_contain_text("nowhere")
    assert page.locator(".jp-Cell").count() == 2, "b is no key of JupyterLab's here"


def test_twelve_thousand_rows_scroll(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MANY, PANEL, "c = kw.Controls(m); c"])
    opened.run_all()
    panel = opened.panel("Disassembly")
    rows = panel.get_by_role("listbox")
    assert opened.python("d.goto('l0'), d.view['total']")[1] > 15_000
    expect(panel.locator(".kb-is-label", has_text="l0:")).to_be_visible()
    rows.focus()
    page.keyboard.press("End")
    expect(panel.locator(".kb-is-label", has_text="l3999:")).to_be_visible()
    # No more elements than are in sight, whatever the total; each row that is in sight comes.
    assert panel.locator(".kb-code").count() < 60
    expect(panel.locator(".kb-is-unknown")).to_have_count(0)
    page.keyboard.press("Home")
    expect(panel.locator(".kb-is-label", has_text="l0:")).to_be_visible()
    rows.evaluate("element => { element.scrollTop = element.scrollHeight / 2 }")
    expect(panel.locator(".kb-is-label", has_text="l20").first).to_be_visible()
    expect(panel.locator(".kb-is-unknown")).to_have_count(0)
    # Scrolled away while following: the next stop brings rip back, and the rows in sight come again after it.
    panel.get_by_label("follow").check()
    expect(panel.locator(".kb-now")).to_be_visible()
    rows.focus()
    page.keyboard.press("End")
    expect(panel.locator(".kb-now")).to_have_count(0)
    opened.panel("Controls").get_by_role("button", name="Execute one instruction").click()
    expect(panel.locator(".kb-now .kb-address")).to_have_text("0x100004")
    # Frames while the wheel turns: the page draws each in time.
    rows.hover()
    slow = page.evaluate(
        """async (element) => {
            const times = [];
            let last = performance.now();
            for (let n = 0; n < 60; n += 1) {
                element.dispatchEvent(new WheelEvent("wheel", { deltaY: 540, bubbles: true, cancelable: true }));
                await new Promise(requestAnimationFrame);
                const now = performance.now();
                times.push(now - last);
                last = now;
            }
            return times.sort((a, b) => a - b)[54];
        }""",
        rows.element_handle(),
    )
    print(f"90th percentile of a frame while scrolling: {slow:.1f} ms")
    expect(panel.locator(".kb-is-unknown")).to_have_count(0)
    assert slow < 200, "a frame takes long"


def test_a_reloaded_page_shows_the_same_place(notebook: Callable[..., Notebook]) -> None:
    opened = notebook([MANY, PANEL])
    opened.run_all()
    panel = opened.panel("Disassembly")
    opened.python("d.goto('l2000')")
    expect(panel.locator("[aria-selected=true]")).to_contain_text("add")
    expect(panel.locator(".kb-is-label", has_text="l2000:")).to_be_visible()
    opened.command("docmanager:save")
    opened.reload()
    expect(panel.locator(".kb-is-label", has_text="l2000:")).to_be_visible()
    panel.get_by_label("Go to a symbol").fill("l5")
    panel.get_by_label("Go to a symbol").press("Enter")
    expect(panel.locator(".kb-is-label", has_text="l5:")).to_be_visible()
    # What is asked for while the list is hidden, as behind another tab, is there when it is shown.
    rows = panel.get_by_role("listbox")
    panel.evaluate("element => { element.hidden = true; element.style.display = 'none' }")
    opened.python("d.goto('l3000')")
    expect(panel.locator(".kb-is-label", has_text="l3000:")).to_have_count(1)
    panel.evaluate("element => { element.hidden = false; element.style.display = '' }")
    expect(panel.locator(".kb-is-label", has_text="l3000:")).to_be_visible()
    opened.page.wait_for_function("element => element.scrollTop > 100_000", arg=rows.element_handle())
