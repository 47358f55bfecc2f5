"""Tracing on this machine: whether KVM's tracepoints can be read.

Only the `local` host needs this. In an appliance one is root in a kernel with
all of it, and an ssh host has its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kvmbench.doctor.finding import Finding, Status

AREA = "tracing"

# Current kernels mount it at the first; older ones reach it through debugfs.
PLACES = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))


def examine(*, places: tuple[Path, ...] = PLACES, filesystems: Path = Path("/proc/filesystems")) -> Iterator[Finding]:
    """Looks for a tracefs with KVM's events; opens no event."""
    for place in places:
        # Without permission what lies inside seems absent, so the folder's own rights come first.
        if place.is_dir() and not os.access(place, os.R_OK | os.X_OK):
            yield Finding(
                AREA,
                "tracefs",
                Status.LIMITED,
                f"{place} is for root: KVM's tracepoints need it",
                mend='kvmbench.connect("local", sudo=True), or run as root',
            )
            return
        if (place / "events").is_dir():
            yield from _events(place)
            return
    known = filesystems.is_file() and "tracefs" in filesystems.read_text(encoding="ascii", errors="replace")
    if known:
        yield Finding(
            AREA,
            "tracefs",
            Status.LIMITED,
            "the kernel has it, but it is not mounted",
            mend=f"sudo mount -t tracefs tracefs {places[0]}",
        )
    else:
        yield Finding(
            AREA,
            "tracefs",
            Status.LIMITED,
            "this kernel has none: no tracepoints on `local`; the appliance has all of them",
        )


def _events(place: Path) -> Iterator[Finding]:
    kvm = sorted(path.name for path in (place / "events" / "kvm").glob("*") if path.is_dir())
    mmu = sorted(path.name for path in (place / "events" / "kvmmmu").glob("*") if path.is_dir())
    facts: dict[str, object] = {"place": str(place), "kvm_events": len(kvm), "kvmmmu_events": len(mmu)}
    if not kvm:
        yield Finding(AREA, "tracefs", Status.LIMITED, f"{place} has no KVM events", facts=facts)
    elif not os.access(place / "instances", os.W_OK):
        yield Finding(
            AREA,
            "tracefs",
            Status.LIMITED,
            f"{place} can be read, not used: recording takes root",
            mend='kvmbench.connect("local", sudo=True), or run as root',
            facts=facts,
        )
    else:
        yield Finding(
            AREA, "tracefs", Status.OK, f"{len(kvm)} kvm and {len(mmu)} kvmmmu events at {place}", facts=facts
        )
