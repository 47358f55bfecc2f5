"""Compiler, assembler, headers and ssh: what builds the agent and assembles guests."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from kvmbench.doctor.finding import Finding, Status

AREA = "tools"

# Command, what it is for, Debian package.
COMMANDS = (
    ("as", "assembles guest programs (GNU binutils)", "binutils"),
    ("ld", "links guest programs (GNU binutils)", "binutils"),
    ("gcc", "compiles the core and the agent", "gcc"),
    ("musl-gcc", "links the agent statically (gcc -static does too, 50 times larger)", "musl-tools"),
    ("ssh", "reaches ssh:// hosts", "openssh-client"),
)


def examine(*, search_path: str | None = None, include: Path = Path("/usr/include")) -> Iterator[Finding]:
    """Looks for each command and header; runs none of them.

    Args:
        search_path: where to look for commands, in the form of PATH; None means PATH.
        include: the folder of the system's C headers.
    """
    for command, purpose, package in COMMANDS:
        found = shutil.which(command, path=search_path)
        if found:
            yield Finding(AREA, command, Status.OK, found, facts={"path": found})
        else:
            yield _missing(command, f"not on PATH; {purpose}", package)
    header = include / "linux" / "kvm.h"
    if header.is_file():
        yield Finding(AREA, "linux/kvm.h", Status.OK, str(header))
    else:
        yield _missing("linux/kvm.h", "not here; the core and the agent are compiled against it", "linux-libc-dev")
    python_h = Path(sysconfig.get_path("include")) / "Python.h"
    if python_h.is_file():
        yield Finding(AREA, "Python.h", Status.OK, str(python_h))
    else:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        yield _missing("Python.h", f"not here for Python {version}; the core is compiled against it", "python3-dev")


def _missing(subject: str, text: str, package: str) -> Finding:
    return Finding(AREA, subject, Status.MISSING, text, mend=f"sudo apt-get install --no-install-recommends {package}")
