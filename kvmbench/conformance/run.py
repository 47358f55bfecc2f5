"""`run()`: every point on one host."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable
from typing import Any

from kvmbench.conformance.facts import gather
from kvmbench.conformance.point import CannotTry, Point
from kvmbench.conformance.points import POINTS
from kvmbench.conformance.quirk import Quirk, explain
from kvmbench.conformance.quirks import QUIRKS
from kvmbench.conformance.report import Answer, Report, Result
from kvmbench.errors import ClosedError, HostLost, KvmbenchError, MisuseError, UnsupportedError
from kvmbench.host.selfcheck import WORDS

Progress = Callable[[int, int, Point], None]


def chosen(points: Iterable[str | Point] | str | None = None) -> tuple[Point, ...]:
    """Points by name, with ``*`` where wanted: ``kvm.*``, ``*.int3.*``; None: all.

    Raises:
        MisuseError: a name that fits none.
    """
    if points is None:
        return POINTS
    found: dict[str, Point] = {}
    for each in [points] if isinstance(points, str) else points:
        if isinstance(each, Point):
            found[each.name] = each
            continue
        fitting = [point for point in POINTS if fnmatch.fnmatchcase(point.name, each)]
        if not fitting:
            raise MisuseError(f"no point fits {each!r}; `kvmbench conformance --list` names all {len(POINTS)}")
        found.update({point.name: point for point in fitting})
    order = {point.name: place for place, point in enumerate(POINTS)}
    return tuple(sorted(found.values(), key=lambda point: order.get(point.name, len(order))))


def run(
    host: Any,
    points: Iterable[str | Point] | str | None = None,
    progress: Progress | None = None,
    *,
    quirks: Iterable[Quirk] = QUIRKS,
) -> Report:
    """Holds a host's guest debug against the manuals.

    Each point has a fresh machine.

    Args:
        host: from `kvmbench.connect()`.
        points: names, with ``*`` where wanted, or points; None: all.
        progress: called before each point with its place, how many there are, and the point.
        quirks: what differences may be explained with.

    Returns:
        A `Report`. After a lost host the points left over cannot be tried, and say so.

    Raises:
        MisuseError: a name that fits no point, or no host.
        ClosedError: the host is closed.
    """
    if not hasattr(host, "core"):
        raise MisuseError(f"conformance.run() needs a host from kvmbench.connect(), not {host!r}")
    if host.closed:
        raise ClosedError("the host is closed; open it again with kvmbench.connect()")
    wanted, known = chosen(points), tuple(quirks)
    results = []
    for place, point in enumerate(wanted):
        if progress is not None:
            progress(place, len(wanted), point)
        results.append(attempt(host, point, known))
    facts = gather(host) if host.lost is None else {}
    return Report(host.info.describe(), host.provenance, tuple(results), host.mechanisms, facts)


def attempt(host: Any, point: Point, quirks: tuple[Quirk, ...] = QUIRKS) -> Result:
    """One point on a host."""
    start = time.perf_counter()

    def result(answer: Answer, **fields: Any) -> Result:
        return Result(point, answer, elapsed_s=time.perf_counter() - start, **fields)

    if host.lost is not None:
        return result(Answer.CANNOT, why=f"the host was lost: {host.lost}")
    lacking = _lacking(host, point)
    if lacking:
        return result(Answer.CANNOT, why=lacking)
    seen: list[str] = []
    try:
        seen.extend(point.attempt(host))
    except (CannotTry, UnsupportedError) as error:
        return result(Answer.CANNOT, why=str(error), observed=tuple(seen))
    except HostLost as error:
        return result(Answer.CANNOT, why=f"the host was lost: {error}", observed=tuple(seen))
    except KvmbenchError as error:
        seen.append(f"{type(error).__name__}: {error}")
    observed = tuple(seen)
    if observed == point.expected:
        return result(Answer.HOLDS, observed=observed)
    found = explain(point.name, point.expected, observed, host.info, quirks)
    return result(Answer.DIFFERS, observed=observed, quirks=found)


def _lacking(host: Any, point: Point) -> str:
    for name, cpl in point.needs:
        if cpl not in getattr(host.mechanisms, name):
            note = host.mechanisms.notes.get(f"{name}@{cpl}", "not tried")
            return f"self-check: {WORDS[name]} at CPL {cpl}: {note}"
    return ""
