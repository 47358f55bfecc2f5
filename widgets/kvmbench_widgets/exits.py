"""`Exits`: what made the vcpu leave to user space, live: a list, counts by place, and a small timeline."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any, ClassVar

import traitlets

from kvmbench.debug.exit_log import ExitEntry, ExitLog
from kvmbench.errors import MisuseError
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.panel import Panel, action

_BINS = 60
_WINDOW = 200
_PLACES = 12
_LANES = 6
# Drawn at most this often while the guest runs, whatever it does.
_LIVE_S = 0.25


class Exits(Panel):
    """Exits of a vcpu to user space, from the moment the panel is made: ``kw.Exits(cpu)``.

    Attributes:
        follow: whether the list stays at its newest exit.
    """

    MODULE = "exits"
    TITLE = "Exits"
    THEIRS: ClassVar[frozenset[str]] = frozenset({"follow"})

    follow = traitlets.Bool(True).tag(sync=True)

    def __init__(self, target: Any, **traits: Any) -> None:
        self._first = 0
        self._count = _WINDOW
        self._drawn_at = 0.0
        self._last: tuple[float, int] = (0.0, 0)
        super().__init__(target, **traits)

    @property
    def log(self) -> ExitLog:
        """The vcpu's log."""
        log = self.cpu.exit_log  # one without exits is false
        return self.cpu.log_exits() if log is None else log

    def make_view(self) -> dict[str, Any]:
        return self._view(rate=None)

    def tick(self) -> None:
        now = time.monotonic()
        if self.state != "running" or now - self._drawn_at < _LIVE_S:
            return
        before, total = self._last
        self._drawn_at, self._last = now, (now, self.log.total)
        # Of the last draw until now; the first draw after a start has none to compare with.
        rate = (self.log.total - total) / (now - before) if now - before < 4 * _LIVE_S else None
        self.view = self._view(rate=rate)

    def _view(self, rate: float | None) -> dict[str, Any]:
        log = self.log
        entries = log.entries()
        first = max(0, len(entries) - self._count) if self.follow else min(self._first, len(entries))
        window = entries[first : first + self._count]
        start = entries[0].time_ns if entries else 0
        number = log.total - len(entries)
        view: dict[str, Any] = {
            "vcpu": self.cpu.index,
            "all": f"{log.total:,}",
            "total": len(entries),
            "first": first,
            "number": number,
            "rows": [self._row(number + first + n, entry, start) for n, entry in enumerate(window)],
            "places": self._places(log),
            **_timeline(entries),
        }
        if rate is not None:
            view["rate"] = f"{rate:,.0f}"
        return view

    def _row(self, number: int, entry: ExitEntry, start: int) -> dict[str, Any]:
        row: dict[str, Any] = {
            "n": number,
            "us": f"{(entry.time_ns - start) / 1000:,.1f}",
            "kind": entry.kind,
            "where": "" if entry.where is None else f"{entry.where:#x}",
            "value": "" if entry.value is None else f"{entry.value:#0{2 + 2 * entry.size_bytes}x}",
        }
        if entry.rip is not None:
            row["rip"] = f"{entry.rip:#x}"
            row["label"] = self.cpu.symbols.label(entry.rip)
        if entry.kind in ("out", "in") and entry.where is not None:
            row["device"] = self._device(entry.where)
        return row

    def _device(self, port: int) -> str:
        owner = self.machine.bus.owner(port)
        return "" if owner is None else str(owner.name)

    def _places(self, log: ExitLog) -> list[dict[str, Any]]:
        counts = Counter(dict(log.counts)).most_common(_PLACES)
        return [
            {
                "kind": kind,
                "where": "" if where is None else "elsewhere" if where < 0 else f"{where:#x}",
                "count": f"{count:,}",
            }
            for (kind, where), count in counts
        ]

    @action
    def show(self, first: int, count: int) -> None:
        """Sends the kept exits from the `first`-th on."""
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in (first, count)):
            raise MisuseError(f"cannot show {count!r} exits from {first!r}")
        self._first, self._count = first, min(max(count, 1), 2000)
        self.view = self._view(rate=None)

    @action
    def clear(self) -> None:
        """Forgets all exits so far."""
        self.log.clear()
        self._first = 0
        self.view = self._view(rate=None)

    def lines(self) -> list[Line]:
        view = self.view
        lines: list[Line] = [[Span(f"{view.get('all', 0)} exits, the latest {view.get('total', 0):,} kept")]]
        for place in view.get("places", ()):
            lines.append([Span(f"{place['count']:>12} ", "name"), Span(f"{place['kind']} {place['where']}")])
        lines.append([])
        for row in view.get("rows", ())[-40:]:
            lines.append(
                [
                    Span(f"{row['n']:>8} {row['us']:>14} us  ", "dim"),
                    Span(f"{row['kind']:10} {row['where']:>10} {row['value']:>12}  "),
                    Span(f"{row.get('label') or row.get('rip', '')}", "name"),
                ]
            )
        return lines

    def table(self) -> Table:
        """All kept exits, not only those in sight."""
        entries = self.log.entries()
        number = self.log.total - len(entries)
        return Table(
            ("number", "time_ns", "kind", "where", "size_bytes", "value", "rip", "symbol"),
            [
                (
                    number + n,
                    entry.time_ns,
                    entry.kind,
                    "" if entry.where is None else f"{entry.where:#x}",
                    entry.size_bytes,
                    "" if entry.value is None else f"{entry.value:#x}",
                    "" if entry.rip is None else f"{entry.rip:#x}",
                    "" if entry.rip is None else self.cpu.symbols.label(entry.rip),
                )
                for n, entry in enumerate(entries)
            ],
        )

    def figure(self) -> Any:
        """The timeline: a lane a place, a mark an exit."""
        from matplotlib.figure import Figure

        entries = self.log.entries()
        start = entries[0].time_ns if entries else 0
        names = list(dict.fromkeys(_place(entry) for entry in entries))
        figure = Figure(figsize=(7, 1.2 + 0.3 * max(1, len(names))), layout="constrained")
        ax = figure.subplots()
        for lane, name in enumerate(names):
            times = [(entry.time_ns - start) / 1e6 for entry in entries if _place(entry) == name]
            ax.plot(times, [lane] * len(times), "|", markersize=10, color="#1d4ed8")
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        emulated = self.machine.host.info.emulated
        ax.set_xlabel("time since the first exit shown, ms" + (" (served under emulation)" if emulated else ""))
        ax.set_title(f"Exits to user space, vcpu {self.cpu.index}", loc="left")
        return figure


