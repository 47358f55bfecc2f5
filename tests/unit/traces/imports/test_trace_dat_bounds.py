"""trace.dat files that are made to cost more than they weigh: each byte of one is read once."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import LoadError
from kvmbench.traces.imports import read_trace_dat

FILES = Path(__file__).parents[1] / "files"
AMD, INTEL = FILES / "amd-v6.dat", FILES / "intel-v7.dat"
PAGE = 4096
OFFSET, BUFFER, EVENT_FORMATS = 7, 3, 18


def pages_of_v6(data: bytes) -> tuple[int, bytes]:
    """Where the table of processors is, and the first page."""
    at = data.index(b"flyrecord\0") + 10
    (offset,) = struct.unpack_from("<Q", data, at)
    return at, data[offset : offset + PAGE]


def with_processors(data: bytes, count: int) -> bytes:
    """The file with so many processors, which all have the same ten pages."""
    at, page = pages_of_v6(data)
    options = data.index(b"options  \0")
    head = data[: options - 4] + struct.pack("<I", count) + data[options:at]
    place = -(-(len(head) + 16 * count + 15) // PAGE) * PAGE
    table = struct.pack("<QQ", place, 10 * PAGE) * count + struct.pack("<Q", 7) + b"[mono]\0"
    return (head + table).ljust(place, b"\0") + 10 * page


def with_instances(data: bytes, count: int) -> bytes:
    """The file with so many instances, which all have the same table of processors."""
    page = pages_of_v6(data)[1]
    options = data.index(b"options  \0") + 10
    place = options + 16 * count + 2
    words = b"".join(struct.pack("<HIQ", BUFFER, 10, place) + b"i\0" for _ in range(count)) + bytes(2)
    pages = -(-(place + 10 + 16 + 15) // PAGE) * PAGE
    table = b"flyrecord\0" + struct.pack("<QQQ", pages, 10 * PAGE, 7) + b"[mono]\0"
    return (data[:options] + words + table).ljust(pages, b"\0") + 10 * page


def options_of(data: bytes) -> tuple[int, list[tuple[int, bytes]]]:
    """Of version 7: where the place of the options is, and all of them."""
    at = data.index(b"none\0") + 5
    at = data.index(b"\0", at) + 1
    (where,) = struct.unpack_from("<Q", data, at)
    found = []
    while where:
        (size,) = struct.unpack_from("<Q", data, where + 8)
        n, end, where = where + 16, where + 16 + size, 0
        while n < end:
            number, length = struct.unpack_from("<HI", data, n)
            value = data[n + 6 : n + 6 + length]
            n += 6 + length
            if number == 0:
                (where,) = struct.unpack("<Q", value)
                break
            found.append((number, value))
    return at, found


def with_options(data: bytes, options: list[tuple[int, bytes]]) -> bytes:
    """A file of version 7 with these options instead, behind all that was there."""
    at, _ = options_of(data)
    body = b"".join(struct.pack("<HI", number, len(value)) + value for number, value in options)
    body += struct.pack("<HIQ", 0, 8, 0)
    section = struct.pack("<HHIQ", 0, 0, 0, len(body)) + body
    return data[:at] + struct.pack("<Q", len(data)) + data[at + 8 :] + section


def repeated(number: int, times: int) -> bytes:
    data = INTEL.read_bytes()
    options = options_of(data)[1]
    return with_options(data, options + [one for one in options if one[0] == number] * times)


def test_options_written_anew_are_the_same_file():
    data = INTEL.read_bytes()
    assert read_trace_dat(with_options(data, options_of(data)[1])).events.counts == read_trace_dat(data).events.counts


@pytest.mark.parametrize(
    "data",
    [with_processors(AMD.read_bytes(), 1000), with_instances(AMD.read_bytes(), 1000), repeated(BUFFER, 1000)],
    ids=["processors", "instances", "instances of version 7"],
)
def test_pages_that_everybody_claims_are_read_once(data):
    # Of these, 100 kB each, were made a million events, and with more processors all memory was gone.
    imported = read_trace_dat(data)
    assert imported.events.count * 8 <= len(data)
    assert any("again and again" in note for note in imported.notes)


def test_processors_that_share_pages_leave_a_gap_each_and_one_sentence():
    imported = read_trace_dat(with_processors(AMD.read_bytes(), 1000))
    assert len(imported.events.gaps) > 900
    assert len(imported.notes) < 20


def test_a_table_of_processors_that_all_instances_have_is_read_once():
    data = with_processors(AMD.read_bytes(), 1000)
    at = data.index(b"options  \0") + 10
    # Behind what all these options move it by.
    moved = 16 * 4000
    place = data.index(b"flyrecord\0") + moved
    words = b"".join(struct.pack("<HIQ", BUFFER, 10, place) + b"i\0" for _ in range(4000))
    imported = read_trace_dat(data[:at] + words + data[at:])
    assert any("again and again" in note for note in imported.notes)


def test_a_section_that_the_options_name_again_and_again_is_an_error():
    with pytest.raises(LoadError, match="again and again"):
        read_trace_dat(repeated(EVENT_FORMATS, 1000))


def test_pieces_that_become_a_thousand_times_as_much_are_refused_together():
    head = INTEL.read_bytes()
    head = head[: head.index(b"none\0")]
    # Each piece for itself may be pages of zeros; a file that has nothing else is none.
    packed = zlib.compress(bytes(64 << 20), 9)
    section = struct.pack("<HHIQ", 17, 1, 0, len(packed) + 8) + struct.pack("<II", len(packed), 64 << 20) + packed
    out = bytearray(head + b"zlib\x001.2\0" + bytes(8))
    places = []
    for _ in range(40):
        places.append(len(out))
        out += section
    options = b"".join(struct.pack("<HIQ", 17, 8, place) for place in places) + struct.pack("<HIQ", 0, 8, 0)
    options = zlib.compress(options)
    struct.pack_into("<Q", out, len(head) + 9, len(out))
    out += struct.pack("<HHIQ", 0, 1, 0, len(options) + 8) + struct.pack("<II", len(options), 14 * 41) + options
    with pytest.raises(LoadError, match="are said to become"):
        read_trace_dat(bytes(out))


def test_short_events_of_a_long_description_take_no_more_than_their_bytes():
    # 511 events of 8 bytes in each page, of a kind whose last field is said to lie 60,000 bytes behind.
    data = AMD.read_bytes()
    old = b"field:u64 info2;\toffset:"
    at = data.index(b"name: kvm_exit\n")
    place = data.index(old, at)
    line = data[place : data.index(b"\n", place)]
    long = b"field:u8 x;offset:65000;size:1;"
    data = data[:place] + long.ljust(len(line), b" ") + data[place + len(line) :]
    number = int(data[data.index(b"ID: ", at) + 4 :].split(b"\n", 1)[0])
    _, page = pages_of_v6(data)
    made = page[:8] + struct.pack("<Q", PAGE - 16) + struct.pack("<IHH", 1, number, 0) * ((PAGE - 16) // 8)
    data = data.replace(page, made)
    imported = read_trace_dat(data)
    kept = imported.events.get("kvm_exit")
    assert kept is None or kept.data.nbytes < 1 << 20
    assert imported.events.unknown >= 500


def test_a_gap_at_the_end_of_time_is_moved_like_its_events():
    data = INTEL.read_bytes()
    options = options_of(data)[1]
    (buffer,) = (value for number, value in options if number == BUFFER)
    (place,) = struct.unpack_from("<Q", buffer, len(buffer) - 16)
    made = bytearray(with_options(data, [*options, (OFFSET, b"1000\0")]))
    # Its first page begins in the year 2500, and events were lost before it.
    struct.pack_into("<Q", made, place, (1 << 64) - 5)
    (size,) = struct.unpack_from("<Q", made, place + 8)
    struct.pack_into("<Q", made, place + 8, size | 1 << 31)
    imported = read_trace_dat(bytes(made))
    assert len(imported.events.gaps) == 1
    limits = np.iinfo(np.int64)
    assert limits.min <= imported.events.gaps[0].time_ns <= limits.max


def test_a_trace_with_times_at_both_ends_is_exported(tmp_path):
    data = bytearray(AMD.read_bytes())
    at, _ = pages_of_v6(bytes(data))
    (place,) = struct.unpack_from("<Q", data, at)
    struct.pack_into("<Q", data, place, (1 << 63) - 1000)
    (tmp_path / "trace.dat").write_bytes(data)
    trace = kb.open_trace(tmp_path / "trace.dat")
    for suffix in ("npz", "csv", "json", "parquet", "pftrace"):
        if suffix == "parquet":
            pytest.importorskip("pyarrow")
        if suffix == "pftrace":
            pytest.importorskip("perfetto")
        trace.save(tmp_path / f"t.{suffix}")
    assert kb.open_trace(tmp_path / "t.npz").events.counts == trace.events.counts
