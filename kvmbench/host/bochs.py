"""Bochs: where it is, its configuration, and the serial line to the agent inside.

What was measured (Bochs 2.7, Debian's build with its debugger; 64 million instructions a second on the machine of
the figures in docs/benchmarks.md):
  - Bochs counts time in instructions: `ips` of them are a second. A serial line of 115200 baud
    takes 87 us a byte of that time, so a byte costs ips / 11500 instructions: fewer are quicker. But the line
    has no flow control and a FIFO of 16 bytes, and at 20 million a request hung within seconds, at 30
    million one of 64 KiB: presumably a lost byte.
  - The kernel takes the rate of the TSC from CPUID, 3500 MHz, by which its seconds would be 50 s long;
    `tsc_early_khz` gives it the true one.
  - At 20 million, an exchange of the shortest messages takes 1 ms, at 30 million 2, at 50 million 4.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import socket
import threading
import tty
from dataclasses import dataclass
from pathlib import Path

from kvmbench.errors import HostUnavailable

PACKAGES = ("bochs", "bochs-sdl", "bochsbios", "vgabios")
INSTRUCTIONS_PER_S = 50_000_000

_MEND = f"`sudo apt-get install --no-install-recommends {' '.join(PACKAGES)}`"
_FIRMWARE = ("BIOS-bochs-latest", "VGABIOS-lgpl-latest")
_SHARE = (Path("/usr/share/bochs"), Path("/usr/local/share/bochs"))
_DISPLAY = "libbx_sdl2_gui.so"
_PIECE_BYTES = 4096


@dataclass(frozen=True)
class Bochs:
    """A Bochs that can run the Intel appliance.

    Attributes:
        path: the program.
        share: the folder with its firmware.
    """

    path: Path
    share: Path


def find_bochs(*, search_path: str | None = None) -> Bochs:
    """``$KVMBENCH_BOCHS``, or `bochs` on PATH, with the firmware and the display it needs.

    Args:
        search_path: where to look, in the form of PATH; None means PATH.

    Raises:
        HostUnavailable: something is missing; says what, and which package has it.
    """
    chosen = os.environ.get("KVMBENCH_BOCHS")
    found = shutil.which(chosen or "bochs", path=search_path)
    if found is None:
        if chosen:
            raise HostUnavailable(f"$KVMBENCH_BOCHS is {chosen!r}, which is not a program")
        raise HostUnavailable(f"no bochs on PATH: {_MEND}")
    share = next((folder for folder in _SHARE if all((folder / name).is_file() for name in _FIRMWARE)), None)
    if share is None:
        raise HostUnavailable(f"{found} lacks its firmware ({', '.join(_FIRMWARE)}): {_MEND}")
    if not chosen and not any(path.exists() for path in display_plugins()):
        raise HostUnavailable(f"{found} lacks its SDL display, without which it needs a screen: {_MEND}")
    return Bochs(Path(found), share)


def display_plugins() -> list[Path]:
    """Where Debian and Ubuntu have the plug-in of Bochs' SDL display."""
    folders = [Path("/usr/lib/bochs/plugins"), *Path("/usr/lib").glob("*/bochs/plugins")]
    return [folder / _DISPLAY for folder in folders]


def version_of(log: str) -> str:
    """The version in what Bochs prints when it starts, or an empty string."""
    matched = re.search(r"Bochs x86 Emulator (\d[\w.]*)", log)
    return matched.group(1) if matched else ""


def configuration(bochs: Bochs, *, disc: Path, line: str, console: Path, log: Path, memory_mib: int) -> str:
    """The text of a bochsrc.

    Args:
        bochs: the program.
        disc: what to boot.
        line: name of the terminal that is com1.
        console: file that gets what the kernel's console, com2, prints.
        log: file for Bochs' own messages.
        memory_mib: of the machine, in MiB.
    """
    return f"""display_library: sdl2
cpu: model=corei7_skylake_x, count=1, ips={INSTRUCTIONS_PER_S}, reset_on_triple_fault=0
memory: guest={memory_mib}, host={memory_mib}
romimage: file={bochs.share}/{_FIRMWARE[0]}, options=fastboot
vgaromimage: file={bochs.share}/{_FIRMWARE[1]}
com1: enabled=1, mode=term, dev={line}
com2: enabled=1, mode=file, dev={console}
ata0-master: type=cdrom, path={disc}, status=inserted
boot: cdrom
clock: sync=none, time0=utc
speaker: enabled=0
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
mouse: enabled=0
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
log: {log}
"""


class Line:
    """A terminal that Bochs has as com1, seen from here as a connected socket.

    A thread carries bytes both ways; it ends with either side.
    """

    def __init__(self) -> None:
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.name = os.ttyname(self._slave)
        self.socket, self._inner = socket.socketpair()

    def start(self) -> None:
        """Begins to carry bytes."""
        threading.Thread(target=self._carry, name="kvmbench-line", daemon=True).start()

    def opened(self) -> None:
        """To be called when Bochs has opened the terminal, or never will: the end of Bochs then ends this line."""
        if self._slave >= 0:
            os.close(self._slave)
            self._slave = -1

    def abandon(self) -> None:
        """Instead of `start`."""
        self.opened()
        os.close(self._master)
        self.socket.close()
        self._inner.close()

    def _carry(self) -> None:
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        poll.register(self._inner, select.POLLIN)
        try:
            while True:
                for descriptor, _ in poll.poll():
                    if descriptor == self._master:
                        self._inner.sendall(os.read(self._master, _PIECE_BYTES))
                        continue
                    piece = self._inner.recv(_PIECE_BYTES)
                    if not piece:
                        return
                    while piece:
                        piece = piece[os.write(self._master, piece) :]
        except OSError:
            pass  # EIO: Bochs has ended; EPIPE: the channel is closed
        finally:
            with contextlib.suppress(OSError):
                self._inner.shutdown(socket.SHUT_RDWR)
            self._inner.close()
            os.close(self._master)
