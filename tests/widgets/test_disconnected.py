"""Panels whose kernel is gone: after a restart, and as a notebook keeps them for who opens it later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nbformat
from nbclient import NotebookClient
from playwright.sync_api import expect

from .guests import MACHINE
from .lab import Lab, Notebook

CELLS = [MACHINE, "wb = kw.Workbench(m); wb", "r = kw.Registers(m); r"]
RAX = "[data-register=rax]"


def open_and_step(notebook: Callable[..., Notebook]) -> Notebook:
    opened = notebook(CELLS)
    opened.run_all()
    opened.panel("Controls").locator("[data-do=step]").click()
    expect(opened.panel("Registers").last.locator(RAX)).to_have_text(f"{1:016x}")
    return opened


def says(opened: Notebook, words: str) -> None:
    for title in ("Workbench", "Controls", "Registers", "Disassembly"):
        expect(opened.panel(title).last.locator("> .kb-head > .kb-state")).to_have_text(words)


def test_a_kernel_that_was_restarted_is_told_and_nothing_is_asked_of_it(notebook: Callable[..., Notebook]) -> None:
    opened = open_and_step(notebook)
    opened.restart_kernel()
    says(opened, "disconnected: no kernel")
    # What was seen last stays; a button does nothing, and says so.
    rax = opened.panel("Registers").last.locator(RAX)
    expect(rax).to_have_text(f"{1:016x}")
    expect(opened.panel("Controls").locator("[data-do=step]")).to_be_disabled()
    opened.panel("Registers").last.get_by_role("button", name="CF", exact=True).click()
    expect(opened.panel("Registers").last.get_by_role("alert")).to_contain_text("The kernel was restarted or has ended")
    opened.run_all()
    for title in ("Workbench", "Controls", "Registers", "Disassembly"):
        expect(opened.panel(title).last).to_have_attribute("data-state", "stopped")
    opened.panel("Controls").locator("[data-do=step]").click()
    expect(opened.panel("Registers").last.locator(RAX)).to_have_text(f"{1:016x}")
    expect(opened.panel("Registers").last.get_by_role("alert")).to_be_hidden()


def test_a_notebook_opened_without_its_kernel_says_that_it_is_a_saved_page(
    notebook: Callable[..., Notebook], lab: Lab, page: Any
) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in [*CELLS, "cpu.step()"]])
    NotebookClient(book, timeout=60).execute()  # keeps the widgets' state in the notebook
    opened = notebook(["pass"])
    nbformat.write(book, lab.root / opened.name)
    lab.request(f"contents/{opened.name}/trust", "POST")  # or its text is shown in place of its widgets
    opened.close()
    opened.reload()
    says(opened, "saved page: no kernel")
    registers = opened.panel("Registers").last
    expect(registers.locator(RAX)).to_have_text(f"{1:016x}")
    registers.get_by_role("button", name="CF", exact=True).click()
    expect(registers.get_by_role("alert")).to_contain_text("This is a saved page: there is no kernel")
