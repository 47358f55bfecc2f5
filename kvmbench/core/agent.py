"""Builds `kvmbench-agent`, the core as a program of its own, from the C files beside this one.

The binary is static, so the same file is process 1 of the appliance, runs on
any Linux reached by ssh, and under sudo. It is kept in the cache under a hash of
everything it depends on; asking for it again costs about a millisecond.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmbench.errors import HostUnavailable

_HERE = Path(__file__).parent
_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
_STATIC = ("-static", "-s")
# Frame pointers and line tables, so that a sanitizer's report can be read.
_READABLE = ("-g", "-fno-omit-frame-pointer")
_SANITIZE = (*_READABLE, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_SANITIZE_THREADS = (*_READABLE, "-fsanitize=thread")
# musl-gcc looks for headers in musl's own folder only; <linux/kvm.h> is the kernel's and needs no C library.
_KERNEL_HEADERS = (
    "-idirafter",
    "/usr/include",
    "-idirafter",
    "/usr/include/x86_64-linux-gnu",
)


@dataclass(frozen=True)
class Compiler:
    """A C compiler for x86-64 Linux, and the flags that make it link statically."""

    path: Path
    flags: tuple[str, ...]


def sources() -> tuple[Path, ...]:
    """The C files that make up the agent, sorted by name."""
    # cffi leaves its generated _core.c here when it builds in place.
    return tuple(sorted(path for path in _HERE.glob("*.c") if not path.name.startswith("_")))


def find_compiler(*, search_path: str | None = None) -> Compiler:
    """The compiler to build the agent with: musl's if there is one, for its binary is a seventh of the size.

    Args:
        search_path: where to look, in the form of PATH; None means PATH.

    Raises:
        HostUnavailable: there is none; names the package.
    """
    native = platform.machine() in ("x86_64", "amd64") and platform.system() == "Linux"
    candidates: list[tuple[str, tuple[str, ...]]] = [("x86_64-linux-musl-gcc", _KERNEL_HEADERS)]
    if native:
        candidates = [("musl-gcc", _KERNEL_HEADERS), *candidates, ("gcc", ())]
    candidates.append(("x86_64-linux-gnu-gcc", ()))
    for name, flags in candidates:
        found = shutil.which(name, path=search_path)
        if found:
            return Compiler(Path(found), flags)
    package = "gcc musl-tools linux-libc-dev" if native else "gcc-x86-64-linux-gnu"
    raise HostUnavailable(
        "no C compiler for x86-64 Linux, which the agent is built with: "
        f"`sudo apt-get install --no-install-recommends {package}`"
    )


def agent_binary(cache: Path, *, sanitize: bool = False, races: bool = False) -> Path:
    """The agent, built if the cache does not hold it yet.

    Args:
        cache: kvmbench's cache folder (`kvmbench.host.cache.cache_directory()`).
        sanitize: with the address and undefined-behaviour sanitizers, for tests;
            dynamically linked, so of use on this machine only.
        races: likewise, with the thread sanitizer instead, which finds data races.

    Returns:
        The path of the executable; its folder's name is the hash.

    Raises:
        HostUnavailable: no compiler, or it fails; the message ends with what it said.
    """
    compiler = _sanitizing_compiler() if sanitize or races else find_compiler()
    sort = _SANITIZE_THREADS if races else _SANITIZE if sanitize else _STATIC
    flags = (*_FLAGS, *sort, *compiler.flags)
    binary = cache / "agents" / _fingerprint(compiler, flags) / "kvmbench-agent"
    if not binary.is_file():
        _build(compiler, flags, binary)
    return binary


def _sanitizing_compiler() -> Compiler:
    found = shutil.which("gcc")
    if found is None:
        raise HostUnavailable("no gcc: `sudo apt-get install --no-install-recommends gcc libc6-dev`")
    return Compiler(Path(found), ())


def _fingerprint(compiler: Compiler, flags: Sequence[str]) -> str:
    # Time and size stand for the compiler's version: asking it would take longer than all the rest.
    status = compiler.path.resolve().stat()
    digest = hashlib.sha256(repr((str(compiler.path), status.st_mtime_ns, status.st_size, flags)).encode())
    for path in sorted([*sources(), *_HERE.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(compiler: Compiler, flags: Sequence[str], binary: Path) -> None:
    binary.parent.mkdir(parents=True, exist_ok=True)
    # Two that build at once each make a file of their own; the rename is atomic and the files are equal.
    handle, name = tempfile.mkstemp(prefix="building-", dir=binary.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        command = [str(compiler.path), *flags, *map(str, sources()), "-o", str(temporary)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[:20])
            raise HostUnavailable(
                f"{compiler.path.name} cannot build the agent (is linux-libc-dev installed?):\n{said}"
            )
        temporary.chmod(0o755)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # or a loss of power may leave the name without the bytes
        temporary.replace(binary)
    finally:
        temporary.unlink(missing_ok=True)
