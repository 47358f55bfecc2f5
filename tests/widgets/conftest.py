"""Browser tests of the widgets: JupyterLab as people run it, Debian's Chromium as people see it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmbench as kb
from kvmbench.errors import HostUnavailable

pytest.importorskip("playwright", reason="playwright is not installed (pip install playwright)")

from playwright.sync_api import sync_playwright

from .lab import CHROMIUM, CHROMIUM_OPTIONS, Lab, Notebook, start_lab


@pytest.fixture(scope="session")
def chromium(need: Callable[[str, str], Any]) -> Iterator[Any]:
    """Debian's Chromium, headless."""
    if not Path(CHROMIUM).exists():
        need("browser", f"{CHROMIUM} is missing (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_OPTIONS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One JupyterLab for all tests."""
    with start_lab(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page of its own for each test; what it complains of on its console fails the test."""
    context = chromium.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(error.stack or str(error)))
    yield page
    context.close()
    # Of our modules, which anywidget loads from blobs; JupyterLab has errors of its own.
    ours = [error for error in errors if "blob:" in error or "anywidget" in error]
    assert not ours, ours


@pytest.fixture
def notebook(lab: Lab, page: Any) -> Iterator[Callable[..., Notebook]]:
    """Opens notebooks: ``notebook(["cell", ...])``; their kernels end with the test."""
    opened: list[Notebook] = []

    def open_notebook(cells: list[str], **options: Any) -> Notebook:
        opened.append(Notebook.open(lab, page, cells, **options))
        return opened[-1]

    yield open_notebook
    for each in opened:
        each.close()


@pytest.fixture(scope="session")
def amd(need: Callable[[str, str], Any]) -> None:
    """For tests whose notebook connects to the appliance."""
    try:
        kb.connect("appliance", quiet=True).close()
    except HostUnavailable as error:
        need("amd", f"no appliance: {error}")


@pytest.fixture(scope="session")
def local(need: Callable[[str, str], Any]) -> None:
    """For tests whose notebook connects to this machine's KVM."""
    try:
        with kb.connect("local", quiet=True) as host:
            works = 0 in host.mechanisms.step
    except HostUnavailable as error:
        need("local", f"no local host: {error}")
    if not works:
        need("local", "single steps do not work on local")


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures of the page go: $KVMBENCH_SHOTS, for looking at and for docs/images, or nowhere that stays."""
    folder = Path(os.environ.get("KVMBENCH_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
