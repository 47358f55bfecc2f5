"""The files that describe the project to pip, conda, apt and Binder agree with each other."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from kvmbench.host.bochs import PACKAGES

ROOT = Path(__file__).resolve().parents[2]

# conda-forge splits matplotlib: the base package leaves Qt out, as pip's does.
CONDA_NAMES = {"matplotlib": "matplotlib-base"}


def pyproject() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def split(requirement: str) -> tuple[str, str]:
    matched = re.fullmatch(r"([A-Za-z0-9._-]+?)\s*([<>=!~].*)?", requirement)
    assert matched, requirement
    return matched.group(1), (matched.group(2) or "").replace(" ", "")


def declared() -> dict[str, str]:
    """Name to bounds, of the project and of what its notebooks need."""
    project = pyproject()["project"]
    assert isinstance(project, dict)
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["plot"], *extras["notebook"]]
    return dict(split(line) for line in lines if not line.startswith("kvmbench["))


def conda() -> dict[str, str]:
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    start = lines.index("dependencies:")
    return dict(split(line.removeprefix("  - ")) for line in lines[start + 1 :] if line.startswith("  - "))


def test_environment_yml_has_the_bounds_of_pyproject() -> None:
    wanted = {CONDA_NAMES.get(name, name): bounds for name, bounds in declared().items()}
    project = pyproject()
    assert isinstance(project["project"], dict)
    assert isinstance(project["build-system"], dict)
    wanted["python"] = project["project"]["requires-python"]
    wanted |= dict(split(line) for line in project["build-system"]["requires"])
    assert conda() == {**wanted, "pip": ""}


def test_every_dependency_bound_has_its_reason_beside_it() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    bounded = [line for line in lines if re.match(r'\s+"[\w.-]+[<>=]', line)]
    assert len(bounded) >= len(declared())
    assert [line for line in bounded if not re.search(r"# \S+ \S+", line)] == []


def workbench_module(name: str) -> ModuleType:
    """Loads one module of the `workbench` script, which is no package that could be imported."""
    folder = ROOT / "tools" / "workbench"
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


@pytest.mark.parametrize(
    ("release", "programs", "missing"),
    [
        ({"ID": "ubuntu"}, (), True),
        ({"ID": "pop", "ID_LIKE": "ubuntu debian"}, (), True),
        ({"ID": "ubuntu"}, ("zstd",), False),
        ({"ID": "debian"}, (), False),
    ],
)
def test_the_workbench_installs_zstd_for_the_modules_of_ubuntus_kernels(
    release: dict[str, str], programs: tuple[str, ...], missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in programs:
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    wanted = workbench_module("packages").requirements(for_tests=False)
    assert [item.package for item in wanted if item.package == "zstd" and not item.present()] == ["zstd"] * missing


def test_apt_txt_lists_what_the_workbench_installs_except_python() -> None:
    requirements = workbench_module("packages").requirements(for_tests=False)
    wanted = {item.package for item in requirements if not item.package.startswith("python3")}
    lines = (ROOT / "apt.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == wanted


def test_the_workbench_and_the_library_name_the_same_packages_for_the_intel_appliance() -> None:
    requirements = workbench_module("packages").requirements
    plain, with_bochs = (
        {item.package for item in requirements(for_tests=False, with_bochs=bochs)} for bochs in (False, True)
    )
    assert with_bochs - plain == set(PACKAGES)


def test_a_package_that_the_system_does_not_have_keeps_no_other_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt, installed = tmp_path / "apt-get", tmp_path / "installed"
    apt.write_text(
        '#!/bin/sh\ncase "$*" in *update*) exit 0;; *absent*) echo no such package; exit 100;; esac\n'
        f'for last; do :; done; echo "$last" >>{installed}\n'
    )
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    said = workbench_module("packages")._install([], ["here", "absent", "there"], tmp_path / "log")
    assert "no such package" in said
    assert installed.read_text().split() == ["here", "there"]


@pytest.mark.parametrize("script", ["workbench", "postBuild", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    shell = re.match(r"#!.*?(\w+)$", path.read_text(encoding="utf-8").splitlines()[0])
    assert shell is not None
    subprocess.run([shell.group(1), "-n", path], check=True)


def test_no_binder_folder_hides_the_files_of_the_root() -> None:
    # repo2docker ignores environment.yml, apt.txt and postBuild at the root as soon as one of these exists.
    assert not (ROOT / "binder").exists()
    assert not (ROOT / ".binder").exists()


def test_a_stamp_holds_only_for_its_key_and_while_its_products_are_there(tmp_path: Path) -> None:
    stamp = workbench_module("stamp").Stamp(tmp_path / "state" / "step")
    product = tmp_path / "product"
    product.touch()
    assert not stamp.holds("key")
    stamp.write("key", made=[product])
    assert stamp.holds("key")
    assert not stamp.holds("other key")
    product.unlink()
    assert not stamp.holds("key")


def test_a_damaged_stamp_means_the_step_is_done_again(tmp_path: Path) -> None:
    stamp = workbench_module("stamp").Stamp(tmp_path / "step")
    stamp.write("key")
    for damaged in ("", "{", "[]", '{"key": "key"}', '{"key": "key", "made": 3}'):
        stamp.path.write_text(damaged, encoding="utf-8")
        assert not stamp.holds("key"), damaged


def test_a_fingerprint_changes_with_content_name_and_absence(tmp_path: Path) -> None:
    fingerprint = workbench_module("stamp").fingerprint
    first, second = tmp_path / "a", tmp_path / "b"
    absent = fingerprint([first])
    first.write_bytes(b"x")
    second.write_bytes(b"x")
    present = fingerprint([first])
    assert present == fingerprint([first])
    first_and_fact = fingerprint([first], facts=["fact"])
    assert len({absent, present, fingerprint([second]), first_and_fact}) == 4
    first.write_bytes(b"y")
    assert fingerprint([first]) != present


def test_the_source_distribution_holds_the_core_and_nothing_built(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    # A copy: setuptools writes its notes beside what it packs.
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("needs a git checkout")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    planted = ["kvmbench/core/_core.abi3.so", "kvmbench/core/core.o", "kvmbench/core/kvmbench-agent"]
    for name in planted:
        (tree / name).write_bytes(b"built")
    build = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=True)
    archive = tree / "dist" / done.stdout.splitlines()[-1]
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {
        "kvmbench/core/core.c",
        "kvmbench/core/wire.h",
        "kvmbench/core/build.py",
        "pyproject.toml",
        "LICENSE",
        "workbench",
        "tools/workbench/__main__.py",
    } <= names
    assert not names & set(planted)
