"""Exits over time, by how long they took or by kind."""

from __future__ import annotations

import numpy as np
import pytest

from kvmbench import plot
from kvmbench.errors import MisuseError

from ..traces.exit_tables import Traced, many, table, with_gap

ROWS = [
    {"time_ns": 0, "kvm_ns": 1_000, "reason": "npf"},
    {"time_ns": 10, "kvm_ns": 1_000, "reason": "npf"},
    {"time_ns": 9_000, "kvm_ns": 90_000},
]


def cells(mesh):
    return mesh.get_array().filled(0)


def test_each_exit_is_in_the_cell_of_its_time_and_length():
    mesh, _ = plot.exit_heat_map(table(ROWS), columns=2)
    found = cells(mesh)
    assert found.sum() == 3
    assert found.max() == 2
    row, column = np.argwhere(found == 2)[0]
    edges = mesh.get_coordinates()[:, 0, 1]
    assert column == 0
    assert edges[row] <= 1_000 < edges[row + 1]


def test_no_exit_is_lost_among_many():
    exits = many(100_000, vcpus=4)
    assert cells(plot.exit_heat_map(exits)[0]).sum() == 100_000
    assert cells(plot.exit_heat_map(exits, rows="vcpu")[0]).shape == (4, 200)


def test_rows_can_be_reasons():
    mesh, _ = plot.exit_heat_map(table(ROWS), rows="reason", columns=2)
    assert cells(mesh).tolist() == [[2, 0], [1, 0]]
    assert [label.get_text() for label in mesh.axes.get_yticklabels()] == ["npf  (2)", "io  (1)"]


def test_one_reason_can_be_drawn_alone():
    mesh, _ = plot.exit_heat_map(table(ROWS), reason="io")
    assert cells(mesh).sum() == 1
    assert mesh.axes.get_title(loc="left") == "Exits for io over time"


def test_a_cell_without_exits_has_no_colour():
    mesh, _ = plot.exit_heat_map(table(ROWS), columns=2)
    assert np.ma.count(mesh.get_array()) == 2


def test_both_axes_have_their_units_and_say_whose_time_it_is():
    ax = plot.exit_heat_map(Traced(table(ROWS)))[0].axes
    ax.figure.canvas.draw()
    assert ax.get_xlabel() == "time since the first exit (us, emulator time)"
    assert ax.get_ylabel() == "time from the exit until the guest ran again\n(logarithmic, emulator time)"
    assert {"1 us", "10 us", "100 us"} <= {label.get_text() for label in ax.get_yticklabels()}


def test_lost_events_are_hatched():
    drawn = plot.exit_heat_map(Traced(table(ROWS), with_gap(8_000, 7)))
    (box,) = drawn[-1].get_paths()
    assert (box.vertices[:, 0].min(), box.vertices[:, 0].max()) == (10, 8_000)


@pytest.mark.parametrize("rows", ["latency", "reason"])
def test_no_exits_are_said(rows):
    (words,) = plot.exit_heat_map(table(), rows=rows)
    assert words.get_text() == "no exits"


@pytest.mark.parametrize("rows", ["latency", "reason", "vcpu", "user_exit"])
def test_one_exit_is_one_cell(rows):
    mesh, _ = plot.exit_heat_map(table(ROWS[:1]), rows=rows)
    assert cells(mesh).sum() == 1
    mesh.figure.canvas.draw()


def test_an_axes_of_the_caller_s_is_drawn_into():
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, layout="constrained")
    assert plot.exit_heat_map(table(ROWS), ax=axes[1])[0].axes is axes[1]


def test_other_words_are_refused():
    with pytest.raises(MisuseError, match="rows='reasons': did you mean 'reason'"):
        plot.exit_heat_map(table(ROWS), rows="reasons")
    with pytest.raises(MisuseError, match="reason='hlt': the exits have io, npf, cpuid"):
        plot.exit_heat_map(table(ROWS), reason="hlt")
