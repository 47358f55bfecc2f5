"""Bochs: where it is, its configuration, and what kvmbench adds to it (`bochs_port.c`).

What was measured (Bochs 2.7, Debian's build with its debugger; 64 million instructions a second on the machine of
the figures in docs/benchmarks.md):
  - Bochs counts time in instructions: `ips` of them are a second. 50 million is near what it does, so that its
    seconds are near ours, deadlines included.
  - The kernel takes the rate of the TSC from CPUID, 3500 MHz, by which its seconds would be 70 s long;
    `tsc_early_khz` gives it the true one.
  - With VGA's extensions its memory of 16 MiB is saved with the machine, and loaded; without them it has 256 KiB.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kvmbench.errors import HostUnavailable
from kvmbench.host.cache import cache_directory

PACKAGES = ("bochs", "bochs-sdl", "bochsbios", "vgabios")
INSTRUCTIONS_PER_S = 50_000_000
#: Bochs' own limit for the names of files is 512 bytes.
MOST_PATH_BYTES = 400

_MEND = f"`sudo apt-get install --no-install-recommends {' '.join(PACKAGES)}`"
_FIRMWARE = ("BIOS-bochs-latest", "VGABIOS-lgpl-latest")
_SHARE = (Path("/usr/share/bochs"), Path("/usr/local/share/bochs"))
# All must be named: of a saved machine none is loaded by itself.
_PLUGINS = "unmapped=1, extfpuirq=1, serial=1, biosdev=1, speaker=0, parallel=0, gameport=0, iodebug=0, usb_uhci=0"
_DISPLAY = "libbx_sdl2_gui.so"
_SOURCE = Path(__file__).with_name("bochs_port.c")
_HEADER = Path(__file__).parents[1] / "core" / "port.h"
_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-fPIC", "-shared")
_LIBRARIES = "bochs"


@dataclass(frozen=True)
class Bochs:
    """A Bochs that can run the Intel appliance.

    Attributes:
        path: the program.
        share: the folder with its firmware.
        identity: changes when the program, its display or its firmware is replaced.
    """

    path: Path
    share: Path
    identity: str = ""


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
    return Bochs(Path(found), share, _identity(Path(found), share, search_path))


def _identity(program: Path, share: Path, search_path: str | None) -> str:
    # Debian's bochs is a script that starts bochs-bin.
    behind = shutil.which("bochs-bin", path=search_path)
    files = [program, *([Path(behind)] if behind else []), *display_plugins(), *(share / name for name in _FIRMWARE)]
    facts = []
    for path in files:
        if path.exists():
            status = path.resolve().stat()
            facts.append(f"{path.resolve()} {status.st_mtime_ns} {status.st_size}")
    return "\n".join(facts)


def display_plugins() -> list[Path]:
    """Where Debian and Ubuntu have the plug-in of Bochs' SDL display."""
    folders = [Path("/usr/lib/bochs/plugins"), *Path("/usr/lib").glob("*/bochs/plugins")]
    return [folder / _DISPLAY for folder in folders]


def version_of(log: str) -> str:
    """The version in what Bochs prints when it starts, or an empty string."""
    matched = re.search(r"Bochs x86 Emulator (\d[\w.]*)", log)
    return matched.group(1) if matched else ""


def configuration(bochs: Bochs, *, disc: Path, console: Path, log: Path, memory_mib: int) -> str:
    """The text of a bochsrc, of a machine that boots and of one that was saved.

    Args:
        bochs: the program.
        disc: what to boot.
        console: file that gets what the kernel's console, com2, prints.
        log: file for Bochs' own messages.
        memory_mib: of the machine, in MiB.
    """
    return f"""plugin_ctrl: {_PLUGINS}
display_library: sdl2
cpu: model=corei7_skylake_x, count=1, ips={INSTRUCTIONS_PER_S}, reset_on_triple_fault=0
memory: guest={memory_mib}, host={memory_mib}
romimage: file={bochs.share}/{_FIRMWARE[0]}, options=fastboot
vgaromimage: file={bochs.share}/{_FIRMWARE[1]}
vga: extension=none
com1: enabled=0
com2: enabled=1, mode=file, dev={console}
ata0-master: type=cdrom, path={disc}, status=inserted
boot: cdrom
clock: sync=none, time0=utc
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
mouse: enabled=0
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
log: {log}
"""


def port_library(*, search_path: str | None = None) -> Path:
    """`bochs_port.c`, compiled if the cache does not hold it yet; its folder's name is a hash of its sources.

    Args:
        search_path: where to look for gcc, in the form of PATH; None means PATH.

    Raises:
        HostUnavailable: no compiler, or it fails, or the cache cannot be written.
    """
    digest = hashlib.sha256(repr(_FLAGS).encode() + _SOURCE.read_bytes() + _HEADER.read_bytes()).hexdigest()[:16]
    library = cache_directory() / _LIBRARIES / digest / "bochs_port.so"
    if library.is_file():
        return library
    compiler = shutil.which("gcc", path=search_path)
    if compiler is None:
        raise HostUnavailable("no gcc here: `sudo apt-get install --no-install-recommends gcc libc6-dev`")
    try:
        library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix="building-", dir=library.parent) as folder:
            made = Path(folder) / library.name
            command = [compiler, *_FLAGS, f"-I{_HEADER.parent}", str(_SOURCE), "-o", str(made)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode:
                raise HostUnavailable(f"{compiler} cannot compile {_SOURCE}:\n{done.stderr.strip()}")
            made.replace(library)
    except OSError as error:
        raise HostUnavailable(f"{library} cannot be written: {error}; $KVMBENCH_CACHE names another folder") from error
    return library
