"""trace.dat of trace-cmd: real files against trace-cmd's own report of them, and files that are cut off or lie."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmbench.errors import LoadError
from kvmbench.traces.exits import exit_table
from kvmbench.traces.imports import Imported, read_perf_script, read_trace_dat
from kvmbench.traces.imports.imported import number_vcpus

FILES = Path(__file__).parents[1] / "files"
AMD, INTEL = FILES / "amd-v6.dat", FILES / "intel-v7.dat"


def rows(imported: Imported) -> list[tuple[int, str, dict[str, int]]]:
    """Microseconds, name and fields of each event, as trace-cmd prints them."""
    return [
        (round(time / 1000), name, values)
        for time, _, _, name, values in imported.events.rows(0, imported.events.count)
    ]


# Real files.


def test_each_event_is_what_trace_cmd_itself_reports():
    ours, theirs = read_trace_dat(AMD), read_perf_script(FILES / "amd-report-raw.txt")
    assert theirs.ignored == 0
    assert rows(ours) == rows(theirs)
    assert ours.events.counts == {
        "kvm_exit": 57,
        "kvm_entry": 57,
        "kvm_userspace_exit": 26,
        "kvm_pio": 25,
        "kvm_page_fault": 6,
    }
    assert ours.events.gaps == ()
    assert ours.notes == ()


def test_exits_of_a_file_from_svm_and_of_one_from_vmx_have_their_own_names():
    names = {}
    for path in (AMD, INTEL):
        data = read_trace_dat(path).trace_data()
        exits = exit_table(data.events, data.log)
        names[path] = dict(zip(*np.unique(exits.reasons, return_counts=True), strict=True))
        assert (exits.guest_ns >= 0).all()
        assert (exits.kvm_ns[:-1] > 0).all()
    assert names[AMD] == {"cpuid": 25, "io": 25, "npf": 6, "shutdown": 1}
    assert names[INTEL] == {"CPUID": 25, "IO_INSTRUCTION": 25, "EPT_VIOLATION": 6, "TRIPLE_FAULT": 1}


def with_instance(data: bytes, name: bytes) -> bytes:
    """The file with an instance besides, as trace-cmd's manual describes it, that has the same pages."""
    at = data.index(b"options  \0") + 10
    while struct.unpack_from("<H", data, at)[0]:
        at += 6 + struct.unpack_from("<I", data, at + 2)[0]
    # The option's number and size, the instance's place, its name: so much is what follows moved by.
    moved = 6 + 8 + len(name) + 1
    place = len(data) + moved
    option = struct.pack("<HIQ", 3, moved - 6, place) + name + b"\0"
    offset, size = struct.unpack_from("<QQ", data, at + 12)
    table = struct.pack("<QQ", offset + moved, size)
    rest = data[at : at + 12] + table + data[at + 28 :]
    return data[:at] + option + rest + b"flyrecord\0" + table + struct.pack("<Q", 7) + b"[mono]\0"


def test_events_of_all_instances_are_there():
    alone, both = read_trace_dat(AMD), read_trace_dat(with_instance(AMD.read_bytes(), b"two"))
    assert both.events.counts == {name: 2 * count for name, count in alone.events.counts.items()}
    assert both.labels == alone.labels
    assert not both.events.gaps


def test_a_file_compressed_with_zstd_is_read_where_a_package_knows_it():
    pytest.importorskip("zstandard")
    assert rows(read_trace_dat(FILES / "amd-v7-zstd.dat")) == rows(read_trace_dat(AMD))


def test_without_such_a_package_the_error_says_how_to_convert(monkeypatch):
    for module in ("compression.zstd", "zstandard", "pyzstd"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoadError, match=r"zstd.*kvmbench\[zstd\].*trace-cmd convert --file-version 6"):
        read_trace_dat(FILES / "amd-v7-zstd.dat")


