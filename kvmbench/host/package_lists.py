"""Package lists of our own, fetched without root, where the system's are absent or out of date.

Container images (Binder's among them) are made with /var/lib/apt/lists emptied,
and lists that are weeks old name package files that are gone. In both cases
`apt-get download` fails and only root could run `apt-get update`. apt can keep
lists elsewhere, though: they are signed, so they need no trusted place.

Source: apt.conf(5), directories and APT_CONFIG; apt reads the file that
APT_CONFIG names before the system's settings and takes sources and keys from
where they always are.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from kvmbench.errors import HostUnavailable

_SETTINGS = """\
Dir::State "{folder}/state";
Dir::State::lists "{folder}/state/lists";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "{folder}/cache";
APT::Sandbox::User "";
"""


@contextlib.contextmanager
def own_package_lists(folder: Path, *, progress: Callable[[str], None] | None = None) -> Iterator[None]:
    """While it lasts, every apt command started by this process uses lists fetched anew into `folder`.

    It sets APT_CONFIG in this process's environment, so it is for commands and
    not for a library call beside other threads. About 20 MB stay in `folder`.

    Args:
        folder: made when absent.
        progress: gets a line before the download.

    Raises:
        HostUnavailable: there is no apt, or no list could be fetched; says what apt said.
    """
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    settings = folder / "apt.conf"
    settings.write_text(_SETTINGS.format(folder=folder), encoding="utf-8")
    before = os.environ.get("APT_CONFIG")
    os.environ["APT_CONFIG"] = str(settings)
    try:
        if progress is not None:
            progress(f"fetching package lists into {folder}")
        _update()
        yield
    finally:
        if before is None:
            del os.environ["APT_CONFIG"]
        else:
            os.environ["APT_CONFIG"] = before


def _update() -> None:
    try:
        done = subprocess.run(
            ["apt-get", "-q", "update"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise HostUnavailable(f"apt-get does not run: {error.strerror}") from error
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if line.startswith("E:"))
        raise HostUnavailable(f"package lists cannot be fetched: {said or done.stderr.strip()}")
