"""Kernels from packages and from files, and every kind of file that is no such thing."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable, LoadError
from kvmbench.host.kernel_package import from_distribution, from_files, from_packages, image_release

from .conftest import RELEASE

ORDER = ["virtio_ring", "virtio", "virtio_pci", "virtio_console", "irqbypass", "kvm", "kvm_amd", "kvm_intel"]
FOLDER = f"lib/modules/{RELEASE}"


def test_one_package_with_image_and_modules_as_debian_has_it(
    make_package: Callable[..., Path], make_kernel: Callable[..., bytes], module_set: dict[str, bytes]
) -> None:
    files = {f"{FOLDER}/kernel/x/{name}": data for name, data in module_set.items()}
    files |= {f"boot/vmlinuz-{RELEASE}": make_kernel(), f"{FOLDER}/kernel/x/other.ko": b"not looked at"}
    kernel = from_packages([make_package("linux-image", files)])
    assert kernel.release == RELEASE
    assert kernel.origin == "linux-image 1.0"
    assert kernel.image == make_kernel()
    assert [module.name for module in kernel.modules] == ORDER


def test_two_packages_with_merged_usr_built_in_virtio_and_packed_modules_as_ubuntu_has_them(
    make_package: Callable[..., Path], make_kernel: Callable[..., bytes], module_set: dict[str, bytes]
) -> None:
    builtin = "".join(f"kernel/drivers/virtio/{name}.ko\n" for name in ORDER[:4]).encode()
    files = {f"usr/{FOLDER}/modules.builtin": builtin}
    files |= {
        f"usr/{FOLDER}/kernel/arch/x86/kvm/{name}.gz": gzip.compress(data)
        for name, data in module_set.items()
        if not name.startswith("virtio")
    }
    image = make_package("linux-image", {f"boot/vmlinuz-{RELEASE}": make_kernel()})
    kernel = from_packages([image, make_package("linux-modules", files)])
    assert [module.name for module in kernel.modules] == ORDER[4:]


def test_a_module_nobody_expected_to_be_needed_is_found_all_the_same(
    make_package: Callable[..., Path],
    make_kernel: Callable[..., bytes],
    module_set: dict[str, bytes],
    make_module: Callable[..., bytes],
) -> None:
    module_set["irqbypass.ko"] = make_module(depends="surprise")
    module_set["surprise.ko"] = make_module(depends="second_surprise")
    module_set["second_surprise.ko"] = make_module()
    files = {f"{FOLDER}/kernel/x/{name}": data for name, data in module_set.items()}
    kernel = from_packages([make_package("linux-image", files | {f"boot/vmlinuz-{RELEASE}": make_kernel()})])
    names = [module.name for module in kernel.modules]
    assert names.index("second_surprise") < names.index("surprise") < names.index("irqbypass")


def test_a_kernel_without_kvm_modules_is_refused_and_says_what_to_do(
    make_package: Callable[..., Path], make_kernel: Callable[..., bytes], module_set: dict[str, bytes]
) -> None:
    files = {f"{FOLDER}/kernel/x/{name}": data for name, data in module_set.items() if "kvm" not in name}
    package = make_package("linux-image", files | {f"boot/vmlinuz-{RELEASE}": make_kernel()})
    with pytest.raises(HostUnavailable, match=r"without KVM modules.*--kernel"):
        from_packages([package])


def test_a_package_without_a_kernel_is_refused_by_name(make_package: Callable[..., Path]) -> None:
    with pytest.raises(HostUnavailable, match=r"no kernel image in linux-doc_1\.0_amd64\.deb"):
        from_packages([make_package("linux-doc", {"usr/share/doc/x": b""})])


def test_a_damaged_package_is_refused_by_name(make_package: Callable[..., Path]) -> None:
    package = make_package("linux-image", {"boot/vmlinuz-1": bytes(100_000)})
    package.write_bytes(package.read_bytes()[:50_000])
    with pytest.raises(HostUnavailable, match=r"linux-image_1\.0_amd64\.deb cannot be unpacked"):
        from_packages([package])


@pytest.fixture
def own_kernel(tmp_path: Path, make_kernel: Callable[..., bytes], module_set: dict[str, bytes]) -> tuple[Path, Path]:
    kernel, folder = tmp_path / "vmlinuz", tmp_path / "modules"
    kernel.write_bytes(make_kernel())
    folder.mkdir()
    for name, data in module_set.items():
        (folder / name).write_bytes(data)
    return kernel, folder


def test_a_kernel_of_the_users_own(own_kernel: tuple[Path, Path]) -> None:
    kernel = from_files(*own_kernel)
    assert (kernel.release, kernel.origin) == (RELEASE, str(own_kernel[0]))
    assert [module.name for module in kernel.modules] == ORDER


def test_modules_of_another_kernel_are_refused(
    own_kernel: tuple[Path, Path], make_module: Callable[..., bytes]
) -> None:
    (own_kernel[1] / "kvm.ko").write_bytes(make_module(depends="irqbypass", release="5.10.0-1"))
    with pytest.raises(LoadError, match=f"kvm.ko in .* is of Linux 5.10.0-1, the kernel is {RELEASE}"):
        from_files(*own_kernel)


def test_a_missing_kernel_and_a_missing_folder_are_named(own_kernel: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(HostUnavailable, match=r"nothing cannot be read: No such file"):
        from_files(tmp_path / "nothing")
    with pytest.raises(HostUnavailable, match="--modules"):
        from_files(own_kernel[0], tmp_path / "no-folder")
    with pytest.raises(HostUnavailable, match=f"no folder /lib/modules/{RELEASE}"):
        from_files(own_kernel[0])


def test_a_kernel_that_only_root_may_read_says_how_to_copy_it(
    own_kernel: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    # As in /boot of Ubuntu; root, as whom these tests may run, reads everything.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(HostUnavailable, match=r"Permission denied; `sudo install -m 644 .*vmlinuz COPY`"):
        from_files(*own_kernel)


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(5000), bytes(0x202) + b"HdrS" + bytes(0x400)])
def test_a_file_that_is_no_kernel_is_refused(content: bytes) -> None:
    with pytest.raises(LoadError):
        image_release(content)


def test_a_machine_without_apt_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostUnavailable, match=r"no apt-cache here.*--kernel BZIMAGE"):
        from_distribution(tmp_path)


# Lists are what `apt-get update` puts into the folder that apt's settings name; without them apt knows no package.
_APT = """#!/bin/sh
lists=$(sed -n 's/Dir::State::lists "\\(.*\\)";/\\1/p' "$APT_CONFIG")
echo "$(basename $0) $*" >> {calls}
case "$*" in
*update) {update}; touch "$lists/known" ;;
*"--important linux-image-cloud-amd64") test -e "$lists/known" && echo "  Depends: linux-image-6.1.0-99-cloud-amd64" ;;
*depends*) echo "E: No packages found" >&2; exit 100 ;;
*download*) test -e "$lists/known" && cp {package} . ;;
esac
"""


@pytest.fixture
def empty_lists(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_package: Callable[..., Path],
    make_kernel: Callable[..., bytes],
    module_set: dict[str, bytes],
) -> Callable[..., Path]:
    """Puts a stand-in for apt on PATH whose lists are empty until it updates; gives the file that has its calls."""

    def make(*, update: str = ":") -> Path:
        files = {f"{FOLDER}/kernel/x/{name}": data for name, data in module_set.items()}
        package = make_package("linux-image", files | {f"boot/vmlinuz-{RELEASE}": make_kernel()})
        programs, calls, lists = tmp_path / "bin", tmp_path / "calls", tmp_path / "system"
        programs.mkdir()
        lists.mkdir()
        (tmp_path / "apt.conf").write_text(f'Dir::State::lists "{lists}";\n')
        for name in ("apt-get", "apt-cache"):
            (programs / name).write_text(_APT.format(calls=calls, package=package, update=update))
            (programs / name).chmod(0o755)
        monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        return calls

    return make


def test_empty_package_lists_are_made_up_for_by_lists_of_our_own(
    tmp_path: Path, empty_lists: Callable[..., Path]
) -> None:
    calls = empty_lists()
    said: list[str] = []
    kernel = from_distribution(tmp_path / "own", said.append)
    assert kernel.release == RELEASE
    assert [line for line in said if "the system's package lists lead to no kernel" in line]
    assert f"fetching package lists into {tmp_path / 'own'}" in said
    assert calls.read_text().count(" update\n") == 1
    assert not list((tmp_path / "system").iterdir())


def test_lists_that_cannot_be_fetched_either_say_what_to_do(tmp_path: Path, empty_lists: Callable[..., Path]) -> None:
    empty_lists(update="echo 'E: no route to the mirror' >&2; exit 100")
    with pytest.raises(HostUnavailable, match=r"E: no route to the mirror.*--kernel BZIMAGE"):
        from_distribution(tmp_path / "own")
