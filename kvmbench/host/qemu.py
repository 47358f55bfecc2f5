"""QEMU without acceleration: which one, and with which arguments.

What was measured (QEMU 7.2, Linux 6.1 cloud kernel, 256 MiB, processor time of
QEMU until the agent's first answer): 2.4 s with the kernel's defaults; 0.3 s less
without its crypto self-tests, 0.2 s less without module signatures
(`kernel_modules`), 0.3 s less with the kernel unpacked beforehand (`vmlinux`), 0.1 s
less without IPv6, AppArmor and a self-test that ignores the option, 0.1 s less with
memory in a file instead of huge pages that are cleared and not used. Within the
noise: q35, tb-size, -la57, kaslr, no HPET, no USB, a virtio device of one kind only,
lpj=; 0.06 s for qboot as firmware, which not every package has.

What looks faster and is wrong: `acpi=off` and `pci=noacpi` save 0.3 s, but Debian's
kernel has no other way to find the local APIC, so it would run on one processor
with timers of 4 ms. `tsc=reliable` leaves the guest with the clock source
refined-jiffies, and KVM without its master clock. microvm does not find its
virtio devices with a Debian kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmbench.errors import HostUnavailable
from kvmbench.host.cache import cache_directory, write_file
from kvmbench.host.kernel_options import KERNEL_OPTIONS

PROGRAM = "qemu-system-x86_64"
#: Name of the virtio-serial port; the agent looks for it (core/init.c).
PORT_NAME = "kvmbench"

# A message there and back takes 0.7 of the time it takes with `virtio-serial-pci` alone, which has 64 queues on one
# interrupt for 31 ports, and a detour by QEMU's main thread for what the agent sends (docs/decisions/0007).
_SERIAL_DEVICE = "virtio-serial-pci,ioeventfd=off,max_ports=2,vectors=7"
_MEMORY = "ram"
_VERSION_WITHIN_S = 20


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can run the appliance.

    Attributes:
        path: the program.
        version: such as "7.2.22".
        identity: changes when the program is replaced; empty for a script, which stays the same when the
            program that it starts is replaced.
    """

    path: Path
    version: str
    identity: str


