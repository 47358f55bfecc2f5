"""The arrows between the packages point one way, and importing kvmbench is light."""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# docs/design.md: an import may go to a smaller or the same number, never to a larger one.
LAYERS = {
    "errors": 0,
    "arguments": 0,
    "uapi": 1,
    "core": 2,
    "host": 3,
    "kvm": 4,
    "machine": 5,
    "debug": 6,
    "mmu": 6,
    "traces": 6,
    "clock": 6,
    "conformance": 7,
    "experiments": 7,
    "plot": 8,
    "doctor": 9,
    "cli": 10,
    "__main__": 11,
}

FORBIDDEN_AT_IMPORT = (
    "IPython",
    "ipykernel",
    "ipywidgets",
    "jupyter",
    "jupyterlab",
    "matplotlib",
    "notebook",
    "pandas",
    "traitlets",
)


def imported_parts(package: Path) -> Iterator[tuple[Path, int, str, str]]:
    """Yields (file, line, importing part, imported part) for each import inside `package`.

    A part is a module or package right below `package`. Imports inside functions
    and for type checking count: they are arrows all the same.
    """
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        part = relative.parts[0].removesuffix(".py")
        if part == "__init__":
            continue  # the public face: it gathers from everywhere
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, package.name, (package.name, *relative.parts[:-1])):
                if target != part:
                    yield path, getattr(node, "lineno", 0), part, target


def _targets(node: ast.AST, root: str, here: tuple[str, ...]) -> Iterator[str]:
    names: list[tuple[str, ...]] = []
    if isinstance(node, ast.Import):
        names = [tuple(alias.name.split(".")) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = here[: len(here) - node.level + 1] if node.level else ()
        module = (*base, *(node.module.split(".") if node.module else ()))
        names = [(*module, alias.name) for alias in node.names]
    for name in names:
        if name[0] == root and len(name) > 1:
            yield name[1]


def test_no_import_goes_against_the_layers() -> None:
    edges = list(imported_parts(ROOT / "kvmbench"))
    assert edges, "the walk found no import at all"
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {source} imports {target}"
        for path, line, source, target in edges
        if target in LAYERS and LAYERS[source] < LAYERS[target]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_part_of_kvmbench_has_a_layer() -> None:
    package = ROOT / "kvmbench"
    parts = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert parts - {"__init__", "kvmbench"} <= LAYERS.keys()


def test_parts_of_one_layer_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, _, source, target in imported_parts(ROOT / "kvmbench"):
        if target in LAYERS:
            graph.setdefault(source, set()).add(target)
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    "source",
    [
        "import kvmbench.debug.step\n",
        "from kvmbench.debug import step\n",
        "from kvmbench import debug\n",
        "from ..debug.step import Stop\n",
        "from .. import debug\n",
        "def late():\n    from kvmbench.debug import step\n",
    ],
)
def test_a_planted_back_edge_is_seen_however_it_is_written(tmp_path: Path, source: str) -> None:
    module = tmp_path / "kvmbench" / "kvm" / "vcpu.py"
    module.parent.mkdir(parents=True)
    module.write_text(source, encoding="utf-8")
    assert [(part, target) for _, _, part, target in imported_parts(tmp_path / "kvmbench")] == [("kvm", "debug")]


WATCH_IMPORT = """
import json, os, sys
touched = []
def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith(("/dev/", "/sys/")):
        touched.append(str(arguments[0]))
    if event in ("subprocess.Popen", "os.posix_spawn", "os.exec", "socket.connect"):
        touched.append(event)
def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
before = descriptors()
sys.addaudithook(hook)
import kvmbench
touched = list(touched)
left = descriptors() - before
print(json.dumps({"modules": sorted(sys.modules), "touched": touched, "descriptors": left}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict[str, object]:
    """What `import kvmbench` does in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", WATCH_IMPORT], capture_output=True, text=True, check=True, cwd=ROOT)
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_importing_kvmbench_loads_no_jupyter_package_and_no_plotting(fresh_import: dict[str, object]) -> None:
    modules = fresh_import["modules"]
    assert isinstance(modules, list)
    assert "kvmbench" in modules
    assert not [name for name in modules if name.partition(".")[0].partition("_")[0] in FORBIDDEN_AT_IMPORT]


def test_importing_kvmbench_opens_nothing(fresh_import: dict[str, object]) -> None:
    assert fresh_import["touched"] == []
    assert fresh_import["descriptors"] == 0
