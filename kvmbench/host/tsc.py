"""The rate of this machine's time stamp counter, for the kernel in the appliance.

QEMU without acceleration hands this machine's counter to its guest.  The guest's
kernel has to find out its rate from an emulated timer; on a busy machine that
was seen to fail, and KVM there then entered no guest (docs/facts.md).  So the
kernel is told (``tsc_early_khz=``).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

from kvmbench.core.agent import agent_binary
from kvmbench.errors import HostUnavailable
from kvmbench.host.cache import cache_directory, write_file

# A rate measured again that differs by less is the same: saved states are tied to the kernel's command line.
_SAME = 0.002
_WITHIN_S = 10


def tsc_khz() -> int | None:
    """The rate in kHz, to about 0.1 %; None where it cannot be measured (no x86-64 Linux, no agent).

    Measured once a boot, 50 ms, and kept in the cache.
    """
    path = cache_directory() / "tsc.json"
    boot = _boot_id()
    stored_boot, stored_khz = "", 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(path.read_text())
        stored_boot, stored_khz = str(stored["boot"]), int(stored["khz"])
    if boot and stored_boot == boot and stored_khz > 0:
        return stored_khz
    khz = _measure()
    if khz is None:
        return None
    if stored_khz > 0 and abs(khz - stored_khz) < _SAME * khz:
        khz = stored_khz
    with contextlib.suppress(OSError):  # a full disk costs 50 ms next time
        write_file(path, json.dumps({"boot": boot, "khz": khz}).encode())
    return khz


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _measure() -> int | None:
    try:
        binary = agent_binary(cache_directory())
        run = subprocess.run([str(binary), "--tsc-khz"], capture_output=True, text=True, timeout=_WITHIN_S, check=True)
        khz = int(run.stdout)
    except (HostUnavailable, OSError, ValueError, subprocess.SubprocessError):
        return None
    return khz if khz > 0 else None
