"""Recorded steps as a table of text or HTML."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from kvmbench.debug import style
from kvmbench.debug.flags import Flags
from kvmbench.debug.step_rows import EXIT_DEBUG, exit_name

if TYPE_CHECKING:
    from kvmbench.debug.record import StepRecord

_HEAD = ("step", "address", "symbol", "instruction", "changed")
# An HTML repr shows this many steps from each end.
_ENDS = 6


def as_text(record: StepRecord) -> str:
    """All steps of a record, a line each, under a line of headings."""
    rows = [_HEAD, *(_cells(record, index, read=True) for index in range(len(record)))]
    widths = [min(40, max(len(row[column]) for row in rows)) for column in range(len(_HEAD) - 1)]
    lines = []
    for number, row in enumerate(rows):
        # Numbers to the right, all else to the left.
        first = f"{row[0]:>{widths[0]}}"
        rest = [f"{cell:{width}}" for cell, width in zip(row[1:-1], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest, row[-1]]).rstrip())
        if number == 0:
            lines[0] = lines[0].rstrip()
    return "\n".join(lines)


def as_html(record: StepRecord) -> str:
    """A summary and the first and last steps, without a question to the guest."""
    count = len(record)
    head = "".join(f"<th>{style.span(name, 'dim')}</th>" for name in _HEAD)
    rows = []
    shown = range(count) if count <= 2 * _ENDS else [*range(_ENDS), None, *range(count - _ENDS, count)]
    for index in shown:
        if index is None:
            more = style.span(f"... {count - 2 * _ENDS:,} more steps ...", "dim")
            rows.append(f"<tr><td colspan=5>{more}</td></tr>")
            continue
        step, address, symbol, text, changed = _cells(record, index, read=False)
        rows.append(
            f"<tr><td>{style.span(step, 'dim')}</td><td>{address}</td><td>{style.span(symbol, 'name')}</td>"
            f"<td>{html.escape(text)}</td><td>{style.span(changed, 'changed')}</td></tr>"
        )
    summary = html.escape(record.summary())
    return style.page(f"<div>{summary}</div><table><tr>{head}</tr>{''.join(rows)}</table>")


def _cells(record: StepRecord, index: int, *, read: bool) -> tuple[str, str, str, str, str]:
    step = record[index]
    instruction = record.instruction(index, read=read)
    if instruction is None:
        symbol, text = record.symbols.label(step.executed_rip + record.code_base), "?"
    else:
        symbol, text = instruction.label, instruction.text
    changed = []
    for name, (_, new) in step.changes.items():
        if name == "rip":
            continue
        changed.append(f"rflags=[{Flags(new).describe()}]" if name == "rflags" else f"{name}={new:#x}")
    if step.exit != EXIT_DEBUG:
        changed.append(f"exit {exit_name(step.exit)}")
    changed += [f"({words})" for words in step.taints]
    return f"{step.index:,}", f"{step.executed_rip:#x}", symbol, text, " ".join(changed)
