"""The appliance's image: kernel and initramfs, built once and kept in the cache.

    kernels/KEY/    kernel (bzImage), modules.cpio, kernel.json; vmlinux, made from kernel later
    images/KEY/     initramfs.cpio: modules.cpio and the agent's layer, one after the other
    agents/KEY/     kvmbench-agent
    default         the KEY of the kernel that was built last
    apt/            package lists, where the system's lead to no kernel

A folder is complete or absent: it is made under another name and renamed. When
the agent's sources change only images/ is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvmbench.core.agent import agent_binary
from kvmbench.errors import HostUnavailable
from kvmbench.host.cache import cache_directory, write_file
from kvmbench.host.initramfs import agent_layer, module_layer

if TYPE_CHECKING:
    from kvmbench.host import kernel_package

# Raised when what a folder holds changes without its sources having changed.
_FORMAT = 1
# What `remove_all` deletes; the last three are the Intel appliance's (intel.py, bochs.py).
_FOLDERS = ("default", "images", "kernels", "agents", "discs", "bochs", "bochs-states")


@dataclass(frozen=True)
class Image:
    """What an appliance boots.

    Attributes:
        kernel: path of the bzImage.
        initramfs: path of the archive with agent and modules.
        key: names this combination; other contents have another key.
        versions: "kernel" (its release), "origin" (package or file), "agent" (hash of its build).
        parameters: names of the parameters of each module, such as ``{"kvm_amd": ("npt", ...)}``.
    """

    kernel: Path
    initramfs: Path
    key: str
    versions: Mapping[str, str]
    parameters: Mapping[str, tuple[str, ...]]


def build(
    kernel: Path | None = None,
    modules: Path | None = None,
    *,
    refresh: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Image:
    """The image, made as far as the cache does not hold it.

    What was built last is what `connect("appliance")` uses from then on.

    Args:
        kernel: a bzImage of the user's; None means the kernel built last, or the
            distribution's package where there is none.
        modules: the folder with its modules.
        refresh: take the distribution's present package even if there is a kernel.
        progress: gets a line before each step that takes seconds.

    Raises:
        HostUnavailable: something needed is missing; says what, and what mends it.
        LoadError: `kernel` is not one, or the modules are of another.
    """
    cache = cache_directory()
    if kernel is None and not refresh:
        found = current()
        if found is not None:
            return found
    # Not at the top: every warm start would pay 6 ms for it.
    from kvmbench.host import kernel_package
    from kvmbench.host.vmlinux import unpacked

    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(cache):
            key = None if kernel is not None or refresh else _default_kernel(cache)
            if key is None:
                if kernel is None:
                    found_kernel = kernel_package.from_distribution(cache / "apt", progress)
                else:
                    found_kernel = kernel_package.from_files(kernel, modules)
                key = _store_kernel(cache, found_kernel)
                write_file(cache / "default", key.encode())
            image = _image(cache, key)
            unpacked(image.kernel, progress=progress)  # so that no start has to
            return image
    except OSError as error:
        raise HostUnavailable(
            f"the appliance cannot be built in {cache}: {error}; $KVMBENCH_CACHE names another folder"
        ) from error


def current() -> Image | None:
    """The image of the kernel built last, without building anything but the agent; None if there is none.

    Raises:
        HostUnavailable: the agent's sources have changed and it cannot be built.
    """
    cache = cache_directory()
    key = _default_kernel(cache)
    if key is None:
        return None
    found = _find_image(cache, key)
    if found is not None:
        return found
    with _alone(cache):
        return _image(cache, key)


def remove_all() -> list[Path]:
    """Deletes kernels, images and agents from the cache; returns what was deleted."""
    cache = cache_directory()
    removed = [path for name in _FOLDERS if (path := cache / name).exists()]
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return removed


def _store_kernel(cache: Path, kernel: kernel_package.Kernel) -> str:
    layer = module_layer([(module.file_name, module.data) for module in kernel.modules])
    facts = {
        "release": kernel.release,
        "origin": kernel.origin,
        "parameters": {module.name: module.parameters for module in kernel.modules},
    }
    text = json.dumps(facts, indent=1, sort_keys=True).encode()
    key = _hash(str(_FORMAT).encode(), kernel.image, layer, text)
    _store(cache / "kernels" / key, {"kernel": kernel.image, "modules.cpio": layer, "kernel.json": text})
    return key


def _default_kernel(cache: Path) -> str | None:
    try:
        key = (cache / "default").read_text().strip()
    except OSError:
        return None
    return key if key and (cache / "kernels" / key / "kernel.json").is_file() else None


def _image_key(cache: Path, kernel_key: str) -> tuple[str, Path]:
    agent = agent_binary(cache)
    return _hash(str(_FORMAT).encode(), kernel_key.encode(), agent.parent.name.encode()), agent


def _find_image(cache: Path, kernel_key: str) -> Image | None:
    key, agent = _image_key(cache, kernel_key)
    initramfs = cache / "images" / key / "initramfs.cpio"
    if not initramfs.is_file():
        return None
    folder = cache / "kernels" / kernel_key
    facts = json.loads((folder / "kernel.json").read_text())
    return Image(
        kernel=folder / "kernel",
        initramfs=initramfs,
        key=key,
        versions={"kernel": facts["release"], "origin": facts["origin"], "agent": agent.parent.name},
        parameters={name: tuple(names) for name, names in facts["parameters"].items()},
    )


def _image(cache: Path, kernel_key: str) -> Image:
    key, agent = _image_key(cache, kernel_key)
    # Not compressed: decompressing costs the emulated kernel more than QEMU saves by loading less.
    layers = (cache / "kernels" / kernel_key / "modules.cpio").read_bytes() + agent_layer(agent.read_bytes())
    _store(cache / "images" / key, {"initramfs.cpio": layers})
    image = _find_image(cache, kernel_key)
    assert image is not None
    return image


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _store(folder: Path, files: Mapping[str, bytes]) -> None:
    # Makes a folder with these files, all at once; one that is there has the same contents, for its name says so.
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="building-", dir=folder.parent))
    try:
        for name, data in files.items():
            write_file(temporary / name, data)
        temporary.rename(folder)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


@contextlib.contextmanager
def _alone(cache: Path) -> Iterator[None]:
    # Two builds at once would download twice; the second waits and finds everything there.
    with (cache / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
