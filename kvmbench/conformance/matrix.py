"""Several hosts side by side: which there are, opening them, and the matrix of what they answered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvmbench.arguments import instead
from kvmbench.conformance.point import Point
from kvmbench.conformance.quirk import Quirk
from kvmbench.conformance.report import MARKS, Answer, Report, Result, html_table
from kvmbench.conformance.run import chosen, run
from kvmbench.errors import KvmbenchError, MisuseError
from kvmbench.host.connect import connect

#: Name of each column, and what `connect()` takes for it.
HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {}),
    "npt=1": ("appliance", {"npt": 1}),
    "npt=0": ("appliance", {"npt": 0}),
    "ept=1": ("appliance:intel", {"ept": 1}),
    "ept=0": ("appliance:intel", {"ept": 0}),
}


@dataclass(frozen=True)
class Matrix:
    """What several hosts answered.

    Attributes:
        reports: column to report, for hosts that could be opened.
        absent: column to the reason, for those that could not.
    """

    reports: Mapping[str, Report]
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def points(self) -> tuple[Point, ...]:
        """All points, in their order."""
        return tuple(dict.fromkeys(result.point for report in self.reports.values() for result in report.results))

    @property
    def unexplained(self) -> dict[str, tuple[str, ...]]:
        """Column to the names of points that differ there without a quirk."""
        found = {label: tuple(one.point.name for one in report.unexplained) for label, report in self.reports.items()}
        return {label: names for label, names in found.items() if names}

    @property
    def quirks(self) -> dict[Quirk, dict[str, tuple[str, ...]]]:
        """Each quirk that was met: column to the names of points it explains there."""
        met: dict[Quirk, dict[str, tuple[str, ...]]] = {}
        for label, report in self.reports.items():
            for result in report.differences:
                for quirk in result.quirks:
                    by_host = met.setdefault(quirk, {})
                    by_host[label] = (*by_host.get(label, ()), result.point.name)
        return met

    def __repr__(self) -> str:
        columns = ", ".join([*self.reports, *(f"{label} (absent)" for label in self.absent)])
        return f"<Matrix of {len(self.points)} points on {columns}>"

    def __str__(self) -> str:
        return self.text()

    def text(self, *, verbose: bool = False) -> str:
        """The matrix, below it each quirk with the points it explains, and what could not be tried or opened.

        Args:
            verbose: also, for each difference, everything that was expected and everything that was observed.
        """
        parts = (self._table(), self._explanations(), self._observations() if verbose else "")
        return "\n\n".join(part for part in parts if part)

    def _table(self) -> str:
        width = max((len(point.name) for point in self.points), default=5)
        columns = {
            label: max(len(label), *(len(r.cell) for r in report.results), 1) + 2
            for label, report in self.reports.items()
        }
        lines = [f"{'':<{width}}  " + "  ".join(f"{label:<{columns[label]}}" for label in self.reports).rstrip()]
        topic = ""
        for point in self.points:
            if point.topic != topic:
                topic = point.topic
                lines.append(f"\n{topic}")
            cells = []
            for label, report in self.reports.items():
                result = next((one for one in report.results if one.point == point), None)
                text = "" if result is None else f"{MARKS[result.answer]} {result.cell}"
                cells.append(f"{text:<{columns[label]}}")
            lines.append(f"{point.name:<{width}}  " + "  ".join(cells).rstrip())
        return "\n".join(lines)

    def _explanations(self) -> str:
        lines = []
        for quirk, by_host in self.quirks.items():
            lines.append(f"{quirk.name} ({quirk.cause}): {_places(by_host)}\n  {quirk.why}\n  {quirk.source}")
        for label, report in self.reports.items():
            for result in report.results:
                if result.answer is Answer.CANNOT:
                    lines.append(f"{label}: {result.point.name} cannot be tried: {result.why}")
        for label, report in self.reports.items():
            for result in report.unexplained:
                lines.append(f"UNEXPLAINED on {label}: {result.point.name}: {result.how}")
        lines += [f"{label}: {report.host}: {report.summary}" for label, report in self.reports.items()]
        lines += [f"{label}: not there: {why}" for label, why in self.absent.items()]
        return "\n".join(lines)

    def _observations(self) -> str:
        lines = []
        for label, report in self.reports.items():
            for result in report.differences:
                whose = ", ".join(quirk.name for quirk in result.quirks) or "UNEXPLAINED"
                lines.append(f"{label}: {result.point.name} ({whose})")
                lines.append(f"  expected: {'; '.join(result.point.expected) or 'nothing'}")
                lines.append(f"  observed: {'; '.join(result.observed) or 'nothing'}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(dict(self.reports))

    def to_json(self) -> str:
        """All of it as a JSON object."""
        plain = {
            "reports": {label: report.to_plain() for label, report in self.reports.items()},
            "absent": dict(self.absent),
            "unexplained": {label: list(names) for label, names in self.unexplained.items()},
            "quirks": {
                quirk.name: {
                    "cause": str(quirk.cause),
                    "where": str(quirk.where),
                    "why": quirk.why,
                    "source": quirk.source,
                    "met": {label: list(names) for label, names in by_host.items()},
                }
                for quirk, by_host in self.quirks.items()
            },
        }
        return json.dumps(plain, indent=2)


def _places(by_host: Mapping[str, tuple[str, ...]]) -> str:
    # Hosts with the same points share an entry, as npt=1 and npt=0 nearly always do.
    hosts: dict[tuple[str, ...], list[str]] = {}
    for label, names in by_host.items():
        hosts.setdefault(names, []).append(label)
    return "; ".join(f"{', '.join(labels)}: {_shortened(names)}" for names, labels in hosts.items())


def _shortened(names: Iterable[str]) -> str:
    # ``kvm.execute.dr0 .dr1``: a name that shares all but its last word with the one before gives that word only.
    words: list[str] = []
    family = ""
    for name in names:
        before, dot, last = name.rpartition(".")
        words.append(f".{last}" if dot and before == family else name)
        family = before
    return " ".join(words)


def named(hosts: Iterable[str] | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """Columns by name: those of `HOSTS`, or ``ssh://...``; None: all of `HOSTS`.

    Raises:
        MisuseError: there is no such host.
    """
    if hosts is None:
        return dict(HOSTS)
    found = {}
    for name in hosts:
        if name.startswith("ssh://"):
            found[name] = (name, dict[str, Any]())
        elif name in HOSTS:
            found[name] = HOSTS[name]
        else:
            raise MisuseError(f"no host {name!r}; {instead(name, [*HOSTS, 'ssh://...'])}")
    return found


def survey(
    hosts: Iterable[str] | None = None,
    points: Iterable[str | Point] | str | None = None,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> Matrix:
    """Opens hosts one after the other and runs points on each.

    A host that is lost on the way is opened again once, and goes on with the point behind the one that lost it.

    Args:
        hosts: names of `HOSTS`, or ``ssh://...``; None: all.
        points: as `run` takes them.
        progress: called with the column, the place of the point, how many there are, and what is being done.

    Raises:
        MisuseError: no such host or point.
    """
    wanted = chosen(points)
    reports: dict[str, Report] = {}
    absent: dict[str, str] = {}
    for label, (spec, options) in named(hosts).items():

        def say(place: int, count: int, what: str, label: str = label) -> None:
            if progress is not None:
                progress(label, place, count, what)

        say(0, len(wanted), "opening")
        try:
            reports[label] = _on_host(spec, options, wanted, say)
        except KvmbenchError as error:
            absent[label] = str(error)
            say(0, len(wanted), f"not there: {error}")
    return Matrix(reports, absent)


def _on_host(
    spec: str, options: dict[str, Any], points: tuple[Point, ...], say: Callable[[int, int, str], None]
) -> Report:
    done: tuple[Result, ...] = ()
    for again in (True, False):
        with connect(spec, quiet=True, **options) as host:
            start = len(done)

            def progress(place: int, count: int, point: Point, start: int = start) -> None:
                say(start + place, len(points), point.name)

            report = run(host, points[start:], progress)
            lost = host.lost is not None
            results = done + report.results
            if not lost or not again:
                break
        # The point that lost it is not tried again, those behind it are.
        first = next(n for n, result in enumerate(results) if "the host was lost" in result.why)
        done = results[: first + 1]
    say(len(points), len(points), "done")
    return replace(report, results=results)
