"""The whole Workbench: arranged, keyed, themed, accessible, in JupyterLab and in Notebook 7."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from .guests import APPLIANCE, MACHINE
from .lab import Lab, Notebook, start_lab

PANELS = ("Controls", "Disassembly", "Registers", "Stack", "Memory", "Breakpoints", "Exits", "Console")
RAX = "[data-register=rax]"


def open_workbench(notebook: Callable[..., Notebook], machine: str = MACHINE, **options: Any) -> Notebook:
    opened = notebook([machine, "wb = kw.Workbench(m); wb"], **options)
    opened.run_all()
    expect(opened.panel("Registers").locator(RAX)).to_be_visible()
    return opened


def serious_faults(page: Any) -> list[str]:
    """What axe-core holds against the workbench, at impact serious or critical."""
    found = Axe().run(page, context="section.kb-workbench")
    return [
        f"{each['id']}: {node['html'][:150]} {node.get('failureSummary', '')}"
        for each in found.response["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def test_one_click_moves_every_panel(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = open_workbench(notebook)
    bench = opened.panel("Workbench")
    expect(bench.locator(".kb-where")).to_contain_text("Linux")
    opened.panel("Controls").locator("[data-do=step]").click()
    expect(opened.panel("Registers").locator(RAX)).to_have_text(f"{1:016x}")
    expect(opened.panel("Controls").locator(".kb-place")).to_contain_text("loop")
    expect(opened.panel("Disassembly").locator("[aria-current=true]")).to_contain_text("add")
    # What is behind another tab comes to the front with a click, and its key.
    bench.get_by_role("tab", name="Exits").click()
    expect(opened.panel("Exits")).to_be_visible()
    expect(opened.panel("Memory")).to_be_hidden()
    page.keyboard.press("5")
    expect(opened.panel("Memory")).to_be_visible()


def test_keys_alone_drive_it(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = open_workbench(notebook)
    page.keyboard.press("Escape")
    opened.panel("Controls").locator("[data-do=step]").focus()
    page.keyboard.press("s")
    expect(opened.panel("Registers").locator(RAX)).to_have_text(f"{1:016x}")
    page.keyboard.press("F11")
    expect(opened.panel("Registers").locator(RAX)).to_have_text(f"{3:016x}")
    page.keyboard.press("r")
    expect(opened.panel("Controls").locator(".kb-cause")).not_to_have_text("step")
    assert opened.python("cpu.regs.rbx") == 0xFEDCBA9876543211
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_hidden()
    page.keyboard.press("3")
    assert page.evaluate("document.activeElement.closest('.kb-panel').getAttribute('aria-label')") == "Registers"
    # The splitter between code and registers.
    columns = opened.panel("Workbench").get_by_role("separator", name="Width of the code column")
    before = columns.get_attribute("aria-valuenow")
    columns.focus()
    page.keyboard.press("ArrowRight")
    expect(columns).not_to_have_attribute("aria-valuenow", str(before))


def test_two_of_them_on_one_machine_have_names_of_their_own(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, "wb = kw.Workbench(m); wb", "kw.Workbench(m)"])
    opened.run_all()
    registers = opened.panel("Registers")
    expect(registers.locator(RAX)).to_have_count(2)
    expect(opened.panel("Memory").locator(".kb-byte").first).to_be_attached()
    names = page.evaluate("[...document.querySelectorAll('.kb-workbench [id]')].map(each => each.id)")
    assert len(names) > 20
    assert len(names) == len(set(names))
    # What one does, both show; a number may be typed with an exponent.
    opened.panel("Controls").nth(1).get_by_label("How many steps").fill("1e1")
    opened.panel("Controls").nth(1).locator("[data-do=many]").click()
    for n in (0, 1):
        expect(registers.nth(n).locator(RAX)).to_have_text(f"{7:016x}")
    # The line under the bytes is in sight, not behind the edge.
    memory = opened.panel("Memory").first
    inner, outer = memory.locator(".kb-inspector").bounding_box(), memory.bounding_box()
    assert inner["y"] + inner["height"] <= outer["y"] + outer["height"] + 1
    # A key pressed while the guest runs is no mistake.
    opened.python("setattr(cpu.regs, 'rip', cpu.symbols['spin'])")
    opened.panel("Controls").first.locator("[data-do=run]").click()
    expect(opened.panel("Workbench").first).to_have_attribute("data-state", "running")
    opened.panel("Memory").first.locator("[tabindex='0']").first.focus()
    page.keyboard.press("s")
    page.keyboard.press("p")
    expect(opened.panel("Workbench").first).to_have_attribute("data-state", "stopped")
    assert opened.python("wb.controls.error") == ""


def test_two_views_scrolled_apart_do_not_ask_in_turns_for_ever(notebook: Callable[..., Notebook], page: Any) -> None:
    storm = "m.load_asm('again: out 0x80, al; jmp again', at=0x3000); cpu.regs.rip = 0x3000; cpu.log_exits(1_000_000)"
    count = """