def compressed(data: bytes) -> bytes:
    """A file of version 7 as trace-cmd writes it with zlib, which Debian's cannot."""
    head = data[: data.index(b"none\0")]
    at = data.index(b"none\0") + 5
    at = data.index(b"\0", at) + 1
    (options_at,) = struct.unpack_from("<Q", data, at)
    out = bytearray(head + b"zlib\x001.2\0" + bytes(8))
    place = len(out) - 8

    def section(where: int) -> tuple[int, bytes]:
        number, _, _, size = struct.unpack_from("<HHIQ", data, where)
        return number, data[where + 16 : where + 16 + size]

    def add(number: int, content: bytes) -> int:
        packed = zlib.compress(content)
        start = len(out)
        out.extend(struct.pack("<HHIQ", number, 1, 0, len(packed) + 8))
        out.extend(struct.pack("<II", len(packed), len(content)) + packed)
        return start

    def pages(start: int, size: int) -> tuple[int, int]:
        # One chunk a page.
        at = len(out)
        chunks = [data[n : n + 4096] for n in range(start, start + size, 4096)]
        out.extend(struct.pack("<I", len(chunks)))
        for chunk in chunks:
            packed = zlib.compress(chunk)
            out.extend(struct.pack("<II", len(packed), len(chunk)) + packed)
        return at, len(out) - at

    options = bytearray()
    while options_at:
        content = section(options_at)[1]
        options_at, n = 0, 0
        while n < len(content):
            number, size = struct.unpack_from("<HI", content, n)
            value = content[n + 6 : n + 6 + size]
            n += 6 + size
            if number == 0:
                (options_at,) = struct.unpack("<Q", value)
                break
            if number in (16, 17, 18, 19, 20, 21):
                value = struct.pack("<Q", add(*section(*struct.unpack("<Q", value))))
            if number == 3:
                cpu = value.index(b"\0", value.index(b"\0", 8) + 1) + 9
                table = b""
                for k in range(cpu, len(value), 20):
                    who, start, size = struct.unpack_from("<IQQ", value, k)
                    table += struct.pack("<IQQ", who, *(pages(start, size) if size else (start, 0)))
                value = value[:cpu] + table
            options += struct.pack("<HI", number, len(value)) + value
    options += struct.pack("<HIQ", 0, 8, 0)
    struct.pack_into("<Q", out, place, add(0, bytes(options)))
    return bytes(out)


def test_a_file_compressed_with_zlib_holds_the_same():
    plain, packed = read_trace_dat(INTEL), read_trace_dat(compressed(INTEL.read_bytes()))
    assert rows(packed) == rows(plain)
    assert packed.clock == plain.clock


def test_a_file_and_its_bytes_are_the_same():
    assert rows(read_trace_dat(AMD.read_bytes())) == rows(read_trace_dat(str(AMD)))


# Whose vcpu.


def test_machines_with_the_same_vcpu_ids_are_told_apart_by_thread():
    events = read_trace_dat(AMD).events
    halves = events["kvm_exit"].take(np.arange(57))
    halves.tid[::2] = 99
    events["kvm_entry"].tid[::2] = 99
    events["kvm_pio"].tid[3] = 99
    events["kvm_pio"].tid[4] = 1
    numbered, labels = number_vcpus(events, {99: "CPU 0/KVM"}, {99: 90})
    assert labels == ("tid 75 vcpu 0", "CPU 0/KVM pid 90 tid 99 vcpu 0")
    assert numbered["kvm_pio"].vcpu.tolist()[:6] == [0, 0, 0, 1, -1, 0]
    assert set(numbered["kvm_entry"].vcpu.tolist()) == {0, 1}


def test_a_thread_that_runs_two_vcpus_gives_each_its_events():
    events = read_trace_dat(AMD).events
    for name in ("kvm_exit", "kvm_entry"):
        c = events[name]
        c.data["vcpu_id"][c.time_ns > events["kvm_pio"].time_ns[10]] = 3
    numbered, labels = number_vcpus(events, {})
    assert labels == ("tid 75 vcpu 0", "tid 75 vcpu 3")
    assert numbered["kvm_pio"].vcpu.tolist() == [0] * 11 + [1] * 14


