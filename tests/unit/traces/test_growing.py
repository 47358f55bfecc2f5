"""Events that come piece by piece are those that come at once, and what was shown stays as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvmbench.traces.assemble import event_table
from kvmbench.traces.format import PageLayout
from kvmbench.traces.growing import GrowingEvents

from .made_up import CPUID, FORMATS, SIZE, kvm_entry, kvm_exit, mark
from .ring import event, page


def made_up_pages(seed: int, count: int = 60) -> list[tuple[int, memoryview]]:
    """Pages of three processors as they are read: each in order, one up to 300 ns behind the others."""
    dice = random.Random(seed)
    pages, times = [], dict.fromkeys(range(3), 1000)
    for _ in range(count):
        cpu = dice.randrange(3)
        start = times[cpu] = max(times[cpu], max(times.values()) - 300) + dice.randrange(1, 40)
        records = []
        for delta in (0, *(dice.randrange(9) for _ in range(dice.randrange(4)))):
            texts = mark("m" * dice.randrange(1, 30), pid=cpu)
            records.append(event(delta, dice.choice([kvm_entry(pid=cpu), kvm_entry(pid=cpu + 10), texts])))
            times[cpu] += delta
        if dice.random() < 0.2:
            records = [event(0, kvm_exit(CPUID, rip=start))]
            times[cpu] = start
        lost = dice.choice([None, None, None, 0, 3])
        pages.append((cpu, memoryview(page(start, *records, lost=lost, page_bytes=SIZE))))
    return pages


def contents(table):
    """Everything in a table, by kind."""
    found = {}
    for name, c in table.items():
        texts = [c.text(n) for n in range(len(c))]
        fields = [c[field].tolist() for field in c.fields]
        found[name] = (c.time_ns.tolist(), c.cpu.tolist(), c.tid.tolist(), fields, texts)
    return found, sorted((gap.time_ns, gap.cpu, gap.lost) for gap in table.gaps), table.bad_pages, table.unknown


@pytest.mark.parametrize("seed", range(12))
def test_pieces_make_what_the_whole_makes_and_change_nothing_shown_before(seed):
    pages = made_up_pages(seed)
    growing = GrowingEvents(FORMATS, page_bytes=SIZE, layout=PageLayout())
    dice = random.Random(seed)
    shown, at = [], 0
    while at < len(pages):
        step = dice.randrange(1, 9)
        growing.add(pages[at : at + step])
        at += step
        table = growing.table(growing.gaps)
        shown.append(
            (table, contents(table), contents(event_table(pages[:at], FORMATS, page_bytes=SIZE, layout=PageLayout())))
        )
    for table, then, whole in shown:
        assert contents(table) == then, "what was shown stays"
        for name, (times, *columns) in whole[0].items():
            # Events of one instant, of several processors, are in the order they were read.
            mine = then[0][name]
            assert mine[0] == times
            assert sorted(map(repr, zip(times, *(c for c in mine[1:3]), mine[4], strict=True))) == sorted(
                map(repr, zip(times, *(c for c in columns[:2]), columns[3], strict=True))
            )
        assert then[1:] == whole[1:]
    assert all(np.all(np.diff(c.time_ns) >= 0) for c in shown[-1][0].values())
