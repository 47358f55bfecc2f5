"""What one host answered: a point a row, in words, as table, data frame and JSON."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from kvmbench.conformance.point import ITEMS, Point
from kvmbench.conformance.quirk import Quirk
from kvmbench.host.provenance import Provenance
from kvmbench.host.selfcheck import Mechanisms

if TYPE_CHECKING:
    import pandas


class Answer(StrEnum):
    """What a host says to a point."""

    HOLDS = "holds"
    DIFFERS = "differs"
    CANNOT = "cannot be tried"


#: A mark for each answer, so that nothing is said by colour alone; the colours are those of Okabe and Ito.
MARKS = {Answer.HOLDS: "\u2713", Answer.DIFFERS: "\u2260", Answer.CANNOT: "\u2013"}
COLOURS = {Answer.HOLDS: "#0072B2", Answer.DIFFERS: "#E69F00", Answer.CANNOT: "#666666"}
UNEXPLAINED_COLOUR = "#D55E00"


@dataclasses.dataclass(frozen=True)
class Result:
    """The answer of one host to one point.

    Attributes:
        point: the point.
        answer: holds, differs, or cannot be tried.
        observed: everything that was seen, in order.
        why: why it could not be tried, in the self-check's or KVM's words; else "".
        quirks: what explains a difference; empty where nothing does.
        elapsed_s: how long it took, in this process's time.
    """

    point: Point
    answer: Answer
    observed: tuple[str, ...] = ()
    why: str = ""
    quirks: tuple[Quirk, ...] = ()
    elapsed_s: float = 0.0

    @property
    def unexplained(self) -> bool:
        """It differs and no quirk says why."""
        return self.answer is Answer.DIFFERS and not self.quirks

    @property
    def cell(self) -> str:
        """For a matrix: ``holds``, ``differs: KVM``, ``differs: UNEXPLAINED``, ``cannot be tried``."""
        if self.answer is not Answer.DIFFERS:
            return str(self.answer)
        causes = dict.fromkeys(str(quirk.cause) for quirk in self.quirks)
        return f"differs: {' and '.join(causes) or 'UNEXPLAINED'}"

    @property
    def how(self) -> str:
        """The difference: what was seen from the first entry on that is another, and what was expected."""
        if self.answer is Answer.CANNOT:
            return self.why
        if self.answer is Answer.HOLDS:
            return ""
        seen, wanted = self.observed, self.point.expected
        same = next(
            (n for n, pair in enumerate(zip(seen, wanted, strict=False)) if pair[0] != pair[1]),
            min(len(seen), len(wanted)),
        )
        return f"{_listed(seen[same:])} instead of {_listed(wanted[same:])}" + (
            f" from entry {same + 1} on" if same else ""
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "point": self.point.name,
            "answer": str(self.answer),
            "expected": list(self.point.expected),
            "observed": list(self.observed),
            "why": self.why,
            "quirks": [quirk.name for quirk in self.quirks],
            "unexplained": self.unexplained,
            "elapsed_s": round(self.elapsed_s, 3),
        }


def _listed(entries: Sequence[str], most: int = 4) -> str:
    shown = "; ".join(entries[:most])
    return (f"{shown}; ... ({len(entries)} in all)" if len(entries) > most else shown) or "nothing more"


@dataclasses.dataclass(frozen=True)
class Report:
    """What one host answered.

    Attributes:
        host: the host in one line.
        provenance: the same for records and figures.
        results: in the order of the points.
        mechanisms: the host's self-check.
        facts: what else is said of it (`kvmbench.conformance.facts`).
    """

    host: str
    provenance: Provenance
    results: tuple[Result, ...]
    mechanisms: Mechanisms = dataclasses.field(default_factory=Mechanisms, repr=False)
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def differences(self) -> tuple[Result, ...]:
        """Those that differ."""
        return tuple(result for result in self.results if result.answer is Answer.DIFFERS)

    @property
    def unexplained(self) -> tuple[Result, ...]:
        """Those that differ and no quirk says why."""
        return tuple(result for result in self.results if result.unexplained)

    @property
    def summary(self) -> str:
        """``72 hold, 20 differ (12 KVM, 8 emulator), 3 cannot be tried``."""
        counts = {answer: sum(result.answer is answer for result in self.results) for answer in Answer}
        causes: dict[str, int] = {}
        for result in self.differences:
            cause = result.cell.removeprefix("differs: ")
            causes[cause] = causes.get(cause, 0) + 1
        of_them = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        return (
            f"{counts[Answer.HOLDS]} hold, {counts[Answer.DIFFERS]} differ{f' ({of_them})' if of_them else ''}, "
            f"{counts[Answer.CANNOT]} cannot be tried"
        )

    def __getitem__(self, point: str) -> Result:
        """The result of a point, by its name."""
        for result in self.results:
            if result.point.name == point:
                return result
        raise KeyError(f"no point {point!r} in this report of {len(self.results)}")

    def __len__(self) -> int:
        return len(self.results)

    def __repr__(self) -> str:
        return f"<Report of {self.host}: {self.summary}>"

    def __str__(self) -> str:
        lines = [f"{self.host}: {self.summary}"]
        width = max((len(result.point.name) for result in self.results), default=0)
        for result in self.results:
            more = f" ({result.how})" if result.answer is not Answer.HOLDS else ""
            lines.append(f"  {MARKS[result.answer]} {result.point.name:<{width}}  {result.cell}{more}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table({"answer": self}, heading=self.host)

    def to_json(self) -> str:
        """All of it as a JSON object."""
        return json.dumps(self.to_plain(), indent=2)

    def to_plain(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "host": self.host,
            "provenance": json.loads(self.provenance.to_json()),
            "mechanisms": self.mechanisms.to_json(),
            "facts": dict(self.facts),
            "results": [result.to_json() for result in self.results],
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """A row a point: layer, topic, title, item, answer, cause, quirks, how, expected and observed."""
        import pandas

        rows = {
            result.point.name: {
                "layer": str(result.point.layer),
                "topic": result.point.topic,
                "title": result.point.title,
                "item": ITEMS[result.point.item],
                "answer": str(result.answer),
                "cause": result.cell.partition(": ")[2],
                "quirks": ", ".join(quirk.name for quirk in result.quirks),
                "how": result.how,
                "expected": result.point.expected,
                "observed": result.observed,
            }
            for result in self.results
        }
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis("point")


def html_table(reports: dict[str, Report], *, heading: str = "") -> str:
    """Points by hosts, with words and a mark in each cell, and what differs on hovering."""
    points = list(dict.fromkeys(result.point for report in reports.values() for result in report.results))
    by_host = {label: {result.point.name: result for result in report.results} for label, report in reports.items()}
    left = "text-align:left; padding:0 .9em 0 0; vertical-align:top; white-space:nowrap"
    lines = [f"<div><b>{html.escape(heading)}</b></div>"] if heading else []
    lines.append("<table><thead><tr>")
    lines += [f"<th style='{left}'>{html.escape(name)}</th>" for name in ("point", *reports)]
    lines.append("</tr></thead><tbody>")
    topic = ""
    for point in points:
        if point.topic != topic:
            topic = point.topic
            lines.append(f"<tr><th colspan='{len(reports) + 1}' style='{left}'>{html.escape(topic)}</th></tr>")
        lines.append(
            f"<tr><td style='{left}' title='{html.escape(point.title, quote=True)}'>{html.escape(point.name)}</td>"
        )
        for label in reports:
            lines.append(_cell(by_host[label].get(point.name), left))
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])


def _cell(result: Result | None, style: str) -> str:
    if result is None:
        return f"<td style='{style}'></td>"
    colour = UNEXPLAINED_COLOUR if result.unexplained else COLOURS[result.answer]
    # The colour is a stripe beside the words: text in it would be too pale on one of the two themes.
    return (
        f"<td style='{style}; border-left:.5em solid {colour}; padding-left:.4em' "
        f"title='{html.escape(result.how, quote=True)}'>{MARKS[result.answer]} {html.escape(result.cell)}</td>"
    )
