"""Warm starts: an appliance saved after its first boot and loaded in a tenth of a second.

Facts first (QEMU 7.2, 256 MiB, measured):
  - Saving is a migration to a file: 0.1 s, 100 MB; the appliance goes on afterwards.
  - It is made while the machine runs and not after `stop`. The state then says
    "running", so that QEMU started with it runs at once, with no word to its
    monitor: the agent answers 0.1 s after QEMU's start.
  - zstd makes 41 MB of it and a start slower by 0.15 s. So it is stored as it is.
  - Loaded into another QEMU, another command line or another kernel a state
    fails or, worse, does not fail. So its key covers all three.

A file is QEMU's stream and behind it, where QEMU does not look, a trailer with
size and CRC-32. The sum is checked beside QEMU's loading; whatever is wrong, the
file is removed and the appliance boots.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvmbench.errors import HostError
from kvmbench.host.monitor import Monitor
from kvmbench.host.qemu import Configuration, Qemu

#: States are removed, the one not used for longest first, until they fit into this.
LIMIT_BYTES = 1 << 30

_TRAILER = struct.Struct("<8sQII")  # mark, bytes of the stream, CRC-32 of it, 0
_MARK = b"kvmbench"
_SAVE_WITHIN_S = 30.0
# A file being saved that has not changed for so long was left behind by a process that was killed.
_STALE_S = 600.0
# Above what any machine does, so that QEMU does not hold itself back.
_BANDWIDTH_BYTES_S = 1 << 36
_PIECE_BYTES = 1 << 22


def state_key(qemu: Qemu, configuration: Configuration) -> str:
    """Names all that a saved state depends on.

    The host's processor is part of it: the guest has measured the rate of its time-stamp counter, which
    is the host's.
    """
    facts = [qemu.identity, qemu.version, configuration.arguments(), _processor()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(("model name", "CPU part")):
                return line.strip()
    return ""


class State:
    """A saved state, open for reading; a context manager."""

    def __init__(self, path: Path, descriptor: int, stream_bytes: int, crc: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._stream_bytes = stream_bytes
        self._crc = crc

    def intact(self) -> bool:
        """Whether the bytes are those that were saved; reads them all (some 50 ms, without Python's lock)."""
        return _crc_of(self.descriptor, self._stream_bytes) == self._crc

    def remove(self) -> None:
        """Deletes the file, for it did not start."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


class SavedStates:
    """The folder of saved states, and a note beside each.

    Args:
        folder: made when the first state is stored.
        limit_bytes: of all states together.
    """

    def __init__(self, folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes

    def path(self, key: str) -> Path:
        """Where the state of this key is, if there is one."""
        return self._folder / f"{key}.state"

    def open(self, key: str) -> State | None:
        """The state of this key, its read position at its start; None if there is none to trust.

        A file of another user is left alone; a damaged one is removed.
        """
        path = self.path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            # QEMU believes what it loads: only our own files, that nobody else could have written.
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise ValueError
            stream_bytes = status.st_size - _TRAILER.size
            trailer = os.pread(descriptor, _TRAILER.size, max(0, stream_bytes)).ljust(_TRAILER.size)
            mark, written, crc, _ = _TRAILER.unpack(trailer)
            if mark != _MARK or written != stream_bytes:
                path.unlink(missing_ok=True)
                raise ValueError
            os.utime(path)
        except (OSError, ValueError):
            os.close(descriptor)
            return None
        return State(path, descriptor, stream_bytes, crc)

    def save(self, key: str, write: Callable[[int], None]) -> bool:
        """Stores a state, and removes old ones beyond the limit.

        Args:
            key: its name.
            write: writes the stream to the descriptor it is given.

        Returns:
            False if there was no room, or `write` failed with an OSError or a
            HostError: nothing is kept then, and the next start is a cold one.
        """
        temporary: Path | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, name = tempfile.mkstemp(prefix="saving-", dir=self._folder)  # mode 0600
            temporary = Path(name)
            with contextlib.closing(os.fdopen(descriptor, "r+b", buffering=0)) as file:
                write(descriptor)
                stream_bytes = file.seek(0, os.SEEK_END)
                file.write(_TRAILER.pack(_MARK, stream_bytes, _crc_of(descriptor, stream_bytes), 0))
            temporary.replace(self.path(key))
            temporary = None
            self._prune(keep=self.path(key))
            return True
        except (OSError, HostError):
            return False
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def read_note(self, key: str) -> dict[str, Any]:
        """What `write_note` stored for this key, or an empty dictionary."""
        try:
            note = json.loads((self._folder / f"{key}.json").read_text())
        except (OSError, ValueError):
            return {}
        return note if isinstance(note, dict) else {}

    def write_note(self, key: str, note: dict[str, Any]) -> None:
        """Keeps plain values beside the state; a full disk is no error."""
        path = self._folder / f"{key}.json"
        temporary = self._folder / f"{key}.json.{os.getpid()}"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_text(json.dumps(note))
            temporary.replace(path)

    def _prune(self, *, keep: Path) -> None:
        states: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process prunes too
                status = path.stat()
                if path.suffix == ".state":
                    states.append((status.st_mtime, status.st_size, path))
                elif path.name.startswith("saving-") and time.time() - status.st_mtime > _STALE_S:
                    path.unlink()
        total = sum(size for _, size, _ in states)
        for _, size, path in sorted(states):
            if total <= self._limit_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)
                total -= size


def save_machine(monitor: Monitor, descriptor: int) -> None:
    """Has QEMU write its machine's state to a file; the machine runs on afterwards.

    Raises:
        HostError: QEMU refused or failed; the machine runs on all the same.
        OSError: the disk is full, or QEMU did not finish in time.
    """
    try:
        monitor.execute("migrate-set-parameters", max_bandwidth=_BANDWIDTH_BYTES_S, downtime_limit=2000)
        monitor.execute("getfd", fds=[descriptor], fdname="state")
        monitor.execute("migrate", uri="fd:state")
        deadline = time.monotonic() + _SAVE_WITHIN_S
        while (status := monitor.execute("query-migrate").get("status")) not in ("completed", "failed"):
            if time.monotonic() > deadline:
                monitor.execute("migrate_cancel")
                raise TimeoutError("QEMU did not finish saving")
            time.sleep(0.002)
        if status == "failed":
            raise OSError("QEMU could not save the machine, most likely for want of disk space")
    finally:
        # Saving leaves the machine stopped, "postmigrate"; on one that runs this does nothing.
        with contextlib.suppress(EOFError, HostError):
            monitor.execute("cont")


def _crc_of(descriptor: int, size: int) -> int:
    crc = 0
    if size > 0:
        with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as data, memoryview(data) as view:
            for start in range(0, size, _PIECE_BYTES):
                with view[start : start + _PIECE_BYTES] as piece:
                    crc = zlib.crc32(piece, crc)
    return crc
