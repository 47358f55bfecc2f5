"""Kernels and modules made here: real ELF files and real Debian packages, with contents of the tests' own."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RELEASE = "6.1.0-99-test-amd64"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("KVMBENCH_CACHE", str(folder))
    return folder


@pytest.fixture
def full_disk() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which the kernel refuses this process more than 10 bytes a file, as a full disk would."""

    @contextlib.contextmanager
    def limit() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    return limit


@pytest.fixture
def make_module(tmp_path: Path) -> Callable[..., bytes]:
    """Makes a kernel module: an ELF object whose .modinfo says what it is told."""
    assembler = shutil.which("as")
    if assembler is None:
        pytest.skip("no assembler: apt-get install binutils")

    def make(*, depends: str = "", release: str = RELEASE, parameters: tuple[str, ...] = ()) -> bytes:
        items = [f"depends={depends}", f"vermagic={release} SMP preempt mod_unload "]
        items += [f"parmtype={name}:int" for name in parameters]
        lines = ['.section .modinfo,"a"', *(f'.asciz "{item}"' for item in items)]
        made = tmp_path / "module.o"
        subprocess.run([assembler, "--64", "-o", str(made)], input="\n".join(lines) + "\n", text=True, check=True)
        return made.read_bytes()

    return make


@pytest.fixture
def make_kernel() -> Callable[..., bytes]:
    """Makes the start of a bzImage, whose header names a release."""

    def make(release: str = RELEASE) -> bytes:
        image = bytearray(0x1000)
        image[0x202:0x206] = b"HdrS"
        struct.pack_into("<H", image, 0x20E, 0x400)
        text = f"{release} (builder@host) #1 SMP".encode()
        image[0x600 : 0x600 + len(text)] = text
        return bytes(image)

    return make


@pytest.fixture
def module_set(make_module: Callable[..., bytes]) -> dict[str, bytes]:
    """File name and contents of the modules that an appliance needs, as Debian's kernel has them."""
    return {
        "virtio_ring.ko": make_module(),
        "virtio.ko": make_module(depends="virtio_ring"),
        "virtio_pci.ko": make_module(depends="virtio_ring,virtio"),
        "virtio_console.ko": make_module(depends="virtio,virtio_ring"),
        "irqbypass.ko": make_module(),
        "kvm.ko": make_module(depends="irqbypass", parameters=("enable_vmware_backdoor",)),
        "kvm-amd.ko": make_module(depends="kvm", parameters=("npt", "nested")),
        "kvm-intel.ko": make_module(depends="kvm", parameters=("ept",)),
    }


@pytest.fixture
def make_package(tmp_path: Path) -> Callable[..., Path]:
    """Makes a Debian package of the files it is given, by path inside."""
    builder = shutil.which("dpkg-deb")
    if builder is None:
        pytest.skip("no dpkg-deb")

    def make(name: str, files: dict[str, bytes]) -> Path:
        root = tmp_path / f"{name}-root"
        (root / "DEBIAN").mkdir(parents=True)
        control = f"Package: {name}\nVersion: 1.0\nArchitecture: amd64\nMaintainer: none <n@example.org>\n"
        (root / "DEBIAN" / "control").write_text(control + "Description: made by a test\n")
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        package = tmp_path / f"{name}_1.0_amd64.deb"
        command = [builder, "--root-owner-group", "-Znone", "--build", str(root), str(package)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return package

    return make
