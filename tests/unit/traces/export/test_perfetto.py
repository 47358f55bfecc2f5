"""Perfetto's protobuf, read back with its own classes, against the tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from kvmbench.errors import UnsupportedError
from kvmbench.traces.event_table import EventTable
from kvmbench.traces.export import write_perfetto
from kvmbench.traces.export.perfetto import _varint
from kvmbench.traces.run_log import ROW, RunLog
from kvmbench.traces.trace import Trace, TraceData

pytest.importorskip("perfetto")

BEGIN, END, INSTANT = 1, 2, 3


class Read(NamedTuple):
    """A slice or a moment as the viewer has it."""

    track: str
    name: str
    start_ns: int
    end_ns: int
    depth: int
    notes: dict[str, Any]


def packets(path: Any) -> list[Any]:
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2

    return list(perfetto_trace_pb2.Trace.FromString(path.read_bytes()).packet)


def read(path: Any) -> Iterator[Read]:
    """What the file says, by Perfetto's own rules: interned names by sequence, slices as stacks by track."""
    tracks: dict[int, str] = {}
    names: dict[int, dict[int, str]] = {}
    fields: dict[int, dict[int, str]] = {}
    defaults: dict[int, int] = {}
    stacks: dict[int, list[Read]] = {}
    for packet in packets(path):
        sequence = packet.trusted_packet_sequence_id
        if packet.HasField("track_descriptor"):
            tracks[packet.track_descriptor.uuid] = packet.track_descriptor.name
        if packet.sequence_flags & 1:
            names[sequence] = {e.iid: e.name for e in packet.interned_data.event_names}
            fields[sequence] = {e.iid: e.name for e in packet.interned_data.debug_annotation_names}
            defaults[sequence] = packet.trace_packet_defaults.track_event_defaults.track_uuid
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        uuid = event.track_uuid or defaults[sequence]
        stack = stacks.setdefault(uuid, [])
        if event.type == END:
            yield stack.pop()._replace(end_ns=packet.timestamp)
            continue
        notes = {fields[sequence][a.name_iid]: getattr(a, a.WhichOneof("value")) for a in event.debug_annotations}
        name = event.name or names[sequence][event.name_iid]
        found = Read(tracks[uuid], name, packet.timestamp, packet.timestamp, len(stack), notes)
        if event.type == BEGIN:
            stack.append(found)
        else:
            assert event.type == INSTANT
            yield found
    assert not any(stacks.values()), "a slice does not end"


def test_each_exit_is_a_slice_with_its_fields_in_it(traced, tmp_path):
    path = tmp_path / "t.pftrace"
    write_perfetto(path, traced)
    exits = traced.exits
    found = sorted((r for r in read(path) if r.track == "vcpu 0" and "rip" in r.notes), key=lambda r: r.start_ns)
    shown = [r for r in found if r.name in exits.names]
    assert [r.name for r in shown] == exits.reasons.tolist()
    assert [r.start_ns for r in shown] == exits.time_ns.tolist()
    whole = np.where(exits.kvm_ns < 0, 0, exits.kvm_ns + exits.user_ns + exits.outside_ns)
    assert [r.end_ns - r.start_ns for r in shown][:-1] == whole.tolist()[:-1]
    assert [r.notes["rip"] for r in shown] == exits.rip.tolist()
    assert [r.notes["info1"] for r in shown] == exits.info1.tolist()
    assert [r.notes.get("words", "") for r in shown] == [exits.words(n) for n in range(57)]


def test_user_space_lies_in_its_exit_and_the_guest_beside(traced, tmp_path):
    path = tmp_path / "t.pftrace"
    write_perfetto(path, traced)
    found = [r for r in read(path) if r.track == "vcpu 0"]
    user = [r for r in found if r.name == "user space"]
    assert [r.depth for r in user] == [1] * 25
    assert sorted(r.end_ns - r.start_ns for r in user) == sorted(n for n in traced.exits.user_ns.tolist() if n)
    guest = [r for r in found if r.name == "guest"]
    assert {r.depth for r in guest} == {0}
    assert sum(r.end_ns - r.start_ns for r in guest) == traced.exits.guest_ns[traced.exits.guest_ns > 0].sum()


