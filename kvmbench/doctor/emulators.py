"""QEMU and Bochs: the emulators the appliances run in."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kvmbench.doctor.finding import Finding, Status
from kvmbench.errors import HostUnavailable
from kvmbench.host.bochs import PACKAGES, find_bochs

AREA = "appliance"

# QEMU loads the guest's DR7 at VMRUN since 9.1; before, a hardware breakpoint in the appliance never fires. Which ways
# are left is `kvmbench.debug.mechanism.choose`'s matter; the text below says what comes of it.
DEBUG_REGISTERS_SINCE = (9, 1)
_ANSWER_WITHIN_S = 10

# The subject that the AMD appliance, the one connect() falls back to, does without.
INTEL_ONLY = "Bochs"


def examine(*, search_path: str | None = None, os_release: Path = Path("/etc/os-release")) -> Iterator[Finding]:
    """Looks for both emulators and asks QEMU for its version; starts no machine.

    Args:
        search_path: where to look, in the form of PATH; None means PATH.
        os_release: names the distribution, for the command that gets a newer QEMU.
    """
    yield _qemu(search_path, os_release)
    yield _bochs(search_path)


def _qemu(search_path: str | None, os_release: Path) -> Finding:
    found = shutil.which("qemu-system-x86_64", path=search_path)
    if found is None:
        return Finding(
            AREA,
            "QEMU",
            Status.MISSING,
            "qemu-system-x86_64 is not on PATH: no AMD appliance",
            mend="sudo apt-get install --no-install-recommends qemu-system-x86",
        )
    try:
        answer = subprocess.run(
            [found, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_WITHIN_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(AREA, "QEMU", Status.MISSING, f"{found} does not run: {error}")
    matched = re.search(r"version (\d+)\.(\d+)(\.\d+)*", answer.stdout)
    if answer.returncode or matched is None:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        return Finding(
            AREA,
            "QEMU",
            Status.MISSING,
            f"{found} does not tell its version: {said[-1] if said else 'no output'}",
        )
    version = matched.group(0).removeprefix("version ")
    facts: dict[str, object] = {"path": found, "version": version}
    if (int(matched.group(1)), int(matched.group(2))) >= DEBUG_REGISTERS_SINCE:
        return Finding(AREA, "QEMU", Status.OK, f"{version} at {found}", facts=facts)
    return Finding(
        AREA,
        "QEMU",
        Status.LIMITED,
        f"{version} at {found}: works; before 9.1 a debug register never fires in the appliance, so execute "
        "breakpoints there are HLTs in place of the instruction at CPL 0, and step through the guest (slower) "
        "at CPL 3 or with an in-kernel irqchip",
        mend=_newer(os_release),
        facts=facts,
    )


def _newer(os_release: Path) -> str:
    # Debian 12 has 7.2, and 10.0 in backports; elsewhere only a newer release of the distribution helps.
    if os_release.is_file() and "VERSION_CODENAME=bookworm" in os_release.read_text(encoding="utf-8"):
        line = "deb http://deb.debian.org/debian bookworm-backports main"
        return (
            f"echo '{line}' | sudo tee /etc/apt/sources.list.d/backports.list && sudo apt-get update && "
            "sudo apt-get install -t bookworm-backports qemu-system-x86"
        )
    return ""


def _bochs(search_path: str | None) -> Finding:
    found = shutil.which("bochs", path=search_path)
    mend = f"sudo apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if found is None:
        text = "bochs is not on PATH: no Intel appliance"
        return Finding(AREA, INTEL_ONLY, Status.MISSING, text, mend=mend)
    facts: dict[str, object] = {"path": found}
    # Asking for the version would mean a start with a configuration; where its parts are is enough here.
    try:
        find_bochs(search_path=search_path)
    except HostUnavailable as error:
        return Finding(AREA, INTEL_ONLY, Status.LIMITED, str(error).partition(": `")[0], mend=mend, facts=facts)
    text = f"{found}: runs the Intel appliance, connect('appliance:intel')"
    return Finding(AREA, INTEL_ONLY, Status.OK, text, facts=facts)
