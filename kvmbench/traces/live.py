"""`kb.trace`: a trace that is being taken."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from kvmbench.arguments import spelled_out
from kvmbench.debug.code_image import CodeImage
from kvmbench.errors import (
    BusyError,
    ClosedError,
    HostLost,
    KvmbenchError,
    KvmIoctlError,
    MisuseError,
    UnsupportedError,
)
from kvmbench.host import trace_messages
from kvmbench.host.channel import LocalChannel
from kvmbench.kvm.stats import Stats, StatsSample
from kvmbench.traces.assemble import attribute, count_gaps, event_table, run_log, without_cut, without_others
from kvmbench.traces.collector import Collector
from kvmbench.traces.event_table import NO_VCPU, EventTable
from kvmbench.traces.format import EventFormat, PageLayout, parse_format, parse_header_page
from kvmbench.traces.growing import GrowingEvents
from kvmbench.traces.neighbours import WITH_HOLES, WITHOUT_LOG, count_vms
from kvmbench.traces.options import MARK_PORT, Options, advice, check_options, choose_events
from kvmbench.traces.places import Places
from kvmbench.traces.trace import Mark, Trace, TraceData, guest_marks
from kvmbench.traces.words import counted

if TYPE_CHECKING:
    from kvmbench.machine import Machine

# Events of the kernel's own by which marks come.
_MARK_EVENTS = ("ftrace/print", "ftrace/raw_data")
_OUR_MARK = "kvmbench: "
_MOST_MARK_BYTES = 1000
# Instructions whose code is kept: those with the most exits.
_MOST_CODE = 4096
# Marks that only measure how far the clocks are apart; the least counts.
_CLOCK_MARKS = 8
# An emulator's clock may be read with such an error; farther away it is another mark of the same text.
_MOST_CLOCK_ERROR_NS = 10_000_000


@spelled_out
def trace(
    machine: Machine,
    events: str | Iterable[str] | None = None,
    *,
    log: bool = True,
    buffer: int | str = "4M",
    log_rows: int = 1 << 16,
    limit: int | str = "1G",
    own_only: bool | None = None,
    mark_port: int | None = MARK_PORT,
) -> LiveTrace:
    """Traces a machine's exits: ``with kb.trace(m) as t: m.cpu.run()``, then ``t.summary()``.

    There are two sources. The core's log has each KVM_RUN, whoever one may be. The kernel's events, which say
    what happened inside it, take root on the host: the appliances, or ``kb.connect("local", sudo=True)``.

    Args:
        machine: whose vcpus are traced, those that run already too.
        events: names such as "kvm_exit", or "kvmmmu/*"; None: all of ``kvm/`` if the host gives them; (): none.
        log: keep the log.
        buffer: of each processor's ring of events in the kernel. What does not fit between two readings, some
            10 ms, is lost, counted and shown.
        log_rows: of each vcpu's ring of the log, likewise.
        limit: the trace ends when it has taken so much.
        own_only: leave out what other processes of the host do; None: on all hosts but appliances, where
            interrupts that hit other threads tell something too.
        mark_port: OUT to this port makes a mark of the guest's; None: none does.

    Raises:
        MisuseError: an option that cannot be, or events that the kernel has not.
        UnsupportedError: events were asked for by name, and the host does not give them.
        BusyError: the machine is being traced already.
    """
    # A bare machine will do, so it is not asked for its type.
    if not all(hasattr(machine, name) for name in ("host", "vm", "vcpus")):
        raise MisuseError(f"machine={machine!r:.80}: give the machine, as kb.Machine(host) makes it")
    if own_only is None:
        own_only = machine.host.info.kind != "appliance"
    options = check_options(
        events, log=log, buffer=buffer, log_rows=log_rows, limit=limit, own_only=own_only, mark_port=mark_port
    )
    return LiveTrace(machine, options)


class LiveTrace(Trace):
    """A trace between `start` and `stop`, which a ``with`` statement calls; afterwards it is a trace like any other.

    While it runs, everything it shows is what there is so far.

    Attributes:
        requested: the events that are traced.
    """

    def __init__(self, machine: Machine, options: Options) -> None:
        super().__init__(TraceData(EventTable(), run_log((), {}), machine.host.provenance))
        self.requested: tuple[str, ...] = ()
        self._machine = machine
        self._core = machine.host.core
        self._options = options
        self._vcpus = {vcpu.handle: n for n, vcpu in enumerate(machine.vcpus)}
        self._opened: trace_messages.Opened | None = None
        self._page_bytes = 4096
        self._collector: Collector | None = None
        self._formats: dict[int, EventFormat] = {}
        self._layout = PageLayout()
        # What was decoded, and of how many pieces; within _assembling.
        self._events: GrowingEvents | None = None
        self._decoded = 0
        self._trouble: list[str] = []
        self._brackets: list[tuple[int, int, str]] = []
        self._stats: list[Stats] = []
        self._before: list[StatsSample] = []
        # Whether each vcpu has a thread of its own, and whether there were no other machines at any look.
        self._dedicated = not isinstance(self._core.channel, LocalChannel)
        self._alone = True
        self._running = False
        self._seen = (-1, "")
        self._ended = False
        self._latest: tuple[tuple[int, int, str], tuple[TraceData, int]] | None = None
        # A reader on another thread must not put what it saw in the place of what `stop` made.
        self._assembling = threading.Lock()

    @property
    def running(self) -> bool:
        """Between `start` and `stop`."""
        return self._running

    @property
    def started(self) -> bool:
        """Once `start` was called."""
        return self._collector is not None

    @property
    def ended(self) -> bool:
        """Once `stop` has taken what was left: nothing of it changes any more."""
        return self._ended

    @property
    def machine(self) -> Machine:
        """Whose vcpus are traced."""
        return self._machine

    # Beginning and end.

    def start(self) -> Self:
        """Begins.

        Raises:
            MisuseError: it has ended: what it took is kept, make a new one.
        """
        if self._running:
            return self
        if self._collector is not None:
            raise MisuseError("this trace has ended and is kept as it is; make a new one with kb.trace(m)")
        if self._machine.closed:
            raise ClosedError("the machine is closed: there is nothing to trace")
        opened = self._open()
        self._look_around()
        try:
            self._collector = Collector(
                self._core,
                opened.handle,
                limit_bytes=self._options.limit_bytes,
                when_full=lambda: trace_messages.trace_set(self._core, opened.handle, False),
            )
            self._open_statistics()
            trace_messages.trace_set(self._core, opened.handle, True)
            self._opened = opened
            self._running = True
            for _ in range(_CLOCK_MARKS if opened.cpus else 0):
                self._mark(f"{_OUR_MARK}clock {len(self._brackets)}")
            self._collector.start()
        except BaseException:
            self._running = False
            self._close(opened)
            raise
        return self

    def stop(self) -> Self:
        """Ends it, takes what is left, and gives the host back what tracing took; idempotent."""
        if not self._running:
            return self
        self._running = False
        opened, collector = self._opened, self._collector
        assert opened is not None
        assert collector is not None
        # A second Ctrl-C must not leave the kernel's directory behind.
        try:
            try:
                with contextlib.suppress(HostLost, ClosedError):
                    trace_messages.trace_set(self._core, opened.handle, False)
            finally:
                collector.stop()
                lost = self._count_lost(opened)
                with self._assembling:
                    self._data = self._assemble(self._growth(), lost)
                    self._events = None
                self._with_code()
                collector.forget()  # all of it is in the tables
        finally:
            self._latest = None
            self._close(opened)
            self._ended = True
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _open(self) -> trace_messages.Opened:
        options, core = self._options, self._core
        names = self._choose()
        try:
            opened = trace_messages.trace_open(
                core,
                self._machine.vm.handle,
                names,
                log_rows=options.log_rows,
                buffer_kb=options.buffer_bytes >> 10,
                own_only=options.own_only,
            )
        except BusyError as error:
            raise BusyError(
                "this machine is being traced already; a machine has one trace at a time: stop() the other first"
            ) from error
        try:
            if opened.trouble:
                self._without_events(opened.trouble, opened.error_number)
            elif names:
                self._describe(names, opened)
        except BaseException:
            core.close_handle(opened.handle)
            raise
        return opened

    def _choose(self) -> tuple[str, ...]:
        if not self._options.patterns:
            return ()
        try:
            there = trace_messages.available_events(self._core)
        except KvmIoctlError as error:
            self._without_events(f"tracefs cannot be had: {os.strerror(error.errno or 0)}", error.errno or 0)
            return ()
        return choose_events(self._options.patterns, there)

    def _without_events(self, why: str, error_number: int) -> None:
        text = f"no events of the kernel: {why}{advice(error_number)}"
        if self._options.insist:
            raise UnsupportedError(text)
        self._trouble.append(text)

    def _describe(self, names: tuple[str, ...], opened: trace_messages.Opened) -> None:
        core = self._core
        self.requested = names
        if not self._options.log_rows:
            self._trouble.append("there is no log: what user space took to answer is among the time of KVM")
        self._page_bytes = opened.page_bytes
        self._layout = parse_header_page(trace_messages.header_page(core))
        for name in (*names, *_MARK_EVENTS):
            described = parse_format(trace_messages.event_format(core, name), system=name.split("/")[0])
            self._formats[described.id] = described
        if self._options.own_only and not opened.filtered:
            self._trouble.append(
                "the kernel cannot tell this process from others here: all were traced, then sorted out"
            )

    def _close(self, opened: trace_messages.Opened) -> None:
        self._opened = None
        for stats in self._stats:
            with contextlib.suppress(KvmbenchError):
                stats.close()
        # It may have ended with its machine or its host.
        with contextlib.suppress(KvmbenchError):
            self._core.close_handle(opened.handle)

    # KVM's own statistics.

    def _open_statistics(self) -> None:
        # Not while a vcpu runs, for then its descriptor is busy.
        try:
            self._stats = [vcpu.get_stats_fd() for vcpu in self._machine.vcpus]
            self._before = [stats.read() for stats in self._stats]
        except KvmbenchError as error:
            self._before = []
            self._trouble.append(f"no statistics of KVM's: {error}")

    def _growth(self) -> tuple[dict[str, int], ...]:
        try:
            return tuple(s.read().since(before) for s, before in zip(self._stats, self._before, strict=True))
        except (KvmbenchError, ValueError):
            return ()

    def _count_lost(self, opened: trace_messages.Opened) -> dict[int, int]:
        # Pages do not always tell how many events were lost before them; the kernel's statistics do.
        lost = {}
        with contextlib.suppress(KvmbenchError):
            for cpu in range(opened.cpus):
                told = trace_messages.ring_statistics(self._core, opened.handle, cpu)
                lost[cpu] = int(sum(told.get(name, 0) for name in ("overrun", "commit overrun", "dropped events")))
        return lost

    # Marks.

    def mark(self, text: str) -> None:
        """Names this moment, in the kernel's own trace where that runs.

        Raises:
            MisuseError: the trace does not run, or the text is empty or longer than 1000 bytes.
        """
        size = 0
        with contextlib.suppress(UnicodeEncodeError):
            size = len(text.encode()) if isinstance(text, str) else 0
        if not 0 < size <= _MOST_MARK_BYTES or text.startswith(_OUR_MARK):
            raise MisuseError(f"a mark is a text of 1 to {_MOST_MARK_BYTES} bytes, not {text!r:.60}")
        if not self._running:
            raise MisuseError("the trace does not run: mark inside its with statement")
        self._mark(text)

    def _mark(self, text: str) -> None:
        assert self._opened is not None
        before, after, _ = trace_messages.trace_mark(self._core, self._opened.handle, text)
        self._brackets.append((before, after, text))

    def _place_marks(self, events: EventTable) -> tuple[list[Mark], int | None]:
        # The kernel writes marks in the order they came; its time lies between our two readings of the clock,
        # and by how much it might not is what the two clocks may differ by.
        printed = events.get("print")
        kernels: dict[str, list[int]] = {}
        for n in range(len(printed) if printed is not None else 0):
            assert printed is not None
            kernels.setdefault(printed.text(n), []).append(int(printed.time_ns[n]))
        marks: list[Mark] = []
        errors: list[int] = []
        for before, after, text in self._brackets:
            times, at = kernels.get(text), (before + after) // 2
            # The nearest, for an equal one before it may be lost.
            distance, nearest = min((abs(time - at), time) for time in times) if times else (0, None)
            if times and nearest is not None and distance <= after - before + _MOST_CLOCK_ERROR_NS:
                times.remove(nearest)
                at = nearest
                errors.append(max(at - before, after - at))
            if not text.startswith(_OUR_MARK):
                marks.append(Mark(at, text, "host", -1))
        return marks, min(errors, default=None)

    # What there is.

    @property
    def data(self) -> TraceData:
        collector = self._collector
        if self._running and collector is not None:
            collector.drain()
            with self._assembling:
                # An end of reading is told in the notes.
                seen = (collector.taken_bytes, collector.trouble)
                if self._running and seen != self._seen:
                    self._seen = seen
                    self._data = self._assemble(())
        return self._data

    def latest(self, most_bytes: int) -> tuple[TraceData, int | None]:
        """What was taken last of a trace that runs, for who shows it again and again: `data` takes longer each time.

        Args:
            most_bytes: of the kernel's pages.

        Returns:
            The data, and from when on (CLOCK_MONOTONIC of the host, nanoseconds) all is in it; None: it is `data`.
        """
        collector = self._collector
        if not self._running or collector is None or collector.taken_bytes <= most_bytes:
            return self.data, None
        collector.drain()
        seen = (most_bytes, collector.taken_bytes, collector.trouble)
        if self._latest is None or self._latest[0] != seen:
            pages, rows, since_ns = collector.end(most_bytes)
            data = self._assemble((), pages=pages, rows=rows)
            self._latest = seen, (replace(data, log=without_cut(data.log, data.events, since_ns)), since_ns)
        return self._latest[1]

    def _assemble(
        self,
        statistics: tuple[dict[str, int], ...],
        lost: dict[int, int] | None = None,
        *,
        pages: list[tuple[int, memoryview]] | None = None,
        rows: list[tuple[int, memoryview, int]] | None = None,
    ) -> TraceData:
        collector = self._collector
        assert collector is not None
        options = self._options
        log = run_log(list(collector.rows) if rows is None else rows, self._vcpus)
        if pages is None:
            events = self._decode(collector, lost or {})
        else:
            events = event_table(pages, self._formats, page_bytes=self._page_bytes, layout=self._layout)
        self._look_around()
        events = attribute(events, log, self._vcpus, dedicated=self._dedicated, alone=self._alone)
        marks, error = self._place_marks(events)
        nobodys = 0
        if options.own_only and not options.log_rows:
            nobodys = sum(len(c) for c in events.of_vcpu(NO_VCPU).values() if c.name != "print")
        events = without_others(events, marked=_OUR_MARK, only_ours=options.own_only)
        if options.mark_port is not None:
            marks += guest_marks(log, options.mark_port)
        notes = list(self._trouble)
        if not self._alone and events.count and (log.lost or not options.log_rows):
            notes.append(WITH_HOLES if options.log_rows else WITHOUT_LOG)
        if nobodys:
            notes.append(f"without the log nothing tells whose {counted(nobodys, 'event')} were: left out")
        if collector.trouble:
            notes.append(collector.trouble)
        if collector.full:
            notes.append(f"the limit of {options.limit_bytes:,} bytes was reached: what came later is not here")
        return TraceData(
            events,
            log,
            self._data.provenance,
            tuple(sorted(marks)),
            error,
            tuple(notes),
            statistics,
            self._places(),
        )

    def _look_around(self) -> None:
        self._alone = self._dedicated or (self._alone and count_vms() <= 1)

    def _decode(self, collector: Collector, lost: dict[int, int]) -> EventTable:
        # All events so far: only what came since the last time is decoded.
        if self._events is None:
            self._events = GrowingEvents(self._formats, page_bytes=self._page_bytes, layout=self._layout)
        end = len(collector.pages)
        self._events.add(collector.pages[self._decoded : end])
        self._decoded = end
        return self._events.table(count_gaps(self._events.gaps, lost))

    def _places(self) -> Places:
        # A bare machine has neither symbols nor a disassembler.
        symbols = getattr(self._machine, "symbols", None)
        return Places() if symbols is None else Places(dict(symbols))

    def _with_code(self) -> None:
        # The code that exits came from, as it is now: it may be gone when somebody asks. Not while a vcpu runs.
        cpus = getattr(self._machine, "cpus", ())
        if not cpus or any(cpu.running for cpu in cpus):
            return
        rips, counts = np.unique(self.exits.rip, return_counts=True)
        most = rips[np.argsort(-counts, kind="stable")][:_MOST_CODE]
        with contextlib.suppress(KvmbenchError):
            mode = cpus[0].mode
            code = CodeImage.capture(cpus[0].read_code, (mode.linear(rip) for rip in most.tolist() if rip))
            places = Places(self._data.places.symbols, code, mode.bits, mode.code_base)
            self._data = replace(self._data, places=places)

    def _now(self) -> Trace:
        if not self._running:
            return self
        now = Trace(self.data)
        # Another look without anything new need not make the exits again.
        if self._exits is None or self._exits[0] is not now.data:
            self._exits = now.data, now.exits
        now._exits = self._exits
        return now

    def _kind(self) -> str:
        return "Trace, running" if self._running else "Trace" if self.started else "Trace, not started"

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what is missing: events lost, sources that the host has not, a trace that was not started."""
        if self.started:
            return super().notes
        return ("nothing is traced yet: with kb.trace(m) as t: m.cpu.run(), or t.start() and later t.stop()",)
