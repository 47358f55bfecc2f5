"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmbench.errors import MisuseError
from kvmbench.machine.size import page_multiple, parse_size, show_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16M", 16 << 20), ("1G", 1 << 30), ("64 KiB", 65536), ("64kb", 65536), ("4096", 4096), (4096, 4096),
        ("0x2000", 0x2000), ("0x10K", 0x4000), (" 2 T ", 2 << 40), ("12 B", 12),
    ],
)  # fmt: skip
def test_sizes_are_read_as_written(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "16X", "16 M M", -1, 1.5, None, True, [4096]])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(MisuseError, match="memory="):
        parse_size(text, "memory")  # type: ignore[arg-type]


@given(st.integers(1, 1 << 50))
def test_a_shown_size_reads_back(size: int) -> None:
    assert parse_size(show_size(size).replace(" bytes", "")) == size


def test_whole_pages_are_wanted_and_the_nearest_are_named() -> None:
    assert page_multiple("8K") == 8192
    with pytest.raises(MisuseError, match=r"memory='5000' is not a multiple .* take 0x1000 or 0x2000"):
        page_multiple("5000", "memory")
    with pytest.raises(MisuseError, match=r"take 0x1000$"):
        page_multiple(100)
    with pytest.raises(MisuseError, match="at least one page"):
        page_multiple(0)
