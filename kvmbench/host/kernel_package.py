"""Where the appliance's kernel comes from: the distribution's package, not installed, or files the user names.

Debian: the package that linux-image-cloud-amd64 depends on holds image and
modules. Ubuntu: linux-image-virtual leads to linux-image-VERSION-generic with
the image and linux-modules-VERSION-generic with the modules. `apt-get download`
fetches and verifies packages without root, and `dpkg-deb` unpacks them.
"""

from __future__ import annotations

import errno
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvmbench.errors import HostUnavailable, LoadError
from kvmbench.host.apt import Apt
from kvmbench.host.kernel_modules import SUFFIXES, Module, load_order, module_name, read_module

# Metapackages in order of preference: the small kernels for virtual machines first (half the boot time).
_METAPACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64", "linux-image-generic")
# virtio before KVM: the port then appears while KVM loads.
_WANTED = ("virtio_pci", "virtio_console", "kvm_amd", "kvm_intel")
# All that these need in the kernels seen so far, so that one pass over a package is enough.
_EXPECTED = {*_WANTED, "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "kvm"} | {
    "irqbypass",
    "ccp",
}
_ELSEWHERE = (
    "`kvmbench appliance build --kernel BZIMAGE --modules FOLDER` takes a kernel that you have (amd64, with "
    "kvm-amd.ko and virtio_console.ko)"
)

# Documentation/arch/x86/boot.rst: the setup header of a bzImage.
_BOOT_MAGIC = (0x202, b"HdrS")
_KERNEL_VERSION_AT = 0x20E


@dataclass(frozen=True)
class Kernel:
    """A kernel and the modules that make it an appliance.

    Attributes:
        release: as `uname -r` prints it there.
        origin: package and version, or the file it was read from.
        image: the bzImage.
        modules: in load order.
    """

    release: str
    origin: str
    image: bytes
    modules: tuple[Module, ...]


def image_release(image: bytes) -> str:
    """The kernel release a bzImage names in its header.

    Raises:
        LoadError: it is not a bzImage.
    """
    at, magic = _BOOT_MAGIC
    if image[at : at + len(magic)] != magic:
        raise LoadError("not an x86 Linux kernel (a bzImage, as in /boot/vmlinuz-VERSION)")
    (pointer,) = struct.unpack_from("<H", image, _KERNEL_VERSION_AT)
    text = image[pointer + 0x200 : pointer + 0x300].split(b"\0", 1)[0].decode("ascii", "replace")
    release = text.split(" ", 1)[0]
    if not pointer or not re.fullmatch(r"[0-9]+\.[\w.+~-]+", release):
        raise LoadError(f"the kernel's header names no release but {text[:40]!r}")
    return release


def from_files(kernel: Path, modules: Path | None = None) -> Kernel:
    """A kernel that the user has.

    Args:
        kernel: the bzImage.
        modules: a folder with its modules, at any depth; None means
            ``/lib/modules/RELEASE`` of this machine.

    Raises:
        LoadError: not a kernel, or the modules are of another one.
        HostUnavailable: a file cannot be read, or the modules lack KVM.
    """
    try:
        image = kernel.read_bytes()
    except OSError as error:
        # Ubuntu's kernels may be read by root only.
        denied = f"; `sudo install -m 644 {kernel} COPY` makes a copy that can" if error.errno == errno.EACCES else ""
        raise HostUnavailable(f"the kernel {kernel} cannot be read: {error.strerror}{denied}") from error
    try:
        release = image_release(image)
    except LoadError as error:
        raise LoadError(f"{kernel}: {error}") from None
    folder = modules if modules is not None else Path("/lib/modules") / release
    if not folder.is_dir():
        raise HostUnavailable(f"no folder {folder} with the modules of {kernel}; name it with --modules")
    files: dict[str, Path] = {}
    builtin: set[str] = set()
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(SUFFIXES):
            files.setdefault(module_name(path.name), path)
        elif path.name == "modules.builtin":
            builtin |= _builtin(path.read_bytes())

    def find(name: str) -> Module | None:
        path = files.get(name)
        return read_module(str(path), path.read_bytes()) if path is not None else None

    return _assemble(release, str(kernel), image, find, builtin, where=str(folder))


def from_distribution(lists: Path, progress: Callable[[str], None] | None = None) -> Kernel:
    """The kernel of this machine's Debian or Ubuntu, downloaded (25 to 150 MB) but not installed.

    Where the system's package lists are absent or too old to lead to it, lists are fetched that
    are the caller's own.

    Args:
        lists: folder for such lists; made when needed.
        progress: gets a line before each step that takes seconds.

    Raises:
        HostUnavailable: not such a distribution, no network, or a kernel without KVM; the message says
            what to do.
    """
    say = progress if progress is not None else _silent
    for command in ("apt-cache", "apt-get", "dpkg-deb"):
        if shutil.which(command) is None:
            raise HostUnavailable(f"no {command} here, so no kernel package to take; {_ELSEWHERE}")
    with tempfile.TemporaryDirectory(prefix="kvmbench-") as folder:
        try:
            packages = _download(Apt(), Path(folder), say)
        except HostUnavailable as error:
            say(f"the system's package lists lead to no kernel: {error}")
            try:
                packages = _download(Apt.with_own_lists(lists, progress=say), Path(folder), say)
            except HostUnavailable as again:
                raise HostUnavailable(f"no kernel package can be had: {again}; {_ELSEWHERE}") from error
        say("unpacking the kernel and its modules")
        return from_packages(packages)


