"""Guest debug held against the manuals, point by point, on any host.

    from kvmbench import conformance
    report = conformance.run(host)
    report.differences

A *point* is a small guest, everything that has to be seen of it, and the
manual that says so.  Two layers are told apart: what KVM itself does, with
nothing of ours between KVM_SET_GUEST_DEBUG and KVM_RUN, and what
`cpu.step()` and breakpoints make of it.  A difference is explained by a
*quirk* (`kvmbench.conformance.quirks`) or is a fault of somebody not yet named.
"""

from __future__ import annotations

from kvmbench.conformance.matrix import HOSTS, Matrix, survey
from kvmbench.conformance.point import ITEMS, CannotTry, Layer, Point
from kvmbench.conformance.points import POINTS
from kvmbench.conformance.quirk import Cause, Quirk, Where
from kvmbench.conformance.quirks import QUIRKS
from kvmbench.conformance.report import Answer, Report, Result
from kvmbench.conformance.run import chosen, run

__all__ = [
    "HOSTS",
    "ITEMS",
    "POINTS",
    "QUIRKS",
    "Answer",
    "CannotTry",
    "Cause",
    "Layer",
    "Matrix",
    "Point",
    "Quirk",
    "Report",
    "Result",
    "Where",
    "chosen",
    "run",
    "survey",
]
