"""The control flow puts every step at its instruction and names the symbols."""

from __future__ import annotations

import matplotlib.pyplot as plt

from kvmbench import plot
from kvmbench.debug.record import StepRecord
from kvmbench.debug.symbols import Symbols


def test_every_step_is_at_its_instruction(rec: StepRecord) -> None:
    path = plot.control_flow(rec)[0]
    # start, then loop, its second and third instruction, and done: places 0 to 4 by address.
    assert list(path.get_ydata())[:5] == [0, 1, 2, 3, 1]
    assert list(path.get_ydata())[-1] == 4
    assert len(path.get_xdata()) == len(rec)


def test_symbols_name_the_bands(rec: StepRecord) -> None:
    ax = plot.control_flow(rec)[0].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "0x1000 start",
        "0x1010 loop",
        "0x1020 done",
    ]
    other = plot.control_flow(rec, symbols=Symbols.of({"all": 0x1000}))[0].axes
    assert [label.get_text() for label in other.get_yticklabels()] == ["0x1000 all"]


def test_exits_are_marked_by_kind(rec: StepRecord) -> None:
    _, io, halt = plot.control_flow(rec)
    assert io.get_label() == "exit IO (3)"
    assert halt.get_label() == "exit HLT (1)"
    assert io.get_offsets().tolist() == [[2, 2], [14, 2], [26, 2]]


def test_an_axes_of_yours_is_drawn_into(rec: StepRecord) -> None:
    figure, ax = plt.subplots()
    assert all(artist.axes is ax for artist in plot.control_flow(rec, ax=ax))
    assert plt.get_fignums() == [figure.number]


def test_a_long_recording_becomes_a_few_bars_that_cover_it(long_rec: StepRecord) -> None:
    bars = plot.control_flow(long_rec)[0]
    segments = bars.get_segments()
    assert len(segments) < 30
    assert max(segment[1][0] for segment in segments) == len(long_rec)
    rows = {segment[0][1] for segment in segments}
    assert rows == {0, 1, 2, 3, 4}


def test_addresses_of_64_bits_are_written_out(long_rec: StepRecord) -> None:
    labels = [label.get_text() for label in plot.control_flow(long_rec)[0].axes.get_yticklabels()]
    assert labels[1] == "0xffffffff81000010 loop"