cpu.run(deadline_s=0.05)
exits = kw.Exits(m, follow=False); asked = []
exits.on_msg(lambda _, message, __: asked.append(message)); exits"""
    opened = notebook([MACHINE, storm, count, "exits"])
    opened.run_all()
    lists = opened.panel("Exits").locator(".kb-scroller")
    expect(lists).to_have_count(2)
    expect(lists.first.locator("[role=listitem]").first).to_contain_text("out")
    lists.nth(1).evaluate("list => { list.scrollTop = list.scrollHeight; }")
    opened.python("asked.clear()")
    opened.python("exits.session.start(exits, cpu, lambda: cpu.run(deadline_s=2))")
    assert opened.python("exits.wait(20)")
    assert opened.python("len(asked)") < 40
    # Where the reader goes, the rows are.
    opened.panel("Exits").first.scroll_into_view_if_needed()
    lists.first.hover()
    expect(lists.first.locator("[role=listitem]").first).to_contain_text("out")


def test_an_arrangement_is_kept_over_a_reload_and_for_the_next_workbench(notebook: Callable[..., Notebook]) -> None:
    opened = open_workbench(notebook)
    bench = opened.panel("Workbench")
    bench.get_by_role("tab", name="Breakpoints").click()
    bench.locator("summary[aria-label='Panels shown']").click()
    bench.locator("[data-panel=exits]").uncheck()
    expect(bench.get_by_role("tab", name="Exits")).to_be_hidden()
    opened.command("docmanager:save")
    opened.reload()
    expect(opened.panel("Breakpoints")).to_be_visible()
    expect(bench.get_by_role("tab", name="Exits")).to_be_hidden()
    again = notebook([MACHINE, "kw.Workbench(m)"])
    again.run_all()
    expect(again.panel("Breakpoints")).to_be_visible()
    expect(again.panel("Workbench").get_by_role("tab", name="Exits")).to_be_hidden()


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_axe_finds_no_serious_fault_in_either_theme(
    notebook: Callable[..., Notebook], page: Any, theme: str, shots: Path
) -> None:
    opened = open_workbench(notebook)
    opened.set_theme(theme)
    opened.panel("Controls").locator("[data-do=step]").click()
    expect(opened.panel("Registers").locator(RAX)).to_have_text(f"{1:016x}")
    bench = opened.panel("Workbench")
    assert serious_faults(page) == []
    for name in ("Exits", "Console", "Breakpoints"):
        bench.get_by_role("tab", name=name).click()
    assert serious_faults(page) == []
    bench.screenshot(path=shots / f"workbench-{theme.split()[1].lower()}.png")


@pytest.mark.parametrize("width", [900, 1800])
def test_it_is_arranged_at_900_and_at_1800_pixels(
    notebook: Callable[..., Notebook], page: Any, width: int, shots: Path
) -> None:
    opened = open_workbench(notebook)
    opened.command("application:toggle-left-area")
    page.set_viewport_size({"width": width + 160, "height": 1000})
    bench = opened.panel("Workbench")
    bench.scroll_into_view_if_needed()
    outer = bench.bounding_box()
    boxes = {name: opened.panel(name).bounding_box() for name in PANELS if opened.panel(name).is_visible()}
    assert len(boxes) >= 4
    for name, box in boxes.items():
        assert box["width"] > 250, name
        assert box["height"] > 30, name
        assert box["x"] >= outer["x"] - 1, name
        assert box["x"] + box["width"] <= outer["x"] + outer["width"] + 1, f"{name} sticks out"
    names = list(boxes)
    for n, one in enumerate(names):
        for two in names[n + 1 :]:
            a, b = boxes[one], boxes[two]
            apart = (
                a["x"] + a["width"] <= b["x"] + 1
                or b["x"] + b["width"] <= a["x"] + 1
                or a["y"] + a["height"] <= b["y"] + 1
                or b["y"] + b["height"] <= a["y"] + 1
            )
            assert apart, f"{one} and {two} overlap at {width} pixels"
    bench.screenshot(path=shots / f"workbench-{width}.png")


def test_an_exported_file_carries_where_it_came_from(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = open_workbench(notebook)
    registers = opened.panel("Registers")
    for format, magic in (("CSV", b"# kvmbench Registers"), ("SVG", b"<?xml"), ("PNG", b"\x89PNG")):
        registers.locator("summary[aria-label='Save Registers']").click()
        with page.expect_download() as download:
            registers.get_by_role("button", name=f"as {format}").click()
        data = Path(download.value.path()).read_bytes()
        assert data.startswith(magic)
        assert opened.python("host.info.kernel").encode() in data


@pytest.mark.usefixtures("amd")
def test_it_works_on_the_appliance_until_the_host_is_killed(notebook: Callable[..., Notebook]) -> None:
    opened = open_workbench(notebook, APPLIANCE)
    opened.panel("Controls").locator("[data-do=step]").click()
    expect(opened.panel("Registers").locator(RAX)).to_have_text(f"{1:016x}")
    opened.python("__import__('os').kill(host._closer.__self__.pid, 9)")
    opened.panel("Controls").locator("[data-do=step]").click()
    for title in ("Controls", "Registers", "Disassembly", "Memory", "Stack"):
        expect(opened.panel(title).get_by_role("status").first).to_have_text("host lost")
    expect(opened.panel("Disassembly")).to_contain_text("cmp")


@pytest.mark.usefixtures("local")
def test_it_works_in_notebook_7(chromium: Any, tmp_path: Path) -> None:
    with start_lab(tmp_path, application="notebook") as lab:
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        opened = Notebook.open(lab, page, [MACHINE, "wb = kw.Workbench(m); wb"], tree="notebooks")
        try:
            opened.run_all()
            expect(opened.panel("Registers").locator(RAX)).to_be_visible()
            opened.panel("Controls").locator("[data-do=step]").click()
            expect(opened.panel("Registers").locator(RAX)).to_have_text(f"{1:016x}")
        finally:
            opened.close()
            page.close()


def test_nbconvert_keeps_the_last_state(lab: Lab, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    cells = [MACHINE, "wb = kw.Workbench(m); wb", "wb.controls.until('spin-1'); wb.wait()\nhost.close()"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=60).execute()
    html, _ = HTMLExporter().from_notebook_node(book)
    text = html.split('<script type="application/vnd.jupyter.widget-state+json">')[1].split("</script>")[0]
    states = [each["state"] for each in json.loads(text)["state"].values()]
    registers = next(each for each in states if each.get("_anywidget_id", "").endswith(".Registers"))
    assert "fedcba9876543211" in json.dumps(registers["view"])
    assert "text/plain" in book.cells[1].outputs[0].data
    assert "rbx" in book.cells[1].outputs[0].data["text/plain"]