def test_other_events_are_moments_with_their_fields(traced, tmp_path):
    path = tmp_path / "t.pftrace"
    write_perfetto(path, traced)
    found = list(read(path))
    pio = [r for r in found if r.name == "kvm_pio"]
    assert [r.start_ns for r in pio] == traced.events["kvm_pio"].time_ns.tolist()
    assert {tuple(r.notes.items()) for r in pio} == {
        (("rw", 1), ("port", 0x3F8), ("size", 1), ("count", 1), ("val", 0x41))
    }
    nobodys = [r for r in found if r.track == "processor 0 of the host"]
    assert [r.name for r in nobodys] == ["kvm_page_fault"]
    assert len([r for r in found if r.name == "kvm_page_fault"]) == 6


def test_marks_and_what_was_lost_have_tracks_of_their_own(traced, tmp_path):
    path = tmp_path / "t.pftrace"
    write_perfetto(path, traced)
    found = list(read(path))
    marks = [(r.name, r.start_ns, r.notes) for r in found if r.track == "marks"]
    last = int(traced.events["kvm_exit"].time_ns[-1])
    assert marks == [
        ('before "it"', last - 50, {"source": "host"}),
        ("0x7", last - 40, {"source": "guest", "vcpu": 0}),
    ]
    lost = {(r.track, r.name): (r.start_ns < r.end_ns, r.end_ns, r.notes) for r in found if r.track.startswith("lost")}
    assert lost == {
        ("lost on processor 0", "12 events lost"): (True, last, {"lost": 12}),
        ("lost on processor 1", "events lost"): (False, last + 5, {"lost": 0}),
        ("lost of logs", "3 rows of the log lost"): (False, int(traced.log["leave_ns"][-1]), {"lost": 3}),
    }


def test_the_clock_is_declared_and_emulator_time_is_in_the_name(traced, tmp_path):
    path = tmp_path / "t.pftrace"
    write_perfetto(path, traced)
    clock, process, *others = packets(path)
    assert clock.clock_snapshot.primary_trace_clock == 3
    assert clock.clock_snapshot.clocks[0].timestamp == min(int(c.time_ns[0]) for c in traced.events.values())
    name = process.track_descriptor.process.process_name
    assert "CLOCK_MONOTONIC, emulator time" in name
    assert "QEMU 7.2: times are emulator time" in name
    assert "emulator time" in others[0].track_descriptor.description
    assert all(note in process.track_descriptor.description for note in traced.notes)
    uuids = {p.track_descriptor.uuid for p in others if p.HasField("track_descriptor")}
    parents = {p.track_descriptor.parent_uuid for p in others if p.HasField("track_descriptor")}
    assert parents == {process.track_descriptor.uuid}
    used = {p.track_event.track_uuid for p in others if p.track_event.track_uuid}
    assert used <= uuids
    timed = [p for p in others if p.HasField("trace_packet_defaults")]
    assert {p.trace_packet_defaults.timestamp_clock_id for p in timed} == {3}


def test_another_clock_is_not_called_monotonic(traced, tmp_path):
    path = tmp_path / "t.pftrace"
    write_perfetto(path, Trace(replace(traced.data, labels=("CPU 0/KVM tid 75",), clock="local")))
    first, track, *_ = packets(path)
    assert "trace clock local" in first.track_descriptor.process.process_name
    assert track.track_descriptor.name == "CPU 0/KVM tid 75"
    assert not any(p.HasField("clock_snapshot") for p in packets(path))


def test_an_empty_trace_is_a_file_without_slices(tmp_path):
    log = RunLog(np.zeros(0, np.int16), np.zeros(0, ROW))
    write_perfetto(tmp_path / "t.pftrace", Trace(TraceData(EventTable(), log)))
    assert list(read(tmp_path / "t.pftrace")) == []


@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0x3FFF, 0x4000, 1 << 44, (1 << 63) - 1])
def test_times_of_any_length_are_encoded_as_protobuf_does(value):
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2

    encoded = perfetto_trace_pb2.TracePacket(timestamp=value).SerializeToString()
    assert encoded == b"\x40" + _varint(value)


def test_without_the_package_the_error_names_the_extra(traced, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "perfetto.trace_builder.proto_builder", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'kvmbench\[perfetto\]'"):
        write_perfetto(tmp_path / "t.pftrace", traced)
    assert not (tmp_path / "t.pftrace").exists()
