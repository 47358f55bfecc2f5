"""What the Disassembly panel shows, as styled text and as a table, from its view alone."""

from __future__ import annotations

from typing import Any

from kvmbench_widgets.export import Line, Span, Table

_TEXT_ROWS = 40


# Number of the first row, and the rows.
def _in_text(view: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    first = max(0, min(view["at"] - view["first"] - _TEXT_ROWS // 3, len(view["rows"]) - _TEXT_ROWS))
    return view["first"] + first, view["rows"][first : first + _TEXT_ROWS]


def lines(view: dict[str, Any], *, show_bytes: bool = True) -> list[Line]:
    """The listing around the address shown: breakpoints ``b`` (disabled ``o``), arrows, ``=>`` at rip."""
    if not view:
        return [[Span("nothing seen yet", "dim")]]
    first, rows = _in_text(view)
    code = [row for row in rows if row["kind"] == "code"]
    place = max((len(row["address"]) for row in code), default=0)
    size = min(23, max((len(row["bytes"]) for row in code), default=0))
    words = min(40, max((len(_words(row)) for row in code), default=0))
    arrows = _arrows(view, first, len(rows))
    lines: list[Line] = [[Span(f"vcpu {view['vcpu']}, {view['mode']}", "dim")]]
    for number, row in enumerate(rows, first):
        drawn = Span(arrows[number - first], "dim")
        if row["kind"] != "code":
            lines.append([Span("     "), drawn, Span(row["text"], "name" if row["kind"] == "label" else "dim")])
            continue
        here = number == view["here"]
        mark = row.get("breakpoint")
        gutter = " " if mark is None else "b" if mark["enabled"] else "o"
        line = [Span(f"{gutter} {'=>' if here else '  '} ", "here" if here else "bad"), drawn]
        line.append(Span(f"{row['address']:>{place}}  ", "here" if here else "dim"))
        if show_bytes:
            line.append(Span(f"{row['bytes']:{size}}  ", "changed" if "was" in row else "dim"))
        line.append(Span(f"{_words(row):{words}}  ", "here" if here else ""))
        if "taken" in row:
            line.append(Span("jumps  " if row["taken"] else "falls through  ", "changed"))
        line.append(Span(_source(row), "dim"))
        lines.append(line)
    return lines


# The branch arrows, a string a row.
def _arrows(view: dict[str, Any], first: int, count: int) -> list[str]:
    width = view["lanes"]
    if not width:
        return [""] * count
    cells = [[" "] * (width + 1) for _ in range(count)]
    # Inner lanes over outer ones, and the current instruction's over all.
    for arrow in sorted(view["arrows"], key=lambda each: (each.get("here", False), -each["lane"])):
        low, high = sorted((arrow["from"], arrow["to"]))
        column = width - 1 - arrow["lane"]
        for row in range(max(low, first), min(high, first + count - 1) + 1):
            line = cells[row - first]
            if row in (low, high):
                corner = "─" if low == high else "┌" if row == low else "└"
                line[column:] = [corner, *"─" * (width - column)]
                line[width] = ">" if row == arrow["to"] else line[width]
            elif line[column] in " ─":
                line[column] = "│" if line[column] == " " else "┼"
    return ["".join(line) + " " for line in cells]


def table(view: dict[str, Any]) -> Table:
    """The rows of code that the view holds."""
    return Table(
        ("linear", "address", "bytes", "loaded", "instruction", "comment", "label", "line", "source", "breakpoint",
         "here"),
        [
            (
                row["linear"], row["address"], row["bytes"], row.get("was", ""),
                f"{row['mnemonic']} {row['operands']}".strip(), row.get("comment", ""), row.get("label", ""),
                row.get("line", ""), row.get("source", ""), row.get("breakpoint", {}).get("words", ""),
                1 if number == view["here"] else "",
            )
            for number, row in enumerate(view.get("rows", ()), view.get("first", 0))
            if row["kind"] == "code"
        ],
    )  # fmt: skip


def _words(row: dict[str, Any]) -> str:
    comment = f"  ; {row['comment']}" if "comment" in row else ""
    return f"{row['mnemonic']} {row['operands']}".strip() + comment


def _source(row: dict[str, Any]) -> str:
    if "line" not in row:
        return ""
    return f"line {row['line']}" + (f": {row['source']}" if "source" in row else "")