@dataclass(frozen=True)
class Configuration:
    """What is in the appliance's machine; all of it decides over a saved state.

    Attributes:
        kernel: path of the bzImage.
        initramfs: path of the initramfs.
        memory_mib: of the appliance, in MiB; guests live inside.
        vcpus: processors of the appliance.
        parameters: kernel module parameters, such as ``{"kvm_amd.npt": "0"}``.
        tsc_khz: rate of the time stamp counter (`kvmbench.host.tsc`), or None to leave it to the kernel.
    """

    kernel: Path
    initramfs: Path
    memory_mib: int
    vcpus: int
    parameters: Mapping[str, str]
    tsc_khz: int | None = None

    @property
    def memory_bytes(self) -> int:
        """Size of the memory in bytes."""
        return self.memory_mib << 20

    def arguments(self) -> list[str]:
        """QEMU's arguments for a cold start, but for what carries a descriptor's number."""
        return [*self.kernel_arguments(), *self.machine_arguments()]

    def kernel_arguments(self, kernel: Path | None = None) -> list[str]:
        """Those that a saved machine needs no more; `kernel` is the same one in another form."""
        parameters = (f"{name}={value}" for name, value in sorted(self.parameters.items()))
        words = ["console=ttyS0", *KERNEL_OPTIONS, *parameters]
        if self.tsc_khz is not None:
            words.append(f"tsc_early_khz={self.tsc_khz}")
        return [
            *("-kernel", str(kernel or self.kernel), "-initrd", str(self.initramfs), "-append", " ".join(words)),
        ]

    def machine_arguments(self) -> list[str]:
        """Those that decide what the machine is made of."""
        return [
            *("-name", "kvmbench-appliance"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", f"pc,memory-backend={_MEMORY}", "-accel", "tcg", "-cpu", "max"),
            *("-m", f"{self.memory_mib}M", "-smp", str(self.vcpus)),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *("-device", _SERIAL_DEVICE),
            *("-device", f"virtserialport,chardev=channel,name={PORT_NAME}"),
            *("-mon", "chardev=monitor,mode=control"),
        ]


def command(
    qemu: Qemu,
    configuration: Configuration,
    *,
    channel: socket.socket,
    monitor: socket.socket,
    memory: int,
    kernel: Path | None = None,
    saved: bool = False,
) -> list[str]:
    """The whole command line.

    Args:
        qemu: the program.
        configuration: the machine.
        channel: QEMU's end of the socket pair to the agent.
        monitor: QEMU's end of the socket pair to its monitor.
        memory: descriptor of a file that is the machine's memory, and may go on behind it.
        kernel: the configuration's kernel in another form.
        saved: the memory is that of a saved machine and is not written to; QEMU waits for
            the rest of the machine, for which its monitor is to be asked.
    """
    state = ["-incoming", "defer"] if saved else configuration.kernel_arguments(kernel)
    share = "off" if saved else "on"
    return [
        str(qemu.path),
        *("-chardev", f"socket,id=channel,fd={channel.fileno()}"),
        *("-chardev", f"socket,id=monitor,fd={monitor.fileno()}"),
        "-object",
        f"memory-backend-file,id={_MEMORY},size={configuration.memory_mib}M,mem-path=/proc/self/fd/{memory},share={share}",
        *configuration.machine_arguments(),
        *state,
    ]


def find_qemu(*, search_path: str | None = None) -> Qemu:
    """``$KVMBENCH_QEMU``, or the newest `qemu-system-x86_64` on PATH.

    A script around QEMU is taken too. Nothing is remembered of it, and each of its appliances boots.

    Args:
        search_path: where to look, in the form of PATH; None means PATH.

    Raises:
        HostUnavailable: there is none, or it does not run.
    """
    chosen = os.environ.get("KVMBENCH_QEMU")
    if chosen:
        found = shutil.which(chosen, path=search_path)
        if found is None:
            raise HostUnavailable(f"$KVMBENCH_QEMU is {chosen!r}, which is not a program")
        return _ask(Path(found))
    folders = (search_path if search_path is not None else os.environ.get("PATH", os.defpath)).split(os.pathsep)
    programs: dict[Path, Path] = {}  # by what links lead to, for /bin is often /usr/bin
    for folder in folders:
        found = shutil.which(PROGRAM, path=folder) if folder else None
        if found is not None:
            programs.setdefault(Path(found).resolve(), Path(found))
    failures: list[str] = []
    answers: list[Qemu] = []
    for program in programs.values():
        try:
            answers.append(_ask(program))
        except HostUnavailable as error:
            failures.append(str(error))
    if answers:
        return max(answers, key=lambda qemu: _numbers(qemu.version))
    raise HostUnavailable(
        "; ".join(failures)
        or f"no {PROGRAM} on PATH: `sudo apt-get install --no-install-recommends qemu-system-x86`, "
        "or name one in $KVMBENCH_QEMU"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def _ask(program: Path) -> Qemu:
    # Starting QEMU only to ask costs a tenth of a warm start, so the answer is kept.
    identity = _identity(program.resolve())
    kept = cache_directory() / "qemu.json"
    known = _read_known(kept)
    if identity and identity in known:
        return Qemu(program, known[identity], identity)
    try:
        done = subprocess.run(
            [str(program), "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VERSION_WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostUnavailable(f"{program} does not run: {error}") from error
    matched = re.search(r"QEMU emulator version (\d+\.\d+(?:\.\d+)*)", done.stdout)
    if done.returncode != 0 or matched is None:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise HostUnavailable(f"{program} does not tell its version: {said[-1] if said else 'no output'}")
    if identity:
        _write_known(kept, known | {identity: matched.group(1)})
    return Qemu(program, matched.group(1), identity)


def _identity(program: Path) -> str:
    try:
        with program.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                return ""
            status = os.fstat(file.fileno())
    except OSError:  # may be run and not read
        return ""
    return f"{program} {status.st_mtime_ns} {status.st_size}"


def _read_known(path: Path) -> dict[str, str]:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: text for key, text in stored.items() if isinstance(text, str) and re.fullmatch(r"[\d.]*\d", text)}


def _write_known(path: Path, known: Mapping[str, str]) -> None:
    with contextlib.suppress(OSError):  # a full disk or a read-only home costs the question next time, nothing else
        write_file(path, json.dumps(known).encode())
