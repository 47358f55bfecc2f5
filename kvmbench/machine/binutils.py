"""Finds GNU as and ld for x86-64, native or cross."""

from __future__ import annotations

import platform
import shutil

from kvmbench.errors import HostUnavailable

# Debian's cross and native package, then Homebrew's x86_64-elf-binutils, then builds of crosstool-NG.
_PREFIXES = ("x86_64-linux-gnu-", "x86_64-elf-", "x86_64-unknown-linux-gnu-")


def find_tool(name: str) -> str:
    """The path of ``as`` or ``ld`` that makes x86-64 code.

    The plain name is taken on x86-64 Linux only: elsewhere it is another machine's, or not GNU's.

    Raises:
        HostUnavailable: there is none; the message has the command that installs it.
    """
    for prefix in _PREFIXES:
        path = shutil.which(prefix + name)
        if path is not None:
            return path
    if platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64"):
        path = shutil.which(name)
        if path is not None:
            return path
    mend = (
        "brew install x86_64-elf-binutils"
        if platform.system() == "Darwin"
        else "sudo apt-get install binutils-x86-64-linux-gnu"
    )
    raise HostUnavailable(f"no GNU {name} for x86-64 found on PATH; install it: `{mend}`")
