"""Every notebook: stored clean, and running from top to bottom on each host there is.

A notebook asserts what it shows, so running it is the test; what it leaves behind is looked at here.
"""

from __future__ import annotations

import ast
import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

import kvmbench as kb
from kvmbench.errors import HostUnavailable
from kvmbench.host.provenance import Provenance

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
HOSTS = {"local": "local", "appliance": "amd"}  # what connect() takes, and its name in KVMBENCH_REQUIRE
CELL_TIMEOUT_S = 120
MOST_LINES = 10
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SOURCE = "{http://purl.org/dc/elements/1.1/}source"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(params=HOSTS)
def host_name(request: pytest.FixtureRequest, need) -> str:
    """A host that can be had and on which a guest takes a step."""
    try:
        with kb.connect(request.param, quiet=True) as host:
            works = 0 in host.mechanisms.step
    except HostUnavailable as error:
        need(HOSTS[request.param], f"no {request.param} host: {error}")
    if not works:
        need(HOSTS[request.param], f"single steps do not work on {request.param}: {host.mechanisms.summary}")
    return request.param


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS, f"no notebook in {FOLDER}"


def test_a_notebook_is_stored_without_outputs_and_with_ids(notebook: Path) -> None:
    book = nbformat.read(notebook, as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    assert (book.nbformat, book.nbformat_minor) >= (4, 5), "older formats have no cell ids"
    assert len({cell.id for cell in book.cells}) == len(book.cells)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], f"cell {cell.id} has outputs: clear them before storing"
            assert cell.execution_count is None, f"cell {cell.id} has a count: clear the outputs before storing"
        assert not cell.metadata, f"cell {cell.id} has metadata {dict(cell.metadata)}"


def test_a_notebook_says_what_it_shows_needs_and_takes_and_closes_its_host(notebook: Path) -> None:
    cells = nbformat.read(notebook, as_version=4).cells
    opening = cells[0].source
    assert opening.startswith("# ")
    for word in ("**What you will see:**", "**Needs:**", "**Minutes:**"):
        assert word in opening, f"the first cell lacks {word}"
    assert "host.close()" in cells[-1].source


def test_functions_in_a_notebook_are_short(notebook: Path) -> None:
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= MOST_LINES, f"{node.name} in cell {cell.id} has {lines} lines: into the library"


def test_a_notebook_runs_and_leaves_its_figures(
    notebook: Path, host_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("KVMBENCH_HOST", host_name)
    monkeypatch.setenv("KVMBENCH_OUT", str(out))
    # A profile of the user's own, or a start-up file in it, must not decide how the notebook runs.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    book = nbformat.read(notebook, as_version=4)
    # Sockets of files: nothing of the kernel can be reached by others, and no port is taken.
    sockets = {"KernelManager": {"transport": "ipc", "ip": str(tmp_path / "k")}}
    client = NotebookClient(
        book,
        timeout=CELL_TIMEOUT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
        config=Config(sockets),
    )
    client.execute()
    made = sorted(out.iterdir())
    figures = [path for path in made if path.suffix != ".csv"]
    assert {path.suffix for path in figures} == {".png", ".svg"}
    for path in made:
        assert path.stem.startswith(notebook.stem), "a figure carries its notebook's name"
        sources = json.loads(_stored_provenance(path))
        assert [Provenance.from_json(json.dumps(source)).kind for source in sources] == [host_name], path
        assert all(source["kernel"] and source["module"] and source["created"] for source in sources), path
    for stem, group in itertools.groupby(figures, key=lambda path: path.stem):
        assert len(list(group)) == 2, f"{stem} is there in one form only"


def _stored_provenance(path: Path) -> str:
    if path.suffix == ".svg":
        found = [element.text for element in ElementTree.parse(path).iter(_SOURCE)]
        assert len(found) == 1, f"{path} has {len(found)} dc:source elements"
        return found[0] or ""
    if path.suffix == ".csv":
        # A comment line of its own, after the one for people.
        return f"[{path.read_text().splitlines()[2].removeprefix('# ')}]"
    return dict(_png_texts(path.read_bytes()))["kvmbench provenance"]


def _png_texts(data: bytes) -> Iterator[tuple[str, str]]:
    """Keyword and text of each tEXt and iTXt chunk that is not compressed (PNG, "Textual information")."""
    assert data.startswith(_PNG_SIGNATURE)
    at = len(_PNG_SIGNATURE)
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        if kind == b"tEXt":
            keyword, _, text = body.partition(b"\0")
            yield keyword.decode("latin-1"), text.decode("latin-1")
        elif kind == b"iTXt":
            keyword, _, rest = body.partition(b"\0")
            yield keyword.decode("latin-1"), rest[2:].split(b"\0", 2)[2].decode()
        at += 12 + size
