"""What all tests share: how a missing thing becomes a skip, or a failure where it was promised."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

#: What this machine has promised to have: names out of amd, intel, local, ssh, sanitizers, namespaces.
REQUIRED = frozenset(filter(None, os.environ.get("KVMBENCH_REQUIRE", "").split(",")))


def missing(name: str, reason: str) -> NoReturn:
    """Skips the test, naming what is missing; fails it if KVMBENCH_REQUIRE names the thing."""
    if name in REQUIRED:
        pytest.fail(f"KVMBENCH_REQUIRE has {name!r}, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def need():
    """`missing`, for tests that find out for themselves."""
    return missing
