"""The appliance's image in the cache: made once, made anew in parts, never half there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmbench.core import agent as agent_build
from kvmbench.errors import HostUnavailable, LoadError
from kvmbench.host import image as images
from kvmbench.host.initramfs import entries

from .conftest import RELEASE


@pytest.fixture(scope="module")
def built_agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the agent, so that not every test compiles it."""
    folder = tmp_path_factory.mktemp("built")
    try:
        agent_build.agent_binary(folder)
    except HostUnavailable as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture
def cache(cache: Path, built_agent: Path) -> Path:
    shutil.copytree(built_agent, cache)
    return cache


@pytest.fixture
def own_kernel(tmp_path: Path, make_kernel: Callable[..., bytes], module_set: dict[str, bytes]) -> tuple[Path, Path]:
    kernel, folder = tmp_path / "vmlinuz", tmp_path / "modules"
    kernel.write_bytes(make_kernel())
    folder.mkdir()
    for name, data in module_set.items():
        (folder / name).write_bytes(data)
    return kernel, folder


def test_an_image_holds_kernel_agent_and_modules_and_says_what_they_are(
    cache: Path, own_kernel: tuple[Path, Path], module_set: dict[str, bytes]
) -> None:
    image = images.build(*own_kernel)
    assert image.kernel.read_bytes() == own_kernel[0].read_bytes()
    found = entries(image.initramfs.read_bytes())
    assert found["init"][1] == agent_build.agent_binary(cache).read_bytes()
    assert {name: found[f"lib/modules/{name}"][1] for name in module_set} == module_set
    assert image.versions["kernel"] == RELEASE
    assert image.versions["origin"] == str(own_kernel[0])
    assert image.parameters["kvm_amd"] == ("npt", "nested")
    assert all(path.is_relative_to(cache) for path in (image.kernel, image.initramfs))


def test_what_was_built_last_is_what_is_used_from_then_on(cache: Path, own_kernel: tuple[Path, Path]) -> None:
    assert images.current() is None
    built = images.build(*own_kernel)
    before = built.initramfs.stat().st_mtime_ns
    assert images.build() == images.current() == built
    assert built.initramfs.stat().st_mtime_ns == before


def test_a_changed_agent_makes_a_new_image_of_the_same_kernel(
    cache: Path, own_kernel: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = images.build(*own_kernel)
    changed = tmp_path / "core"
    changed.mkdir()
    for path in [*agent_build.sources(), *agent_build.sources()[0].parent.glob("*.h")]:
        (changed / path.name).write_bytes(path.read_bytes())
    with (changed / "agent.c").open("a") as file:
        file.write('\nconst char added_by_a_test[] = "changed";\n')
    monkeypatch.setattr(agent_build, "_HERE", changed)
    second = images.build()
    assert second.key != first.key
    assert second.kernel == first.kernel
    assert second.versions["agent"] != first.versions["agent"]
    assert images.current() == second


def test_two_builds_at_once_end_with_one_whole_image(cache: Path, own_kernel: tuple[Path, Path]) -> None:
    kernel, modules = own_kernel
    script = (
        "import sys; from pathlib import Path; from kvmbench.host import image; "
        "print(image.build(Path(sys.argv[1]), Path(sys.argv[2])).key)"
    )
    command = [sys.executable, "-c", script, str(kernel), str(modules)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    keys = {process.communicate(timeout=120)[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(keys) == 1
    leftovers = [path.name for path in cache.rglob("*") if path.name.startswith("building-") or ".new" in path.name]
    assert leftovers == []
    assert len(list((cache / "images").iterdir())) == len(list((cache / "kernels").iterdir())) == 1


def test_a_failed_build_leaves_the_image_before_it_in_use(
    cache: Path, own_kernel: tuple[Path, Path], tmp_path: Path
) -> None:
    built = images.build(*own_kernel)
    no_kernel = tmp_path / "no-kernel"
    no_kernel.write_bytes(b"text")
    with pytest.raises(LoadError, match="no-kernel"):
        images.build(no_kernel)
    assert images.current() == built


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, own_kernel: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KVMBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(HostUnavailable, match="KVMBENCH_CACHE"):
        images.build(*own_kernel)


def test_remove_all_leaves_nothing_to_use(cache: Path, own_kernel: tuple[Path, Path]) -> None:
    images.build(*own_kernel)
    removed = {path.name for path in images.remove_all()}
    assert removed == {"default", "images", "kernels", "agents"}
    assert images.current() is None
    assert images.remove_all() == []


def test_no_compiler_names_the_packages(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailable, match="apt-get install"):
        agent_build.find_compiler(search_path=str(tmp_path))


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("musl-gcc", "x86_64-linux-musl-gcc"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho 'agent.c:1: no such luck' >&2\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(HostUnavailable, match="no such luck"):
        agent_build.agent_binary(tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