# What is cut off.


def check_cut(data: bytes, cut: int, whole: set[tuple[int, str]]) -> int:
    try:
        found = read_trace_dat(data[:cut])
    except LoadError:
        return -1
    assert {(time, name) for time, name, _ in rows(found)} <= whole
    if {(time, name) for time, name, _ in rows(found)} != whole:
        assert found.events.gaps, cut
        assert any("cut off" in note or "missing" in note for note in found.notes), (cut, found.notes)
    return found.events.count


def sample(name: str) -> bytes:
    if name == "zlib":
        return compressed(INTEL.read_bytes())
    if name == "instance":
        return with_instance(AMD.read_bytes(), b"two")
    return (FILES / name).read_bytes()


@pytest.mark.parametrize("name", ["amd-v6.dat", "intel-v7.dat", "zlib", "instance"])
def test_a_file_cut_off_anywhere_is_an_error_or_what_was_whole_with_a_gap(name):
    data = sample(name)
    whole = {(time, event) for time, event, _ in rows(read_trace_dat(data))}
    end = len(data)
    # Each byte at both ends and where parts meet; behind that all are alike, and 7 and 61 share no factor with pages.
    cuts = {*range(600), *range(600, end, 61), *range(end - 300, end, 7), *range(4090, end, 4096), end - 1}
    counts = [check_cut(data, cut, whole) for cut in sorted(cuts)]
    if "v6" in name:
        assert any(0 < count < len(whole) for count in counts), "no cut left a part of it"


# What lies.


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: b"", "begins b''"),
        (lambda d: b"PERFILE2" + d, "no trace.dat of trace-cmd: it begins b'PERFILE2"),
        (lambda d: b"\x7fELF" + bytes(100), "no trace.dat"),
        (lambda d: d.replace(b"tracing6\0", b"tracing5\0", 1), "version '5'"),
        (lambda d: d.replace(b"tracing6\0", b"tracing8\0", 1), "version '8'"),
        (lambda d: d.replace(b"tracing6\0", b"tracing6" * 9, 1), "the version does not end"),
        (lambda d: patched(d, 12, b"\1"), "big-endian"),
        (lambda d: patched(d, 13, b"\7"), "a long of 7 bytes"),
        (lambda d: patched(d, 14, b"\0\0\0\0"), "pages of 0 bytes"),
        (lambda d: patched(d, 14, b"\xff\xff\xff\xff"), "pages of 4,294,967,295 bytes"),
        (lambda d: patched(d, 30, b"\xff" * 8), "takes 18,446,744,073,709,551,615 bytes"),
        (lambda d: d.replace(b"offset:8;\tsize:8;", b"offset:8;\tsize:4;", 1), "machine of 32 bits"),
        (lambda d: d.replace(b"flyrecord\0", b"latency  \0"), "latency tracer"),
    ],
)
def test_a_file_of_another_sort_says_which(change, said):
    with pytest.raises(LoadError, match=said):
        read_trace_dat(change(AMD.read_bytes()))


def test_an_empty_file_says_so(tmp_path):
    (tmp_path / "trace.dat").touch()
    with pytest.raises(LoadError, match="is empty"):
        read_trace_dat(tmp_path / "trace.dat")


def test_options_that_go_round_in_a_circle_are_an_error():
    data = bytearray(INTEL.read_bytes())
    at = data.index(b"none\0") + 6
    (options,) = struct.unpack_from("<Q", data, at)
    (size,) = struct.unpack_from("<Q", data, options + 8)
    data[options + 16 + size - 8 : options + 16 + size] = struct.pack("<Q", options)
    with pytest.raises(LoadError, match="circle"):
        read_trace_dat(bytes(data))


