"""The Intel appliance: the kernel and agent of the AMD appliance, with real kvm_intel, in Bochs.

It needs neither /dev/kvm nor root. The first start of a kind boots the kernel, some
730 million instructions, and saves the machine; later ones load it (`bochs_state`).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from kvmbench.errors import HostError, HostUnavailable, InternalError, MisuseError
from kvmbench.host import appliance, bochs
from kvmbench.host import image as images
from kvmbench.host.bochs_state import BochsState, BochsStates
from kvmbench.host.cache import cache_directory
from kvmbench.host.disc_cache import kept_disc
from kvmbench.host.kernel_options import KERNEL_OPTIONS
from kvmbench.host.process import Process
from kvmbench.host.stream import StreamChannel, greet

EMULATOR = "Bochs"
STATES = "bochs-states"

# Five times what they take on a machine that others use too.
_BOOT_WITHIN_S = 120.0
_LOAD_WITHIN_S = 40.0
_SAVE_WITHIN_S = 30.0
_MOST_MEMORY_MIB = 2048
_TAIL_BYTES = 2000
_KERNEL_OPTIONS = (
    "console=ttyS1",
    *KERNEL_OPTIONS,
    f"tsc_early_khz={bochs.INSTRUCTIONS_PER_S // 1000}",
    "kvmbench.channel=bochs",
    # After a panic: a triple fault ends Bochs (`reset_on_triple_fault=0`), where any other reset would boot again.
    "reboot=t",
)

#: Tries what the booted appliance can do; what it returns is kept with the saved state, as `IntelAppliance.note`.
Prepare = Callable[[StreamChannel], dict[str, Any]]


@dataclass(frozen=True)
class IntelAppliance:
    """A running one whose agent has answered.

    Attributes:
        channel: to its agent.
        emulator: "Bochs".
        emulator_version: such as "2.7".
        warm: whether it was loaded from a saved state.
        pid: of Bochs.
        image: what it boots.
        note: what `prepare` returned, now or when the state was saved.
    """

    channel: StreamChannel
    emulator: str
    emulator_version: str
    warm: bool
    pid: int
    image: images.Image
    note: Mapping[str, Any]
    _running: _Running = field(repr=False)

    def close(self) -> None:
        """Ends it and all machines in it; idempotent."""
        self.channel.close()
        self._running.end()


def start_intel(
    *,
    ept: int | bool | None = None,
    memory: str | int = "256M",
    parameters: Mapping[str, object] | None = None,
    warm: bool = True,
    progress: Callable[[str], None] | None = None,
    prepare: Prepare | None = None,
) -> IntelAppliance:
    """Starts one and waits until its agent answers (10 to 20 s; with a saved state 1 s).

    Args:
        ept: kvm_intel's parameter: 0 for shadow paging; None leaves it at its default, 1.
        memory: of the appliance, guests included: "256M", "1G", or bytes; 2G at most.
        parameters: of kernel modules, such as ``{"kvm_intel.vpid": 0}``.
        warm: load a saved state if there is one, and save one otherwise.
        progress: gets a line before each step that takes seconds.
        prepare: is called with a booted appliance before it is saved; if it raises, nothing is saved.

    Raises:
        MisuseError: no such parameter, or a value out of range.
        HostUnavailable: no Bochs, no kernel, or the appliance does not come up; what its
            console said last is in the message.
    """
    memory_mib = appliance.memory_mib_of(memory)
    if memory_mib > _MOST_MEMORY_MIB:
        raise MisuseError(f"memory={memory!r}: Bochs has {_MOST_MEMORY_MIB}M at most")
    given = appliance.given_parameters("kvm_intel.ept", ept, parameters, progress)
    program = bochs.find_bochs()
    image = images.build(progress=progress)
    if "kvm_intel" not in image.parameters:
        raise HostUnavailable(f"the kernel {image.versions.get('kernel', '?')} came without kvm-intel.ko")
    checked = appliance.checked_parameters(given, image.parameters)
    words = " ".join([*_KERNEL_OPTIONS, *(f"{name}={value}" for name, value in sorted(checked.items()))])
    machine = _Machine(program, bochs.port_library(), kept_disc(image, words, progress=progress), memory_mib)
    states = BochsStates(cache_directory() / STATES)
    key = machine.key()
    state = states.open(key) if warm else None
    if state is not None and (running := _load(machine, state)) is not None:
        return _appliance(running, running.channel(), image, state.note, warm=True)
    if progress is not None:
        progress("booting the Intel appliance (10 to 20 s)")
    running = _boot(machine)
    try:
        channel = running.channel()
        note = prepare(channel) if prepare is not None else {}
        if warm:
            states.save(key, running.save, note)
        return _appliance(running, channel, image, note, warm=False)
    except BaseException:
        running.end()
        raise


def _appliance(
    running: _Running, channel: StreamChannel, image: images.Image, note: Mapping[str, Any], *, warm: bool
) -> IntelAppliance:
    version = bochs.version_of(running.process.first_output())
    return IntelAppliance(channel, EMULATOR, version, warm, running.process.pid, image, note, running)


@dataclass(frozen=True)
class _Machine:
    program: bochs.Bochs
    library: Path
    disc: Path
    memory_mib: int

    def key(self) -> str:
        # All that a saved state depends on. The names of library and disc are hashes of what is in them.
        nowhere = Path("-")
        text = self.configuration(nowhere)
        facts = [self.program.identity, self.library.parent.name, self.disc.name, text]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def configuration(self, folder: Path) -> str:
        return bochs.configuration(
            self.program,
            disc=self.disc,
            console=folder / "console",
            log=folder / "log",
            memory_mib=self.memory_mib,
        )


class _Running:
    # Bochs, the stream to the agent in it, what its kernel says, and a way to have it saved.

    def __init__(self, process: Process, stream: socket.socket, control: socket.socket, console: BinaryIO) -> None:
        self.process = process
        self._stream = stream
        self._control = control
        self._console = console

    def greet(self, within_s: float) -> None:
        # HostUnavailable, TimeoutError, EOFError, InternalError
        if greet(self._stream, timeout_s=within_s) < 0:
            raise HostUnavailable(f"the Intel appliance came up without /dev/kvm: {self.last_words()}")

    def channel(self) -> StreamChannel:
        return StreamChannel(self._stream, peer="the Intel appliance", describe_end=self.last_words)

    def last_words(self) -> str:
        try:
            end = self._console.seek(0, os.SEEK_END)
            self._console.seek(max(0, end - _TAIL_BYTES))
            text = self._console.read().decode("utf-8", "replace").strip()
        except ValueError:  # closed
            text = ""
        ended = self.process.describe_end()
        return f"{ended}\nits console said last:\n{text}" if text else ended

    def save(self, folder: Path) -> bool:
        name = os.fsencode(folder)
        if len(name) > bochs.MOST_PATH_BYTES:
            return False
        self._control.settimeout(_SAVE_WITHIN_S)
        try:
            self._control.send(name)
            return self._control.recv(64) == b"saved"
        except OSError:
            return False

    def end(self) -> None:
        self._stream.close()
        self.process.end()
        self._control.close()
        self._console.close()


def _boot(machine: _Machine) -> _Running:
    with tempfile.TemporaryDirectory(prefix="kvmbench-bochs-") as folder:
        # Gone once the agent answers: Bochs has opened what is in it. Only a SIGKILL until then leaves it behind.
        running = _start(machine, Path(folder), None)
        try:
            running.greet(_BOOT_WITHIN_S)
            return running
        except TimeoutError:
            message = f"the Intel appliance did not answer within {_BOOT_WITHIN_S:.0f} s: {running.last_words()}"
        except EOFError:
            message = f"the Intel appliance did not come up: {running.last_words()}"
        except BaseException:
            running.end()
            raise
    running.end()
    raise HostUnavailable(message)


def _load(machine: _Machine, state: BochsState) -> _Running | None:
    # None: the state was no good, and is gone.
    checked: list[bool] = []
    check = threading.Thread(target=lambda: checked.append(state.intact()), name="kvmbench-crc")
    check.start()
    try:
        with tempfile.TemporaryDirectory(prefix="kvmbench-bochs-") as folder:
            running = _start(machine, Path(folder), state)
            try:
                running.greet(_LOAD_WITHIN_S)
                check.join()
                if checked == [True]:
                    return running
            except (EOFError, TimeoutError, HostError, InternalError):
                pass
            except BaseException:
                running.end()
                raise
        running.end()
        state.remove()
        return None
    finally:
        check.join()


def _start(machine: _Machine, folder: Path, state: BochsState | None) -> _Running:
    configuration, debugger, console, library = (folder / name for name in ("bochsrc", "go", "console", "port.so"))
    if state is None:
        configuration.write_text(machine.configuration(folder))
        machine_words = ["-f", str(configuration)]
    else:
        state.lay_out(folder / "state", machine.configuration(folder))
        machine_words = ["-r", str(folder / "state")]
    debugger.write_text("c\n")  # Debian's is built with its debugger, which waits for this
    console.touch()
    library.symlink_to(machine.library)  # in LD_PRELOAD a space ends a name
    ours, theirs = socket.socketpair()
    our_control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said = console.open("rb")
    command = [
        "env",
        # No screen and no sound, also where there are some.
        "SDL_VIDEODRIVER=dummy",
        "SDL_AUDIODRIVER=dummy",
        f"LD_PRELOAD={library}",
        f"KVMBENCH_BOCHS_CHANNEL={theirs.fileno()}",
        f"KVMBENCH_BOCHS_CONTROL={control.fileno()}",
        *(str(machine.program.path), "-q", *machine_words, "-rc", str(debugger)),
    ]
    # Closed here: the end of Bochs is then the end of the stream.
    with theirs, control:
        try:
            process = Process("Bochs", command, pass_fds=[theirs.fileno(), control.fileno()], die_with_parent=True)
        except BaseException as error:
            for opened in (ours, our_control, said):
                opened.close()
            if not isinstance(error, OSError):
                raise
            raise HostUnavailable(f"{machine.program.path} does not start: {error.strerror}") from error
    return _Running(process, ours, our_control, said)
