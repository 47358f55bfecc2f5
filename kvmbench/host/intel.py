"""The Intel appliance: the kernel and agent of the AMD appliance, with real kvm_intel, in Bochs.

It needs neither /dev/kvm nor root. There is no saved state: each start boots
the kernel, some 730 million instructions.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from kvmbench.errors import HostUnavailable, MisuseError
from kvmbench.host import appliance, bochs
from kvmbench.host import image as images
from kvmbench.host.cache import cache_directory
from kvmbench.host.process import Process
from kvmbench.host.stream import StreamChannel, greet

EMULATOR = "Bochs"
DISCS = "discs"

# Five times what they take on a machine that others use too.
_BOOT_WITHIN_S = 120.0
_MOST_MEMORY_MIB = 2048
_MOST_DISCS = 4
_READY = b"\nkvmbench agent\n"  # core/init.c
_TAIL_BYTES = 2000
_KERNEL_OPTIONS = (
    "console=ttyS1",
    "quiet",
    "oops=panic",
    "panic=-1",
    "mitigations=off",
    "cryptomgr.notests",
    "initcall_blacklist=crypto_kdf108_init",
    "ipv6.disable=1",
    "apparmor=0",
    "rcupdate.rcu_expedited=1",
    "tsc=nowatchdog",
    f"tsc_early_khz={bochs.INSTRUCTIONS_PER_S // 1000}",
    "kvmbench.channel=ttyS0",
    # Bochs reports a debug exit on the same rip at the first entries of a step after other exits.
    "kvmbench.steps=again",
)


@dataclass(frozen=True)
class IntelAppliance:
    """A running one whose agent has answered.

    Attributes:
        channel: to its agent.
        emulator: "Bochs".
        emulator_version: such as "2.7".
        pid: of Bochs.
        image: what it boots.
    """

    channel: StreamChannel
    emulator: str
    emulator_version: str
    pid: int
    image: images.Image
    _process: Process = field(repr=False)
    _console: BinaryIO = field(repr=False)

    def close(self) -> None:
        """Ends it and all machines in it; idempotent."""
        self.channel.close()
        self._process.end()
        self._console.close()


def start_intel(
    *,
    ept: int | bool | None = None,
    memory: str | int = "256M",
    parameters: Mapping[str, object] | None = None,
    progress: Callable[[str], None] | None = None,
) -> IntelAppliance:
    """Starts one and waits until its agent answers.

    Args:
        ept: kvm_intel's parameter: 0 for shadow paging; None leaves it at its default, 1.
        memory: of the appliance, guests included: "256M", "1G", or bytes; 2G at most.
        parameters: of kernel modules, such as ``{"kvm_intel.vpid": 0}``.
        progress: gets a line before each step that takes seconds.

    Raises:
        MisuseError: no such parameter, or a value out of range.
        HostUnavailable: no Bochs, no kernel, or the appliance does not come up; what its
            console said last is in the message.
    """
    memory_mib = appliance.memory_mib_of(memory)
    if memory_mib > _MOST_MEMORY_MIB:
        raise MisuseError(f"memory={memory!r}: Bochs has {_MOST_MEMORY_MIB}M at most")
    if progress is not None and not callable(progress):
        raise MisuseError(f"progress={progress!r}: give a function that takes a line, such as print")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise MisuseError(f"parameters={parameters!r}: give a dictionary, such as {{'kvm_intel.ept': 0}}")
    if ept not in (None, 0, 1):
        raise MisuseError(f"ept={ept!r}: give 0 (shadow paging) or 1 (nested paging)")
    program = bochs.find_bochs()
    image = images.build(progress=progress)
    if "kvm_intel" not in image.parameters:
        raise HostUnavailable(f"the kernel {image.versions.get('kernel', '?')} came without kvm-intel.ko")
    given = dict(parameters or {})
    if ept is not None:
        given["kvm_intel.ept"] = int(ept)
    checked = appliance.checked_parameters(given, image.parameters)
    words = " ".join([*_KERNEL_OPTIONS, *(f"{name}={value}" for name, value in sorted(checked.items()))])
    disc = _disc(image, words, progress)
    if progress is not None:
        progress("booting the Intel appliance (10 to 20 s)")
    with tempfile.TemporaryDirectory(prefix="kvmbench-bochs-") as folder:
        # Gone once the agent answers: Bochs has opened what is in it. Only a SIGKILL while it boots leaves it behind.
        return _start(program, image, disc, Path(folder), memory_mib)


def _start(program: bochs.Bochs, image: images.Image, disc: Path, folder: Path, memory_mib: int) -> IntelAppliance:
    console, log, rc, debugger = (folder / name for name in ("console", "log", "bochsrc", "debugger"))
    line = bochs.Line()
    try:
        text = bochs.configuration(program, disc=disc, line=line.name, console=console, log=log, memory_mib=memory_mib)
        rc.write_text(text)
        debugger.write_text("c\n")  # Debian's is built with its debugger, which waits for this
        console.touch()
        said = console.open("rb")
        # No screen and no sound, also where there are some.
        environment = ("env", "SDL_VIDEODRIVER=dummy", "SDL_AUDIODRIVER=dummy")
        command = [*environment, str(program.path), "-q", "-f", str(rc), "-rc", str(debugger)]
        try:
            process = Process("Bochs", command, die_with_parent=True)
        except BaseException as error:
            said.close()
            if not isinstance(error, OSError):
                raise
            raise HostUnavailable(f"{program.path} does not start: {error.strerror}") from error
    except BaseException:
        line.abandon()
        raise

    def last_words() -> str:
        try:
            end = said.seek(0, os.SEEK_END)
            said.seek(max(0, end - _TAIL_BYTES))
            text = said.read().decode("utf-8", "replace").strip()
        except ValueError:
            text = ""
        ended = process.describe_end()
        return f"{ended}\nits console said last:\n{text}" if text else ended

    try:
        try:
            _wait_until_ready(line, process)
        finally:
            line.opened()
        api = greet(line.socket, timeout_s=_BOOT_WITHIN_S)
        if api < 0:
            raise HostUnavailable(f"the Intel appliance came up without /dev/kvm: {last_words()}")
    except TimeoutError:
        message = f"the Intel appliance did not answer within {_BOOT_WITHIN_S:.0f} s: {last_words()}"
        _discard(line, process, said)
        raise HostUnavailable(message) from None
    except EOFError:
        message = f"the Intel appliance did not come up: {last_words()}"
        _discard(line, process, said)
        raise HostUnavailable(message) from None
    except BaseException:
        _discard(line, process, said)
        raise
    channel = StreamChannel(line.socket, peer="the Intel appliance", describe_end=last_words)
    version = bochs.version_of(process.first_output())
    return IntelAppliance(channel, EMULATOR, version, process.pid, image, process, said)


def _discard(line: bochs.Line, process: Process, console: BinaryIO) -> None:
    line.socket.close()
    process.end()
    console.close()


def _wait_until_ready(line: bochs.Line, process: Process) -> None:
    # What comes before is the line's own: nothing may be sent until the agent says so.
    line.start()
    limit = time.monotonic() + _BOOT_WITHIN_S
    line.socket.settimeout(1.0)
    seen = b""
    while not seen.endswith(_READY):
        try:
            byte = line.socket.recv(1)
        except TimeoutError:
            if not process.running:
                raise EOFError from None
            if time.monotonic() > limit:
                raise
            continue
        if not byte:
            raise EOFError
        seen = (seen + byte)[-len(_READY) :]


def _disc(image: images.Image, words: str, progress: Callable[[str], None] | None) -> Path:
    from kvmbench.host import boot_disc
    from kvmbench.host.vmlinux import unpacked

    digest = hashlib.sha256(f"{image.key}\0{words}\0".encode())
    for source in (boot_disc.SOURCE, Path(boot_disc.__file__)):
        digest.update(source.read_bytes())
    folder = cache_directory() / DISCS
    target = folder / f"{digest.hexdigest()[:16]}.iso"
    try:
        if target.is_file():
            os.utime(target)
            return target
        kernel = unpacked(image.kernel, progress=progress)
        if progress is not None:
            progress("writing the boot disc (once)")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        data = boot_disc.disc(kernel.read_bytes(), image.initramfs.read_bytes(), words, boot_disc.assemble_loader())
        descriptor, name = tempfile.mkstemp(prefix="building-", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.replace(name, target)
        except BaseException:
            os.unlink(name)
            raise
        for old in sorted(folder.glob("*.iso"), key=lambda path: path.stat().st_mtime)[:-_MOST_DISCS]:
            old.unlink(missing_ok=True)
    except OSError as error:
        raise HostUnavailable(
            f"the boot disc cannot be written in {folder}: {error}; $KVMBENCH_CACHE names another folder"
        ) from error
    return target
