"""Modules as files: compression, signature, what .modinfo says, and the order to load them in."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable

import pytest

from kvmbench.errors import HostUnavailable, LoadError
from kvmbench.host.kernel_modules import Module, load_order, module_name, read_module

Make = Callable[..., bytes]


def test_a_module_says_what_it_needs_what_it_takes_and_for_which_kernel_it_is(make_module: Make) -> None:
    data = make_module(depends="kvm,irq-bypass", parameters=("npt", "nested"), release="6.9.1")
    module = read_module("kernel/arch/x86/kvm/kvm-amd.ko", data)
    assert (module.name, module.file_name) == ("kvm_amd", "kvm-amd.ko")
    assert module.depends == ("kvm", "irq_bypass")
    assert module.parameters == ("npt", "nested")
    assert module.release == "6.9.1"
    assert module.data == data


def zstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        pytest.skip("no zstd command")
    return subprocess.run(["zstd", "-q"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".xz", lzma.compress), (".gz", gzip.compress), (".zst", zstd), ("", bytes)]
)
def test_a_compressed_module_is_decompressed_by_its_suffix(
    make_module: Make, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    data = make_module()
    module = read_module(f"x/kvm.ko{suffix}", compress(data))
    assert (module.file_name, module.data) == ("kvm.ko", data)


def test_the_signature_is_taken_off(make_module: Make) -> None:
    data = make_module()
    signature = b"s" * 300
    tail = struct.pack(">8xI", len(signature)) + b"~Module signature appended~\n"
    assert read_module("kvm.ko", data + signature + tail).data == data


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_a_damaged_module_is_refused_by_name(suffix: str) -> None:
    if suffix == ".zst":
        zstd(b"")
    with pytest.raises(LoadError, match=r"kvm\.ko"):
        read_module(f"kvm.ko{suffix}", b"not a module")


def test_an_elf_file_that_is_no_module_is_refused(make_module: Make) -> None:
    data = make_module().replace(b".modinfo", b".morinfo")
    with pytest.raises(LoadError, match=r"no \.modinfo"):
        read_module("kvm.ko", data)


def test_a_module_named_zst_without_a_zstd_command_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostUnavailable, match="apt-get install zstd"):
        read_module("kvm.ko.zst", b"")


def modules(**depends: str) -> Callable[[str], Module | None]:
    made = {
        name: Module(name, f"{name}.ko", b"", tuple(filter(None, needs.split(","))), (), "6")
        for name, needs in depends.items()
    }
    return made.get


def test_each_module_comes_after_all_it_needs_and_once() -> None:
    find = modules(kvm_amd="kvm,ccp", kvm="irqbypass", irqbypass="", ccp="", kvm_intel="kvm")
    order = [module.name for module in load_order(["kvm_amd", "kvm_intel"], find)]
    assert order == ["irqbypass", "kvm", "ccp", "kvm_amd", "kvm_intel"]


def test_what_the_kernel_has_built_in_is_not_looked_for() -> None:
    find = modules(virtio_console="virtio,virtio_ring")
    assert [module.name for module in load_order(["virtio_console"], find, builtin=["virtio", "virtio_ring"])] == [
        "virtio_console"
    ]


def test_missing_modules_are_named_with_who_needs_them() -> None:
    with pytest.raises(HostUnavailable, match=r"irqbypass \(needed by kvm\), virtio_console"):
        load_order(["kvm", "virtio_console"], modules(kvm="irqbypass"))


def test_modules_that_need_each_other_do_not_hang_the_search() -> None:
    assert {module.name for module in load_order(["a"], modules(a="b", b="a"))} == {"a", "b"}


@pytest.mark.parametrize("path", ["kvm-amd.ko", "lib/modules/6/kernel/kvm/kvm-amd.ko.zst", "kvm_amd.ko.xz"])
def test_a_file_name_gives_the_kernels_name_of_the_module(path: str) -> None:
    assert module_name(path) == "kvm_amd"
