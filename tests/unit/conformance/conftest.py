"""Two small reports of hosts that answered differently."""

from __future__ import annotations

import pytest

from kvmbench.conformance import POINTS, QUIRKS, Answer, Matrix, Report, Result
from kvmbench.host.provenance import Provenance

BY_NAME = {point.name: point for point in POINTS}
HIDDEN = next(quirk for quirk in QUIRKS if quirk.name == "tf-hidden")


@pytest.fixture
def report() -> Report:
    """Four points: one holds, one differs for a known reason, one without, one could not be tried."""
    return Report(
        "appliance: Linux 6.1.0, kvm_amd npt=1, QEMU (TCG) 7.2",
        Provenance(kind="appliance", module="kvm_amd", parameters={"npt": "1"}, emulator="QEMU 7.2", kernel="6.1.0"),
        (
            Result(BY_NAME["kvm.gd"], Answer.HOLDS, BY_NAME["kvm.gd"].expected),
            Result(
                BY_NAME["kvm.tf.hidden"],
                Answer.DIFFERS,
                ("TF set", "stepped: TF clear", "afterwards: TF clear"),
                quirks=(HIDDEN,),
            ),
            Result(BY_NAME["kvm.int3.cpl0"], Answer.DIFFERS, ("<SHUTDOWN>",)),
            Result(BY_NAME["kvm.pcid"], Answer.CANNOT, why="no PCID"),
        ),
    )


@pytest.fixture
def matrix(report: Report) -> Matrix:
    other = Report("local: Linux 6.18", Provenance(kind="local", module="kvm_pvm"), report.results[:1])
    return Matrix({"npt=1": report, "local": other}, {"ept=1": "Bochs is missing"})
