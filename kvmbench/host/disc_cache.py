"""The discs that the Intel appliance boots, kept in the cache: one for each kernel, agent and command line.

A saved state needs its disc too, for Bochs opens it before it loads the state. Finding a disc
loads no module that reads or writes one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from kvmbench.errors import HostUnavailable
from kvmbench.host import image as images
from kvmbench.host.cache import cache_directory, write_file

DISCS = "discs"

_MOST_DISCS = 6  # as many as saved states
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("boot_disc.py", "loader.S"))


def kept_disc(image: images.Image, words: str, *, progress: Callable[[str], None] | None = None) -> Path:
    """The disc, written if the cache does not hold it yet; its name is a hash of what is on it.

    Args:
        image: the kernel and the initramfs.
        words: the kernel's command line.
        progress: gets a line before each step that takes seconds.

    Raises:
        HostUnavailable: the kernel is none for it, the binutils are missing, or the cache cannot be written.
    """
    digest = hashlib.sha256(f"{image.key}\0{words}\0".encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    folder = cache_directory() / DISCS
    target = folder / f"{digest.hexdigest()[:16]}.iso"
    try:
        if target.is_file():
            os.utime(target)
            return target
        # Not at the top: every warm start would pay for them.
        from kvmbench.host.boot_disc import assemble_loader, disc
        from kvmbench.host.vmlinux import unpacked

        kernel = unpacked(image.kernel, progress=progress)
        if progress is not None:
            progress("writing the boot disc (once)")
        write_file(target, disc(kernel.read_bytes(), image.initramfs.read_bytes(), words, assemble_loader()))
        for old in sorted(folder.glob("*.iso"), key=lambda path: path.stat().st_mtime)[:-_MOST_DISCS]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise HostUnavailable(
            f"the boot disc cannot be written in {folder}: {error}; $KVMBENCH_CACHE names another folder"
        ) from error
    return target
