"""A host: a Linux whose /dev/kvm we drive, and what is known of it."""

from __future__ import annotations

import dataclasses
import errno
import html
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING

from kvmbench import errors
from kvmbench.host.client import Core
from kvmbench.host.provenance import Provenance
from kvmbench.host.selfcheck import NAMES, WORDS, Mechanisms

if TYPE_CHECKING:
    import drgn

    from kvmbench.host.kernel.program import HostKernel


def why_no_kvm(error: int) -> str:
    """Why /dev/kvm could not be opened, from its errno, and what mends it."""
    if error in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return "there is no /dev/kvm (no hardware virtualization, or the kvm module is not loaded)"
    if error in (errno.EACCES, errno.EPERM):
        return "no permission for /dev/kvm: `sudo usermod -aG kvm $USER` and log in again, or sudo=True"
    return f"/dev/kvm cannot be opened: {os.strerror(error)}"


@dataclasses.dataclass(frozen=True)
class HostInfo:
    """What a host is; every figure and record carries it on.

    Attributes:
        kind: "local", "appliance" or "ssh".
        kernel: release of the kernel that runs KVM, such as "6.1.0-28-cloud-amd64".
        module: its KVM module, "kvm_amd", "kvm_intel" or another.
        parameters: that module's parameters and kvm's own, as the kernel shows them.
        cpu: model name of the processor that KVM sees.
        cpus: how many of them.
        emulator: "QEMU (TCG)" or "", for hosts that are emulated.
        emulator_version: its version, or "".
        api_version: KVM_GET_API_VERSION.
        uid: user the core runs as there.
        tracing: whether the core can read KVM's tracepoints there.
        kcore: whether the core can read the kernel's memory there.
    """

    kind: str
    kernel: str
    module: str
    parameters: dict[str, str]
    cpu: str
    cpus: int
    emulator: str
    emulator_version: str
    api_version: int
    uid: int
    tracing: bool
    kcore: bool

    @property
    def emulated(self) -> bool:
        """True if clocks on this host are an emulator's, not the machine's."""
        return bool(self.emulator)

    def describe(self) -> str:
        """One line: kernel, module with what matters of its parameters, CPU, emulator."""
        mmu = {"kvm_amd": "npt", "kvm_intel": "ept"}.get(self.module)
        value = self.parameters.get(f"{self.module}.{mmu}") if mmu else None
        module = f"{self.module} {mmu}={value}" if value else self.module
        emulator = f", {self.emulator} {self.emulator_version}".rstrip() if self.emulator else ""
        return f"{self.kind}: Linux {self.kernel}, {module}, {self.cpu}{emulator}"

    @classmethod
    def read(
        cls,
        core: Core,
        *,
        kind: str,
        emulator: str = "",
        emulator_version: str = "",
        raw: Mapping[str, str] | None = None,
    ) -> HostInfo:
        """Asks the core for it.

        Args:
            raw: `Core.host_info` of just this host, where it is known from before.

        Raises:
            HostUnavailable: the core runs where /dev/kvm cannot be used.
        """
        hello = core.hello()
        raw = core.host_info() if raw is None else raw
        if hello["kvm_api_version"] < 0:
            where = "" if kind == "local" else f"on {kind} ({raw.get('kernel.release', '?')}): "
            raise errors.HostUnavailable(where + why_no_kvm(-hello["kvm_api_version"]))
        modules = [name for name in ("kvm_amd", "kvm_intel", "kvm_pvm") if f"module.{name}" in raw]
        prefix = "parameter."
        return cls(
            kind=kind,
            kernel=raw.get("kernel.release", "?"),
            module=modules[0] if modules else "kvm",
            parameters={key[len(prefix) :]: value for key, value in raw.items() if key.startswith(prefix)},
            cpu=" ".join(raw.get("cpu.model_name", "?").split()),
            cpus=int(raw.get("cpu.count", "0")),
            emulator=emulator,
            emulator_version=emulator_version,
            api_version=hello["kvm_api_version"],
            uid=hello["agent_uid"],
            tracing=raw.get("tracing") == "1",
            kcore=raw.get("kcore") == "1",
        )


class Host:
    """A connected host; `kvmbench.connect()` makes it.

    A context manager.  Closing it ends every machine in it.

    Attributes:
        name: what was asked for, such as "appliance" or "ssh://server".
        core: the requests it serves.
        info: what it is.
        mechanisms: which ways to stop a guest were seen to work there.
        why: one line that says why `connect()` picked it.
    """

    def __init__(
        self,
        name: str,
        core: Core,
        info: HostInfo,
        mechanisms: Mechanisms,
        *,
        why: str = "",
        closer: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.core = core
        self.info = info
        self.mechanisms = mechanisms
        self.why = why
        self._closer = closer

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self.core.closed

    @property
    def lost(self) -> str | None:
        """Why the host is gone, or None while it is there."""
        return self.core.channel.lost

    @cached_property
    def host_kernel(self) -> HostKernel:
        """The memory, types and symbols of the host's kernel, for `kvmbench.mmu`; read and never written.

        Raises:
            UnsupportedError: it cannot be read, and why.
        """
        from kvmbench.host.kernel.program import HostKernel

        return HostKernel(self.core)

    @property
    def kernel(self) -> drgn.Program:
        """The host's running kernel as a drgn program: ``host.kernel["init_task"].comm``, drgn's helpers, ...

        Its memory is /proc/kcore of the host, its types are BTF. Nothing is ever written.

        Raises:
            UnsupportedError: it cannot be read (not root, no /proc/kcore, no BTF), or drgn is not installed.
        """
        return self.host_kernel.program

    @property
    def provenance(self) -> Provenance:
        """What records and figures of this host carry."""
        own = f"{self.info.module}."
        return Provenance.now(
            self.info.kind,
            kernel=self.info.kernel,
            module=self.info.module,
            parameters={
                key[len(own) :]: value
                for key, value in self.info.parameters.items()
                if key in (own + "npt", own + "ept")
            },
            cpu=self.info.cpu,
            emulator=f"{self.info.emulator} {self.info.emulator_version}".strip(),
        )

    def close(self) -> None:
        """Ends the host and everything in it; idempotent."""
        try:
            self.core.close()
        finally:
            closer, self._closer = self._closer, None
            if closer is not None:
                closer()

    def __enter__(self) -> Host:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = " (closed)" if self.closed else f" (lost: {self.lost})" if self.lost else ""
        return f"<Host {self.info.describe()}{state}>"

    def _repr_html_(self) -> str:
        rows = [("host", self.info.describe())]
        if self.why:
            rows.append(("picked", self.why))
        if self.closed or self.lost:
            rows.append(("state", "closed" if self.closed else f"lost: {self.lost}"))
        rows += [("stops a guest", "at CPL 0 / at CPL 3")]
        rows += [(f"\u2003{WORDS[name]}", " / ".join(self._outcome(name, cpl) for cpl in (0, 3))) for name in NAMES]
        left = "style='text-align:left; padding:0 .9em 0 0'"
        cells = "".join(
            f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(text)}</td></tr>" for name, text in rows
        )
        return f"<table>{cells}</table>"

    def _outcome(self, name: str, cpl: int) -> str:
        if cpl in getattr(self.mechanisms, name):
            return "works"
        return f"no ({self.mechanisms.notes.get(f'{name}@{cpl}', 'not tried')})"
