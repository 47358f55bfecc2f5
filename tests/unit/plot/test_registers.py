"""Register curves show the recorded values, thinned without losing extremes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kvmbench import plot
from kvmbench.debug.record import StepRecord
from kvmbench.errors import MisuseError


def test_the_registers_that_changed_are_drawn_each_on_its_own_axes(rec: StepRecord) -> None:
    lines = plot.registers(rec)
    assert [line.get_label() for line in lines] == ["rax", "rcx"]
    assert len({line.axes for line in lines}) == 2
    assert len({line.get_figure() for line in lines}) == 1
    assert list(lines[0].get_ydata()) == rec.rax.tolist()
    assert list(lines[0].get_xdata()) == list(range(len(rec)))


def test_one_axes_takes_all_registers_with_a_legend(rec: StepRecord) -> None:
    _, ax = plt.subplots()
    lines = plot.registers(rec, names=["rax", "rcx", "rsp"], ax=ax)
    assert all(line.axes is ax for line in lines)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["rax", "rcx", "rsp"]
    assert len({line.get_color() for line in lines}) == 3
    assert len({line.get_linestyle() for line in lines}) == 3
    assert ax.get_xlabel() == "step"


def test_as_many_axes_as_registers_may_be_given(rec: StepRecord) -> None:
    _, axes = plt.subplots(2)
    lines = plot.registers(rec, names=["rip", "rsp"], ax=axes)
    assert [line.axes for line in lines] == list(axes)
    with pytest.raises(MisuseError, match="2 Axes for 1 registers"):
        plot.registers(rec, names=["rip"], ax=axes)


def test_a_slice_is_drawn_at_its_steps(rec: StepRecord) -> None:
    line = plot.registers(rec[10:20], names=["rax"])[0]
    assert line.get_xdata()[0] == 10


def test_a_long_recording_is_thinned_and_keeps_what_stands_out(long_rec: StepRecord) -> None:
    rows = long_rec.rows.copy()
    rows["rdx"][12345] = 77
    rows["rdx"][-1] = 3
    line = plot.registers(StepRecord(rows, long_rec.start), names=["rdx"])[0]
    values = np.asarray(line.get_ydata())
    assert len(values) < 9000
    assert values.max() == 77
    assert list(line.get_xdata()).count(12345) == 1
    assert (line.get_xdata()[-1], values[-1]) == (len(rows) - 1, 3)


@pytest.mark.parametrize(("names", "message"), [(["eax"], "no register 'eax'"), ([], "names is empty")])
def test_bad_names_are_refused(rec: StepRecord, names: list[str], message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        plot.registers(rec, names=names)


def test_nothing_to_draw_is_said(rec: StepRecord) -> None:
    for draw in (plot.registers, plot.control_flow, plot.hot_addresses):
        with pytest.raises(MisuseError, match="no steps to draw"):
            draw(rec[:0])
    assert plt.get_fignums() == []
