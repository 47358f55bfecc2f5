"""Samples of KVM's statistics."""

from __future__ import annotations

import numpy as np
import pytest

from kvmbench.kvm.stats import StatDescriptor, StatKind, StatsSample, StatUnit


def descriptor(name: str, **parts: object) -> StatDescriptor:
    known = {"kind": StatKind.CUMULATIVE, "unit": StatUnit.NONE, "scale": 1.0, "count": 1, "offset": 0}
    return StatDescriptor(name=name, **{**known, "bucket_size": 0, **parts})


DESCRIPTORS = {
    one.name: one
    for one in (
        descriptor("exits"),
        descriptor("halts"),
        descriptor("wait_ns", unit=StatUnit.SECONDS, scale=1e-9),
        descriptor("pages", kind=StatKind.INSTANT),
        descriptor("histogram", kind=StatKind.LOG_HISTOGRAM, count=3),
    )
}


def sample(exits: int, pages: int, wait_ns: int = 0) -> StatsSample:
    numbers = {"exits": [exits], "halts": [3], "wait_ns": [wait_ns], "pages": [pages], "histogram": [1, 2, 3]}
    return StatsSample(DESCRIPTORS, {name: np.array(row, dtype=np.uint64) for name, row in numbers.items()})


def test_a_single_value_is_a_number_and_a_histogram_an_array():
    stats = sample(5, 7)
    assert stats["exits"] == 5
    assert isinstance(stats["exits"], int)
    assert stats["histogram"].tolist() == [1, 2, 3]
    assert set(stats) == set(DESCRIPTORS)


def test_only_what_is_cumulative_and_grew_counts_as_change():
    assert sample(9, 8).since(sample(5, 7)) == {"exits": 4}


def test_a_value_is_scaled_to_its_unit():
    assert sample(0, 0, wait_ns=1_500_000_000).scaled("wait_ns") == pytest.approx(1.5)


def test_a_histogram_has_no_single_value():
    with pytest.raises(TypeError, match="3 buckets"):
        sample(0, 0).scaled("histogram")
