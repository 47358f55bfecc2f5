"""Warm starts: an appliance saved after its first boot and loaded in a twentieth of a second.

Facts first (QEMU 7.2, 256 MiB, measured):
  - The memory of an appliance is a file (`qemu.command`), which QEMU leaves out of
    what it saves (x-ignore-shared). So QEMU writes 0.4 MB of devices, and the memory
    is copied while the machine stands, 0.1 s for 80 to 120 MB.
  - To start, QEMU maps the copy privately: nothing is read but what the guest
    touches. The agent answers 50 ms after QEMU's start; with the memory in QEMU's
    stream it was 90 ms.
  - It is saved while the machine runs and not after `stop`. The state then says
    "running", so that QEMU started with it runs at once.
  - Loaded into another QEMU, another command line or another kernel a state
    fails or, worse, does not fail. So its key covers all three.

A file is the memory, as large as the machine's with holes where that is zero, then
QEMU's stream, and a trailer with size and CRC-32. The sum is checked beside QEMU's
loading; whatever is wrong, the file is removed and the appliance boots.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvmbench.errors import HostError, HostUnavailable
from kvmbench.host.cache import write_file
from kvmbench.host.monitor import Monitor
from kvmbench.host.qemu import Configuration, Qemu

#: States are removed, the one not used for longest first, until they fit into this.
LIMIT_BYTES = 1 << 30

_TRAILER = struct.Struct("<8sQII")  # mark, bytes before it, CRC-32 of them (`_crc_of`), 0
_MARK = b"kvmbenc2"
_SAVE_WITHIN_S = 30.0
_RESUME_WITHIN_S = 5.0
# A file being saved that has not changed for so long was left behind by a process that was killed.
_STALE_S = 600.0
_IGNORE_MEMORY = {"capability": "x-ignore-shared", "state": True}
# Above what any machine does, so that QEMU does not hold itself back.
_BANDWIDTH_BYTES_S = 1 << 36
_PIECE_BYTES = 1 << 20
_ZERO_CRC = zlib.crc32(bytes(_PIECE_BYTES))


def state_key(qemu: Qemu, configuration: Configuration) -> str:
    """Names all that a saved state depends on; "", under which nothing is kept, if QEMU may change unnoticed.

    The host's processor is part of it: the guest has measured the rate of its time-stamp counter, which
    is the host's.
    """
    if not qemu.identity:
        return ""
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

    def __init__(self, path: Path, descriptor: int, size_bytes: int, crc: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._size_bytes = size_bytes
        self._crc = crc

    def intact(self) -> bool:
        """Whether the bytes are those that were saved; reads them all (some 30 ms, without Python's lock)."""
        return _crc_of(self.descriptor, self._size_bytes) == self._crc

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
        if not key:
            return None
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
            size_bytes = status.st_size - _TRAILER.size
            trailer = os.pread(descriptor, _TRAILER.size, max(0, size_bytes)).ljust(_TRAILER.size)
            mark, written, crc, _ = _TRAILER.unpack(trailer)
            if mark != _MARK or written != size_bytes:
                path.unlink(missing_ok=True)
                raise ValueError
            os.utime(path)
        except (OSError, ValueError):
            os.close(descriptor)
            return None
        return State(path, descriptor, size_bytes, crc)

    def save(self, key: str, write: Callable[[int], None]) -> bool:
        """Stores a state, and removes old ones beyond the limit.

        Args:
            key: its name.
            write: writes it to the descriptor it is given.

        Returns:
            False if there was no room, or `write` failed with an OSError or a
            HostError: nothing is kept then, and the next start is a cold one.
        """
        if not key:
            return False
        temporary: Path | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor, name = tempfile.mkstemp(prefix="saving-", dir=self._folder)  # mode 0600
            temporary = Path(name)
            with contextlib.closing(os.fdopen(descriptor, "r+b", buffering=0)) as file:
                write(descriptor)
                # Not brought to the disk, 100 MB of it: what a loss of power leaves of it fails its CRC.
                size_bytes = file.seek(0, os.SEEK_END)
                file.write(_TRAILER.pack(_MARK, size_bytes, _crc_of(descriptor, size_bytes), 0))
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
        if not key:
            return
        with contextlib.suppress(OSError):
            write_file(self._folder / f"{key}.json", json.dumps(note).encode())

    def _prune(self, *, keep: Path) -> None:
        states: list[tuple[float, int, Path]] = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another process prunes too
                status = path.stat()
                if path.suffix == ".state":
                    stored = min(status.st_size, status.st_blocks * 512)  # holes take no room
                    states.append((status.st_mtime, stored, path))
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


def save_machine(monitor: Monitor, descriptor: int, memory: int, memory_bytes: int) -> None:
    """Writes a machine to a file: its memory, and behind it what QEMU says of the rest; call `resume_machine` then.

    Args:
        monitor: to its QEMU.
        descriptor: of the file, empty.
        memory: descriptor of the file that is the machine's memory.
        memory_bytes: its size.

    Raises:
        HostError: QEMU refused or failed.
        OSError: the disk is full, or QEMU did not finish in time.
    """
    os.lseek(descriptor, memory_bytes, os.SEEK_SET)
    monitor.execute("migrate-set-capabilities", capabilities=[_IGNORE_MEMORY])
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
    # QEMU has stopped the machine, so this is its memory at the same moment.
    _copy(memory, descriptor, memory_bytes)


def resume_machine(monitor: Monitor) -> None:
    """Has a machine run on after `save_machine`, which leaves it stopped ("postmigrate"), and may if it failed.

    Raises:
        HostError: QEMU does not let it run on.
        EOFError: QEMU has ended.
    """
    deadline = time.monotonic() + _RESUME_WITHIN_S
    while True:
        try:
            monitor.execute("cont")  # does nothing if it runs
            return
        except TimeoutError as error:
            raise HostUnavailable("QEMU saved the machine and does not answer any more") from error
        except HostError:  # while what was cancelled is not over: "Migration is not finalized yet"
            if time.monotonic() > deadline:
                raise
            time.sleep(0.002)


def load_machine(monitor: Monitor, state: State, memory_bytes: int) -> None:
    """Has a QEMU that was started with `saved` take the rest of the machine; it runs then.

    Raises:
        HostError, EOFError, TimeoutError: QEMU cannot.
    """
    # With a read position of its own: `State.intact` moves that of the other. Not by /dev/fd, which a bare /dev lacks.
    descriptor = os.open(f"/proc/self/fd/{state.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.lseek(descriptor, memory_bytes, os.SEEK_SET)
        monitor.execute("migrate-set-capabilities", capabilities=[_IGNORE_MEMORY])
        monitor.execute("getfd", fds=[descriptor], fdname="state")
        monitor.execute("migrate-incoming", uri="fd:state")
    finally:
        os.close(descriptor)


def _copy(source: int, target: int, size: int) -> None:
    with mmap.mmap(source, size, prot=mmap.PROT_READ) as data, memoryview(data) as view:
        for start, end in _written(source, size):
            for piece in range(start, end, _PIECE_BYTES):
                with view[piece : min(end, piece + _PIECE_BYTES)] as part:
                    done = 0
                    while done < len(part):
                        done += os.pwrite(target, part[done:], piece + done)


def _written(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    # (start, end) of what is no hole; all of it where the file system knows of none.
    end = 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return
            raise
        if start >= size:
            return
        end = min(size, os.lseek(descriptor, start, os.SEEK_HOLE))
        yield start, end


def _crc_of(descriptor: int, size: int) -> int:
    # The CRC-32 of the CRC-32s of all pieces. It does not depend on where there are holes, and takes no time for them.
    if size == 0:
        return 0
    count = -(-size // _PIECE_BYTES)
    sums = [_ZERO_CRC] * count
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as data, memoryview(data) as view:
        for start, end in _written(descriptor, size):
            for n in range(start // _PIECE_BYTES, -(-end // _PIECE_BYTES)):
                with view[n * _PIECE_BYTES : (n + 1) * _PIECE_BYTES] as piece:
                    sums[n] = zlib.crc32(piece)
        with view[(count - 1) * _PIECE_BYTES :] as piece:  # is shorter, a hole or not
            sums[-1] = zlib.crc32(piece)
    os.lseek(descriptor, place, os.SEEK_SET)
    return zlib.crc32(struct.pack(f"<{count}I", *sums))
