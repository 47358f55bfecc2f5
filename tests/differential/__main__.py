"""``python -m tests.differential``: random guests on several hosts, compared step by step."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator

from .guest import Guest, by_name, generate
from .hosts import NAMES, open_host
from .report import describe
from .runner import Runner
from .session import Result, Session
from .setting import BY_NAME, SETTINGS, Setting


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--hosts", nargs="+", default=["local", "npt=1", "npt=0"], help=f"of {', '.join(NAMES)}")
    parser.add_argument("--count", type=int, default=1000, help="guests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first guest")
    parser.add_argument("--settings", nargs="+", choices=BY_NAME, help="default: all that two of the hosts run")
    parser.add_argument("--exceptions", action="store_true", help="guests that raise exceptions")
    parser.add_argument("--guest", action="append", help="only this one, by its name")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--brief", action="store_true", help="a line a divergence")
    return parser.parse_args()


def guests_of(settings: tuple[Setting, ...], seed: int, first: int, count: int, exceptions: bool) -> Iterator[Guest]:
    """Guests by number, the settings in turn."""
    for number in range(first, first + count):
        yield generate(seed, number, settings[number % len(settings)], exceptions=exceptions)


def main() -> int:
    """Runs what the command line asks for; 1 if anything is unexplained."""
    options = _arguments()
    with contextlib.ExitStack() as stack:
        runners = []
        for name in options.hosts:
            start = time.monotonic()
            runners.append(Runner(stack.enter_context(open_host(name)), name))
            print(f"{name}: {runners[-1].host.info.describe()} ({time.monotonic() - start:.1f} s)", flush=True)
        if options.guest:
            guests: Iterator[Guest] = iter([by_name(name) for name in options.guest])
        else:
            wanted = [BY_NAME[name] for name in options.settings] if options.settings else SETTINGS
            settings = tuple(s for s in wanted if sum(runner.supports(s) for runner in runners) > 1)
            guests = guests_of(settings, options.seed, options.first, options.count, options.exceptions)
        session = Session(runners, shrinking=not options.no_shrink)
        start = time.monotonic()
        result = session.run(
            guests, found=lambda divergence: print(describe(divergence, whole=not options.brief), "\n", flush=True)
        )
        summary(result, time.monotonic() - start)
    return 1 if result.counts else 0


def summary(result: Result, seconds: float) -> None:
    """Prints the counts."""
    print(f"{result.guests} guests in {seconds:.1f} s: " + ", ".join(f"{n} {s}" for s, n in result.settings.items()))
    for name, steps in result.steps.items():
        print(f"  {name}: {steps} steps, busy {result.seconds[name]:.1f} s")
    for pair, count in result.compared.items():
        print(f"  {' and '.join(pair)}: {count} compared")
    for (name, kind), count in sorted(result.quirks.items()):
        print(f"  explained, {count} times on {kind}: {name}")
    for sort, group in itertools.groupby(sorted(result.counts.items(), key=str), key=lambda item: item[0]):
        print(f"  UNEXPLAINED, {sum(count for _, count in group)} times: {sort}")


if __name__ == "__main__":
    sys.exit(main())
