"""Where a recording, a trace or a figure came from.

Every number this library shows depends on the host it was measured on: the
same guest steps differently on kvm_amd under QEMU, on kvm_intel under Bochs
and on bare metal. So each record carries one of these, each saved file and
each figure repeats it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib import metadata

from kvmbench.errors import MisuseError

#: Kinds of host, as `kvmbench.connect` names them.
KINDS = ("local", "appliance", "ssh", "unknown")


@dataclass(frozen=True)
class Provenance:
    """The host behind some data. All fields are text as the host reported it; empty means not known.

    Attributes:
        kind: one of `KINDS`.
        kernel: release of the kernel whose KVM ran the guest, as ``uname -r`` prints it.
        module: ``kvm_amd``, ``kvm_intel``, ...
        parameters: the module's parameters, such as ``{"npt": "1"}``.
        cpu: the processor's model name, the emulated one in an appliance.
        emulator: ``QEMU 7.2.22 (TCG)``, ``Bochs 2.7``, or empty on a machine that runs KVM itself. Not empty
            means that every time in the data is emulator time.
        versions: of this software, such as ``{"kvmbench": "0.1.0", "python": "3.11.7"}``.
        created: when the data was taken, ISO 8601 in UTC.
        note: anything a person wants to add.
    """

    kind: str = "unknown"
    kernel: str = ""
    module: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    cpu: str = ""
    emulator: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise MisuseError(f"host kind {self.kind!r} is none of {', '.join(KINDS)}")

    @classmethod
    def now(
        cls,
        kind: str,
        *,
        kernel: str = "",
        module: str = "",
        parameters: Mapping[str, str] | None = None,
        cpu: str = "",
        emulator: str = "",
        note: str = "",
    ) -> Provenance:
        """Provenance of data being taken at this moment: adds the time and this software's versions."""
        return cls(
            kind=kind,
            kernel=kernel,
            module=module,
            parameters=dict(parameters or {}),
            cpu=cpu,
            emulator=emulator,
            versions=software_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            note=note,
        )

    @property
    def is_emulated(self) -> bool:
        """Whether KVM itself ran inside an emulator, so that times are emulator time."""
        return bool(self.emulator)

    @property
    def time_unit_note(self) -> str:
        """What to write beside a time axis: ``emulator time``, or an empty string."""
        return "emulator time" if self.is_emulated else ""

    def __str__(self) -> str:
        """One line: ``appliance, Linux 6.1.0, kvm_amd npt=1, QEMU 7.2.22 (TCG): times are emulator time``."""
        parts = [self.kind if self.kind != "unknown" else "host unknown"]
        if self.kernel:
            parts.append(f"Linux {self.kernel}")
        if self.module:
            parts.append(" ".join([self.module, *(f"{name}={value}" for name, value in self.parameters.items())]))
        if self.cpu:
            parts.append(self.cpu)
        line = ", ".join(parts)
        return f"{line}, {self.emulator}: times are emulator time" if self.emulator else line

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(
            {**asdict(self), "parameters": dict(self.parameters), "versions": dict(self.versions)},
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """The inverse of `to_json`; fields unknown to this version are dropped, missing ones are empty.

        Raises:
            MisuseError: not a JSON object, or fields of the wrong type.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MisuseError(f"provenance is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise MisuseError("provenance is not a JSON object")
        known: dict[str, object] = {}
        for name in cls.__dataclass_fields__:
            if name not in values:
                continue
            value, is_table = values[name], name in ("parameters", "versions")
            if (is_table and isinstance(value, dict) and all(isinstance(item, str) for item in value.values())) or (
                not is_table and isinstance(value, str)
            ):
                known[name] = value
            else:
                raise MisuseError(
                    f"provenance field {name!r} is {value!r}, not {'a table of text' if is_table else 'text'}"
                )
        return cls(**known)  # type: ignore[arg-type]


def software_versions() -> dict[str, str]:
    """Versions of kvmbench, Python and numpy in this process."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    # Once a process: looking through the installed packages takes milliseconds, and every recording asks.
    found = [("python", platform.python_version())]
    for name in ("kvmbench", "numpy"):
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            # Running from a checkout that is not installed.
            found.append((name, "not installed"))
    return tuple(found)
