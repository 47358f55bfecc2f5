"""What this machine can do, and the command that mends what it cannot.

`examine()` looks at local KVM, tracing, the emulators, the appliance's cache,
the tools and Python; ``kvmbench doctor`` prints what it returns. It opens
/dev/kvm and runs ``qemu-system-x86_64 --version``; it boots nothing unless
asked to, installs nothing and changes nothing but the remembered self-check.
"""

from __future__ import annotations

from kvmbench.doctor import appliance, emulators, hosts, local, python, toolchain, tracing
from kvmbench.doctor.finding import Finding, Status, guarded
from kvmbench.doctor.report import Report

__all__ = ["Finding", "Report", "Status", "examine"]


def examine(*, deep: bool = False) -> Report:
    """Examines this machine; never raises for what it finds.

    Args:
        deep: also start each host, let it check itself, and time it. Takes
            seconds; without it, a fraction of one.
    """
    findings = guarded(local.AREA, local.examine)
    try:
        check = hosts.check_local()
    except Exception as error:  # as in `guarded`: one surprise must not hide the rest
        text = f"could not be examined: {type(error).__name__}: {error}"
        broken = Finding(local.AREA, "self-check", Status.BROKEN, text)
        check = hosts.LocalCheck(broken, complete=False, reason="the self-check could not be done")
    findings.append(check.finding)
    findings += guarded(tracing.AREA, tracing.examine)
    of_appliance = guarded(emulators.AREA, emulators.examine)
    of_appliance += guarded(appliance.AREA, appliance.examine)
    findings += of_appliance
    findings += guarded(toolchain.AREA, toolchain.examine)
    findings += guarded(python.AREA, python.examine)
    if deep:
        findings += guarded("trial", hosts.trials)
    needed = [finding for finding in of_appliance if finding.subject != emulators.INTEL_ONLY]
    return Report(findings, hosts.verdict(check, needed))
