"""Kernel modules as files: what they need, what parameters they take, in which order they load.

A kernel package has no modules.dep (depmod writes it at installation), so the
dependencies are read from the modules themselves: their .modinfo section.
"""

from __future__ import annotations

import gzip
import io
import lzma
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kvmbench.errors import HostUnavailable, LoadError

#: What a file name of a module ends with, and hence how it is compressed.
SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")

_SIGNATURE_MARK = b"~Module signature appended~\n"
# struct module_signature (include/linux/module_signature.h): 12 bytes, the last 4 the signature's length.
_SIGNATURE_INFO_BYTES = 12


@dataclass(frozen=True)
class Module:
    """One kernel module.

    Attributes:
        name: as the kernel shows it, with underscores: "kvm_amd".
        file_name: "kvm-amd.ko", without a suffix of compression.
        data: the ELF file, decompressed and without signature.
        depends: names of the modules that must be loaded before.
        parameters: names of its parameters.
        release: the kernel it was built for, first word of its vermagic.
    """

    name: str
    file_name: str
    data: bytes
    depends: tuple[str, ...]
    parameters: tuple[str, ...]
    release: str


def module_name(path: str) -> str:
    """The kernel's name for a module file: "kvm_amd" for "lib/modules/6.1/kernel/arch/x86/kvm/kvm-amd.ko.xz"."""
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


def read_module(path: str, raw: bytes) -> Module:
    """Reads one module file.

    Args:
        path: its path; the name and the compression are taken from it.
        raw: its contents, possibly compressed.

    Raises:
        LoadError: it is not a kernel module, or is damaged.
        HostUnavailable: it is compressed with zstd and there is no zstd command.
    """
    data = _without_signature(_decompressed(path, raw))
    info = _module_information(path, data)
    release = (info.get("vermagic") or ["?"])[0].split(" ", 1)[0]
    depends = [name.replace("-", "_") for text in info.get("depends", []) for name in text.split(",") if name]
    return Module(
        name=module_name(path),
        file_name=path.rsplit("/", 1)[-1].split(".ko", 1)[0] + ".ko",
        data=data,
        depends=tuple(depends),
        parameters=tuple(text.split(":", 1)[0] for text in info.get("parmtype", [])),
        release=release,
    )


def load_order(
    wanted: Iterable[str], find: Callable[[str], Module | None], *, builtin: Iterable[str] = ()
) -> list[Module]:
    """The wanted modules and all they need, each after what it needs.

    Args:
        wanted: names; each is found, or built into the kernel, or missing.
        find: a module by name, or None.
        builtin: names of what the kernel has built in.

    Raises:
        HostUnavailable: names the modules that are missing and who needs them.
    """
    inside = set(builtin)
    ordered: dict[str, Module] = {}
    missing: list[str] = []
    visited: set[str] = set()

    def visit(name: str, needed_by: str) -> None:
        if name in visited or name in inside:
            return
        visited.add(name)
        module = find(name)
        if module is None:
            missing.append(f"{name} (needed by {needed_by})" if needed_by else name)
            return
        for other in module.depends:
            visit(other, name)
        ordered[name] = module

    for name in wanted:
        visit(name, "")
    if missing:
        raise HostUnavailable(f"this kernel lacks modules that the appliance needs: {', '.join(missing)}")
    return list(ordered.values())


def _decompressed(path: str, raw: bytes) -> bytes:
    try:
        if path.endswith(".xz"):
            return lzma.decompress(raw)
        if path.endswith(".gz"):
            return gzip.decompress(raw)
    except (lzma.LZMAError, OSError, EOFError) as error:
        raise LoadError(f"{path} cannot be decompressed: {error}") from error
    if path.endswith(".zst"):
        command = shutil.which("zstd")
        if command is None:
            raise HostUnavailable(f"{path} is compressed with zstd: `sudo apt-get install zstd`")
        done = subprocess.run([command, "-dcq"], input=raw, capture_output=True, check=False)
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip()
            raise LoadError(f"{path} cannot be decompressed: {said}")
        return done.stdout
    return raw


def _without_signature(data: bytes) -> bytes:
    # Checking it takes the emulated kernel 0.2 s at each cold start, a twelfth of the whole. The package that
    # the module comes from was verified by apt.
    if not data.endswith(_SIGNATURE_MARK):
        return data
    end = len(data) - len(_SIGNATURE_MARK)
    (length,) = struct.unpack(">I", data[end - 4 : end])
    start = end - _SIGNATURE_INFO_BYTES - int(length)
    return data[:start] if start > 0 else data


def _module_information(path: str, data: bytes) -> Mapping[str, list[str]]:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        section = ELFFile(io.BytesIO(data)).get_section_by_name(".modinfo")
        content: bytes = section.data() if section is not None else b""
    except (ELFError, ValueError, struct.error) as error:
        raise LoadError(f"{path} is not a kernel module: {error}") from error
    if not content:
        raise LoadError(f"{path} is not a kernel module: it has no .modinfo section")
    found: dict[str, list[str]] = {}
    for item in re.split(rb"\0+", content):
        key, _, value = item.decode("utf-8", "replace").partition("=")
        if key:
            found.setdefault(key, []).append(value)
    return found
