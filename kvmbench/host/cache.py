"""Where built and remembered things live, and how a file gets there: whole or not at all.

A cache is read by processes that run at the same time, and survives a crash of the
machine. A file written in place is seen half; one that is only renamed may, after a loss of
power, be there with its name and without its bytes (ext4's delayed allocation). So every
file is written under another name, brought to the disk, and renamed. What has a checksum of its own
(`saved_state`) need not be brought to the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def cache_directory() -> Path:
    """``$KVMBENCH_CACHE``, else ``$XDG_CACHE_HOME/kvmbench``, else ``~/.cache/kvmbench``; may not exist yet."""
    chosen = os.environ.get("KVMBENCH_CACHE")
    if chosen:
        # Absolute, for what is started from here (apt, QEMU) may run in another folder.
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "kvmbench"


def write_file(path: Path, data: bytes) -> None:
    """Writes a file of the cache whole, or leaves it as it was; makes its folder.

    Raises:
        OSError: as `replacing`.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, which takes the place of `path` once the block has ended and all of it is on the disk.

    If the block raises, or is interrupted, nothing is left of it and `path` is as it was.

    Raises:
        OSError: it cannot be written; names `path`, and says why ("No space left on device").
    """
    # Of nobody else's: two that write the same at once do not meet, and the later one stays.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)
        # A failed write() names no file, and a failed open() the temporary one, which means nothing to the reader.
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except BaseException:
        _discard(temporary)
        raise


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
