"""Machines that lack something: no /dev/kvm, no right to it, no QEMU, a kernel without KVM.

Each is made for real: a mount name space with another /dev, a process without the
capability to ignore permissions, an empty PATH, a kernel booted without its modules.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvmbench as kb
from kvmbench.errors import HostUnavailable
from kvmbench.host import image as images
from kvmbench.host.cache import cache_directory

# Prints what connect() does; arguments: the host's name or "-", then option=1 words.
_CONNECT = """
import sys
import kvmbench as kb
from kvmbench.errors import HostUnavailable

options = {word: True for word in sys.argv[2:]}
try:
    with kb.connect(None if sys.argv[1] == "-" else sys.argv[1], quiet=True, **options) as host:
        print("connected", host.info.kind, "because", host.why)
except HostUnavailable as error:
    print("unavailable", error)
"""

# A /dev with what Python and the compiler need, and no more; $1: a folder to make it in, $2: which kvm.
_OTHER_DEV = """
set -e
mount -t tmpfs -o mode=755 none "$1"
for name in null zero random urandom; do : >"$1/$name"; mount --bind "/dev/$name" "$1/$name"; done
case "$2" in
denied) mknod -m 600 "$1/kvm" c 10 232; chown 65534 "$1/kvm" ;;
other) : >"$1/kvm"; mount --bind /dev/null "$1/kvm" ;;
esac
mount --move "$1" /dev
shift 2
exec "$@"
"""


@pytest.fixture
def connect_where(tmp_path: Path, need) -> Callable[..., str]:
    """Runs connect() in a process whose /dev/kvm is "missing", "denied", or "other" (not KVM's)."""

    def run(kvm: str, spec: str, *options: str, **environment: str) -> str:
        if kvm == "denied" and os.geteuid() != 0:
            pytest.skip("only root can make a /dev/kvm that it may not open")
        folder = tmp_path / "dev"
        folder.mkdir(exist_ok=True)
        spaces = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
        prefix = [*spaces, "sh", "-c", _OTHER_DEV, "sh", str(folder), kvm]
        tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
        if tried.returncode != 0:
            need("namespaces", f"no mount name space of our own: {tried.stderr.strip()}")
        if kvm == "denied":
            prefix += ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
        done = subprocess.run(
            [*prefix, sys.executable, "-c", _CONNECT, spec, *options],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, **environment},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def test_without_dev_kvm_local_says_so(connect_where):
    assert connect_where("missing", "local").startswith("unavailable there is no /dev/kvm")


def test_without_the_right_to_dev_kvm_local_says_what_mends_it(connect_where):
    said = connect_where("denied", "local")
    assert said.startswith("unavailable no permission for /dev/kvm")
    assert "`sudo usermod -aG kvm $USER`" in said


@pytest.mark.parametrize("kvm", ["missing", "denied"])
def test_an_agent_without_dev_kvm_says_the_same(kvm, connect_where):
    assert connect_where(kvm, "local", "agent") == connect_where(kvm, "local")


@pytest.mark.parametrize("options", [(), ("agent",)])
def test_a_dev_kvm_that_is_something_else_is_refused(options, connect_where):
    said = connect_where("other", "local", *options)
    assert said.startswith("unavailable /dev/kvm")
    # ENOTTY, the answer of what is no KVM to any ioctl.
    assert "Inappropriate ioctl for device" in said


def test_without_dev_kvm_connect_takes_the_appliance_and_says_why(connect_where, need):
    said = connect_where("missing", "-", KVMBENCH_HOST="")
    if said.startswith("unavailable"):
        need("amd", said)
    assert said.startswith("connected appliance because no local KVM: there is no /dev/kvm")


def test_without_dev_kvm_and_without_qemu_connect_names_what_to_install(connect_where, tmp_path):
    # sh, mount and unshare run first, so PATH cannot be empty for them.
    bare = tmp_path / "bin"
    bare.mkdir()
    for name in ("sh", "mount", "unshare", "setpriv", "gcc", "as", "ld"):
        found = shutil.which(name)
        if found:
            (bare / name).symlink_to(found)
    said = connect_where("missing", "-", PATH=str(bare), KVMBENCH_HOST="", KVMBENCH_QEMU="")
    assert said.startswith("unavailable")
    assert "no qemu-system-x86_64 on PATH" in said
    assert "`sudo apt-get install --no-install-recommends qemu-system-x86`" in said


def test_without_qemu_the_appliance_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("KVMBENCH_QEMU", raising=False)
    mends = r"no qemu-system-x86_64 on PATH: `sudo apt-get install .*qemu-system-x86`"
    with pytest.raises(HostUnavailable, match=mends):
        kb.connect("appliance", quiet=True)


def test_a_qemu_that_does_not_run_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "qemu-system-x86_64"
    broken.write_text("#!/bin/sh\necho 'a library is missing' >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv("KVMBENCH_QEMU", str(broken))
    with pytest.raises(HostUnavailable, match=f"{broken} does not tell its version: a library is missing"):
        kb.connect("appliance", quiet=True)


def archived(cpio: bytes) -> Iterator[tuple[str, bytes]]:
    """Files of a cpio archive in the "newc" format."""
    at = 0
    while at + 110 <= len(cpio) and cpio[at : at + 6] == b"070701":
        fields = [int(cpio[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_bytes = fields[6], fields[11]
        name = cpio[at + 110 : at + 110 + name_bytes - 1].decode()
        data_at = (at + 110 + name_bytes + 3) & ~3
        if name == "TRAILER!!!":
            return
        yield name, cpio[data_at : data_at + size]
        at = (data_at + size + 3) & ~3


def test_a_kernel_that_comes_up_without_kvm_is_told_with_its_console(monkeypatch, tmp_path, need):
    try:
        stock = images.build()
    except HostUnavailable as error:
        need("amd", f"no appliance image: {error}")
    # A kernel that claims KVM is built in, and is not: all its modules but KVM's.
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in ("kvm", "kvm-amd", "irqbypass")))
    modules = 0
    for name, data in archived(stock.initramfs.read_bytes()):
        base = name.rpartition("/")[2]
        if base.endswith(".ko") and not base.startswith(("kvm", "irqbypass", "ccp")):
            (folder / base).write_bytes(data)
            modules += 1
    assert modules >= 3
    kept = cache_directory()
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "agents").symlink_to(kept / "agents")
    monkeypatch.setenv("KVMBENCH_CACHE", str(cache))
    images.build(stock.kernel, folder)
    with pytest.raises(HostUnavailable, match="the appliance came up without /dev/kvm") as caught:
        kb.connect("appliance", quiet=True)
    assert "there is no /dev/kvm" in str(caught.value).partition("its console says:")[2]
    # What failed is not kept for a quicker start.
    assert [path for path in (cache / "states").glob("**/*") if path.is_file()] == []