def _download(apt: Apt, folder: Path, say: Callable[[str], None]) -> list[Path]:
    # The kernel's packages, as files in a folder of their own.
    for left in folder.glob("*.deb"):
        left.unlink()
    names = _packages(apt)
    say(f"downloading {' and '.join(names)}")
    # apt hands downloads to its own user _apt if that user can write here, and else warns and goes on.
    apt.run("apt-get", "-qq", "-o", "APT::Sandbox::User=", "download", *names, folder=folder)
    return sorted(folder.glob("*.deb"))


def from_packages(packages: Sequence[Path]) -> Kernel:
    """The kernel inside Debian packages (.deb files).

    Raises:
        HostUnavailable: no kernel or no KVM modules in them, or they cannot be unpacked.
    """
    images: dict[str, bytes] = {}
    files: dict[str, tuple[str, bytes]] = {}
    builtin: set[str] = set()
    wanted = set(_EXPECTED)
    while True:
        for package in packages:
            builtin |= _unpack(package, wanted - set(files), images, files)
        # A module that was not expected to be needed takes another pass over the packages.
        more = {
            other
            for name, (path, raw) in list(files.items())
            for other in read_module(path, raw).depends
            if name in wanted
        } - wanted
        if not more:
            break
        wanted |= more
    if not images:
        raise HostUnavailable(f"no kernel image in {', '.join(path.name for path in packages)}; {_ELSEWHERE}")
    image = images[max(images)]

    def find(name: str) -> Module | None:
        return read_module(*files[name]) if name in files else None

    origin = " and ".join(" ".join(path.stem.split("_")[:2]) for path in packages)
    return _assemble(image_release(image), origin, image, find, builtin, where="its packages")


def _assemble(
    release: str,
    origin: str,
    image: bytes,
    find: Callable[[str], Module | None],
    builtin: set[str],
    *,
    where: str,
) -> Kernel:
    if "kvm_amd" not in builtin and find("kvm_amd") is None:
        raise HostUnavailable(f"a kernel without KVM modules: there is no kvm-amd in {where}; {_ELSEWHERE}")
    # kvm_intel is for the Intel appliance only.
    wanted = [name for name in _WANTED if name != "kvm_intel" or find(name) is not None]
    modules = load_order(wanted, find, builtin=builtin)
    for module in modules:
        if module.release != release:
            raise LoadError(f"{module.file_name} in {where} is of Linux {module.release}, the kernel is {release}")
    return Kernel(release, origin, image, tuple(modules))


def _unpack(package: Path, wanted: set[str], images: dict[str, bytes], files: dict[str, tuple[str, bytes]]) -> set[str]:
    # Puts what is wanted into images and files; returns the names of built-in modules.
    builtin: set[str] = set()
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = member.name.removeprefix("./").removeprefix("usr/")
                    base = path.rsplit("/", 1)[-1]
                    is_image = base.startswith("vmlinuz") and path.startswith(("boot/", "lib/modules/"))
                    is_module = path.endswith(SUFFIXES) and module_name(path) in wanted
                    if not member.isfile() or not (is_image or is_module or base == "modules.builtin"):
                        continue
                    content = archive.extractfile(member)
                    data = content.read() if content is not None else b""
                    if is_image:
                        images[base] = data
                    elif is_module:
                        files[module_name(path)] = (path, data)
                    else:
                        builtin |= _builtin(data)
        except tarfile.TarError as error:
            process.kill()
            said = process.stderr.read().decode("utf-8", "replace").strip() or str(error)
            raise HostUnavailable(f"{package.name} cannot be unpacked: {said}") from error
    return builtin


def _builtin(data: bytes) -> set[str]:
    return {module_name(line) for line in data.decode("utf-8", "replace").split()}


def _packages(apt: Apt) -> list[str]:
    # The packages behind the first metapackage that is known here, such as linux-image-6.1.0-56-cloud-amd64.
    suffix = "" if apt.run("dpkg", "--print-architecture").strip() == "amd64" else ":amd64"
    for metapackage in _METAPACKAGES:
        images = _depends(apt, metapackage + suffix, r"linux-image-(unsigned-)?[0-9][^:]*")
        if images:
            modules = _depends(apt, images[0] + suffix, r"linux-modules-[0-9][^:]*")
            return [name + suffix for name in (*images[:1], *modules[:1])]
    mend = "; run `sudo dpkg --add-architecture amd64 && sudo apt-get update`" if suffix else ""
    raise HostUnavailable(f"apt knows none of the packages {', '.join(_METAPACKAGES)}{mend}")


def _depends(apt: Apt, package: str, pattern: str) -> list[str]:
    try:
        said = apt.run("apt-cache", "depends", "--important", package)
    except HostUnavailable:
        return []  # no such package in these lists
    names = re.findall(r"^\s*\|?(?:Pre)?Depends: (\S+)", said, flags=re.MULTILINE)
    bare = [name.split(":", 1)[0] for name in names]
    return [name for name in bare if re.fullmatch(pattern, name)]


def _silent(text: str) -> None:
    pass
