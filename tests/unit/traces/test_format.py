"""What the kernel says of events, read; and what is none of it refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmbench.errors import LoadError
from kvmbench.traces.format import TAIL, PageLayout, parse_format, parse_header_page

from .ring import FORMAT, make_format

EXIT = (Path(__file__).parent / "formats" / "kvm_exit-6.18.txt").read_text()
HEADER = """\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""


def test_a_kernels_kvm_exit_is_read():
    found = parse_format(EXIT, system="kvm")
    assert (found.system, found.name) == ("kvm", "kvm_exit")
    fields = {f.name: f for f in found.fields}
    assert fields["common_pid"].offset == 4
    assert fields["common_pid"].signed
    assert [f.name for f in found.own_fields][:2] == ["exit_reason", "guest_rip"]
    assert found.dtype.fields["guest_rip"][0] == np.dtype("<u8")
    assert found.size_bytes == found.dtype.itemsize
    assert "REC->" in found.print_format
    assert not found.has_tail


@pytest.mark.parametrize(
    ("c_type", "name", "size", "dtype"),
    [
        ("int", "x", 4, "<i4"),
        ("u32", "x", 4, "<u4"),
        ("unsigned char", "x", 1, "u1"),
        ("unsigned long", "x[3]", 24, ("<u8", (3,))),
        ("char", "comm[16]", 16, "S16"),
        ("__u8", "insn[15]", 15, ("u1", (15,))),
        ("u64", "x[MAX_THINGS]", 32, ("<u8", (4,))),
        ("struct odd", "x", 12, "V12"),
    ],
)
def test_fields_have_the_types_of_their_declarations(c_type, name, size, dtype):
    found = make_format("e", 1, (c_type, name, size))
    assert found.dtype[name.partition("[")[0]] == np.dtype(dtype)


def test_what_ends_with_the_event_is_its_tail():
    found = make_format("print", 5, ("unsigned long", "ip", 8), ("char", "buf[]", 0))
    assert found.has_tail
    assert "buf" not in (found.dtype.names or ())
    assert found.dtype_of(40)[TAIL] == np.dtype("V24")
    located = make_format("sched", 6, ("__data_loc char[]", "comm", 4))
    assert located.has_tail
    assert located.own_fields[0].located
    assert located.own_fields[0].c_type == "__data_loc char"
    assert located.dtype["comm"] == np.dtype("<u4")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name: x\n",
        "ID: 5\n",
        "name: x\nID: 5\n",
        FORMAT.format(name="x", number=1, fields="\tfield:int x;\toffset:0;"),
        FORMAT.format(name="x", number=1, fields="\tfield:int x;\toffset:99999;\tsize:4;\tsigned:0;"),
        FORMAT.format(name="x", number=1, fields="\tfield:int x;\toffset:-8;\tsize:4;\tsigned:0;"),
        FORMAT.format(name="x", number=1, fields="\tfield:;\toffset:8;\tsize:4;\tsigned:0;"),
        "name: x\nID: 5\n\tfield:char buf[];\toffset:0;\tsize:0;\tsigned:0;\n",
        # Twice the same name.
        FORMAT.format(name="x", number=1, fields="\tfield:int common_pid;\toffset:8;\tsize:4;\tsigned:0;"),
    ],
)
def test_what_describes_no_event_is_refused(text):
    with pytest.raises(LoadError):
        parse_format(text)


@pytest.mark.parametrize("count", ["²", "9" * 5000, "MAX", "1 + 1", ""])
def test_a_count_that_is_no_number_is_told_by_the_size(count):
    found = make_format("x", 1, ("int", f"x[{count}]", 8))
    assert found.own_fields[0].count == (2 if count else 0) or found.own_fields[0].count >= 2


def test_a_field_called_like_what_follows_an_event_has_another_name():
    assert make_format("x", 1, ("int", TAIL, 4)).own_fields[0].name == f"{TAIL}_"


def test_a_header_page_is_read():
    assert parse_header_page(HEADER) == PageLayout(8, 16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no "),
        (HEADER.replace("commit", "committed"), "has no commit"),
        (HEADER.replace("data", "dates"), "has no data"),
        (HEADER.replace("commit;\toffset:8;\tsize:8", "commit;\toffset:8;\tsize:4"), "32 bits"),
    ],
)
def test_another_sort_of_page_is_refused(text, said):
    with pytest.raises(LoadError, match=said):
        parse_header_page(text)


LINES = st.lists(
    st.sampled_from(["name: x", "ID: 7", *EXIT.splitlines(), "\tfield:char b[];\toffset:8;\tsize:0;", "y"])
)


@given(st.one_of(st.text(), LINES.map("\n".join)))
def test_no_text_makes_more_of_it_than_a_load_error(text):
    for parse in (parse_format, parse_header_page):
        try:
            found = parse(text)
        except LoadError:
            continue
        if parse is parse_format:
            assert found.dtype_of(found.size_bytes + 4).itemsize > 0
