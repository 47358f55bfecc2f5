"""Local KVM: the device, who may open it, and which module is behind it."""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from kvmbench.doctor.finding import Finding, Status

AREA = "local KVM"

# KVM API entry 4.1: KVM_GET_API_VERSION is _IO(KVMIO, 0x00), and every kernel since 2.6.22 answers 12.
_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12


def examine(
    *,
    device: Path = Path("/dev/kvm"),
    modules: Path = Path("/sys/module"),
    cpuinfo: Path = Path("/proc/cpuinfo"),
) -> Iterator[Finding]:
    """Looks at the device and the modules; creates no VM.

    Args:
        device: KVM's character device.
        modules: the kernel's list of modules, ``/sys/module``.
        cpuinfo: the processor's flags, ``/proc/cpuinfo``.
    """
    names = loaded_modules(modules)
    if not device.exists():
        yield _absent(device, names, cpuinfo)
        return
    yield _device(device)
    if names:
        parameters = {name: _parameters(modules / name) for name in names}
        yield Finding(AREA, "module", Status.OK, ", ".join(names), facts={"parameters": parameters})
    else:
        yield Finding(AREA, "module", Status.LIMITED, f"{device} is there, but {modules} shows no KVM module")


def loaded_modules(modules: Path = Path("/sys/module")) -> list[str]:
    """Names of the KVM modules in the kernel, the processor's own first.

    ``kvm`` is common to all; ``kvm_intel``, ``kvm_amd`` or another one drives
    the processor. Modules built into the kernel count when they have parameters.
    """
    own = sorted(path.name for path in modules.glob("kvm_*"))
    return [*own, "kvm"] if (modules / "kvm").is_dir() else own


def _parameters(module: Path) -> dict[str, str]:
    # Some parameters can be read by root only: those are left out.
    values: dict[str, str] = {}
    for path in sorted((module / "parameters").glob("*")):
        try:
            values[path.name] = path.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            continue
    return values


def _absent(device: Path, names: list[str], cpuinfo: Path) -> Finding:
    flags: set[str] = set()
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("flags"):
                flags.update(line.partition(":")[2].split())
                break
    missing = Status.MISSING
    if names:
        return Finding(
            AREA,
            str(device),
            missing,
            f"not here, though the kernel has {names[0]}: a container without the device?",
            mend="start the container with: --device /dev/kvm",
        )
    for flag, module in (("vmx", "kvm_intel"), ("svm", "kvm_amd")):
        if flag in flags:
            return Finding(
                AREA,
                str(device),
                missing,
                f"not here; the processor has {flag.upper()}, so the module is not loaded",
                mend=f"sudo modprobe {module}",
            )
    if "hypervisor" in flags:
        text = "not here: this is a virtual machine whose owner did not give it nested virtualization"
    else:
        text = "not here, and the processor offers neither VMX nor SVM (firmware may have switched it off)"
    return Finding(AREA, str(device), missing, f"{text}; the appliance needs neither")


def _device(device: Path) -> Finding:
    facts: dict[str, object] = {}
    info = device.stat()
    facts["mode"] = stat.filemode(info.st_mode)
    facts["owner"] = _user(info.st_uid)
    facts["group"] = _group(info.st_gid)
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        return Finding(
            AREA,
            str(device),
            Status.MISSING,
            f"you may not open it ({facts['mode']} {facts['owner']}:{facts['group']})",
            mend=_permission(device, info),
            facts=facts,
        )
    except OSError as error:
        return Finding(AREA, str(device), Status.MISSING, f"does not open: {error.strerror}", facts=facts)
    try:
        version = fcntl.ioctl(descriptor, _KVM_GET_API_VERSION, 0)
    except OSError as error:
        return Finding(AREA, str(device), Status.MISSING, f"is not a KVM device: {error.strerror}", facts=facts)
    finally:
        os.close(descriptor)
    facts["api_version"] = version
    if version != _KVM_API_VERSION:
        text = f"API version {version}; only {_KVM_API_VERSION} is known"
        return Finding(AREA, str(device), Status.MISSING, text, facts=facts)
    return Finding(AREA, str(device), Status.OK, f"opens, API version {version}", facts=facts)


def _permission(device: Path, info: os.stat_result) -> str:
    user = _user(os.getuid())
    group = _group(info.st_gid)
    if group != "root" and info.st_mode & 0o060 == 0o060:
        return f"sudo usermod -aG {group} {user}   (then log in again)"
    return f"sudo chgrp kvm {device} && sudo chmod g+rw {device} && sudo usermod -aG kvm {user}"


def _user(number: int) -> str:
    # A container may have ids without names; so also below.
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _group(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
