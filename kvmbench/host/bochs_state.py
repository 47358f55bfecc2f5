"""Saved machines of Bochs: a folder each, complete and unharmed, or not there.

Bochs saves a machine as some thirty files: a text for each device, and its memory, 256 MiB
with holes of which 100 are stored. What else a machine depends on (Bochs itself, the disc, the size
of its memory) is in the key. `manifest.json` has the size and the CRC-32 of each file,
and a note of the caller's; a folder that does not match it is removed, and the machine boots.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
#: Bochs keeps its configuration there, with the paths of when it was saved: each start writes its own.
CONFIGURATION = "config"

_MOST_STATES = 6
# One being saved that has not changed for so long was left behind by a process that was killed.
_STALE_S = 600.0


@dataclass(frozen=True)
class BochsState:
    """A saved machine.

    Attributes:
        folder: where it is.
        note: what was stored with it.
    """

    folder: Path
    note: Mapping[str, Any]
    _files: Mapping[str, tuple[int, int]]

    def intact(self) -> bool:
        """Whether all bytes are those that were saved; reads them all (0.2 s, without Python's lock)."""
        try:
            return all(_measure(self.folder / name) == tuple(facts) for name, facts in self._files.items())
        except OSError:
            return False

    def lay_out(self, folder: Path, configuration: str) -> None:
        """Makes `folder` one that `bochs -r` takes: this state, with another configuration."""
        folder.mkdir()
        for name in self._files:
            (folder / name).symlink_to(self.folder / name)
        (folder / CONFIGURATION).write_text(configuration)

    def remove(self) -> None:
        """Deletes it, for it did not start."""
        shutil.rmtree(self.folder, ignore_errors=True)


class BochsStates:
    """The folder of saved machines.

    Args:
        folder: made when the first one is stored.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, key: str) -> BochsState | None:
        """The machine of this key; None if there is none to trust.

        One of another user is left alone; an incomplete one is removed.
        """
        folder = self._folder / key
        try:
            status = folder.lstat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
        except OSError:
            return None
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            files = {str(name): (int(size), int(crc)) for name, (size, crc) in manifest["files"].items()}
            note = dict(manifest["note"])
            whole = files and all((folder / name).stat().st_size == size for name, (size, _) in files.items())
            os.utime(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return BochsState(folder, note, files)

    def save(self, key: str, write: Callable[[Path], bool], note: Mapping[str, Any]) -> bool:
        """Stores a machine, and removes those used longest ago beyond six.

        Args:
            key: its name.
            write: writes it to the folder it is given; False if it could not.
            note: plain values to keep with it.

        Returns:
            False if there was no room, or `write` failed: nothing is kept then.
        """
        temporary: Path | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = Path(tempfile.mkdtemp(prefix="saving-", dir=self._folder))  # mode 0700
            if not write(temporary):
                return False
            (temporary / CONFIGURATION).unlink(missing_ok=True)
            files = {path.name: _measure(path) for path in temporary.iterdir()}
            (temporary / MANIFEST).write_text(json.dumps({"files": files, "note": dict(note)}))
            shutil.rmtree(self._folder / key, ignore_errors=True)
            temporary.rename(self._folder / key)
            temporary = None
            self._prune()
            return True
        except OSError:
            return False
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self) -> None:
        states = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process prunes too
                changed = path.stat().st_mtime
                if not path.name.startswith("saving-"):
                    states.append((changed, path))
                elif time.time() - changed > _STALE_S:
                    shutil.rmtree(path, ignore_errors=True)
        for _, path in sorted(states)[:-_MOST_STATES]:
            shutil.rmtree(path, ignore_errors=True)


def _measure(path: Path) -> tuple[int, int]:
    # Size and CRC-32 of a file.
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return 0, 0
        with mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as data:
            return size, zlib.crc32(data)
