"""What the benchmarks share: which hosts, how often, and how a ratio is told.

These machines are shared and drift, so a figure is taken in pairs (the plain
loop, then ours, then the plain loop again ...) in one run on one host, and what counts
is the median of the ratios, with the range beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Iterator

import kvmbench as kb
from kvmbench.errors import HostUnavailable

HOSTS = {
    "local": ("local", {}),
    "npt1": ("appliance", {"npt": 1}),
    "npt0": ("appliance", {"npt": 0}),
    "intel": ("appliance:intel", {"ept": 1}),
}


def hosts(description: str | None) -> Iterator[kb.Host]:
    """The hosts named on the command line (``--hosts local,npt1``), each opened and closed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--hosts", default="local,npt1", help=f"comma-separated: {', '.join(HOSTS)}")
    chosen = parser.parse_args().hosts.split(",")
    print((description or "").strip().splitlines()[0])
    yield from opened(chosen)


def opened(names: Iterable[str]) -> Iterator[kb.Host]:
    """The hosts of these names, each opened and closed, without those that are not here."""
    for name in names:
        spec, options = HOSTS[name]
        try:
            host = kb.connect(spec, quiet=True, **options)
        except HostUnavailable as error:
            print(f"  {name}: not here: {error}")
            continue
        with host:
            print(f"  {host.info.describe()}")
            yield host


def paired(
    plain: Callable[[], float], ours: Callable[[], float], *, pairs: int = 9
) -> tuple[float, float, list[float]]:
    """Runs the two in turn; returns (median plain, median ours, ratios ours/plain pair by pair)."""
    plain(), ours()  # warm up
    taken = [(plain(), ours()) for _ in range(pairs)]
    return (
        statistics.median(one for one, _ in taken),
        statistics.median(two for _, two in taken),
        [two / one for one, two in taken],
    )


def tell(what: str, unit: str, figures: tuple[float, float, list[float]], goal: str = "") -> None:
    """Prints one line: the two medians and the ratio with its range."""
    one, two, ratios = figures
    print(
        f"    {what:<44} {two:10.2f} {unit}, plain {one:10.2f} {unit}: ratio {statistics.median(ratios):.3f}"
        f" ({min(ratios):.3f} to {max(ratios):.3f}){'; goal ' + goal if goal else ''}"
    )


def median(run: Callable[[], float], *, times: int = 9) -> float:
    """The median of several runs, after one to warm up."""
    run()
    return statistics.median(run() for _ in range(times))
