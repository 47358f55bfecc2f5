"""One thing the doctor looked at: what it is, how it stands, what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    """How a finding stands.

    OK works; LIMITED works as far as the text says; MISSING is absent or
    refused; BROKEN could not be examined, which is worth a bug report.
    """

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """What the doctor found about one subject.

    Attributes:
        area: the heading it stands under, such as ``local KVM``.
        subject: what was looked at, such as ``/dev/kvm``.
        status: how it stands.
        text: the same in words, one line.
        mend: the command that mends it, or an empty string when there is
            nothing to mend or no command that could.
        facts: the details as plain values, for ``kvmbench doctor --json``.
    """

    area: str
    subject: str
    status: Status
    text: str
    mend: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)


def guarded(area: str, examine: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Runs one examination so that a surprise in it becomes a finding.

    The doctor is called when something is wrong; a traceback would hide all it
    found elsewhere. Hence the one broad except of this package.
    """
    found: list[Finding] = []
    try:
        found.extend(examine())
    except Exception as error:
        text = f"could not be examined: {type(error).__name__}: {error}"
        found.append(Finding(area, area, Status.BROKEN, text))
    return found
