"""apt without root: with the system's package lists, or with lists of our own.

Container images (Binder's among them) are made with /var/lib/apt/lists emptied,
and lists that are weeks old name package files that are gone. In both cases
`apt-get download` fails and only root could run `apt-get update`. apt can keep
lists elsewhere, though: they are signed, so they need no trusted place.

Source: apt.conf(5), directories and APT_CONFIG; apt reads the file that
APT_CONFIG names before the system's settings and takes sources and keys from
where they always are.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvmbench.errors import HostUnavailable

_SETTINGS = """\
Dir::State "{folder}/state";
Dir::State::lists "{folder}/state/lists";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "{folder}/cache";
APT::Sandbox::User "";
"""


@dataclass(frozen=True)
class Apt:
    """apt's commands with one set of package lists.

    Attributes:
        settings: a file that comes before the system's settings; None: the system's as they are.
    """

    settings: Path | None = None

    @classmethod
    def with_own_lists(cls, folder: Path, *, progress: Callable[[str], None] | None = None) -> Apt:
        """apt with lists fetched anew into `folder`, some 20 MB.

        Args:
            folder: made when absent.
            progress: gets a line before the download.

        Raises:
            HostUnavailable: there is no apt, or no list could be fetched; says what apt said.
        """
        for name in ("state/lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        apt = cls(folder / "apt.conf")
        assert apt.settings is not None
        apt.settings.write_text(_SETTINGS.format(folder=folder), encoding="utf-8")
        if progress is not None:
            progress(f"fetching package lists into {folder}")
        try:
            apt.run("apt-get", "-q", "update")
        except HostUnavailable as error:
            raise HostUnavailable(f"package lists cannot be fetched: {error}") from error
        return apt

    def run(self, *command: str, folder: Path | None = None) -> str:
        """What one of apt's commands printed.

        Args:
            command: its words, such as ``"apt-get", "download", "hello"``.
            folder: where it runs; None means the current one.

        Raises:
            HostUnavailable: it is not there or failed; says what apt said.
        """
        environment = {**os.environ, "LC_ALL": "C"}
        if self.settings is not None:
            environment["APT_CONFIG"] = str(self.settings)
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env=environment,
            )
        except OSError as error:
            raise HostUnavailable(f"{command[0]} does not run: {error.strerror}") from error
        if done.returncode:
            said = " ".join(line.strip() for line in done.stderr.splitlines() if line.startswith("E:"))
            raise HostUnavailable(said or done.stderr.strip() or f"{command[0]} ended with status {done.returncode}")
        return done.stdout