def _place(entry: ExitEntry) -> str:
    return _name(entry.kind, entry.where)


def _name(kind: str, where: int | None) -> str:
    return kind if where is None else f"{kind} {where:#x}"


def _timeline(entries: list[ExitEntry]) -> dict[str, Any]:
    """Exits a bin of time for the commonest places, over the time the kept exits span."""
    if not entries:
        return {"lanes": [], "span": ""}
    start, span = entries[0].time_ns, max(1, entries[-1].time_ns - entries[0].time_ns)
    # Ten thousand entries at every step: sorted once, in as little Python as can be.
    times: dict[tuple[str, int | None], list[int]] = defaultdict(list)
    for time_ns, kind, where, *_ in entries:
        times[kind, where].append(time_ns)
    commonest = sorted(times.items(), key=lambda item: -len(item[1]))[:_LANES]
    edges = [start + (span * n + _BINS - 1) // _BINS for n in range(_BINS)]
    lanes = []
    for (kind, where), found in commonest:
        begin = [bisect_left(found, edge) for edge in edges] + [len(found)]
        bins = [after - before for before, after in pairwise(begin)]
        lanes.append({"name": _name(kind, where), "count": f"{len(found):,}", "bins": bins})
    return {"lanes": lanes, "span": f"{span / 1e6:,.3f} ms"}
