"""Registers as a debugger shows them: a dozen lines of text, or the same in HTML.

Both are drawn from `_groups`, so text and HTML cannot disagree.
"""

from __future__ import annotations

import html
from collections.abc import Collection
from dataclasses import dataclass

from kvmbench.debug import style
from kvmbench.debug.mode import CodeMode
from kvmbench.debug.register_file import RegisterFile
from kvmbench.debug.register_table import GENERAL, SEGMENTS, short_name
from kvmbench.debug.symbols import Symbols


# One register as shown: its name(s), its value, whether any of them changed, and a remark after it.
@dataclass(frozen=True, slots=True)
class _Cell:
    name: str
    value: str
    changed: bool
    remark: str = ""


def as_text(
    now: RegisterFile, before: RegisterFile | None = None, symbols: Symbols | None = None, *, title: str = ""
) -> str:
    """Grouped registers; values that differ from `before` are followed by ``*``.

    Args:
        now: what is shown.
        before: the state to compare with, or None to mark nothing.
        symbols: names rip when given.
        title: a first line.
    """
    lines = [title] if title else []
    for rows in _groups(now, before, symbols):
        columns = max(len(row) for row in rows)
        names = [max((len(row[i].name) for row in rows if i < len(row)), default=0) for i in range(columns)]
        values = [max((len(row[i].value) for row in rows if i < len(row)), default=0) for i in range(columns)]
        for row in rows:
            words = []
            for index, cell in enumerate(row):
                mark = "*" if cell.changed else " "
                word = f"{cell.name:{names[index]}} {cell.value}{mark}"
                padded = f"{word:{names[index] + values[index] + 2}}"
                words.append(f"{padded} {cell.remark}" if cell.remark else padded)
            lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def as_html(
    now: RegisterFile, before: RegisterFile | None = None, symbols: Symbols | None = None, *, title: str = ""
) -> str:
    """As `as_text`, in HTML: changes are bold, underlined and coloured, with the old value as tooltip."""
    old = {} if before is None else {cell.name: cell.value for cell in _cells(before, None, None)}
    parts = [f"<div>{html.escape(title)}</div>"] if title else []
    for rows in _groups(now, before, symbols):
        drawn = []
        for row in rows:
            cells = []
            for cell in row:
                kind = "changed" if cell.changed else "value"
                tip = f"was {old.get(cell.name, 'grouped otherwise')}" if cell.changed else ""
                cells.append(f"<td>{style.span(cell.name, 'name')}</td>")
                remark = f" {style.span(cell.remark, 'dim')}" if cell.remark else ""
                cells.append(f"<td>{style.span(cell.value, kind, title=tip)}{remark}</td>")
            drawn.append(f"<tr>{''.join(cells)}</tr>")
        parts.append(f"<table>{''.join(drawn)}</table>")
    return style.page("".join(parts))


def changes_text(before: RegisterFile, now: RegisterFile, *, skip: Collection[str] = ("rip",)) -> str:
    """What changed, in one line: ``rax 0x1 -> 0x2, rflags 0x2 -> 0x246 [PF ZF IF]``."""
    return ", ".join(
        f"{name} {_short(old)} -> {_short(new)}" for name, (old, new) in before.diff(now).items() if name not in skip
    )


def _short(value: object) -> str:
    return f"{value:#x}" if type(value) is int else str(value)


def _cells(now: RegisterFile, before: RegisterFile | None, symbols: Symbols | None) -> list[_Cell]:
    return [cell for rows in _groups(now, before, symbols) for row in rows for cell in row]


def _groups(now: RegisterFile, before: RegisterFile | None, symbols: Symbols | None) -> list[list[list[_Cell]]]:
    mode = now.mode
    changed = set() if before is None else set(before.diff(now))
    return [
        _general(now, mode, changed),
        _position(now, mode, changed, symbols),
        _segments(now, changed),
        [[_Cell(name, repr(getattr(now, name)), name in changed) for name in ("gdt", "idt")]],
        [
            [_Cell(name, str(getattr(now, name)), name in changed) for name in names]
            for names in (("cr0", "cr2", "cr8"), ("cr4", "cr3"), ("efer", "apic_base"))
        ],
    ]


def _general(now: RegisterFile, mode: CodeMode, changed: set[str]) -> list[list[_Cell]]:
    # 16- and 32-bit code sees eight registers of 32 bits. The others are shown only if something is in them,
    # as after a return from long mode; hiding a value would be lying.
    narrow = mode.bits != 64
    names = GENERAL
    if narrow and not any(getattr(now, name) for name in GENERAL[8:]) and not changed & set(GENERAL[8:]):
        names = GENERAL[:8]
    narrow = narrow and not any(getattr(now, name) >> 32 for name in names)
    cells = [
        _Cell(
            short_name(name, 32) if narrow else name,
            f"{getattr(now, name):08x}" if narrow else f"{getattr(now, name):016x}",
            name in changed,
        )
        for name in names
    ]
    # Down the columns, four to a column, so that rsi rdi rsp rbp stand together; eight fit two rows.
    depth = 4 if len(cells) == 16 else 2
    return [cells[row::depth] for row in range(depth)]


def _position(now: RegisterFile, mode: CodeMode, changed: set[str], symbols: Symbols | None) -> list[list[_Cell]]:
    linear = mode.linear(now.rip)
    label = symbols.label(linear) if symbols is not None else ""
    at = f"(linear {linear:#x}) " if linear != now.rip else ""
    paging = "" if mode.paging == "off" else f", {mode.paging} paging"
    return [
        [
            _Cell("rip", f"{now.rip:#x}", "rip" in changed, f"{at}{label}".strip()),
            _Cell("rflags", str(now.rflags), "rflags" in changed, f"({mode}{paging})"),
        ]
    ]


def _segments(now: RegisterFile, changed: set[str]) -> list[list[_Cell]]:
    # Segments that hold the same thing share a line: usually ds es fs gs ss.
    groups: dict[str, list[str]] = {}
    for name in SEGMENTS:
        groups.setdefault(repr(getattr(now, name)), []).append(name)
    return [[_Cell(" ".join(names), text, any(name in changed for name in names))] for text, names in groups.items()]
