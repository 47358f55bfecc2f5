"""`ExitTrace`: a trace's exits on a time line, a lane a vcpu, from all of it down to one exit.

A page draws from columns (`exit_columns`) that it asks for piece by piece, `_PIECE` rows at once and the next when it
has the last: a page that is slow is asked nothing. The widget's state has only names, counts and a small picture of
everything, which is drawn until the columns are there, and in a saved page.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Any, ClassVar

import anywidget
import numpy as np
import traitlets

from kvmbench.debug.cpu import Cpu
from kvmbench.debug.machine import Machine
from kvmbench.debug.step_rows import exit_name
from kvmbench.errors import MisuseError
from kvmbench.traces.exits import NO_USER_EXIT, NOT_TOLD, ExitTable
from kvmbench.traces.live import LiveTrace, trace
from kvmbench.traces.summary import Summary, summarise
from kvmbench.traces.trace import Mark, Trace
from kvmbench.traces.words import counted, show_ns
from kvmbench_widgets import exit_columns, export
from kvmbench_widgets.exit_columns import COLUMNS, Columns, Reasons
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.library import Library
from kvmbench_widgets.panel import Panel, _answer_while_cells_run, action

_PIECE = 1 << 18
_MOST = 2_000_000
_BUCKETS = 240
# While a trace runs it is looked at this often, and for a quarter of the time at most; no more of it than so many
# bytes, for which a look takes some 0.3 s.
_LIVE_S, _IDLE_SHARE = 0.25, 3.0
_LIVE_BYTES = 32 << 20
_ENDS_S = 10.0
# What is drawn of marks and gaps, and how many marks are sent with their text.
_MOST_MOMENTS, _MOST_TEXTS, _TEXT = 200_000, 2000, 60
_MOST_SAVED = 200_000
_NO_EXITS = "no exits"

# Marks; when gaps begin and end, and what was lost in them.
Moments = tuple[tuple[Mark, ...], tuple[tuple[int, int, int], ...]]


class _Alone:
    # What a panel asks of its machine's session, where there is no machine: a trace runs nothing.
    def __init__(self) -> None:
        self.lock = threading.RLock()

    def settle(self, cpu: object) -> None: ...

    def wait(self, cpu: object, timeout_s: float | None = None) -> bool:
        return True


class ExitTrace(Panel):
    """Exits of a trace over time: ``kw.ExitTrace(t)``; while the trace runs, it grows.

    Attributes:
        trace: the trace.
        most: so many exits are shown at once, the latest.
        hidden: names of reasons that are left out.
        span: what is in sight, in nanoseconds since the first exit, [] for all: below 2**53, as JSON numbers go.
        chosen: the stretch of time that was chosen, likewise; [] for none.
        counts: what `chosen` holds, by reason.
    """

    MODULE = "exit_trace"
    TITLE = "Exit trace"
    THEIRS: ClassVar[frozenset[str]] = frozenset({"hidden", "span"})

    hidden = traitlets.List(traitlets.Unicode()).tag(sync=True)
    span = traitlets.List(traitlets.Float(), maxlen=2).tag(sync=True)
    chosen = traitlets.List(traitlets.Float(), maxlen=2).tag(sync=True)
    counts = traitlets.Dict().tag(sync=True)

    def __init__(self, target: Trace | Machine | Cpu, *, most: int = _MOST, **traits: Any) -> None:
        """Shows a trace, taken from a machine or opened from a file.

        Args:
            target: the trace; of a machine, one is begun, which ends with the widget.
            most: so many exits are shown at once, the latest; a page needs some 43 bytes for each.

        Raises:
            MisuseError: `target` is neither, or there is no such option.
            BusyError: the machine has a trace already.
        """
        # What `close` looks at, which is called of what was never made, too.
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._own = self._made = False
        if not isinstance(most, int) or isinstance(most, bool) or not 1000 <= most <= 50_000_000:
            raise MisuseError(f"most is how many exits are shown, 1,000 to 50,000,000, not {most!r}")
        self._refuse_unknown(traits, "most")
        if isinstance(target, Cpu):
            target = target.machine
        if isinstance(target, Machine):
            target = trace(target).start()
            self._own = True
        if not isinstance(target, Trace):
            raise MisuseError(f"ExitTrace shows a trace, as kb.trace(m) gives it, or a machine, not {target!r:.80}")
        self.trace, self.most = target, most
        self.session: Any = _Alone()
        self._cpu: Any = None
        # The trace as it was looked at last, its exits, and whether these are only its end.
        self._now: Trace = target
        self._only_end = False
        self._table: ExitTable | None = None
        self._reasons = Reasons()
        self._vcpus: list[int] = []
        self._columns: Columns = {name: np.zeros(0, kind) for name, kind in COLUMNS}
        self._zero = self._base = self._version = 0
        # Of each version, how many rows it begins with as the one before did.
        self._kept: deque[tuple[int, int]] = deque(maxlen=64)
        self._moments: Moments = ((), ())
        self._moments_number = 0
        anywidget.AnyWidget.__init__(self, where=str(target.provenance), library=Library.reference(), **traits)
        _answer_while_cells_run(self.comm)
        self.on_msg(self._receive)
        self.refresh()
        self._made = True
        if self._is_growing():
            self._thread = threading.Thread(target=self._follow, name="kvmbench exit trace", daemon=True)
            self._thread.start()

    # A trace grows.

    def _is_growing(self) -> bool:
        return isinstance(self.trace, LiveTrace) and not self.trace.ended

    def _follow(self) -> None:
        growing, pause = True, _LIVE_S
        while growing and not self._closing.wait(pause):
            growing = self._is_growing()  # asked before: what ends now is looked at once more
            began = time.monotonic()
            self.refresh()
            pause = max(_LIVE_S, _IDLE_SHARE * (time.monotonic() - began))

    def close(self) -> None:
        """Ends the widget, its thread, and the trace if it began that."""
        self._closing.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(_ENDS_S)
        if self._own and isinstance(self.trace, LiveTrace):
            self.trace.stop()
        super().close()

    @property
    def cpu(self) -> Cpu:
        """A trace has no one vcpu; `trace` has all."""
        raise MisuseError("an ExitTrace shows all vcpus of a trace")

    @cpu.setter
    def cpu(self, cpu: Cpu) -> None:
        raise MisuseError("an ExitTrace shows all vcpus of a trace")

    @property
    def machine(self) -> Machine:
        machine = getattr(self.trace, "machine", None)
        if not isinstance(machine, Machine):
            raise MisuseError("this trace is of no machine that is here")
        return machine

    @property
    def selected(self) -> ExitTable:
        """The exits in `chosen`; in `span` if nothing is; else all that are shown. Without reasons that are hidden."""
        return self._within(self.chosen or self.span)

    @traitlets.validate("hidden")
    def _check_hidden(self, proposal: Any) -> list[str]:
        names: list[str] = proposal["value"]
        unknown = [name for name in names if name not in self._reasons.names] if self._made else []
        if unknown:
            raise traitlets.TraitError(f"no exit here has the reason {unknown[0]!r:.60}")
        return names

    @traitlets.validate("span")
    def _check_span(self, proposal: Any) -> list[float]:
        span: list[float] = proposal["value"]
        if span and not (len(span) == 2 and _is_time(span[0]) and _is_time(span[1]) and span[0] < span[1]):
            raise traitlets.TraitError(f"a span is [start, end] in nanoseconds, or [] for all, not {span!r:.60}")
        return span

    def refresh(self) -> None:
        """Takes in what the trace has now."""
        growing = self._is_growing()
        try:
            # Not under the lock: of a running trace it takes its time. Everything is looked at as of one moment.
            now, since_ns = self._look(growing)
            if not growing or now.data is not self._now.data or self._table is None:
                exits = now.exits if since_ns is None else now.exits.between(since_ns, 1 << 62)
                moments = _moments(now, exits)
            else:
                exits, moments = self._table, self._moments
        except Exception as error:
            self.fail(error)
            return
        with self.session.lock:
            self._now, self._only_end = now, since_ns is not None
            if moments != self._moments:
                self._moments = moments
                self._moments_number += 1
            self._take(exits)
            self.view = self.make_view()
            host = getattr(getattr(self.trace, "machine", None), "host", None)
            self.state = "lost" if growing and getattr(host, "lost", None) else "stopped"

    def _look(self, growing: bool) -> tuple[Trace, int | None]:
        if not growing or not isinstance(self.trace, LiveTrace):
            return self.trace, None
        data, since_ns = self.trace.latest(_LIVE_BYTES)
        return Trace(data), since_ns

    def _take(self, exits: ExitTable) -> None:
        if exits is self._table:
            return
        vcpus = sorted({*self._vcpus, *np.unique(exits.vcpu).tolist()})
        if len(exits) and not len(self._columns["time"]):
            self._zero = int(exits.time_ns[0])
        # A window that slid with each new exit would be sent anew with each.
        base = 0 if self._only_end else self._base
        if len(exits) - base > self.most + (self.most // 4 if self._is_growing() else 0):
            base = len(exits) - self.most
        shown = exits.take(np.arange(base, len(exits))) if base else exits
        columns = exit_columns.pack(shown, self._reasons, vcpus, self._zero)
        same = base == self._base and vcpus == self._vcpus and not self._only_end
        kept = exit_columns.first_difference(self._columns, columns) if same else 0
        self._version += 1
        self._kept.append((self._version, kept))
        self._table, self._columns, self._base, self._vcpus = exits, columns, base, vcpus

    # What is drawn.

    def make_view(self) -> dict[str, Any]:
        columns, exits = self._columns, self._table
        assert exits is not None
        counts = np.bincount(columns["reason"], minlength=len(self._reasons.names)).tolist()
        of_lane = np.bincount(columns["lane"], minlength=len(self._vcpus)).tolist()
        labels = self._now.data.labels
        notes = list(self._now.notes)
        if self._only_end:
            notes.append(f"while the trace runs, only its latest {len(columns['time']):,} exits are shown here")
        elif self._base:
            notes.append(f"only the latest {len(columns['time']):,} of {len(exits):,} exits are shown here")
        return {
            "version": self._version,
            "total": len(columns["time"]),
            "all": f"{'the latest ' * self._only_end}{len(exits):,}",
            "live": self._is_growing(),
            "begun": not isinstance(self.trace, LiveTrace) or self.trace.started,
            "clock": self.trace.provenance.time_unit_note,
            "lanes": [
                {"name": labels[vcpu] if vcpu < len(labels) else f"vcpu {vcpu}", "count": count}
                for vcpu, count in zip(self._vcpus, of_lane, strict=True)
            ],
            "reasons": [
                {"name": name, "together": together, "count": count}
                for name, together, count in zip(self._reasons.names, self._reasons.together, counts, strict=True)
            ],
            "moments": self._moments_number,
            "marks": len(self._moments[0]),
            "gaps": len(self._moments[1]),
            "notes": notes,
            "picture": exit_columns.picture(columns, len(self._vcpus), self._reasons.together, _BUCKETS),
        }

    @action
    def rows(self, version: int, first: int) -> None:
        """Sends the page columns from a row on, or from where they differ from those of the version it has."""
        if not _is_count(version) or not _is_count(first):
            raise MisuseError(f"cannot show exits from {first!r} of version {version!r}")
        total = len(self._columns["time"])
        since = [kept for number, kept in self._kept if number > version]
        known = version == self._version or (since and self._version - version == len(since))
        first = min([first, total, *since]) if known else 0
        last = min(total, first + _PIECE)
        self.send(
            {"do": "rows", "version": self._version, "first": first, "count": last - first, "total": total},
            buffers=[self._columns[name][first:last].tobytes() for name, _ in COLUMNS],
        )

    @action
    def moments(self) -> None:
        """Sends the page marks and gaps."""
        marks, gaps = self._moments
        lane = {vcpu: n for n, vcpu in enumerate(self._vcpus)}
        self.send(
            {
                "do": "moments",
                "number": self._moments_number,
                "texts": [mark.text[:_TEXT].encode("utf-8", "replace").decode() for mark in marks[:_MOST_TEXTS]],
            },
            buffers=[
                np.array([mark.time_ns - self._zero for mark in marks], "<f8").tobytes(),
                np.array([lane.get(mark.vcpu, -1) for mark in marks], "<i2").tobytes(),
                np.array([[a - self._zero, b - self._zero, lost] for a, b, lost in gaps], "<f8").tobytes(),
            ],
        )

    @action
    def tell(self, row: int) -> None:
        """Sends the page one exit in words."""
        total = len(self._columns["time"])
        if not _is_count(row) or row >= total:
            raise MisuseError(f"there is no exit {row!r}; there are {total:,}")
        self.send({"do": "told", "version": self._version, "row": row, "words": self.words(row)})

    def words(self, row: int) -> str:
        """An exit of those shown, in words: when, why, and where the time went."""
        exits, row = self._table, row + self._base
        assert exits is not None
        rip, user = int(exits.rip[row]), int(exits.user_exit[row])
        spent = [
            ("in the guest" if exits.isa[row] else "in KVM_RUN", int(exits.guest_ns[row]), "before it"),
            ("KVM", int(exits.kvm_ns[row]), "after it"),
            ("user space", int(exits.user_ns[row]) or NOT_TOLD, ""),
            ("stood", int(exits.outside_ns[row]) or NOT_TOLD, ""),
        ]
        times = [f"{what} {show_ns(ns)} {when}".strip() for what, ns, when in spent if ns != NOT_TOLD]
        said = [
            f"{exits.names[exits.reason[row]]} at {_since(int(exits.time_ns[row]) - self._zero)}",
            exits.words(row),
            f"at {self._now.data.places.instruction(rip)}" if rip else "",
            f"KVM_RUN returned {exit_name(user)}" if user != NO_USER_EXIT and exits.isa[row] else "",
            ", ".join(times) or "no times are told",
        ]
        clock = self.trace.provenance.time_unit_note
        return "; ".join(part for part in said if part) + (f" ({clock})" if clock else "")

    @action
    def choose(self, start: float, end: float) -> None:
        """Chooses a stretch of time, in nanoseconds since the first exit, and counts what is in it."""
        if not (_is_time(start) and _is_time(end) and start < end):
            raise MisuseError(f"cannot choose from {start!r} to {end!r}")
        self.chosen = [float(start), float(end)]
        self._count()

    @action
    def forget(self) -> None:
        """Chooses nothing."""
        self.chosen, self.counts = [], {}

    def _within(self, span: list[float]) -> ExitTable:
        exits, zero = self._table, self._zero
        assert exits is not None
        if len(span) == 2:
            exits = exits.between(zero + math.floor(span[0]), zero + math.ceil(span[1]))
        elif self._base:
            exits = exits.take(np.arange(self._base, len(exits)))
        gone = [n for n, name in enumerate(exits.names) if name in self.hidden]
        return exits.take(~np.isin(exits.reason, gone)) if gone else exits

    def _summary(self, span: list[float]) -> Summary:
        clock = self.trace.provenance.time_unit_note
        return summarise(self._within(span), ("reason",), places=self._now.data.places, clock=clock)

    @traitlets.observe("hidden")
    def _count(self, change: object = None) -> None:
        if len(self.chosen) != 2 or self._table is None:
            return
        summary = self._summary(self.chosen)
        names = ("total_ns", "mean_ns", "p50_ns", "p99_ns", "max_ns")
        self.counts = {
            "exits": f"{summary.exits:,}",
            "length": show_ns(self.chosen[1] - self.chosen[0]),
            "rows": [
                [row.key[0], f"{row.count:,}", *(show_ns(getattr(row, name)) for name in names)] for row in summary
            ],
            "where": summary.where_time_went if summary.exits else "",
        }

    # Without a page.

    def lines(self) -> list[Line]:
        view = self.view
        many = len(view["lanes"])
        lines: list[Line] = [[Span(f"{view['all']} exits of {many} vcpu{'s' * (many != 1)}")]]
        if view["live"]:
            lines[0].append(Span(", the trace runs", "name"))
        if not view["total"]:
            lines.append([Span(_NO_EXITS if view["begun"] else "the trace has not begun", "dim")])
        for reason in sorted(view["reasons"], key=lambda each: -each["count"]):
            lines.append([Span(f"{reason['count']:>12,} ", "name"), Span(reason["name"])])
        lines += [[Span(note, "bad")] for note in view["notes"]]
        for row in self.counts.get("rows", ()):
            lines.append([Span("chosen: ", "dim"), Span("  ".join(row))])
        return lines

    def table(self) -> Table:
        """The exits that are chosen, or in sight."""
        exits = self.selected
        if len(exits) > _MOST_SAVED:
            raise MisuseError(
                f"{len(exits):,} exits are too many for a file; choose a stretch of time, or t.exits.to_dataframe()"
            )
        names = ("time_ns", "vcpu", "guest_ns", "kvm_ns", "user_ns", "outside_ns")
        columns = [getattr(exits, name).tolist() for name in names]
        rip = [hex(each) if each else "" for each in exits.rip.tolist()]
        words = [exits.words(row) for row in range(len(exits))]
        rows = list(zip(*columns, exits.reasons.tolist(), rip, words, strict=True))
        return Table((*names, "reason", "rip", "words"), rows)

    def figure(self) -> Any:
        """What is in sight, as ``kb.plot.exit_timeline`` draws it."""
        from matplotlib.figure import Figure

        from kvmbench.plot import exit_timeline

        figure = Figure(figsize=(7, 1.5 + 0.3 * max(1, len(self._vcpus))), layout="constrained")
        start, end = (self._zero + int(each) for each in self.span) if len(self.span) == 2 else (None, None)
        exit_timeline(self.trace, by="reason", start_ns=start, end_ns=end, ax=figure.subplots())
        return figure

    def _file(self, kind: str) -> bytes:
        if self._is_growing():
            self.refresh()
        where = self.trace.provenance
        return export.make(kind, title=self.TITLE, figure=self.figure, table=self.table, text=self.text, where=where)

    def __repr__(self) -> str:
        return f"<ExitTrace of {counted(len(self._columns['time']), 'exit')}>"


def _moments(now: Trace, exits: ExitTable) -> Moments:
    # A gap says when it ended; it began with the last exit before.
    gaps = now.events.gaps[-_MOST_MOMENTS:]
    ends = [gap.time_ns for gap in gaps]
    before = np.searchsorted(exits.time_ns, ends) - 1
    begins = exits.time_ns[np.maximum(before, 0)].tolist() if len(exits) else ends
    lost = [gap.lost for gap in gaps]
    return now.marks[-_MOST_MOMENTS:], tuple(zip(begins, ends, lost, strict=True))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1 << 62


def _since(ns: int) -> str:
    # All digits: two exits of a trace of hours may be a hundred nanoseconds apart.
    return f"{ns / 1e9:,.9f} s" if abs(ns) >= 10**9 else f"{ns / 1e6:,.6f} ms" if abs(ns) >= 10**6 else f"{ns:,} ns"
