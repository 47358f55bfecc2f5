"""Where built and remembered things live: kernel, initramfs, agent, saved states, self-checks."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``$KVMBENCH_CACHE``, else ``$XDG_CACHE_HOME/kvmbench``, else ``~/.cache/kvmbench``; may not exist yet."""
    chosen = os.environ.get("KVMBENCH_CACHE")
    if chosen:
        # Absolute, for what is started from here (apt, QEMU) may run in another folder.
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "kvmbench"
