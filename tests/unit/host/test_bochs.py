"""Bochs: what is missing is named, and what a saved machine depends on is in its identity."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable, MisuseError
from kvmbench.host import bochs
from kvmbench.host.bochs import Bochs, configuration, find_bochs, port_library, version_of
from kvmbench.host.intel import start_intel


def test_without_bochs_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMBENCH_BOCHS", raising=False)
    with pytest.raises(HostUnavailable, match=r"apt-get install .*bochs bochs-sdl bochsbios vgabios"):
        find_bochs(search_path=str(tmp_path))


def test_without_firmware_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bochs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.delenv("KVMBENCH_BOCHS", raising=False)
    monkeypatch.setattr(bochs, "_SHARE", (tmp_path,))
    with pytest.raises(HostUnavailable, match=r"firmware .*bochsbios"):
        find_bochs(search_path=str(tmp_path))


def test_a_program_named_by_the_environment_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMBENCH_BOCHS", "/nowhere/bochs")
    with pytest.raises(HostUnavailable, match="KVMBENCH_BOCHS"):
        find_bochs()


def test_the_version_is_read_from_the_banner() -> None:
    assert version_of("===\n     Bochs x86 Emulator 2.7\n Built from") == "2.7"
    assert version_of("nothing of the kind") == ""


def test_the_configuration_names_the_disc_the_console_and_the_rate(tmp_path: Path) -> None:
    text = configuration(
        Bochs(Path("/usr/bin/bochs"), tmp_path),
        disc=tmp_path / "a.iso",
        console=tmp_path / "console",
        log=tmp_path / "log",
        memory_mib=256,
    )
    assert f"com2: enabled=1, mode=file, dev={tmp_path}/console\n" in text
    assert f"path={tmp_path}/a.iso" in text
    assert f"ips={bochs.INSTRUCTIONS_PER_S}," in text


def test_another_bochs_or_other_firmware_has_another_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMBENCH_BOCHS", raising=False)
    monkeypatch.setattr(bochs, "_SHARE", (tmp_path,))
    plugin = tmp_path / "libbx_sdl2_gui.so"
    monkeypatch.setattr(bochs, "display_plugins", lambda: [plugin])
    files = [tmp_path / "bochs", tmp_path / "bochs-bin", plugin]
    files += [tmp_path / name for name in ("BIOS-bochs-latest", "VGABIOS-lgpl-latest")]
    for path in files:
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    seen = {find_bochs(search_path=str(tmp_path)).identity}
    for path in files:
        path.write_text(f"#!/bin/sh\n# {path.name}\n")
        seen.add(find_bochs(search_path=str(tmp_path)).identity)
    assert len(seen) == 1 + len(files)


@pytest.mark.parametrize(
    "options",
    [{"ept": 2}, {"memory": "64M"}, {"memory": "4G"}, {"parameters": 1}, {"progress": 1}],
    ids=lambda options: next(iter(options)),
)
def test_a_value_out_of_range_is_misuse(options: dict[str, object]) -> None:
    with pytest.raises(MisuseError, match=next(iter(options))):
        start_intel(**options)  # type: ignore[arg-type]


def test_the_addition_to_bochs_is_compiled_once(cache: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: apt-get install gcc")
    library = port_library()
    assert library.is_relative_to(cache)
    made = library.stat()
    assert port_library().stat() == made
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_without_a_compiler_the_package_is_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(HostUnavailable, match=r"apt-get install .*gcc"):
        port_library(search_path=str(tmp_path))


def test_a_compiler_that_fails_is_quoted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.c"
    wrong.write_text("this is no C\n")
    monkeypatch.setattr(bochs, "_SOURCE", wrong)
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: apt-get install gcc")
    with pytest.raises(HostUnavailable, match=r"(?s)cannot compile .*error"):
        port_library()
    assert not list(cache.rglob("*.so"))
