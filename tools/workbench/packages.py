"""The system packages the workbench needs, and how it gets them.

A package is missing when what it provides cannot be found, not when dpkg does
not list it: a compiler in ``/opt`` or a Python built by hand does as well.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from progress import SetupError, Timer, run_logged, say, step_done


@dataclass(frozen=True)
class Requirement:
    """One Debian or Ubuntu package and the question whether its service is there."""

    package: str
    purpose: str
    present: Callable[[], bool]
    essential: bool = False  # without it no command can run; without the others some can


def _command(name: str) -> Callable[[], bool]:
    # sshd lives in /usr/sbin, which is not on a user's PATH in Debian.
    path = os.environ.get("PATH", os.defpath) + os.pathsep + "/usr/sbin"
    return lambda: shutil.which(name, path=path) is not None


def _header(*names: str) -> Callable[[], bool]:
    # Debian keeps <asm/...> in a folder named after the architecture; gcc searches both.
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu"
    folders = [Path("/usr/include"), Path("/usr/include") / multiarch, Path("/usr/local/include")]
    return lambda: all(any((folder / name).is_file() for folder in folders) for name in names)


def _python_package(suffix: str) -> str:
    # The distribution's own interpreter has python3-venv; python3.12 put beside it has python3.12-venv.
    own = Path("/usr/bin/python3")
    if own.exists() and own.resolve() != Path(sys.executable).resolve():
        return f"python{sys.version_info.major}.{sys.version_info.minor}-{suffix}"
    return f"python3-{suffix}"


def _python_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def _zstd_if_ubuntu() -> bool:
    # Ubuntu's kernel modules are .ko.zst, and its small images have no command for that; Debian's need none.
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return True
    ubuntu = "ubuntu" in (release.get("ID", ""), *release.get("ID_LIKE", "").split())
    return not ubuntu or shutil.which("zstd") is not None


def _chromium() -> bool:
    # Ubuntu's /usr/bin/chromium-browser only fetches a snap, which containers cannot run: it does not count.
    return Path("/usr/bin/chromium").exists()


def _bochs_firmware(name: str) -> Callable[[], bool]:
    folders = [Path("/usr/share/bochs"), Path("/usr/local/share/bochs")]
    return lambda: any((folder / name).is_file() for folder in folders)


def _bochs_display() -> bool:
    folders = [Path("/usr/lib/bochs/plugins"), *Path("/usr/lib").glob("*/bochs/plugins")]
    return any((folder / "libbx_sdl2_gui.so").exists() for folder in folders)


def requirements(*, for_tests: bool, with_bochs: bool = False) -> list[Requirement]:
    """The packages to look for.

    Args:
        for_tests: add what only the tests use.
        with_bochs: add what runs the Intel appliance: 4 MB to fetch beside the tests' Chromium, 57 MB
            without it, for Bochs needs GTK.
    """
    needed = [
        Requirement(
            _python_package("venv"),
            "makes .venv",
            lambda: find_spec("venv") is not None and find_spec("ensurepip") is not None,
            essential=True,
        ),
        Requirement("gcc", "compiles the core and the agent", _command("gcc")),
        Requirement("libc6-dev", "C library headers", _header("stdio.h")),
        Requirement("linux-libc-dev", "the KVM ABI, <linux/kvm.h>", _header("linux/kvm.h", "asm/kvm.h")),
        Requirement("musl-tools", "links the agent statically", _command("musl-gcc")),
        Requirement("binutils", "assembles guest programs", _command("as")),
        Requirement(_python_package("dev"), "Python.h for the core", _python_headers),
        Requirement("qemu-system-x86", "runs the appliance", _command("qemu-system-x86_64")),
        Requirement("zstd", "unpacks the modules of Ubuntu's kernels", _zstd_if_ubuntu),
        Requirement("openssh-client", "reaches ssh:// hosts", _command("ssh")),
    ]
    if with_bochs:
        needed.append(Requirement("bochs", "runs the Intel appliance", _command("bochs")))
        needed.append(Requirement("bochs-sdl", "its display, without a screen", _bochs_display))
        needed.append(Requirement("bochsbios", "its firmware", _bochs_firmware("BIOS-bochs-latest")))
        needed.append(Requirement("vgabios", "its firmware", _bochs_firmware("VGABIOS-lgpl-latest")))
    if for_tests:
        needed.append(Requirement("openssh-server", "the ssh:// host the tests start", _command("sshd")))
        needed.append(Requirement("chromium", "the browser the widgets are tested in", _chromium))
    return needed


def ensure(*, for_tests: bool, with_bochs: bool = False, log: Path) -> bool:
    """Installs the missing packages with apt-get, with sudo when not root.

    Where it cannot install, it says what is missing, by whom it is wanted, and
    goes on unless nothing can work without it.

    Returns:
        True when something was installed or is missing (a line was printed).

    Raises:
        SetupError: a package that everything needs is missing and cannot be installed.
    """
    missing = [item for item in requirements(for_tests=for_tests, with_bochs=with_bochs) if not item.present()]
    if not missing:
        return False
    names = [item.package for item in missing]
    prefix = _privilege()
    timer = Timer()
    if shutil.which("apt-get") is None:
        reason = "there is no apt-get here"
    elif prefix is None:
        reason = "that takes root, and there is no sudo here"
    else:
        how = "through sudo" if prefix else "as root"
        say(f"  system packages   installing {how}: {' '.join(names)}")
        reason = _install(prefix, names, log)
    # importlib remembers folders it has read: ensurepip may be there only now.
    import importlib

    importlib.invalidate_caches()
    still = [item for item in missing if not item.present()]
    if not still:
        step_done("system packages", f"{len(names)} installed", timer.seconds)
        return True
    for line in reason.splitlines():
        say(f"    {line}")
    say("  system packages   missing, and not installed:")
    for item in still:
        say(f"    {item.package:<20}{item.purpose}")
    mend = f"sudo apt-get install --no-install-recommends {' '.join(item.package for item in still)}"
    if any(item.essential for item in still):
        raise SetupError(f"Nothing can run without these. What mends it:\n    {mend}")
    say(f"    going on without; what mends it: {mend}")
    return True


def _privilege() -> list[str] | None:
    # The words that go before apt-get; None when root cannot be had.
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    # Without a terminal a password prompt would hang or fail in odd words: -n fails at once.
    return ["sudo"] if sys.stdin is not None and sys.stdin.isatty() else ["sudo", "-n"]


def _install(prefix: Sequence[str], names: Sequence[str], log: Path) -> str:
    # Returns why it failed, or an empty string. The lists are fetched first: a fresh container has none.
    if prefix:
        # Ask for the password now, on the terminal: apt-get below runs without one.
        if subprocess.run([*prefix, "true"], check=False).returncode:
            return "sudo refused"
        prefix = ["sudo", "-n"]
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    update_failure = ""
    try:
        run_logged([*apt, "update"], name="apt-get update", log=log)
    except SetupError as error:
        # One unreachable source fails the update though the others are fresh: the install decides.
        update_failure = f"{error}\n"
    install = [*apt, "install", "-y", "--no-install-recommends"]
    try:
        run_logged([*install, *names], name="apt-get install", log=log)
    except SetupError as error:
        # A package that this system does not have (Bochs, Chromium) keeps none of the others out.
        for name in names if len(names) > 1 else ():
            with contextlib.suppress(SetupError):
                run_logged([*install, name], name=f"apt-get install {name}", log=log)
        return f"{update_failure}{error}"
    return ""
