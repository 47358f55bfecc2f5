"""What all tests share: how a missing thing becomes a skip, or a failure where it was promised."""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import NoReturn

import pytest

#: What this machine has promised to have: names out of amd, intel, local, ssh, sanitizers, namespaces.
REQUIRED = frozenset(filter(None, os.environ.get("KVMBENCH_REQUIRE", "").split(",")))

# A shell's background jobs ignore Ctrl-C, and so would the guests that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def missing(name: str, reason: str) -> NoReturn:
    """Skips the test, naming what is missing; fails it if KVMBENCH_REQUIRE names the thing."""
    if name in REQUIRED:
        pytest.fail(f"KVMBENCH_REQUIRE has {name!r}, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def need():
    """`missing`, for tests that find out for themselves."""
    return missing


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was skipped, a line for each reason: pytest's own list, a line for each place, hides what failed."""
    reasons = Counter(
        str(report.longrepr[2]).removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])
    )
    if reasons:
        terminalreporter.section("skipped, by reason")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:4d} {reason}")
