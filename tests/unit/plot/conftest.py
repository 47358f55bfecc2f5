"""A recorded loop to draw, and figures that are closed after each test."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest

from kvmbench.debug.record import StepRecord
from kvmbench.debug.step_rows import ROW
from kvmbench.debug.symbols import Symbols
from kvmbench.host.provenance import Provenance

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures_and_keep_rcparams() -> Iterator[None]:
    """No test leaves a figure open, and no plot function changes a global setting."""
    import matplotlib.pyplot as plt

    before = matplotlib.rcParams.copy()
    yield
    plt.close("all")
    assert matplotlib.rcParams == before


def make_record(loops: int, *, base: int = 0x1000) -> StepRecord:
    """`loops` rounds of three instructions: rax += 3, OUT (exits each 4th round), rcx -= 1."""
    state = dict.fromkeys(ROW.names or (), 0)
    state.update(rip=base, rsp=0x8000, rflags=2)
    start = np.array(tuple(state.values()), dtype=ROW)
    rows = []

    def step(offset: int, exit: int = 4, **values: int) -> None:
        state.update(values, rip=base + offset, exit=exit)
        rows.append(tuple(state.values()))

    step(0x10, rcx=loops)
    for left in range(loops, 0, -1):
        step(0x13, rax=state["rax"] + 3)
        step(0x14, exit=2 if left % 4 == 0 else 4)
        step(0x10 if left > 1 else 0x20, rcx=left - 1)
    step(0x21, exit=5)
    return StepRecord(
        np.array(rows, dtype=ROW),
        start,
        symbols=Symbols.of({"start": base, "loop": base + 0x10, "done": base + 0x20}),
        provenance=Provenance(
            kind="appliance",
            kernel="6.1.0",
            module="kvm_amd",
            parameters={"npt": "1"},
            emulator="QEMU 7.2",
            created="2026-01-02T03:04:05+00:00",
        ),
    )


@pytest.fixture
def rec() -> StepRecord:
    return make_record(12)


@pytest.fixture
def long_rec() -> StepRecord:
    return make_record(9000, base=0xFFFFFFFF81000000)
