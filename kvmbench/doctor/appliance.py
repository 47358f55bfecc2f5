"""The appliance's parts: the kernel in the cache, the agent's compiler, the cache itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmbench.core.agent import find_compiler
from kvmbench.doctor.finding import Finding, Status
from kvmbench.errors import HostUnavailable
from kvmbench.host.cache import cache_directory

AREA = "appliance"

#: Folders of the cache; `kvmbench.host.image` and `saved_state` say what is in them.
FOLDERS = ("kernels", "images", "agents", "states", "discs", "apt")


@dataclass(frozen=True)
class CachedKernel:
    """A kernel in the cache.

    Attributes:
        key: name of its folder.
        release: as ``uname -r`` prints it there.
        origin: package and version, or the file it was read from.
        size_bytes: of kernel and modules.
        default: whether `connect("appliance")` boots it.
    """

    key: str
    release: str
    origin: str
    size_bytes: int
    default: bool


def cached_kernels(cache: Path) -> list[CachedKernel]:
    """The complete kernels in the cache, by release; damaged ones are left out."""
    try:
        default = (cache / "default").read_text(encoding="utf-8").strip()
    except OSError:
        default = ""
    found: list[CachedKernel] = []
    for path in sorted((cache / "kernels").glob("*/kernel.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            release, origin = str(facts["release"]), str(facts["origin"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        key = path.parent.name
        found.append(CachedKernel(key, release, origin, size_bytes(path.parent), key == default))
    return sorted(found, key=lambda kernel: kernel.release)


def size_bytes(folder: Path) -> int:
    """What the files below a folder take, in bytes; 0 if there is no such folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue  # removed meanwhile
    return total


def examine(*, cache: Path | None = None, search_path: str | None = None) -> Iterator[Finding]:
    """Looks at what is built and whether the rest could be; builds and downloads nothing.

    Args:
        cache: kvmbench's cache folder; None means the user's.
        search_path: where to look for commands, in the form of PATH; None means PATH.
    """
    cache = cache if cache is not None else cache_directory()
    yield _kernel(cache, search_path)
    yield _agent(search_path)
    yield _cache(cache)


def _kernel(cache: Path, search_path: str | None) -> Finding:
    kernels = cached_kernels(cache)
    for kernel in kernels:
        if kernel.default:
            facts: dict[str, object] = {"release": kernel.release, "origin": kernel.origin}
            return Finding(AREA, "kernel", Status.OK, f"{kernel.release} from {kernel.origin}", facts=facts)
    missing = [name for name in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(name, path=search_path)]
    if missing:
        text = f"not built, and no {missing[0]} here that could fetch Debian's or Ubuntu's: bring your own"
        mend = "kvmbench appliance build --kernel BZIMAGE --modules FOLDER"
        return Finding(AREA, "kernel", Status.MISSING, text, mend=mend)
    text = "not built yet; the first start fetches this distribution's kernel package (25 to 150 MB)"
    return Finding(AREA, "kernel", Status.LIMITED, text, mend="kvmbench appliance build")


def _agent(search_path: str | None) -> Finding:
    try:
        compiler = find_compiler(search_path=search_path)
    except HostUnavailable:
        text = "no C compiler for x86-64 Linux, which it is built with"
        mend = "sudo apt-get install --no-install-recommends gcc musl-tools libc6-dev linux-libc-dev"
        return Finding(AREA, "agent", Status.MISSING, text, mend=mend)
    return Finding(AREA, "agent", Status.OK, f"built with {compiler.path}")


def _cache(cache: Path) -> Finding:
    place = cache
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK | os.X_OK):
        text = f"{cache} cannot be written: the appliance cannot be built or remembered there"
        return Finding(AREA, "cache", Status.MISSING, text, mend="export KVMBENCH_CACHE=/a/folder/of/yours")
    sizes = {name: size_bytes(cache / name) for name in FOLDERS}
    parts = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items() if size)
    text = f"{cache}: {parts}" if parts else f"{cache}: empty"
    return Finding(AREA, "cache", Status.OK, text, facts={"folder": str(cache), "size_bytes": sizes})
