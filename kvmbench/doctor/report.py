"""The doctor's findings as text for people and as JSON for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from kvmbench.doctor.finding import Finding, Status

_MARKS = {Status.OK: "ok", Status.LIMITED: "limited", Status.MISSING: "missing", Status.BROKEN: "BROKEN"}
_SUBJECT_COLUMN = 2
_TEXT_COLUMN = 26
_WIDTH = 110


@dataclass(frozen=True)
class Report:
    """All findings, and which host `connect()` would take.

    Attributes:
        findings: in the order they are shown, areas together.
        verdict: one line: what `connect()` without arguments would pick, and why.
    """

    findings: Sequence[Finding]
    verdict: str

    def __str__(self) -> str:
        lines: list[str] = []
        area = ""
        for finding in self.findings:
            if finding.area != area:
                area = finding.area
                lines.append(area if not lines else f"\n{area}")
            lines.extend(_lines(finding))
        lines.append(f"\n{self.verdict}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The same as one JSON object with `findings` and `verdict`.

        Each finding has area, subject, status (ok, limited, missing or broken),
        text, mend and facts.
        """
        findings = [
            {
                "area": finding.area,
                "subject": finding.subject,
                "status": finding.status.value,
                "text": finding.text,
                "mend": finding.mend,
                "facts": dict(finding.facts),
            }
            for finding in self.findings
        ]
        return json.dumps({"findings": findings, "verdict": self.verdict}, indent=2, default=str)


def _lines(finding: Finding) -> list[str]:
    head = f"{'':{_SUBJECT_COLUMN}}{finding.subject:<14} {_MARKS[finding.status]:<8} "
    indent = " " * _TEXT_COLUMN
    lines = textwrap.wrap(
        finding.text,
        _WIDTH,
        initial_indent=f"{head:<{_TEXT_COLUMN}}",
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    if finding.mend:
        # Not wrapped: a command is copied as one line.
        lines.append(f"{indent}mend: {finding.mend}")
    return lines or [head.rstrip()]
