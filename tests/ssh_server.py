"""A real sshd for the tests: throwaway keys, one connection on standard streams, no port."""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from kvmbench.errors import HostUnavailable

URL = f"ssh://{getpass.getuser()}@server"


class Server:
    """An sshd that serves one connection on standard streams, and the options that lead ssh to it."""

    def __init__(self, folder: Path, sshd: str) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        for name in ("host_key", "client_key", "other_key"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(key, check=True, stdin=subprocess.DEVNULL)
        (folder / "authorized").write_text((folder / "client_key.pub").read_text())
        # The remote shell's home and cache are the test's: SetEnv comes before the user's shell starts.
        configuration = f"""
            HostKey {folder}/host_key
            AuthorizedKeysFile {folder}/authorized
            PidFile none
            UsePAM no
            StrictModes no
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            PermitRootLogin yes
            SetEnv XDG_CACHE_HOME={self.home}
        """
        (folder / "sshd_config").write_text("\n".join(line.strip() for line in configuration.splitlines()))
        public = (folder / "host_key.pub").read_text()
        (folder / "known_hosts").write_text(f"server {public}")
        self.folder = folder
        proxy = shlex.join([sshd, "-i", "-f", str(folder / "sshd_config"), "-E", str(folder / "log")])
        self.options = [
            *("-F", "none", "-o", f"ProxyCommand={proxy}", "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"),
            *("-o", f"UserKnownHostsFile={folder}/known_hosts", "-o", "GlobalKnownHostsFile=none"),
        ]
        self.key = ["-i", str(folder / "client_key")]
        self.other_key = ["-i", str(folder / "other_key")]

    def add_environment(self, line: str) -> None:
        path = self.folder / "sshd_config"
        path.write_text(path.read_text().replace("SetEnv ", f"SetEnv {line} "))


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[Server]:
    """An sshd whose keys, settings and home are in an empty folder.

    Raises:
        HostUnavailable: there is no sshd, or no ssh.
    """
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        raise HostUnavailable("no sshd or ssh: apt-get install openssh-server openssh-client")
    # What the service does when it starts: root's sshd insists on this folder.
    separation = Path("/run/sshd")
    made = os.geteuid() == 0 and not separation.exists()
    if made:
        separation.mkdir(mode=0o755)
    try:
        yield Server(folder, sshd)
    finally:
        if made:
            separation.rmdir()
