"""The ES modules, joined: what a page is handed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kvmbench_widgets as kw
from kvmbench_widgets import modules
from kvmbench_widgets.library import Library

FOLDER = Path(modules.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.js"))
PANELS = [getattr(kw, name) for name in kw.__all__ if hasattr(getattr(kw, name), "MODULE")]
BUNDLE_BYTES = 150_000


@pytest.mark.parametrize("name", MODULES)
def test_a_module_keeps_to_the_two_forms_that_joining_knows(name: str) -> None:
    text = (FOLDER / f"{name}.js").read_text()
    for line in re.findall(r"^import .*$", text, re.MULTILINE):
        assert modules._IMPORT.fullmatch(line), line
    for line in re.findall(r"^export .*$", text, re.MULTILINE):
        assert modules._EXPORT.match(line) or line == "export default { render };", line
    assert "innerHTML" not in text
    assert not re.search(r"\bhttps?://(?!www\.w3\.org/)", text), "nothing is fetched at run time"
    for literal in re.findall(r"`[^`]*`", text):
        assert "\n" not in literal, f"joining strips indentation, also inside {literal!r}"


@pytest.mark.parametrize("name", MODULES)
def test_a_joined_module_parses(name: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node; the browser tests load every module too")
    path = tmp_path / "joined.mjs"
    path.write_text(modules.library() if name in modules.SHARED else modules.esm(name))
    done = subprocess.run([node, "--check", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_that_import_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.js").write_text('import { b } from "./b.js";\nexport const a = 1;\n')
    (tmp_path / "b.js").write_text('import { a } from "./a.js";\nexport const b = 1;\n')
    monkeypatch.setattr(modules, "_FOLDER", tmp_path)
    with pytest.raises(ImportError, match="a -> b -> a"):
        modules.esm.__wrapped__("a")


def test_everything_a_workbench_loads_stays_below_150_kilobytes() -> None:
    sizes = {kind.__name__: len(str(kind._esm)) + len(str(kind._css)) for kind in [*PANELS, Library]}
    print(sizes, sum(sizes.values()))
    assert sum(sizes.values()) < BUNDLE_BYTES, sizes


def test_what_is_shared_is_sent_once_and_again_when_it_was_closed() -> None:
    first = Library.reference()
    assert Library.reference() == first
    assert Library._made is not None
    Library._made.close()
    assert Library.reference() != first


def test_a_panel_holds_nothing_of_what_is_shared() -> None:
    for kind in PANELS:
        assert "function each(" not in str(kind._esm)
        assert "kb-export" not in str(kind._css)
