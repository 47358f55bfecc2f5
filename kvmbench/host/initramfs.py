"""The appliance's root file system: a cpio archive in the "newc" format, which the kernel unpacks into memory.

Archives may follow one another in one file; later entries replace earlier
ones. So the modules, which change with the kernel, and the agent, which
changes with this library's sources, are two layers that are built apart.

Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
# /dev/console as the kernel numbers it: it is opened for process 1 before anything is mounted.
_CONSOLE_DEVICE = (5, 1)


class Archive:
    """Collects entries; `finish` returns the archive's bytes.

    Everything belongs to root and carries no time, so that equal contents make
    equal archives.
    """

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._inode = 0

    def add_directory(self, path: str, *, mode: int = 0o755) -> None:
        """A directory; its parent must have been added before."""
        self._add(path, stat.S_IFDIR | mode)

    def add_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """A regular file with these contents."""
        self._add(path, stat.S_IFREG | mode, data)

    def add_character_device(self, path: str, device: tuple[int, int], *, mode: int = 0o600) -> None:
        """A device node; `device` is its major and minor number."""
        self._add(path, stat.S_IFCHR | mode, device=device)

    def finish(self) -> bytes:
        """The whole archive, a multiple of 4 bytes long so that another may follow."""
        self._add(_TRAILER, 0)
        data = b"".join(self._pieces)
        self._pieces.pop()
        return data

    def _add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        name = path.encode() + b"\0"
        self._inode += 1
        # ino, mode, uid, gid, nlink, mtime, size, device major and minor, rdev major and minor, name's size, check
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        header = _MAGIC + b"".join(b"%08X" % field for field in fields)
        self._pieces.append(_padded(header + name) + _padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def module_layer(modules: Sequence[tuple[str, bytes]]) -> bytes:
    """The layer that a kernel decides: directories, /dev/console, the modules and the order to load them in.

    Args:
        modules: file name such as "kvm-amd.ko" and contents of each, in load order.
    """
    archive = Archive()
    for path in ("dev", "proc", "sys", "lib", "lib/modules"):
        archive.add_directory(path)
    archive.add_character_device("dev/console", _CONSOLE_DEVICE)
    for name, data in modules:
        archive.add_file(f"lib/modules/{name}", data)
    archive.add_file("modules", "".join(f"{name}\n" for name, _ in modules).encode())
    return archive.finish()


def agent_layer(agent: bytes) -> bytes:
    """The layer that this library's sources decide: the agent as /init."""
    archive = Archive()
    archive.add_file("init", agent, mode=0o755)
    return archive.finish()


def entries(archive: bytes) -> Mapping[str, tuple[int, bytes]]:
    """Path to (mode, contents) of every entry in one or more archives that follow one another.

    Raises:
        ValueError: the bytes are no such archive, or it is cut short.
    """
    found: dict[str, tuple[int, bytes]] = {}
    place = 0
    while place < len(archive):
        if archive[place : place + 6] != _MAGIC or place + 110 > len(archive):
            raise ValueError(f"no cpio header at byte {place:#x}")
        numbers = [int(archive[place + 6 + 8 * n : place + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = numbers[1], numbers[6], numbers[11]
        name_end = place + 110 + name_size
        data_start = name_end + -name_end % 4
        place = data_start + size + -size % 4
        if place > len(archive):
            raise ValueError("the cpio archive is cut short")
        name = archive[name_end - name_size : name_end - 1].decode()
        if name != _TRAILER:
            found[name] = (mode, archive[data_start : data_start + size])
    return found
