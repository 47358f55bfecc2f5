"""Perfetto's protobuf, which https://ui.perfetto.dev opens: a track for each vcpu, with what it did nested in it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kvmbench.errors import UnsupportedError
from kvmbench.host.cache import replacing
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.exits import ExitTable
from kvmbench.traces.export.timeline import (
    EXIT,
    NAMES,
    Words,
    clock_name,
    lost_of,
    moments_of,
    other_kinds,
    slices_of,
    vcpu_name,
    vcpus_of,
    without_length,
)
from kvmbench.traces.run_log import RunLog

if TYPE_CHECKING:
    from kvmbench.traces.trace import Trace

# Of perfetto_trace.proto: TrackEvent.Type, TracePacket.SequenceFlags, BuiltinClock, ChildTracksOrdering.
_BEGIN, _END, _INSTANT = 1, 2, 3
_CLEARED, _NEEDS = 1, 2
_CLOCKS = {"mono": 3, "mono_raw": 5, "boot": 6}
_EXPLICIT = 3
# Identifiers of tracks, which are this file's own.
_PROCESS, _MARKS, _VCPUS, _CPUS, _LOST, _KINDS = 1, 2, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000
# Different packets that are remembered.
_MOST_MADE = 1 << 15
_SHORT = [bytes([value]) for value in range(0x80)]
# Shown in hex, however small.
_ADDRESSES = frozenset(
    ("rip", "guest_rip", "info1", "info2", "gpa", "gva", "hva", "fault_address", "address", "gfn", "port")
)
# Fields of an event and their values, as they are shown beside it.
_Notes = tuple[tuple[str, int | str], ...]


def write_perfetto(path: Path, trace: Trace) -> None:
    """Writes a trace for Perfetto's viewer, packet by packet.

    Args:
        path: the file; one that is there is replaced.
        trace: one that does not run.

    Raises:
        UnsupportedError: the package perfetto is not installed.
        OSError: the file cannot be written.
    """
    try:
        module = importlib.import_module("perfetto.trace_builder.proto_builder")
    except ImportError as error:
        raise UnsupportedError(
            f"Perfetto's format needs the package perfetto ({error}): pip install 'kvmbench[perfetto]'"
        ) from None
    with replacing(path) as file:
        out = _Packets(file, module.TraceProtoBuilder, _CLOCKS.get(trace.data.clock, 0))
        _write(out, trace)


class _Packets:
    # Writes packets. A trace's bytes are those of its packets one after the other.
    def __init__(self, file: IO[bytes], builder: Any, clock_id: int) -> None:
        self._file, self._builder, self._clock_id = file, builder, clock_id

    @contextmanager
    def packet(self) -> Iterator[Any]:
        # One packet to fill in.
        builder = self._builder()
        yield builder.add_packet()
        self._file.write(builder.serialize())

    def bytes_of(self, fill: Callable[[Any], None]) -> bytes:
        # A packet's own bytes, without those around it.
        packet = self._builder().add_packet()
        fill(packet)
        data: bytes = packet.SerializeToString()
        return data

    def write(self, data: bytes) -> None:
        self._file.write(data)

    def clock(self, first_ns: int) -> None:
        # Without it the viewer takes the times of another clock than its own for unknown.
        if not self._clock_id:
            return
        with self.packet() as packet:
            packet.clock_snapshot.primary_trace_clock = self._clock_id
            one = packet.clock_snapshot.clocks.add()
            one.clock_id, one.timestamp = self._clock_id, max(first_ns, 0)

    def track(self, uuid: int, name: str, *, rank: int = 0, description: str = "") -> None:
        with self.packet() as packet:
            track = packet.track_descriptor
            track.uuid, track.parent_uuid, track.name = uuid, _PROCESS, name
            track.sibling_order_rank = rank
            if description:
                track.description = description

    def process(self, name: str, description: str) -> None:
        with self.packet() as packet:
            track = packet.track_descriptor
            track.uuid, track.description = _PROCESS, description
            track.process.pid, track.process.process_name = 1, name
            track.child_ordering = _EXPLICIT

    def sequence(self, track: int, names: Sequence[str], fields: Sequence[str]) -> _Sequence:
        return _Sequence(self, track, names, fields, self._clock_id)


class _Sequence:
    # Packets that say their names once. All of a packet but its time is made once, too: protobuf objects cost
    # microseconds, and most packets of a trace differ in the time alone.
    def __init__(self, out: _Packets, track: int, names: Sequence[str], fields: Sequence[str], clock_id: int) -> None:
        self._out, self._id = out, track
        self._names = {name: n for n, name in enumerate(names, 1)}
        self._fields = {name: n for n, name in enumerate(fields, 1)}
        self._made: dict[tuple[Any, ...], bytes] = {}
        with out.packet() as packet:
            packet.trusted_packet_sequence_id = track
            packet.sequence_flags = _CLEARED | _NEEDS
            packet.trace_packet_defaults.track_event_defaults.track_uuid = track
            if clock_id:
                packet.trace_packet_defaults.timestamp_clock_id = clock_id
            for table, known in (
                (packet.interned_data.event_names, self._names),
                (packet.interned_data.debug_annotation_names, self._fields),
            ):
                for name, number in known.items():
                    entry = table.add()
                    entry.iid, entry.name = number, name

    def begin(self, time_ns: int, name: str, notes: _Notes = ()) -> None:
        """A slice begins."""
        self._write(time_ns, (_BEGIN, name, notes, 0))

    def end(self, time_ns: int) -> None:
        """The slice that began last ends."""
        self._write(time_ns, (_END, "", (), 0))

    def instant(self, time_ns: int, name: str, notes: _Notes = (), track: int = 0) -> None:
        """Something without a length; on another track than the sequence's, if one is given."""
        self._write(time_ns, (_INSTANT, name, notes, track))

    def _write(self, time_ns: int, what: tuple[int, str, _Notes, int]) -> None:
        rest = self._made.get(what)
        if rest is None:
            rest = self._out.bytes_of(lambda packet: self._fill(packet, *what))
            if len(self._made) < _MOST_MADE:
                self._made[what] = rest
        time = _varint(max(time_ns, 0))
        # TracePacket.timestamp is field 8, Trace.packet field 1.
        self._out.write(b"\x0a" + _varint(1 + len(time) + len(rest)) + b"\x40" + time + rest)

    def _fill(self, packet: Any, kind: int, name: str, notes: _Notes, track: int) -> None:
        packet.trusted_packet_sequence_id = self._id
        packet.sequence_flags = _NEEDS
        event = packet.track_event
        event.type = kind
        if track:
            event.track_uuid = track
        if number := self._names.get(name):
            event.name_iid = number
        elif name:
            event.name = name
        for field, value in notes:
            annotation = event.debug_annotations.add()
            annotation.name_iid = self._fields[field]
            if not isinstance(value, int):
                annotation.string_value = value
            elif value < 0:
                annotation.int_value = value
            elif field in _ADDRESSES or value >> 32:
                # The viewer shows a pointer in hex.
                annotation.pointer_value = value
            else:
                annotation.uint_value = value


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _SHORT[value]
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _write(
    out: _Packets,
    trace: Trace,
) -> None:
    data, exits = trace.data, trace.exits
    events, log, marks, provenance, labels = data.events, data.log, data.marks, data.provenance, data.labels
    times = [int(c.time_ns[0]) for c in events.values() if len(c)]
    out.clock(min([*times, *(exits.time_ns[:1].tolist()), *(mark.time_ns for mark in marks)], default=0))
    timed = clock_name(data.clock, provenance)
    out.process(f"KVM: {provenance}; {timed}", "; ".join([f"times: {timed}", *trace.notes, provenance.to_json()]))
    words = Words(exits)
    for vcpu in vcpus_of(events, exits):
        out.track(_VCPUS + vcpu, vcpu_name(vcpu, labels), rank=vcpu, description=f"times: {timed}")
        names = (*NAMES.values(), *exits.names)
        sequence = out.sequence(_VCPUS + vcpu, tuple(dict.fromkeys(names)), ("rip", "info1", "info2", "words"))
        _vcpu(sequence, exits, vcpu, words)
    if marks:
        out.track(_MARKS, "marks", rank=-1)
        sequence = out.sequence(_MARKS, (), ("source", "vcpu"))
        for mark in marks:
            whose = (("vcpu", mark.vcpu),) if mark.vcpu >= 0 else ()
            sequence.instant(mark.time_ns, mark.text or "mark", (("source", mark.source), *whose))
    _moments(out, events, with_print=not marks)
    _lost(out, events, log)


