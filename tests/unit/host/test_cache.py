"""Files of the cache: whole or as they were, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvmbench.host.cache import replacing, write_file


def test_a_file_is_written_with_its_folder_and_as_readable_as_others(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "kernels" / "file"
    mask = os.umask(0o027)
    try:
        write_file(path, b"first")
        write_file(path, b"second")
    finally:
        os.umask(mask)
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_a_disk_that_fills_leaves_the_old_file_and_names_the_file_that_was_wanted(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    with full_disk(), pytest.raises(OSError, match=r"File too large: .*/file'$") as caught:
        write_file(path, b"new, and too much")
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_may_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file where a folder should be")
    with pytest.raises(OSError, match=r"/cache'"):
        write_file(tmp_path / "cache" / "file", b"data")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no data"), OSError(errno.EIO, "of its own", "x")])
def test_what_goes_wrong_in_between_is_raised_and_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    write_file(tmp_path / "file", b"old")

    def write_half() -> None:
        with replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)) as caught:
        write_half()
    assert caught.value is error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_two_that_write_at_once_do_not_meet(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as two:
        one.write(b"one")
        two.write(b"two")
    assert (tmp_path / "file").read_bytes() == b"one", "the block that ends last has the last word"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
