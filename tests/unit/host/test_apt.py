"""apt's commands as they are started, with the system's package lists and with lists of our own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable
from kvmbench.host.apt import Apt
from kvmbench.host.cache import cache_directory


def fake_apt(folder: Path, body: str) -> None:
    """An apt-get in `folder` that notes how it was called and then does `body`."""
    folder.mkdir()
    path = folder / "apt-get"
    path.write_text(f'#!/bin/sh\necho "$APT_CONFIG $@" >> {folder}/calls\n{body}\n', encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, for `fake_apt`."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("APT_CONFIG", "/the/users")
    return tmp_path / "bin"


def test_own_lists_are_fetched_and_used_by_their_apt_only(tmp_path: Path, programs: Path) -> None:
    fake_apt(programs, "exit 0")
    folder = tmp_path / "lists"
    said: list[str] = []
    own = Apt.with_own_lists(folder, progress=said.append)
    assert own.settings is not None
    assert f'Dir::State::lists "{folder}/state/lists";' in own.settings.read_text(encoding="utf-8")
    assert (folder / "state" / "lists" / "partial").is_dir()
    own.run("apt-get", "download", "x")
    Apt().run("apt-get", "download", "y")
    calls = (programs / "calls").read_text(encoding="utf-8").splitlines()
    assert calls == [f"{own.settings} -q update", f"{own.settings} download x", "/the/users download y"]
    assert os.environ["APT_CONFIG"] == "/the/users"
    assert said == [f"fetching package lists into {folder}"]


def test_lists_that_cannot_be_fetched_say_what_apt_said(tmp_path: Path, programs: Path) -> None:
    fake_apt(programs, "echo 'W: odd' >&2; echo 'E: Failed to fetch http://mirror' >&2; exit 100")
    with pytest.raises(HostUnavailable, match="cannot be fetched: E: Failed to fetch http://mirror"):
        Apt.with_own_lists(tmp_path / "lists")


def test_a_command_that_fails_without_a_word_tells_its_status(programs: Path) -> None:
    fake_apt(programs, "exit 3")
    with pytest.raises(HostUnavailable, match="apt-get ended with status 3"):
        Apt().run("apt-get", "download", "x")


@pytest.mark.usefixtures("programs")
def test_a_machine_without_apt_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailable, match="apt-get does not run"):
        Apt.with_own_lists(tmp_path / "lists")


def test_a_relative_cache_folder_is_the_same_from_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # apt downloads in a folder of its own, and there a relative APT_CONFIG leads to no settings, without a word.
    monkeypatch.chdir(tmp_path)
    for variable, folder in (("XDG_CACHE_HOME", tmp_path / "mine" / "kvmbench"), ("KVMBENCH_CACHE", tmp_path / "mine")):
        monkeypatch.delenv("KVMBENCH_CACHE", raising=False)
        monkeypatch.setenv(variable, "mine")
        assert cache_directory() == folder
