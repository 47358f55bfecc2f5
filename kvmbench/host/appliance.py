"""The AMD appliance: a stock kernel with real kvm_amd in QEMU without acceleration.

It needs neither /dev/kvm nor root. The first start of a kind boots the kernel
and saves the machine; later ones load it (`saved_state`).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from kvmbench.arguments import instead, integer
from kvmbench.errors import HostError, HostUnavailable, InternalError, MisuseError
from kvmbench.host import image as images
from kvmbench.host.cache import cache_directory
from kvmbench.host.monitor import Monitor
from kvmbench.host.process import Process
from kvmbench.host.qemu import Configuration, Qemu, command, find_qemu
from kvmbench.host.saved_state import SavedStates, load_machine, resume_machine, save_machine, state_key
from kvmbench.host.stream import StreamChannel, greet
from kvmbench.host.tsc import tsc_khz

EMULATOR = "QEMU (TCG)"

# The kernel, its modules and their unpacking take some 100 MiB.
_LEAST_MEMORY_MIB = 128
_MOST_VCPUS = 64
# After a panic or an oops the kernel prints a page of addresses.
_TELLING = re.compile(r"Kernel panic|BUG: |Oops: |general protection fault")
# Twenty times what they take on an idle machine.
_BOOT_WITHIN_S = 60.0
_LOAD_WITHIN_S = 10.0


@dataclass(frozen=True)
class Appliance:
    """A running appliance whose agent has answered.

    Attributes:
        channel: to its agent.
        emulator: what emulates its processor.
        emulator_version: such as "7.2.22".
        warm: whether it was loaded from a saved state.
        pid: of QEMU.
        image: what it boots.
    """

    channel: StreamChannel
    emulator: str
    emulator_version: str
    warm: bool
    pid: int
    image: images.Image
    _process: Process = field(repr=False)
    _states: SavedStates = field(repr=False)
    _key: str = field(repr=False)

    def read_note(self) -> dict[str, Any]:
        """What `write_note` stored for appliances of just this kind, or an empty dictionary."""
        return self._states.read_note(self._key)

    def write_note(self, note: dict[str, Any]) -> None:
        """Remembers plain values for later appliances of just this kind: QEMU, kernel, agent, options."""
        self._states.write_note(self._key, note)

    def close(self) -> None:
        """Ends it and all machines in it; idempotent."""
        self.channel.close()
        self._process.end()


def start_appliance(
    *,
    npt: int | bool | None = None,
    vcpus: int = 1,
    memory: str | int = "256M",
    parameters: Mapping[str, object] | None = None,
    warm: bool = True,
    progress: Callable[[str], None] | None = None,
    prepare: Callable[[StreamChannel, dict[str, Any]], None] | None = None,
) -> Appliance:
    """Starts an appliance and waits until its agent answers (2 s; with a saved state 0.05 s).

    Args:
        npt: kvm_amd's parameter: 0 for shadow paging; None leaves it at its default, 1.
        vcpus: processors of the appliance, 1 to 64.
        memory: of the appliance, guests included: "256M", "1G", or bytes.
        parameters: of kernel modules, such as ``{"kvm.enable_vmware_backdoor": 1}``.
        warm: load a saved state if there is one, and save one otherwise.
        progress: gets a line before each step that takes seconds.
        prepare: is called with a booted appliance, and the note of earlier ones of its
            kind, before it is saved: what it leaves in memory there, later starts
            begin with; if it raises, nothing is saved.

    Raises:
        MisuseError: no such parameter, or a value out of range.
        HostUnavailable: no QEMU, no kernel, or the appliance does not come up; what its
            console said last is in the message.
    """
    memory_mib = memory_mib_of(memory)
    if not 1 <= integer(vcpus, "vcpus") <= _MOST_VCPUS:
        raise MisuseError(f"vcpus={vcpus!r}: an appliance has 1 to {_MOST_VCPUS}")
    given = given_parameters("kvm_amd.npt", npt, parameters, progress)
    qemu = find_qemu()
    image = images.build(progress=progress)
    configuration = Configuration(
        kernel=image.kernel,
        initramfs=image.initramfs,
        memory_mib=memory_mib,
        vcpus=vcpus,
        parameters=checked_parameters(given, image.parameters),
        tsc_khz=tsc_khz(),
    )
    key = state_key(qemu, configuration)
    warm = warm and bool(key)
    states = SavedStates(cache_directory() / "states")
    started = _load(qemu, configuration, states, key) if warm else None
    loaded = started is not None
    if started is None:
        from kvmbench.host.vmlinux import unpacked

        kernel = unpacked(image.kernel, progress=progress)
        if progress is not None:
            progress("booting the appliance")
        started = _boot(qemu, configuration, kernel, states, key, save=warm, prepare=prepare)
    channel, process = started
    return Appliance(channel, EMULATOR, qemu.version, loaded, process.pid, image, process, states, key)


def memory_mib_of(memory: str | int) -> int:
    """MiB in what a person gave as ``memory=``; MisuseError for what makes no sense."""
    if isinstance(memory, int):
        mib = memory >> 20
    else:
        matched = re.fullmatch(r"(\d{1,9})([MG])(?:i?B)?", memory.strip()) if isinstance(memory, str) else None
        if matched is None:
            raise MisuseError(f"memory={memory!r}: a number with M or G, such as '256M', or a number of bytes")
        mib = int(matched.group(1)) << (10 if matched.group(2) == "G" else 0)
    if mib < _LEAST_MEMORY_MIB:
        raise MisuseError(f"memory={memory!r}: the appliance's kernel needs {_LEAST_MEMORY_MIB}M at least")
    return mib


def given_parameters(
    paging: str, value: object, parameters: Mapping[str, object] | None, progress: object
) -> dict[str, object]:
    """The module parameters that were asked for, and a look at what else an appliance is given.

    Args:
        paging: the parameter that switches nested paging, such as ``kvm_amd.npt``.
        value: what the option of its name was given: 0, 1 or None.

    Raises:
        MisuseError: no such value, no dictionary, or no function.
    """
    if progress is not None and not callable(progress):
        raise MisuseError(f"progress={progress!r}: give a function that takes a line, such as print")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise MisuseError(f"parameters={parameters!r}: give a dictionary, such as {{{paging!r}: 0}}")
    if value not in (None, 0, 1):
        raise MisuseError(f"{paging.partition('.')[2]}={value!r}: give 0 (shadow paging) or 1 (nested paging)")
    given = dict(parameters or {})
    if value is not None:
        given[paging] = int(bool(value))
    return given


def checked_parameters(parameters: Mapping[str, object], known: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Module parameters as words of the kernel's command line; MisuseError for one that no module has."""
    # The kernel ignores a parameter that it does not know; here that is an error.
    words: dict[str, str] = {}
    for name, value in parameters.items():
        if not isinstance(name, str):
            raise MisuseError(f"parameter {name!r}: give names such as 'kvm_amd.npt'")
        module, _, parameter = name.replace("-", "_").partition(".")
        if module not in known:
            raise MisuseError(f"parameter {name!r}: the appliance's modules are {', '.join(sorted(known))}")
        if parameter not in known[module]:
            raise MisuseError(
                f"parameter {name!r}: no such parameter of {module}; {instead(parameter, sorted(known[module]))}"
            )
        text = str(int(value)) if isinstance(value, bool) else str(value)
        if not re.fullmatch(r"[\w,.:/+-]+", text):
            raise MisuseError(f"parameter {name!r}: the value {text!r} is not a word")
        words[f"{module}.{parameter}"] = text
    return words


