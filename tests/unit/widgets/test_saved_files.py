"""Every panel as every kind of file, each with where it came from."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvmbench_widgets as kw
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance
from kvmbench_widgets.panel import Panel

PANELS: list[type[Panel]] = [getattr(kw, name) for name in kw.__all__ if hasattr(getattr(kw, name), "MODULE")]


@pytest.fixture
def stopped(machine: Any, send: Callable[..., None]) -> Any:
    """A machine that has something to show in every panel."""
    machine.load_asm("mov al, 'k'\nmov dx, 0x3f8\nout dx, al\nloop: push rax\njmp loop", at=0x3000)
    machine.cpu.log_exits()
    machine.cpu.breakpoints.add(0x1007)
    machine.cpu.regs.rip, machine.cpu.regs.rsp = 0x3000, 0x8000
    machine.cpu.step(5)
    return machine


@pytest.mark.parametrize("kind", PANELS)
def test_a_panel_is_saved_as_data_text_and_pictures_with_where_they_came_from(
    stopped: Any, tmp_path: Path, kind: type[Panel]
) -> None:
    panel, where = kind(stopped), stopped.host.provenance
    if kind is kw.ExitTrace:
        stopped.cpu.step()  # it has what came after it was made
    made = {ending: tmp_path / f"panel.{ending}" for ending in ("csv", "txt", "svg", "png")}
    for path in made.values():
        panel.save(path)

    lines = made["csv"].read_text().splitlines()
    assert lines[0] == f"# kvmbench {panel.TITLE}"
    assert lines[1] == f"# {where}"
    about = Provenance.from_json(lines[2].removeprefix("# "))
    assert (about.kernel, about.module, about.versions) == (where.kernel, where.module, where.versions)
    table = list(csv.reader(lines[3:]))
    assert len(table) > 1
    assert {len(row) for row in table} == {len(panel.table().columns)}

    text = made["txt"].read_text()
    assert text.startswith(f"{panel.TITLE}: {where}")
    assert Provenance.from_json(text.splitlines()[-1]).kernel == where.kernel
    assert len(text.splitlines()) > 3

    picture = made["svg"].read_text()
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert where.kernel in picture
    assert made["png"].read_bytes().startswith(b"\x89PNG")
    assert where.kernel.encode() in made["png"].read_bytes()

    with pytest.raises(MisuseError, match=r"\.csv, \.txt, \.svg or \.png"):
        panel.save(tmp_path / "panel.docx")


def test_the_data_of_a_workbench_are_those_of_all_its_panels(stopped: Any, tmp_path: Path) -> None:
    bench = kw.Workbench(stopped)
    bench.save(tmp_path / "all.csv")
    lines = (tmp_path / "all.csv").read_text().splitlines()[3:]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in csv.DictReader(lines):
        found.setdefault((row["panel"], row["row"]), {})[row["column"]] = row["value"]
    assert {panel for panel, _ in found} == {panel.TITLE for panel in bench.panels.values()}
    for panel in bench.panels.values():
        columns, rows = panel.table()
        for number, row in enumerate(rows):
            assert found[panel.TITLE, str(number)] == dict(zip(columns, map(str, row), strict=True))
    bench.close()


def test_a_picture_of_an_empty_panel_is_a_picture(widget_host: Any, tmp_path: Path) -> None:
    import kvmbench as kb

    with kb.Machine(widget_host, mode="long") as machine:
        for kind in PANELS:
            panel = kind(machine)
            for ending in ("csv", "txt", "svg", "png"):
                panel.save(tmp_path / f"{kind.__name__}.{ending}")
                assert (tmp_path / f"{kind.__name__}.{ending}").stat().st_size > 100
