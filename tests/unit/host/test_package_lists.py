"""Package lists of our own: apt is pointed to them for as long as they are wanted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable
from kvmbench.host.package_lists import own_package_lists


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
    monkeypatch.delenv("APT_CONFIG", raising=False)
    return tmp_path / "bin"


def test_apt_uses_the_folder_inside_and_the_system_afterwards(tmp_path: Path, programs: Path) -> None:
    fake_apt(programs, "exit 0")
    folder = tmp_path / "lists"
    said: list[str] = []
    with own_package_lists(folder, progress=said.append):
        settings = Path(os.environ["APT_CONFIG"])
        assert f'Dir::State::lists "{folder}/state/lists";' in settings.read_text(encoding="utf-8")
        assert (folder / "state" / "lists" / "partial").is_dir()
    assert "APT_CONFIG" not in os.environ
    assert (programs / "calls").read_text(encoding="utf-8") == f"{settings} -q update\n"
    assert said == [f"fetching package lists into {folder}"]


def test_a_setting_of_the_user_comes_back(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_apt(programs, "exit 0")
    monkeypatch.setenv("APT_CONFIG", "/the/users")
    with own_package_lists(tmp_path / "lists"):
        assert os.environ["APT_CONFIG"] != "/the/users"
    assert os.environ["APT_CONFIG"] == "/the/users"


def test_lists_that_cannot_be_fetched_say_what_apt_said(tmp_path: Path, programs: Path) -> None:
    fake_apt(programs, "echo 'W: odd' >&2; echo 'E: Failed to fetch http://mirror' >&2; exit 100")
    with (
        pytest.raises(HostUnavailable, match="cannot be fetched: E: Failed to fetch http://mirror"),
        own_package_lists(tmp_path / "lists"),
    ):
        pytest.fail("the body must not run")
    assert "APT_CONFIG" not in os.environ


def test_a_machine_without_apt_is_told_so(tmp_path: Path, programs: Path) -> None:
    with (
        pytest.raises(HostUnavailable, match="apt-get does not run"),
        own_package_lists(tmp_path / "lists"),
    ):
        pytest.fail("the body must not run")
