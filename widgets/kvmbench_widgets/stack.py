"""`Stack`: words from SS:RSP up, each with what it may be: a return address, a symbol, a text."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvmbench.debug.instruction import DECODER, MAX_BYTES
from kvmbench.debug.mode import CodeMode
from kvmbench.errors import AddressError, MisuseError
from kvmbench.kvm.region import PAGE_BYTES
from kvmbench_widgets.address import evaluate
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.pages import Pages
from kvmbench_widgets.panel import Panel, action

# Words looked at, at most: two pages of memory in long mode.
_MOST_WORDS = 512
_WINDOW = 64
_MOST_WINDOW = 512
# CALL is two bytes at least, and eight with a SIB byte, a 32-bit displacement and a prefix.
_CALL_BYTES = range(2, 9)


class _Frame(NamedTuple):
    """Where a stack is: offsets in the stack segment wrap at `mask`."""

    base: int
    pointer: int
    mask: int
    word_bytes: int

    def linear(self, offset: int) -> int:
        return (self.base + (offset & self.mask)) & (0xFFFF_FFFF if self.word_bytes < 8 else (1 << 64) - 1)


class Stack(Panel):
    """The stack of a vcpu, its top first: ``kw.Stack(cpu)``."""

    MODULE = "stack"
    TITLE = "Stack"

    def __init__(self, target: Any, **traits: Any) -> None:
        self._first, self._count = 0, _WINDOW
        self._pages = Pages()
        super().__init__(target, **traits)

    def make_view(self) -> dict[str, Any]:
        self._pages.begin(self.machine)
        cpu, mode = self.cpu, self.cpu.mode
        frame = self._frame(mode)
        left = (frame.mask + 1 - frame.pointer) // frame.word_bytes  # a stack ends with its segment
        most = min(_MOST_WORDS, left)
        total = self._mapped(frame, most)
        self._first = max(0, min(self._first, total - 1))
        base_pointer = int(cpu.regs.rbp) & frame.mask
        rows = [
            self._row(frame, mode, index, base_pointer)
            for index in range(self._first, min(total, self._first + self._count))
        ]
        view: dict[str, Any] = {
            "vcpu": cpu.index,
            "word_bytes": frame.word_bytes,
            "segment": f"{int(cpu.regs.ss.selector):04x}" if mode.name in ("real", "virtual-8086") else "",
            "pointer": f"{frame.pointer:x}",
            "total": total,
            "first": self._first,
            "rows": rows,
        }
        if total < most:
            end = frame.linear(frame.pointer + total * frame.word_bytes)
            view["end"] = f"{end:#x} is {self._pages.linear(cpu, end & -PAGE_BYTES).note or 'not mapped'}"
        return view

    def _frame(self, mode: CodeMode) -> _Frame:
        regs = self.cpu.regs
        if mode.bits == 64:
            return _Frame(0, int(regs.rsp), (1 << 64) - 1, 8)
        # SS.B says how wide the pointer is, the code's width how wide a push is without prefixes.
        mask = 0xFFFF_FFFF if regs.ss.db else 0xFFFF
        return _Frame(int(regs.ss.base), int(regs.rsp) & mask, mask, mode.bits // 8)

    def _mapped(self, frame: _Frame, words: int) -> int:
        # How many of these words there are. Asked of no page behind the window: each question is a round trip.
        at, size = 0, frame.word_bytes
        while at < min(words, self._first + self._count) * size:
            address = frame.linear(frame.pointer + at)
            if self._pages.linear(self.cpu, address & -PAGE_BYTES).data is None:
                return at // size
            at += PAGE_BYTES - address % PAGE_BYTES
        return words

    def _row(self, frame: _Frame, mode: CodeMode, index: int, base_pointer: int) -> dict[str, Any]:
        size, cpu = frame.word_bytes, self.cpu
        offset = (frame.pointer + index * size) & frame.mask
        address = frame.linear(offset)
        data = self._pages.read(cpu, address, size)
        row: dict[str, Any] = {"at": f"{address:0{2 * size if size == 8 else 8}x}", "offset": f"+{index * size:#x}"}
        if len(data) < size:
            return row | {"note": "not mapped"}
        value = int.from_bytes(data, "little")
        row["hex"] = f"{value:0{2 * size}x}"
        before = self._before(address, size)
        if before is not None and before != data:
            row["was"] = f"{int.from_bytes(before, 'little'):0{2 * size}x}"
        marks = ["sp"] if index == 0 else []
        if offset <= base_pointer < offset + size:
            marks.append("bp")
        if marks:
            prefix = {2: "", 4: "e", 8: "r"}[size]
            row["marks"] = [prefix + mark for mark in marks]
        called = self._call_before(mode, value)
        target = mode.linear(value)
        if called is not None:
            row["call"] = called
        row["label"] = cpu.symbols.label(target) if value else ""
        if all(0x20 <= byte < 0x7F for byte in data) or _is_text(data):
            row["text"] = data.rstrip(b"\0").decode("ascii")
        return row

    def _before(self, address: int, size: int) -> bytes | None:
        found = b""
        while len(found) < size:
            at = address + len(found)
            before = self._pages.linear(self.cpu, at & -PAGE_BYTES).before
            if before is None:
                return None
            found += before[at % PAGE_BYTES : at % PAGE_BYTES + size - len(found)]
        return found

    # What a CALL pushes is the address behind it. Bytes that happen to decode so are taken for one too: the panel
    # says that a CALL stands before the address, not that it was made.
    def _call_before(self, mode: CodeMode, value: int) -> str | None:
        if value < MAX_BYTES:
            return None
        code = self._pages.read(self.cpu, mode.linear(value - MAX_BYTES), MAX_BYTES)
        if len(code) < MAX_BYTES or not any(code):
            return None
        for length in _CALL_BYTES:
            one = DECODER.decode(
                code[-length:], bits=mode.bits, address=value - length, symbols=self.cpu.symbols,
                code_base=mode.code_base,
            )  # fmt: skip
            if one.is_call and one.size_bytes == length:
                return one.text
        return None

    @action
    def show(self, first: int, count: int) -> None:
        """Sends the words from the `first`-th on; while the vcpu runs the last ones seen stay.

        Raises:
            MisuseError: not two numbers of words.
        """
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in (first, count)):
            raise MisuseError(f"cannot show {count!r} words from word {first!r}")
        self._first, self._count = first, min(max(count, 1), _MOST_WINDOW)
        self.refresh()

    @action
    def write(self, address: str, value: str) -> None:
        """Writes a word of the stack.

        Args:
            address: its linear address, as the view has it.
            value: a number, a symbol, a register, or one of these and a distance.

        Raises:
            MisuseError: no such value, or it does not fit; or the vcpu runs.
            AddressError: nothing is mapped there.
        """
        cpu = self.cpu
        if self.session.is_busy(cpu):
            raise MisuseError(f"the stack cannot be written while vcpu {cpu.index} runs; pause it first")
        try:
            start = int(address, 16)
        except (TypeError, ValueError):
            raise MisuseError(f"{address!r} is no address: give hex digits") from None
        size = cpu.mode.bits // 8
        number, _ = evaluate(cpu, value)
        if number >> 8 * size:
            raise MisuseError(f"{value} = {number:#x} does not fit a word of {8 * size} bits")
        if not 0 <= start <= (1 << 64) - size:
            raise MisuseError(f"{address!r} is no address of 64 bits")
        data = number.to_bytes(size, "little")
        pieces: list[tuple[int, bytes]] = []
        first = min(size, PAGE_BYTES - start % PAGE_BYTES)
        for at, piece in ((start, data[:first]), (start + first, data[first:])):
            if not piece:
                continue
            gpa = cpu.translate(at)
            if gpa is None:
                raise AddressError(f"{at:#x} is not mapped")
            self.machine.memory.find(gpa, len(piece))
            pieces.append((gpa, piece))
        for gpa, piece in pieces:
            self.machine.memory.write(gpa, piece)
        self.session.changed()

    def lines(self) -> list[Line]:
        view = self.view
        if not view:
            return [[Span("nothing seen yet", "dim")]]
        lines: list[Line] = []
        for row in view["rows"]:
            marks = ",".join(row.get("marks", ()))
            line = [Span(f"{marks:7} ", "here"), Span(f"{row['at']} ", "name"), Span(f"{row['offset']:6} ", "dim")]
            if "note" in row:
                lines.append([*line, Span(row["note"], "dim")])
                continue
            changed = "was" in row
            line += [Span(row["hex"], "changed" if changed else ""), Span("* " if changed else "  ")]
            lines.append([*line, Span(_meaning(row))])
        if "end" in view:
            lines.append([Span(view["end"], "dim")])
        return lines

    def table(self) -> Table:
        return Table(
            ("address", "offset", "value", "before", "marks", "symbol", "call_before", "text"),
            [
                (
                    f"0x{row['at']}",
                    row["offset"],
                    f"0x{row['hex']}" if "hex" in row else "",
                    f"0x{row['was']}" if "was" in row else "",
                    " ".join(row.get("marks", ())),
                    row.get("label", ""),
                    row.get("call", ""),
                    row.get("text", ""),
                )
                for row in self.view.get("rows", ())
            ],
        )


def _is_text(data: bytes) -> bool:
    # The end of a string: at least two characters and the zeros behind them.
    text = data.rstrip(b"\0")
    return len(text) > 1 and all(0x20 <= byte < 0x7F for byte in text)


def _meaning(row: dict[str, Any]) -> str:
    words = []
    if "call" in row:
        words.append(f"return to {row['label'] or '0x' + row['hex'].lstrip('0')} after {row['call']}")
    elif row.get("label"):
        words.append(row["label"])
    if "text" in row:
        words.append(repr(row["text"]))
    return "  ".join(words)