def _vcpu(sequence: _Sequence, exits: ExitTable, vcpu: int, words: Words) -> None:
    open_ends: list[int] = []
    reasons = exits.reason
    for start, end, kind, row in slices_of(exits, vcpu):
        while open_ends and open_ends[-1] <= start:
            sequence.end(open_ends.pop())
        if kind == EXIT:
            sequence.begin(start, exits.names[reasons[row]], _exit(exits, row, words))
        else:
            sequence.begin(start, NAMES[kind])
        open_ends.append(end)
    while open_ends:
        sequence.end(open_ends.pop())
    for row in without_length(exits, vcpu).tolist():
        sequence.instant(int(exits.time_ns[row]), exits.names[reasons[row]], _exit(exits, row, words))


def _exit(exits: ExitTable, row: int, words: Words) -> _Notes:
    notes: list[tuple[str, int | str]] = [("rip", int(exits.rip[row]))]
    if exits.isa[row]:
        notes += (("info1", int(exits.info1[row])), ("info2", int(exits.info2[row])))
    said = words(row)
    return (*notes, ("words", said)) if said else tuple(notes)


def _moments(out: _Packets, events: EventTable, *, with_print: bool) -> None:
    # A sequence for each kind: its track is said by each event, for a kind has those of several vcpus.
    cpus: set[int] = set()
    for number, columns in enumerate(other_kinds(events, with_print=with_print)):
        sequence: _Sequence | None = None
        for moment in moments_of(columns):
            if moment.vcpu < 0 and moment.cpu not in cpus:
                cpus.add(moment.cpu)
                out.track(_CPUS + moment.cpu, f"processor {moment.cpu} of the host", rank=1 << 20 | moment.cpu)
            sequence = sequence or out.sequence(_KINDS + number, (columns.name,), tuple(moment.values))
            track = _VCPUS + moment.vcpu if moment.vcpu >= 0 else _CPUS + moment.cpu
            notes = tuple(
                (name, value if isinstance(value, int) else str(value)) for name, value in moment.values.items()
            )
            sequence.instant(moment.time_ns, columns.name, notes, track)


def _lost(out: _Packets, events: EventTable, log: RunLog) -> None:
    tracks: dict[int, _Sequence] = {}

    def track(cpu: int) -> _Sequence:
        if cpu not in tracks:
            name = f"lost on processor {cpu}" if cpu >= 0 else "lost of logs"
            out.track(_LOST + 1 + cpu, name, rank=1 << 21 | cpu + 1)
            tracks[cpu] = out.sequence(_LOST + 1 + cpu, (), ("lost",))
        return tracks[cpu]

    for lost in lost_of(events):
        if lost.start_ns < lost.end_ns:
            track(lost.cpu).begin(lost.start_ns, lost.name, (("lost", lost.count),))
            track(lost.cpu).end(lost.end_ns)
        else:
            track(lost.cpu).instant(lost.end_ns, lost.name, (("lost", lost.count),))
    if log.lost and not any(gap.cpu < 0 for gap in events.gaps):
        end = int(log["leave_ns"].max()) if len(log) else 0
        track(-1).instant(end, f"{log.lost:,} rows of the log lost", (("lost", log.lost),))
