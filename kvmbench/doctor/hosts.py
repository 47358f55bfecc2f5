"""What the hosts themselves show: the self-check's result, and which one `connect()` takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvmbench.doctor.finding import Finding, Status
from kvmbench.errors import KvmbenchError

_TRIALS: tuple[tuple[str, str, dict[str, object]], ...] = (
    ("local", "local", {}),
    ("npt=1", "appliance", {"npt": 1}),
    ("npt=0", "appliance", {"npt": 0}),
)


@dataclass(frozen=True)
class LocalCheck:
    """How this machine's own KVM did.

    Attributes:
        finding: the result in words.
        complete: stepping, breakpoints and watchpoints work at CPL 0 and CPL 3,
            which is what `connect()` without arguments asks of it.
        reason: why not, or an empty string.
    """

    finding: Finding
    complete: bool
    reason: str


def check_local() -> LocalCheck:
    """Opens the `local` host and reads its self-check: milliseconds, or none when it is remembered from this boot."""
    from kvmbench.host.connect import connect

    try:
        with connect("local", quiet=True) as host:
            mechanisms = host.mechanisms
    except KvmbenchError as error:
        finding = Finding("local KVM", "self-check", Status.MISSING, f"not done: {error}")
        return LocalCheck(finding, False, f"no local KVM: {error}")
    finding = _result("local KVM", "self-check", mechanisms.shortcomings, mechanisms.to_json())
    if mechanisms.complete:
        return LocalCheck(finding, True, "")
    lacking = mechanisms.shortcomings
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return LocalCheck(finding, False, f"local KVM fails the self-check: {lacking[0]}{more}")


def trials() -> list[Finding]:
    """Starts every host that can be started and lets it check itself: seconds, for `--deep`."""
    from kvmbench.host.connect import connect

    found: list[Finding] = []
    for subject, spec, options in _TRIALS:
        start = time.monotonic()
        try:
            with connect(spec, quiet=True, **options) as host:
                seconds = time.monotonic() - start
                finding = _result("trial", subject, host.mechanisms.shortcomings, host.mechanisms.to_json())
                text = f"{host.info.describe()}; up in {seconds:.1f} s; {finding.text}"
        except KvmbenchError as error:
            found.append(Finding("trial", subject, Status.MISSING, f"did not start: {error}"))
            continue
        found.append(Finding("trial", subject, finding.status, text, facts=finding.facts))
    return found


def verdict(local: LocalCheck, appliance: Sequence[Finding]) -> str:
    """One line: which host `connect()` without arguments takes, and why.

    Args:
        local: how this machine's own KVM did.
        appliance: the findings the AMD appliance needs to be good.
    """
    if local.complete:
        return "connect() takes local: stepping, breakpoints and watchpoints work there at CPL 0 and CPL 3"
    lacking = [finding for finding in appliance if finding.status in (Status.MISSING, Status.BROKEN)]
    if not lacking:
        return f"connect() takes the appliance: {local.reason}"
    missing = ", ".join(finding.subject for finding in lacking)
    return f"connect() finds no host: {local.reason}; and the appliance lacks {missing} (see above)"


def _result(area: str, subject: str, shortcomings: Sequence[str], facts: dict[str, object]) -> Finding:
    if not shortcomings:
        return Finding(area, subject, Status.OK, "all ways to stop a guest work at CPL 0 and CPL 3", facts=facts)
    return Finding(area, subject, Status.LIMITED, "does not work: " + "; ".join(shortcomings), facts=facts)
