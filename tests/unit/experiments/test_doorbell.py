"""The doorbell experiment, asked in ways that cannot be; what it measures is tested on hosts."""

from __future__ import annotations

import pytest

from kvmbench.errors import MisuseError
from kvmbench.experiments import doorbell


@pytest.mark.parametrize("host", [None, "appliance", 5])
def test_what_is_no_host_is_refused(host):
    with pytest.raises(MisuseError, match=r"host=.*: give a host, as kb\.connect\(\) gives it"):
        doorbell.measure(host)


@pytest.mark.parametrize("us", [None, {}, {"PIO, ioeventfd": 1.0}, {**doorbell.PUBLISHED_US, "MMIO, ioeventfd": None}])
def test_a_round_trip_is_taken_apart_only_where_all_three_are_known(us):
    with pytest.raises(MisuseError, match="'MMIO, user space', 'MMIO, ioeventfd', 'PIO, ioeventfd'"):
        doorbell.parts(us)


def test_the_published_round_trip_is_the_sum_of_its_parts():
    found = doorbell.parts(doorbell.PUBLISHED_US)
    assert found.exit_us + found.decode_us + found.user_us == pytest.approx(9.09)
    assert sum(found.shares()) == pytest.approx(1)
