"""Stamps: remembering that a step was done, and for which inputs.

A stamp is a small JSON file with the hash of everything the step depended on
and the files it made. The step is done again when the hash differs or one of
those files is gone. A stamp is written last and in one go, so a step that was
interrupted has none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path


def fingerprint(files: Iterable[Path], facts: Iterable[str] = ()) -> str:
    """Hashes the contents of files, their names, and some facts, in hexadecimal.

    A file that does not exist counts as such, so that its appearance is a change.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes() if path.is_file() else b"\0absent"
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    for fact in facts:
        digest.update(f"\0{fact}\0".encode())
    return digest.hexdigest()


class Stamp:
    """One step's memory, kept at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def holds(self, key: str) -> bool:
        """True when the step was finished for `key` and all it made is still there."""
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            return bool(record["key"] == key) and all(Path(made).exists() for made in record["made"])
        except (OSError, ValueError, TypeError, KeyError):
            return False  # absent, or not one of ours: do the step again

    def write(self, key: str, made: Iterable[Path] = ()) -> None:
        """Records that the step is finished for `key` and made these files."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps({"key": key, "made": [str(path) for path in made]}), encoding="utf-8")
        os.replace(partial, self.path)

    def remove(self) -> None:
        """Forgets the step."""
        self.path.unlink(missing_ok=True)