_Started = tuple[StreamChannel, Process]


def _channel(stream: socket.socket, process: Process) -> StreamChannel:
    return StreamChannel(stream, peer="the appliance", describe_end=process.describe_end)


def _boot(
    qemu: Qemu,
    configuration: Configuration,
    kernel: Path,
    states: SavedStates,
    key: str,
    *,
    save: bool,
    prepare: Callable[[StreamChannel, dict[str, Any]], None] | None,
) -> _Started:
    size = configuration.memory_bytes
    with _memory_file(size) as memory:
        stream, process, monitor = _start(qemu, configuration, memory.fileno(), kernel=kernel)
        with contextlib.closing(monitor):
            try:
                kvm_api_version = greet(stream, timeout_s=_BOOT_WITHIN_S)
                if kvm_api_version < 0:
                    said = process.output()
                    raise HostUnavailable(f"the appliance came up without /dev/kvm; its console says:\n{said}")
                channel = _channel(stream, process)
                if prepare is not None:
                    prepare(channel, states.read_note(key))
                if save:
                    states.save(key, lambda descriptor: save_machine(monitor, descriptor, memory.fileno(), size))
                    resume_machine(monitor)
                return channel, process
            except TimeoutError as error:
                text = f"did not answer within {_BOOT_WITHIN_S:.0f} s; its console says:\n{process.output()}"
                _discard(stream, process)
                raise HostUnavailable(f"the appliance {text}") from error
            except EOFError:
                text = f"the appliance did not come up: {process.describe_end()}"
                _discard(stream, process)
                raise HostUnavailable(text) from None
            except BaseException:
                _discard(stream, process)
                raise


def _load(qemu: Qemu, configuration: Configuration, states: SavedStates, key: str) -> _Started | None:
    # None: there is no state, or it was no good and is gone.
    state = states.open(key)
    if state is None:
        return None
    with state:
        checked: list[bool] = []
        check = threading.Thread(target=lambda: checked.append(state.intact()), name="kvmbench-crc")
        check.start()
        try:
            stream, process, monitor = _start(qemu, configuration, state.descriptor, saved=True)
            try:
                with contextlib.closing(monitor):
                    load_machine(monitor, state, configuration.memory_bytes)
                greet(stream, timeout_s=_LOAD_WITHIN_S)
                check.join()
                if checked == [True]:
                    return _channel(stream, process), process
            except (EOFError, TimeoutError, HostError, InternalError):
                pass
            except BaseException:
                _discard(stream, process)
                raise
            _discard(stream, process)
            state.remove()
            return None
        finally:
            check.join()


def _memory_file(size_bytes: int) -> BinaryIO:
    # What a machine has for memory. It is gone with its last user.
    if hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("kvmbench-appliance"), "r+b", buffering=0)
    else:
        file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115 - the caller closes it
    try:
        file.truncate(size_bytes)
    except BaseException:
        file.close()
        raise
    return file


def _start(
    qemu: Qemu, configuration: Configuration, memory: int, *, kernel: Path | None = None, saved: bool = False
) -> tuple[socket.socket, Process, Monitor]:
    ours, channel = socket.socketpair()
    our_monitor, monitor = socket.socketpair()
    fds = [channel.fileno(), monitor.fileno(), memory]
    with channel, monitor:
        try:
            words = command(
                qemu, configuration, channel=channel, monitor=monitor, memory=memory, kernel=kernel, saved=saved
            )
            process = Process("QEMU", words, pass_fds=fds, telling=_TELLING, die_with_parent=True)
        except BaseException as error:
            ours.close()
            our_monitor.close()
            if isinstance(error, OSError):
                raise HostUnavailable(f"{qemu.path} does not start: {error.strerror}") from error
            raise
    return ours, process, Monitor(our_monitor)


def _discard(stream: socket.socket, process: Process) -> None:
    stream.close()
    process.end()
