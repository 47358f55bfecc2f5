"""A stretch of disassembled code, as text and as an HTML table."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import overload

from kvmbench.arguments import integer
from kvmbench.debug import style
from kvmbench.debug.instruction import DECODER, MAX_BYTES, Instruction
from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError


class Disassembly(Sequence[Instruction]):
    """Instructions in the order of their addresses; prints as a listing.

    The listing marks the instruction at rip with ``=>`` and breakpoints with
    ``b``, starts every symbol with a line of its own, and shows the source line
    of each instruction that has one.

    Attributes:
        rip: offset of the instruction that runs next, or None.
        breakpoints: offsets marked in the gutter.
        note: why the listing ends early, or an empty string.
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        *,
        rip: int | None = None,
        breakpoints: Collection[int] = (),
        note: str = "",
    ) -> None:
        self._instructions = tuple(instructions)
        self.rip = rip
        self.breakpoints = frozenset(breakpoints)
        self.note = note

    @overload
    def __getitem__(self, index: int) -> Instruction: ...
    @overload
    def __getitem__(self, index: slice) -> Disassembly: ...
    def __getitem__(self, index: int | slice) -> Instruction | Disassembly:
        if isinstance(index, slice):
            return Disassembly(self._instructions[index], rip=self.rip, breakpoints=self.breakpoints)
        return self._instructions[index]

    def __len__(self) -> int:
        return len(self._instructions)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self._instructions)

    @property
    def text(self) -> str:
        """The listing."""
        if not self._instructions:
            return self.note or "no instructions"
        place = max(len(f"{one.address:#x}") for one in self._instructions)
        # Long encodings would push the text out of sight: beyond eight bytes only they get more room.
        code = min(23, max(len(one.bytes.hex(" ")) for one in self._instructions))
        words = min(40, max(len(_with_comment(one)) for one in self._instructions))
        lines: list[str] = []
        for one in self._instructions:
            if _starts_symbol(one):
                lines.append(f"{one.label}:")
            gutter = "b" if one.address in self.breakpoints else " "
            gutter += "=>" if one.address == self.rip else "  "
            row = [
                f"{one.address:#{place}x}",
                f"{one.bytes.hex(' '):{code}}",
                f"{_with_comment(one):{words}}",
            ]
            lines.append("  ".join([f"{gutter} {row[0]}", *row[1:], _source(one)]).rstrip())
        if self.note:
            lines.append(f"({self.note})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        rows: list[str] = []
        for one in self._instructions:
            if _starts_symbol(one):
                rows.append(f"<tr><td></td><td colspan=4>{style.span(one.label + ':', 'name')}</td></tr>")
            has_breakpoint = one.address in self.breakpoints
            here = one.address == self.rip
            gutter = style.span("●", "break", title="breakpoint") if has_breakpoint else " "
            gutter += "➤" if here else " "
            # Columns that line up in the source are only a gap here, and a wide one.
            source = " ".join(_source(one).split())
            rows.append(
                f"<tr{' class=kb-here' if here else ''}><td>{gutter}</td>"
                f'<td title="{html.escape(one.label, quote=True)}">{one.address:#x}</td>'
                f"<td>{style.span(one.bytes.hex(' '), 'dim')}</td>"
                f"<td>{_html_text(one)}</td><td>{style.span(source, 'dim')}</td></tr>"
            )
        note = f"<div>{style.span(self.note, 'dim')}</div>" if self.note else ""
        return style.page(f"<table>{''.join(rows)}</table>{note}")


def disassemble(
    code: bytes | Callable[[int, int], bytes],
    *,
    address: int,
    bits: int,
    count: int | None = None,
    symbols: Symbols | None = None,
    code_base: int = 0,
    rip: int | None = None,
    breakpoints: Collection[int] = (),
) -> Disassembly:
    """Disassembles bytes, or memory through a reader, from an address on.

    Bytes that are no instruction are shown one by one as ``.byte``, after which
    decoding goes on at the next byte, and may well be out of step.

    Args:
        code: the bytes from `address` on, or a function ``(gva, length_bytes) -> bytes`` that returns as many
            as it can read.
        address: offset of the first instruction in the code segment.
        bits: code width: 16, 32 or 64.
        count: how many instructions; needed with a reader, else all bytes are decoded.
        symbols: for labels, branch targets and source lines.
        code_base: linear address of offset 0 (CS base outside long mode).
        rip: offset to mark as the next to run.
        breakpoints: offsets to mark.

    Raises:
        MisuseError: a reader without a count, a negative count, or another width.
    """
    if count is not None:
        count = integer(count, "count", 0)
    if callable(code):
        if count is None:
            raise MisuseError("disassembling from memory needs count=")
        code = code((address + code_base) & (1 << 64) - 1, count * MAX_BYTES)
    code = bytes(code)
    found: list[Instruction] = []
    offset = 0
    while offset < len(code) and (count is None or len(found) < count):
        one = DECODER.decode(
            code[offset : offset + MAX_BYTES],
            bits=bits,
            address=address + offset,
            symbols=symbols,
            code_base=code_base,
        )
        found.append(one)
        offset += one.size_bytes
    note = ""
    if count is not None and len(found) < count:
        note = f"nothing readable at {address + offset:#x}"
    return Disassembly(found, rip=rip, breakpoints=breakpoints, note=note)


def _starts_symbol(one: Instruction) -> bool:
    return bool(one.label) and "+" not in one.label


def _with_comment(one: Instruction) -> str:
    return f"{one.text}  ; {one.comment}" if one.comment else one.text


def _source(one: Instruction) -> str:
    if one.line is None:
        return ""
    # Assembly source mostly repeats the instruction; only the line number is news then.
    if "".join(one.source.split()) == "".join(one.text.split()):
        return f"line {one.line}"
    return f"line {one.line}: {one.source}"


def _html_text(one: Instruction) -> str:
    text = html.escape(one.text)
    if one.target is not None and one.target_label:
        text = f"{html.escape(one.mnemonic)} {style.span(one.target_label, 'name', title=f'{one.target:#x}')}"
    if one.comment:
        text += "  " + style.span(f"; {one.comment}", "name")
    return text
