"""Exits: over the steps of a recording, over the time of a trace, or as bare counts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kvmbench import plot
from kvmbench.debug.record import StepRecord
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance


def test_a_recording_shows_its_exits_at_their_steps(rec: StepRecord) -> None:
    io, halt = plot.exits(rec)
    assert [segment[0][0] for segment in io.get_segments()] == [2, 14, 26]
    assert [segment[0][0] for segment in halt.get_segments()] == [37]
    assert [label.get_text() for label in io.axes.get_yticklabels()] == ["IO  (3)", "HLT  (1)"]
    assert io.axes.get_xlabel() == "step"


def test_a_trace_shows_its_exits_in_time_and_says_whose_time() -> None:
    trace = SimpleNamespace(
        exit_times_ns=np.array([1000, 2000, 5000]),
        exit_names=np.array(["IO", "HLT", "IO"]),
        provenance=Provenance(kind="appliance", emulator="QEMU"),
    )
    io, halt = plot.exits(trace)
    assert [segment[0][0] for segment in io.get_segments()] == [0.0, 4.0]
    assert [segment[0][0] for segment in halt.get_segments()] == [1.0]
    assert io.axes.get_xlabel() == "time since the first exit (us, emulator time)"


def test_counts_become_bars() -> None:
    bars = plot.exits({"HLT": 3, "IO": 1200})
    assert [bar.get_width() for bar in bars] == [1200, 3]


def test_no_exits_are_said_in_the_figure(rec: StepRecord) -> None:
    (words,) = plot.exits(rec[:2])
    assert words.get_text() == "no exits but plain steps"


def test_something_else_is_refused() -> None:
    with pytest.raises(MisuseError, match="exits\\(\\) draws a StepRecord, a trace or a mapping"):
        plot.exits([1, 2, 3])  # type: ignore[arg-type]
