"""Saved states as files: stored whole or not at all, trusted only when they are ours and intact."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable
from kvmbench.host.qemu import Configuration, Qemu
from kvmbench.host.saved_state import SavedStates, state_key


def writes(data: bytes) -> Callable[[int], None]:
    def write(descriptor: int) -> None:
        os.write(descriptor, data)

    return write


@pytest.fixture
def states(tmp_path: Path) -> SavedStates:
    return SavedStates(tmp_path / "states")


def test_a_state_is_read_back_from_its_start_and_is_private(states: SavedStates) -> None:
    assert states.save("key", writes(b"machine" * 1000))
    assert states.path("key").stat().st_mode & 0o777 == 0o600
    with states.open("key") as state:
        assert state.intact()
        assert os.read(state.descriptor, 7000) == b"machine" * 1000


def test_there_is_no_state_of_another_key(states: SavedStates) -> None:
    states.save("key", writes(b"machine"))
    assert states.open("other") is None


@pytest.mark.parametrize("keep", [0, 10, 23, 24, 100, 1000])
def test_a_truncated_file_is_removed(states: SavedStates, keep: int) -> None:
    states.save("key", writes(bytes(2000)))
    os.truncate(states.path("key"), keep)
    assert states.open("key") is None
    assert not states.path("key").exists()


def test_a_changed_byte_is_noticed(states: SavedStates) -> None:
    states.save("key", writes(bytes(100_000)))
    with states.path("key").open("r+b") as file:
        file.seek(50_000)
        file.write(b"\1")
    with states.open("key") as state:
        assert not state.intact()
        state.remove()
    assert states.open("key") is None


def test_a_copy_without_the_holes_is_intact_and_a_byte_in_a_hole_is_noticed(states: SavedStates) -> None:
    def sparse(descriptor: int) -> None:
        os.pwrite(descriptor, b"start", 0)
        os.pwrite(descriptor, b"middle", 5 << 20)
        os.ftruncate(descriptor, (16 << 20) + 1000)

    states.save("key", sparse)
    path = states.path("key")
    data = path.read_bytes()
    assert len(data) > 16 << 20
    path.write_bytes(data)  # all of it, zeros too
    with states.open("key") as state:
        assert state.intact()
        assert os.read(state.descriptor, 5) == b"start"
    states.save("key", sparse)
    with path.open("r+b") as file:
        file.seek(11 << 20)
        file.write(b"\1")
    with states.open("key") as state:
        assert not state.intact()


def test_a_foreign_file_is_not_taken_for_a_state(states: SavedStates) -> None:
    states.save("key", writes(b""))
    states.path("key").write_bytes(b"something else, and long enough to have a trailer")
    states.path("key").chmod(0o600)
    assert states.open("key") is None


def test_a_file_that_others_may_write_or_a_link_is_not_trusted(states: SavedStates) -> None:
    states.save("key", writes(b"machine"))
    states.path("link").symlink_to(states.path("key"))
    assert states.open("link") is None
    states.path("key").chmod(0o622)
    assert states.open("key") is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), HostUnavailable("QEMU refused")])
def test_a_failed_save_keeps_the_old_state_and_leaves_nothing_behind(
    states: SavedStates, tmp_path: Path, error: Exception
) -> None:
    states.save("key", writes(b"old"))

    def fail(descriptor: int) -> None:
        os.write(descriptor, b"half")
        raise error

    assert not states.save("key", fail)
    assert not states.save("other", fail)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["key.state"]
    with states.open("key") as state:
        assert os.read(state.descriptor, 3) == b"old"


def test_a_full_disk_is_no_error(states: SavedStates) -> None:
    def write(descriptor: int) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    assert not states.save("key", write)


def test_an_interrupted_save_leaves_nothing_behind(states: SavedStates, tmp_path: Path) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        states.save("key", interrupt)
    assert list((tmp_path / "states").iterdir()) == []


def test_the_states_not_used_for_longest_go_first(tmp_path: Path) -> None:
    states = SavedStates(tmp_path, limit_bytes=3500)
    for age, key in enumerate(("c", "b", "a")):
        states.save(key, writes(bytes(1000)))
        states.write_note(key, {"key": key})
        os.utime(states.path(key), (1000 - age, 1000 - age))
    with states.open("a") as _:  # used again: now the youngest
        pass
    states.save("d", writes(bytes(1000)))
    assert {key for key in "abcd" if states.path(key).exists()} == {"a", "c", "d"}
    assert states.read_note("b") == {}
    assert states.read_note("c") == {"key": "c"}


def test_holes_do_not_count_against_the_limit(tmp_path: Path) -> None:
    states = SavedStates(tmp_path, limit_bytes=1 << 20)
    for key in "ab":
        states.save(key, lambda descriptor: os.ftruncate(descriptor, 64 << 20))
    assert all(states.path(key).exists() for key in "ab")


def test_a_state_beyond_the_limit_by_itself_is_kept(tmp_path: Path) -> None:
    states = SavedStates(tmp_path, limit_bytes=10)
    assert states.save("key", writes(bytes(1000)))
    assert states.path("key").exists()


def test_what_a_killed_process_left_is_cleared_away(states: SavedStates, tmp_path: Path) -> None:
    states.save("key", writes(b"machine"))
    old, new = tmp_path / "states" / "saving-old", tmp_path / "states" / "saving-new"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    os.utime(old, (1000, 1000))
    states.save("key", writes(b"machine"))
    assert not old.exists()
    assert new.exists()


def test_notes_are_kept_beside_and_a_damaged_one_is_empty(states: SavedStates, tmp_path: Path) -> None:
    assert states.read_note("key") == {}
    states.write_note("key", {"step": [0, 3]})
    assert states.read_note("key") == {"step": [0, 3]}
    (tmp_path / "states" / "key.json").write_text("{damaged")
    assert states.read_note("key") == {}
    (tmp_path / "states" / "key.json").write_text("[1]")
    assert states.read_note("key") == {}


def test_the_key_changes_with_everything_that_decides_over_a_state() -> None:
    qemu = Qemu(Path("/usr/bin/qemu"), "7.2.22", "qemu 1 2")
    configuration = Configuration(Path("k"), Path("i"), 256, 1, {"kvm_amd.npt": "1"})
    others = [
        (dataclasses.replace(qemu, version="7.2.23"), configuration),
        (dataclasses.replace(qemu, identity="qemu 2 2"), configuration),
        *(
            (qemu, dataclasses.replace(configuration, **change))
            for change in (
                {"kernel": Path("k2")},
                {"initramfs": Path("i2")},
                {"memory_mib": 512},
                {"vcpus": 2},
                {"parameters": {"kvm_amd.npt": "0"}},
            )
        ),
    ]
    keys = {state_key(*pair) for pair in [(qemu, configuration), *others]}
    assert len(keys) == len(others) + 1
    assert state_key(qemu, configuration) == state_key(qemu, dataclasses.replace(configuration))
