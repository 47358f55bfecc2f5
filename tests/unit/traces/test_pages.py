"""Pages of the ring buffer: every sort of record, what is broken, and that both decoders agree."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmbench.errors import LoadError
from kvmbench.traces.format import TAIL, PageLayout
from kvmbench.traces.pages import Decoded, decode, native

from .ring import HEAD, PADDING, PAGE, discarded, end, event, extend, make_format, page, payload, stamp

EXIT = make_format("kvm_exit", 300, ("unsigned long", "rip", 8))
LONG = make_format("print", 5, ("unsigned long", "ip", 8), ("char", "buf[]", 0))
FORMATS = {EXIT.id: EXIT, LONG.id: LONG}


@pytest.fixture(params=["core", "python"])
def walk(request):
    if request.param == "core" and native() is None:
        pytest.skip("the core was not built here")

    def run(data: bytes, **options: object) -> Decoded:
        options = {"page_bytes": PAGE, "use_core": request.param == "core", **options}
        pieces = list(decode(data, FORMATS, **options))
        assert len(pieces) <= 1
        return pieces[0] if pieces else Decoded({}, [], 0, 0)

    return run


def rip(value: int, pid: int = 7) -> bytes:
    return payload(300, pid, struct.pack("<Q", value))


def times(decoded: Decoded, number: int = 300) -> list[int]:
    return decoded.rows[number].time_ns.tolist() if number in decoded.rows else []


def test_events_are_where_and_when_they_were_written(walk):
    found = walk(page(1000, event(0, rip(1, 11)), event(5, rip(2, 12)), event(7, rip(3, 13))))
    assert times(found) == [1000, 1005, 1012]
    assert found.rows[300].data["rip"].tolist() == [1, 2, 3]
    assert found.rows[300].data["common_pid"].tolist() == [11, 12, 13]
    assert (found.bad, found.unknown, found.gaps) == (0, 0, [])


def test_a_long_event_has_its_length_in_a_word_of_its_own(walk):
    text = b"x" * 120 + b"\n"
    found = walk(page(10, event(1, payload(5, rest=bytes(8) + text)), event(1, rip(9))))
    row = found.rows[5].data[0]
    assert bytes(row[TAIL]).rstrip(b"\0") == text
    assert times(found, 5) == [11]
    assert times(found) == [12]


def test_a_time_extend_adds_to_the_time(walk):
    far = (5 << 27) + 3
    assert times(walk(page(7, event(1, rip(0)), extend(far), event(2, rip(0))))) == [8, 8 + far + 2]


def test_a_time_stamp_sets_the_time_but_for_its_upper_bits(walk):
    top = 3 << 59
    found = walk(page(top + 100, event(1, rip(0)), stamp(5 << 30), event(2, rip(0))))
    assert np.array(times(found)).view(np.uint64).tolist() == [top + 101, top + (5 << 30) + 2]


def test_an_event_that_was_taken_back_leaves_its_time(walk):
    assert times(walk(page(0, event(1, rip(0)), discarded(10, 24), event(1, rip(0))))) == [1, 12]


def test_what_is_not_a_whole_number_of_words_is_filled_up(walk):
    odd = struct.pack("<II", PADDING | 1 << 5, 5) + bytes(4)
    assert times(walk(page(0, odd, event(1, rip(0))))) == [2]
    # And where the page ends before, it makes no sense.
    assert walk(page(0, odd, size=9)).bad == 1


def test_times_wrap_around(walk):
    found = walk(page((1 << 64) - 3, event(1, rip(0)), event(5, rip(0))))
    assert times(found) == [-2, 3]


def test_padding_without_a_time_ends_the_page(walk):
    found = walk(page(0, event(1, rip(0)), end(), event(1, rip(0))))
    assert times(found) == [1]
    assert found.bad == 0


@pytest.mark.parametrize("lost", [0, 5, 1 << 40])
def test_lost_events_are_told_before_the_page_they_precede(walk, lost):
    found = walk(page(50, event(1, rip(0))) + page(99, event(1, rip(0)), lost=lost))
    assert found.gaps == [(99, lost)]
    assert times(found) == [51, 100]
    assert found.bad == 0


def test_a_number_of_lost_events_that_cannot_be_there_is_none(walk):
    full = [event(0, rip(0))] * ((PAGE - HEAD) // 20)
    data = bytearray(page(1, *full))
    data[8:16] = struct.pack("<Q", len(full) * 20 | 1 << 31 | 1 << 30)
    assert len(full) * 20 == PAGE - HEAD
    found = walk(bytes(data))
    assert found.gaps == [(1, 0)]
    assert len(times(found)) == 12


@pytest.mark.parametrize(
    "broken",
    [
        struct.pack("<I", 28),  # 112 bytes that are not there
        struct.pack("<II", 0, 3),  # a length without itself
        struct.pack("<II", 0, 4),  # an event without its number
        struct.pack("<II", 0, 5),
        struct.pack("<II", 0, 0xFFFF_FFFF),
        struct.pack("<II", 0, 5000),
        struct.pack("<II", PADDING | 1 << 5, 2),
        struct.pack("<II", PADDING | 1 << 5, 0xFFFF_FFFC),
        struct.pack("<I", 30 | 1 << 5),  # time without its upper half
        struct.pack("<I", 31),
        struct.pack("<I", 0),
    ],
)
def test_a_record_that_makes_no_sense_ends_its_page_only(walk, broken):
    data = page(0, event(1, rip(0)), broken) + page(50, event(1, rip(0)))
    found = walk(data)
    assert times(found) == [1, 51]
    assert found.bad == 1


def test_a_page_that_says_it_is_larger_than_it_is_has_no_events(walk):
    found = walk(page(0, event(1, rip(0)), size=PAGE - HEAD + 1) + page(0, event(1, rip(0)), size=0xFFFFF))
    assert times(found) == []
    assert found.bad == 2


def test_what_is_behind_the_last_whole_page_is_left_out(walk):
    data = page(0, event(1, rip(0)))
    assert times(walk(data + data[:-1])) == [1]
    assert times(walk(b"")) == []
    assert times(walk(data[:-1])) == []


def test_events_without_a_description_are_counted(walk):
    found = walk(page(0, event(1, payload(77)), event(1, rip(0)), event(1, payload(78, rest=bytes(40)))))
    assert found.unknown == 2
    assert times(found) == [2]


def test_a_short_event_is_filled_up_with_zeros(walk):
    found = walk(page(0, event(1, payload(300, 9)), event(1, rip(5))))
    assert found.rows[300].data["rip"].tolist() == [0, 5]
    assert found.rows[300].data["common_pid"].tolist() == [9, 7]


def test_a_long_text_is_cut(walk):
    found = walk(page(0, event(1, payload(5, rest=b"y" * 5000)), page_bytes=8192), page_bytes=8192)
    assert found.rows[5].data.dtype.itemsize == 16 + 1024


@pytest.mark.parametrize(
    ("page_bytes", "layout"),
    [
        (31, PageLayout()),
        (PAGE, PageLayout(size_offset=9)),
        (PAGE, PageLayout(data_offset=15)),
        (PAGE, PageLayout(data_offset=PAGE + 1)),
        (PAGE, PageLayout(size_offset=1 << 62, data_offset=64)),
    ],
)
def test_a_layout_that_cannot_be_is_refused(walk, page_bytes, layout):
    with pytest.raises(LoadError, match="cannot be"):
        walk(bytes(1024), page_bytes=page_bytes, layout=layout)


def same(data: bytes, page_bytes: int = PAGE, layout: PageLayout = PageLayout()) -> None:  # noqa: B008 - frozen
    if native() is None:
        pytest.skip("the core was not built here")
    both = [
        list(decode(data, FORMATS, page_bytes=page_bytes, layout=layout, use_core=use_core))
        for use_core in (True, False)
    ]
    assert len(both[0]) == len(both[1])
    for core, python in zip(*both, strict=True):
        assert (core.gaps, core.bad, core.unknown) == (python.gaps, python.bad, python.unknown)
        assert core.rows.keys() == python.rows.keys()
        for number, rows in core.rows.items():
            assert rows.time_ns.tolist() == python.rows[number].time_ns.tolist()
            assert rows.data.tobytes() == python.rows[number].data.tobytes()


@given(st.binary(max_size=4 * PAGE))
def test_both_decoders_agree_on_any_bytes(data):
    same(data)


WORDS = st.one_of(
    st.integers(0, 0xFFFF_FFFF).map(lambda word: struct.pack("<I", word)),
    st.integers(0, 31).map(lambda kind: struct.pack("<I", kind | 1 << 5)),
    st.integers(0, 64).map(lambda word: struct.pack("<I", word)),
    st.sampled_from([rip(1), payload(5, rest=b"text"), event(3, rip(2)), extend(1 << 40), stamp(1 << 58), end()]),
)


@settings(max_examples=400)
@given(
    st.integers(0, (1 << 64) - 1),
    st.lists(WORDS, max_size=40).map(b"".join),
    st.one_of(st.none(), st.integers(0, 300)),
    st.sampled_from([0, 1 << 31, 3 << 30]),
    st.integers(0, 3),
)
def test_both_decoders_agree_on_pages_that_are_nearly_right(time, data, size, lost, odd):
    data = data[: PAGE - HEAD]
    told = (len(data) if size is None else size) - odd & 0xFFFFF
    first = (struct.pack("<QQ", time, told | lost) + data).ljust(PAGE, b"\1")
    same(first + page(5, event(1, rip(0))))


def test_both_decoders_agree_on_long_pages_with_every_record():
    rng = random.Random(3)
    pages = []
    for n in range(40):
        records, room = [], 4096 - HEAD - 8
        while True:
            record = rng.choice(
                [
                    event(rng.randrange(1 << 27), rip(rng.getrandbits(64))),
                    event(3, payload(5, rest=rng.randbytes(rng.randrange(600)))),
                    extend(rng.randrange(1 << 40)),
                    stamp(rng.randrange(1 << 59)),
                    discarded(rng.randrange(1, 99), 8 + 4 * rng.randrange(20)),
                ]
            )
            if len(record) > room:
                break
            room -= len(record)
            records.append(record)
        pages.append(page(n << 50, *records, lost=n % 3 if n % 2 else None, page_bytes=4096))
    same(b"".join(pages), 4096)
