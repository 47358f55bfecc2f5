"""Saved machines of Bochs: whole, unharmed and one's own, or not there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmbench.host.bochs_state import CONFIGURATION, MANIFEST, BochsState, BochsStates

FILES = {"cpu0": b"registers", "memory.ram": bytes(5000) + b"memory", "empty": b""}


def write(folder: Path) -> bool:
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / CONFIGURATION).write_text("paths of when it was saved")
    return True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "states"


@pytest.fixture
def states(folder: Path) -> BochsStates:
    states = BochsStates(folder)
    assert states.save("key", write, {"one": 1})
    return states


def opened(states: BochsStates) -> BochsState:
    state = states.open("key")
    assert state is not None
    return state


def test_what_was_saved_is_found_with_its_note(states: BochsStates) -> None:
    state = opened(states)
    assert state.note == {"one": 1}
    assert state.intact()
    assert states.open("another") is None


def test_a_state_is_laid_out_with_a_configuration_of_now(states: BochsStates, tmp_path: Path) -> None:
    opened(states).lay_out(tmp_path / "run", "paths of now")
    found = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert found == FILES | {CONFIGURATION: b"paths of now"}


@pytest.mark.parametrize("name", ["cpu0", "memory.ram"])
def test_a_changed_byte_is_seen(states: BochsStates, name: str) -> None:
    state = opened(states)
    path = state.folder / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    assert not opened(states).intact()


def cut_short(folder: Path) -> None:
    (folder / "cpu0").write_bytes(b"reg")


def lose_a_file(folder: Path) -> None:
    (folder / "empty").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text("{}")


def leave_the_manifest_empty(folder: Path) -> None:
    (folder / MANIFEST).write_text(json.dumps({"files": {}, "note": {}}))


@pytest.mark.parametrize(
    "spoil", [cut_short, lose_a_file, lose_the_manifest, damage_the_manifest, leave_the_manifest_empty]
)
def test_an_incomplete_state_is_removed(states: BochsStates, folder: Path, spoil: Callable[[Path], None]) -> None:
    spoil(folder / "key")
    assert states.open("key") is None
    assert not (folder / "key").exists()


def test_a_state_that_others_may_write_is_left_alone(states: BochsStates, folder: Path) -> None:
    (folder / "key").chmod(0o777)
    assert states.open("key") is None
    assert (folder / "key" / "cpu0").exists()


def test_a_link_to_a_state_is_none(states: BochsStates, folder: Path) -> None:
    (folder / "key").rename(folder / "elsewhere")
    (folder / "key").symlink_to(folder / "elsewhere")
    # The link itself has mode 0777.
    assert states.open("key") is None


def test_what_could_not_be_written_leaves_nothing(states: BochsStates, folder: Path) -> None:
    def fail(place: Path) -> bool:
        write(place)
        return False

    def no_room(place: Path) -> bool:
        raise OSError(28, "No space left on device")

    assert not states.save("key", fail, {})
    assert not states.save("other", no_room, {})
    assert [path.name for path in folder.iterdir()] == ["key"]
    assert opened(states).intact()


def test_a_newer_state_takes_the_place_of_an_older_one(states: BochsStates) -> None:
    assert states.save("key", write, {"two": 2})
    assert opened(states).note == {"two": 2}


def test_those_used_longest_ago_go_first_and_so_does_what_was_left_behind(states: BochsStates, folder: Path) -> None:
    for n in range(6):
        assert states.save(f"other{n}", write, {})
        os.utime(folder / f"other{n}", (n + 10, n + 10))
    os.utime(folder / "key", (5, 5))
    assert states.open("key") is not None  # used now
    stale = folder / "saving-stale"
    stale.mkdir()
    os.utime(stale, (time.time() - 10_000,) * 2)
    (folder / "saving-now").mkdir()
    assert states.save("last", write, {})
    left = {path.name for path in folder.iterdir()}
    assert left == {"key", "other2", "other3", "other4", "other5", "last", "saving-now"}
