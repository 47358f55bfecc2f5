"""The Memory panel, clicked, typed into and scrolled."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

from .guests import MACHINE
from .lab import Notebook

STORE = """
m.load_asm('''
        mov byte ptr [0x2003], 0x41
again:  inc qword ptr [0x2008]
        jmp again
''', at=0x1000)
m.memory.write(0x2020, b"find me")
m.memory.write(0x800000, b"find me")
"""
GRID = ".kb-scroller"


def line(panel: Any, address: int) -> Any:
    return panel.locator(".kb-line", has=panel.page.locator(f".kb-at:text-is('{address:08x}')"))


def byte(panel: Any, address: int) -> Any:
    return line(panel, address & ~15).locator(".kb-hex .kb-byte").nth(address & 15)


def go(panel: Any, where: str) -> None:
    box = panel.get_by_label("Go to a symbol")
    box.fill(where)
    box.press("Enter")


def open_memory(notebook: Callable[..., Notebook]) -> tuple[Notebook, Any]:
    opened = notebook([MACHINE, STORE, "mem = kw.Memory(m); mem", "c = kw.Controls(m); c"])
    opened.run_all()
    panel = opened.panel("Memory")
    expect(line(panel, 0x1000)).to_be_visible()
    return opened, panel


def test_changed_bytes_are_marked_and_edits_are_written(notebook: Callable[..., Notebook], page: Any) -> None:
    opened, panel = open_memory(notebook)
    go(panel, "0x2000")
    expect(byte(panel, 0x2000)).to_have_class("kb-byte kb-cursor")
    opened.panel("Controls").locator("[data-do=step]").click()
    expect(byte(panel, 0x2003)).to_have_text("41")
    expect(byte(panel, 0x2003)).to_have_class("kb-byte kb-changed")
    expect(byte(panel, 0x2003)).to_have_attribute("title", "was 00")
    expect(byte(panel, 0x2004)).not_to_have_class("kb-byte kb-changed")

    # Typed digits wait for Enter, and are shown as such.
    byte(panel, 0x200E).click()
    page.keyboard.type("dEadb5")
    expect(byte(panel, 0x200E)).to_have_text("de")
    expect(byte(panel, 0x2010)).to_have_text("b5")
    expect(panel.locator(".kb-typed:not(.kb-text *)")).to_have_count(3)
    expect(panel.locator(".kb-inspector")).to_contain_text("3 bytes typed")
    assert opened.python("m.memory[0x200e:0x2011].hex()") == "000000"
    page.keyboard.press("Enter")
    expect(panel.locator(".kb-typed")).to_have_count(0)
    expect(byte(panel, 0x2010)).to_have_text("b5")
    assert opened.python("m.memory[0x200e:0x2011].hex()") == "deadb5"

    # Esc gives up; the text column takes characters.
    byte(panel, 0x2000).click()
    page.keyboard.type("77")
    page.keyboard.press("Escape")
    expect(byte(panel, 0x2000)).to_have_text("00")
    line(panel, 0x2000).locator(".kb-text .kb-byte").nth(1).click()
    page.keyboard.type("Hi!")
    page.keyboard.press("Enter")
    expect(byte(panel, 0x2003)).to_have_text("21")
    assert opened.python("m.memory[0x2000:0x2004]") == b"\0Hi!"
    expect(panel.get_by_role("alert")).to_be_hidden()

    # Numbers of eight bytes are exact to the last digit, there and back.
    panel.get_by_label("Bytes in a number").select_option("8")
    line(panel, 0x2000).locator(".kb-hex .kb-byte").nth(1).click()
    page.keyboard.type("fedcba9876543211")
    page.keyboard.press("Enter")
    expect(line(panel, 0x2000).locator(".kb-hex .kb-byte").nth(1)).to_have_text("fedcba9876543211")
    assert opened.python("m.memory.read_u64(0x2008)") == 0xFEDCBA9876543211


def test_keys_alone_go_find_and_edit(notebook: Callable[..., Notebook], page: Any) -> None:
    opened, panel = open_memory(notebook)
    panel.get_by_label("Go to a symbol").focus()
    page.keyboard.type("again")
    page.keyboard.press("Enter")
    expect(byte(panel, 0x1008)).to_have_class("kb-byte kb-cursor")
    find = panel.get_by_label("Find the next place that holds this")
    find.focus()
    page.keyboard.type("find me")
    page.keyboard.press("Enter")
    expect(byte(panel, 0x2020)).to_have_class("kb-byte kb-found kb-cursor")
    page.keyboard.press("Enter")
    expect(byte(panel, 0x800000)).to_have_class("kb-byte kb-found kb-cursor")
    find.fill("surely nowhere")
    page.keyboard.press("Enter")
    expect(panel.get_by_role("alert")).to_contain_text("nowhere in memory")

    panel.locator(GRID).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    expect(byte(panel, 0x800011)).to_have_class("kb-byte kb-cursor")
    active = panel.locator(GRID).get_attribute("aria-activedescendant")
    assert page.locator(f"[id='{active}']").inner_text() == "00"
    # Digits are an edit only after Enter: a stray key must change nothing.
    page.keyboard.type("bb")
    expect(panel.locator(".kb-typed")).to_have_count(0)
    page.keyboard.press("Enter")
    page.keyboard.type("c3")
    page.keyboard.press("F2")
    page.keyboard.type("x")
    page.keyboard.press("Enter")
    expect(byte(panel, 0x800012)).to_have_text("78")
    assert opened.python("m.memory[0x800011:0x800013]") == b"\xc3x"
    assert page.locator(".jp-Cell").count() == 4, "the notebook's own keys stay out"
    page.keyboard.press("Control+End")
    expect(line(panel, 0xFFFFF0)).to_be_visible()
    page.keyboard.press("Control+Home")
    expect(line(panel, 0)).to_be_visible()


def test_a_million_rows_scroll_and_copy(notebook: Callable[..., Notebook], page: Any) -> None:
    opened, panel = open_memory(notebook)
    grid = panel.locator(GRID)
    assert opened.python("mem.view['total']") == 1 << 20
    for place, start in ((0.25, "0040"), (0.5, "0080"), (0.999, "00ff")):
        grid.evaluate("(element, place) => { element.scrollTop = element.scrollHeight * place; }", place)
        expect(panel.locator(".kb-line .kb-at").first).to_have_text(re.compile(f"^{start}"))
    assert panel.locator(".kb-line").count() < 60
    go(panel, "0x2020")
    row = line(panel, 0x2020)
    expect(row).to_be_visible()
    # What a reader selects and copies reads as it looks.
    text = row.evaluate("node => { getSelection().selectAllChildren(node); return getSelection().toString(); }")
    words = text.split()
    assert words[0] == "00002020"
    assert words[1:8] == ["66", "69", "6e", "64", "20", "6d", "65"]
    assert words[17:] == ["find", "me........."]
    page.evaluate("getSelection().removeAllRanges()")
    box = row.locator(".kb-hex").bounding_box()
    page.mouse.move(box["x"] + 2, box["y"] + 8)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 8)
    page.mouse.up()
    assert page.evaluate("getSelection().toString()").startswith("66 69 6e")
    expect(panel.locator(".kb-editing")).to_have_count(0)


def test_it_is_live_while_the_guest_runs_and_frozen_for_linear_addresses(notebook: Callable[..., Notebook]) -> None:
    opened, panel = open_memory(notebook)
    go(panel, "0x2000")
    expect(byte(panel, 0x2008)).to_have_text("00")
    opened.panel("Controls").locator("[data-do=run]").click()
    expect(panel.get_by_role("status").first).to_have_text("running")
    expect(byte(panel, 0x200A)).not_to_have_text("00")
    assert opened.python("mem.view['live']") is True
    panel.get_by_label("Kind of address").select_option("gva")
    expect(panel.locator(".kb-inspector")).to_contain_text("as of the last stop")
    opened.panel("Controls").locator("[data-do=pause]").click()
    expect(panel.locator(".kb-inspector")).not_to_contain_text("as of the last stop")
    expect(panel.locator(".kb-at", has_text="0000000000002000")).to_be_visible()
    go(panel, "0xffff800000000000")
    expect(panel.locator(".kb-note", has_text="not mapped").first).to_be_visible()


def test_a_narrow_column_gets_rows_of_eight(notebook: Callable[..., Notebook], page: Any) -> None:
    page.set_viewport_size({"width": 520, "height": 900})
    opened = notebook([MACHINE, "mem = kw.Memory(m); mem"])
    opened.command("application:toggle-left-area")
    page.add_style_tag(content=".kb-host { width: 330px; }")
    opened.run_all()
    panel = opened.panel("Memory")
    expect(panel.get_by_label("Bytes in a row")).to_have_value("8")
    expect(line(panel, 0x1000)).to_have_text("00001000  48 c7 c0 01 00 00 00 48  H......H  ")
    fits = panel.locator(".kb-cells").evaluate("element => element.scrollWidth <= element.clientWidth + 1")
    assert fits, "nothing to scroll sideways for"