def test_a_piece_that_claims_to_become_terabytes_is_refused_before_it_is_unpacked():
    data = compressed(INTEL.read_bytes())
    # The first compressed section begins right behind the head.
    start = data.index(b"zlib\x001.2\0") + 17
    with pytest.raises(LoadError, match="are said to become 4,294,967,295"):
        read_trace_dat(patched(data, start + 20, b"\xff\xff\xff\xff"))
    with pytest.raises(LoadError, match="becomes"):
        read_trace_dat(patched(data, start + 20, b"\x10\0\0\0"))


def test_a_processor_whose_pages_are_said_to_be_elsewhere_leaves_a_gap():
    data = bytearray(AMD.read_bytes())
    at = data.index(b"flyrecord\0") + 10
    struct.pack_into("<Q", data, at, 1 << 62)
    imported = read_trace_dat(bytes(data))
    assert imported.events.count == 0
    assert len(imported.events.gaps) == 1
    assert "processor 0" in imported.notes[0]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damage_anywhere_is_an_error_or_a_table(drawn):
    data = bytearray(sample(drawn.draw(st.sampled_from(["amd-v6.dat", "intel-v7.dat", "instance", "zlib"]))))
    for _ in range(drawn.draw(st.integers(1, 6))):
        at = drawn.draw(st.integers(0, len(data) - 9))
        with_bytes = st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff", b"\x80", b"\0\0\0\x80"]) | st.binary(
            min_size=1, max_size=8
        )
        value = drawn.draw(with_bytes)
        data[at : at + len(value)] = value
    try:
        imported = read_trace_dat(bytes(data))
    except LoadError:
        return
    exit_table(imported.events, imported.trace_data().log)
    repr(imported)


def described_as(data: bytes, old: bytes, new: bytes) -> bytes:
    """A file with another description of an event, of the same length."""
    assert len(old) == len(new)
    assert old in data
    return data.replace(old, new)


def test_a_kvm_exit_of_another_processor_is_no_exit_but_an_event():
    data = described_as(AMD.read_bytes(), b"unsigned int exit_reason;", b"unsigned int esr_ec_____;")
    imported = read_trace_dat(data)
    assert imported.events.counts["kvm_kvm_exit"] == 57
    assert "not that of x86" in imported.notes[0]
    made = imported.trace_data()
    exits = exit_table(made.events, made.log)
    assert set(exits.isa.tolist()) == {0}
    assert set(exits.reasons.tolist()) == {"IO", "SHUTDOWN"}


def test_a_description_that_makes_no_sense_leaves_its_events_unknown():
    data = described_as(AMD.read_bytes(), b"field:u64 info2;", b"field:u64 info1;")
    imported = read_trace_dat(data)
    assert "kvm_exit" not in imported.events
    assert imported.events.unknown == 57
    assert "1 descriptions of events were not understood" in imported.notes[0]


def test_a_field_called_tail_does_not_hide_the_text_behind_the_fields():
    data = described_as(AMD.read_bytes(), b"unsigned int port;", b"unsigned int tail;")
    assert set(read_trace_dat(data).events["kvm_pio"]["tail_"].tolist()) == {0x3F8}


def test_exits_without_an_isa_are_rows_without_words():
    data = read_trace_dat(AMD).trace_data()
    data.events["kvm_exit"].data["isa"][5] = 0
    exits = exit_table(data.events, data.log)
    assert len(exits) == 57
    assert exits.words(5) == ""


def test_the_clock_goes_with_the_trace_into_files_of_ours(tmp_path):
    import kvmbench as kb

    opened = kb.open_trace(INTEL)
    assert opened.data.clock == "local"
    opened.save(tmp_path / "t.npz")
    assert kb.open_trace(tmp_path / "t.npz").data.clock == "local"
    opened.save(tmp_path / "t.csv")
    assert "trace clock local" in (tmp_path / "t.csv").read_text().splitlines()[1]
    opened.save(tmp_path / "t.json")
    assert '"clock": "trace clock local"' in (tmp_path / "t.json").read_text()
