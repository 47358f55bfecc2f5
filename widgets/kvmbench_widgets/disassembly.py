"""`Disassembly`: the code around rip or around any address, with labels, source, breakpoints and branch arrows.

The rows are those of a `Listing`: a part of a loaded program, or a few pages
around the address. What is in sight is compared with memory at each stop, so
code that changes itself is shown as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, ClassVar

import traitlets

from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.flags import Flags
from kvmbench.debug.instruction import DECODER, Instruction
from kvmbench.debug.mode import CodeMode
from kvmbench.errors import MisuseError
from kvmbench_widgets import disassembly_text
from kvmbench_widgets.address import evaluate
from kvmbench_widgets.branches import is_jump, lanes, will_jump
from kvmbench_widgets.export import Line, Table
from kvmbench_widgets.listing import Listing, Rows
from kvmbench_widgets.panel import Panel, action

# Swept at once: 256 KB of code are some 60,000 instructions and take 50 ms.
_PROGRAM_BYTES = 0x40000
_AROUND_BYTES = 0x2000
_PAGE_BYTES = 0x1000
# Nearer than this to where a listing is cut, the next one is made around the address.
_MARGIN_BYTES = 0x80
_WINDOW_ROWS = 120
_MOST_ROWS = 1000
_HISTORY = 100
_LABEL = re.compile(r"^[\w.$]+: *")


@dataclass(frozen=True)
class _Moment:
    # What a stop says that the rows need; kept, so that rows can be drawn while the vcpu runs or is gone.
    mode: CodeMode
    rip: int
    flags: Flags
    rcx: int
    cr3: int
    serial: int


class Disassembly(Panel):
    """Code of a vcpu: ``kw.Disassembly(cpu)``.

    Attributes:
        follow: whether each stop brings rip into sight; `goto` turns it off.
        show_bytes: whether encodings are shown.
        bits: 16, 32 or 64 to decode for that width; 0: as the vcpu would now.
    """

    MODULE = "disassembly"
    TITLE = "Disassembly"
    THEIRS: ClassVar[frozenset[str]] = frozenset({"follow", "show_bytes", "bits"})
    SHOWS: ClassVar[frozenset[str]] = frozenset({"code"})

    follow = traitlets.Bool(True).tag(sync=True)
    show_bytes = traitlets.Bool(True).tag(sync=True)
    bits = traitlets.Enum((0, 16, 32, 64), 0).tag(sync=True)

    def __init__(self, target: Any, **traits: Any) -> None:
        self._listing: Listing | None = None
        self._made_for: tuple[Any, ...] = ()
        self._moment: _Moment | None = None
        self._rows = Rows((), (), before=False, after=False)
        self._starts: list[int] = []
        self._numbered_for: tuple[Any, ...] = ()
        # Symbols and source lines by address, as of the last look.
        self._named: list[int] = []
        self._names: dict[int, str] = {}
        self._lined: list[int] = []
        self._known: tuple[Any, ...] = ()
        self._at = 0
        self._first, self._count = 0, _WINDOW_ROWS
        self._moves = 0
        self._shown_for: tuple[Any, ...] = ()
        self._back: list[int] = []
        self._forward: list[int] = []
        super().__init__(target, **traits)
        self.observe(self._chosen, ("follow", "bits"))

    def _chosen(self, change: Any) -> None:
        if change["name"] == "follow" and self.follow:
            self._shown_for = ()
        self.refresh()

    # --- what is shown

    def make_view(self) -> dict[str, Any]:
        regs = self.cpu.regs
        mode = regs.mode
        self._moment = moment = _Moment(
            mode, mode.linear(int(regs.rip)), Flags(regs.rflags), int(regs.rcx), int(regs.cr3), self.cpu.stop_serial
        )
        if self.follow:
            self._at = moment.rip
        # At a stop, and after a goto, the address is to be in sight; not after a breakpoint was set or a row shown.
        shown_for = (self.cpu.index, moment.serial if self.follow else None, self._at)
        moved, self._shown_for = shown_for != self._shown_for, shown_for
        listing = self._find(moment, moved)
        self._number(listing, moment, moved)
        begin, end = self._span(listing)
        now = self.cpu.read(begin, end - begin) if end > begin else b""
        if len(now) < end - begin:  # pages went away
            self._made_for = ()
            self._number(self._find(moment, moved), moment, moved)
        elif listing.patch(begin, now):
            self._number(listing, moment, moved)
        if moved:
            self._moves += 1
        return self._view(moment)

    @property
    def _bits(self) -> int:
        assert self._moment is not None
        return self.bits or self._moment.mode.bits

    def _find(self, moment: _Moment, moved: bool) -> Listing:
        """The listing that holds `_at`: the one there is, or a new one."""
        self._learn()
        at, mode = self._at, moment.mode
        segment = self._segment(at)
        made_for = (self.cpu.index, self._bits, self._known, mode.paging, moment.cr3, segment)
        kept = self._listing
        if kept is not None and made_for == self._made_for and at in kept:
            near_start = kept.cut_before and at - kept.start < _MARGIN_BYTES
            near_end = kept.cut_after and kept.end - at <= _MARGIN_BYTES
            # The ends of a segment stay where they are.
            if segment is not None:
                near_start = near_start and kept.start > segment[0]
                near_end = near_end and kept.end < segment[0] + segment[1]
            if not moved or not (near_start or near_end):
                return kept
        self._made_for = made_for
        low, data = self._read_around(at, segment, top=1 << (64 if mode.bits == 64 else 32))
        end = low + len(data)
        goes_on = bool(data) and end < 1 << 64 and bool(self.cpu.read(end, 1))
        self._listing = made = Listing(
            low,
            data,
            bits=self._bits,
            symbols=self._named[bisect_left(self._named, low) : bisect_left(self._named, end)],
            lines=self._lined[bisect_left(self._lined, low) : bisect_left(self._lined, end)],
            cut_before=bool(data) and low > 0 and bool(self.cpu.read(low - 1, 1)),
            cut_after=goes_on,
            trim=goes_on and (segment is None or end < segment[0] + segment[1]),
        )
        return made

    def _read_around(self, at: int, segment: tuple[int, int] | None, *, top: int) -> tuple[int, bytes]:
        """Where the bytes shown with `at` begin, and the bytes; none if it is not mapped."""
        if segment is None:
            least = 0
            low = max(0, (at & -_PAGE_BYTES) - _AROUND_BYTES)
            high = min(low + 3 * _AROUND_BYTES, top)
        else:
            least = segment[0]
            low = max(least, at - _PROGRAM_BYTES // 2)
            # Best from a place where an instruction is known to begin.
            known = bisect_left(self._named, low)
            if low > least and known < len(self._named) and self._named[known] <= at:
                low = self._named[known]
            high = min(least + segment[1], low + _PROGRAM_BYTES)
        for start in (low, max(at & -_PAGE_BYTES, least)):
            data = self.cpu.read(start, max(0, high - start))
            if at < start + len(data):
                return start, data
        return at, b""

    def _learn(self) -> None:
        symbols = self.cpu.symbols
        known = (self.machine.programs, len(symbols))
        if known == self._known:
            return
        self._known = known
        self._names = {address: name for name, address in symbols}
        self._named = list(self._names)
        self._lined = sorted(symbols.lines)

    def _segment(self, address: int) -> tuple[int, int] | None:
        for program in self.machine.programs:
            for gpa, data in program.segments:
                if gpa <= address < gpa + len(data):
                    return gpa, len(data)
        return None

    def _number(self, listing: Listing, moment: _Moment, moved: bool) -> None:
        """Numbers the rows, and moves the window to `_at` if that moved out of it."""
        # The row at the address asked for, and before all that at rip.
        starts = listing.with_rows_at((self._at, moment.rip))
        if starts is not self._starts or self._numbered_for != self._known:  # mostly they are the same
            self._starts, self._numbered_for = starts, self._known
            named = self._named[bisect_left(self._named, listing.start) : bisect_left(self._named, listing.end)]
            self._rows = Rows(starts, named, before=listing.start > 0 and bool(starts), after=True)
        at = self._rows.of(self._at) or 0
        if moved and not self._first + 4 <= at < self._first + self._count - 20:
            self._first = max(0, at - self._count // 3)
        self._first = max(0, min(self._first, self._rows.total - 1))

    def _span(self, listing: Listing) -> tuple[int, int]:
        """The linear addresses from and to which the window's rows reach."""
        shown = [self._rows[n] for n in self._window()]
        code = [address for kind, address in shown if kind == "code"]
        if not code:
            return 0, 0
        index = bisect_left(self._starts, code[-1])
        return code[0], self._starts[index + 1] if index + 1 < len(self._starts) else listing.end

    def _window(self) -> range:
        return range(self._first, min(self._first + self._count, self._rows.total))

    def _view(self, moment: _Moment) -> dict[str, Any]:
        """From what is kept alone: nothing is asked of the vcpu."""
        breakpoints: dict[int, Breakpoint] = {}
        for each in self.cpu.breakpoints:
            if not each.is_watchpoint and (each.address not in breakpoints or each.enabled):
                breakpoints[each.address] = each
        rows, jumps = [], []
        for number in self._window():
            kind, address = self._rows[number]
            if kind == "label":
                rows.append({"kind": "label", "linear": f"{address:#x}", "text": f"{self._names.get(address, '')}:"})
            elif kind == "code":
                one = self._decode(address, moment)
                row = self._row(one, address, moment, breakpoints.get(address))
                rows.append(row)
                if "target" in row and is_jump(one):
                    jumps.append((number, int(row["target"], 16), address == moment.rip, row.get("taken")))
            else:
                rows.append(self._edge(kind))
        here = self._rows.of(moment.rip)
        view: dict[str, Any] = {
            "vcpu": self.cpu.index,
            "mode": str(moment.mode),
            "bits": self._bits,
            "total": self._rows.total,
            "first": self._first,
            "rows": rows,
            "here": -1 if here is None else here,
            "rip": f"{moment.rip:#x}",
            "label": self.cpu.symbols.label(moment.rip),
            "at": self._rows.of(self._at) or 0,
            "moves": self._moves,
            "back": bool(self._back),
            "forward": bool(self._forward),
            **self._arrows(jumps),
        }
        return view

    def _decode(self, address: int, moment: _Moment) -> Instruction:
        assert self._listing is not None
        code = self._listing.bytes_of(self._starts, bisect_left(self._starts, address))
        base = moment.mode.code_base
        mask = (1 << 64) - 1 if moment.mode.bits == 64 else 0xFFFF_FFFF
        return DECODER.decode(
            code, bits=self._bits, address=(address - base) & mask, symbols=self.cpu.symbols, code_base=base
        )

    def _row(self, one: Instruction, address: int, moment: _Moment, breakpoint: Breakpoint | None) -> dict[str, Any]:
        base = moment.mode.code_base
        row: dict[str, Any] = {
            "kind": "code",
            "linear": f"{address:#x}",
            "address": f"{one.address:#x}",
            "bytes": one.bytes.hex(" "),
            "mnemonic": one.mnemonic,
            "operands": one.text[len(one.mnemonic) :].strip(),
        }
        if address < base:
            row["address"] = f"linear {address:#x}"  # no offset in this segment leads there
        if one.label:
            row["label"] = one.label
        if one.comment:
            row["comment"] = one.comment
        if one.target is not None:
            row["target"] = f"{moment.mode.linear(one.target):#x}"
        if one.line is not None:
            row["line"] = one.line
            # Assembly source mostly repeats the label and the instruction: the number alone is news then.
            source = _LABEL.sub("", " ".join(one.source.split()))
            if source.replace(" ", "") != one.text.replace(" ", ""):
                row["source"] = source
        if breakpoint is not None:
            row["breakpoint"] = {
                "number": breakpoint.number,
                "enabled": breakpoint.enabled,
                "conditional": breakpoint.condition is not None,
                "words": repr(breakpoint).strip("<>"),
            }
        was = self._loaded(address, one.size_bytes)
        if was and was != one.bytes:
            row["was"] = was.hex(" ")
        if address == moment.rip:
            taken = will_jump(one, moment.flags, moment.rcx)
            if taken is not None and one.operation != "jmp":
                row["taken"] = taken
        return row

    def _loaded(self, address: int, size_bytes: int) -> bytes:
        """What a program had there when it was loaded."""
        for program in self.machine.programs:
            for gpa, data in program.segments:
                if gpa <= address < gpa + len(data):
                    return data[address - gpa : address - gpa + size_bytes]
        return b""

    def _edge(self, kind: str) -> dict[str, Any]:
        listing = self._listing
        assert listing is not None
        if listing.start == listing.end:
            words = f"nothing is mapped at {listing.start:#x}"
            return {"kind": "edge", "text": words, "linear": f"{listing.start:#x}"}
        if kind == "before":
            if not listing.cut_before:
                return {"kind": "edge", "text": f"nothing is mapped below {listing.start:#x}"}
            larger = self._segment(listing.start - 1) == self._segment(listing.start)
            target = listing.start if larger else max(0, listing.start - 16)
            return {"kind": "edge", "text": f"more above {listing.start:#x}", "target": f"{target:#x}"}
        if not listing.cut_after:
            return {"kind": "edge", "text": f"nothing is mapped from {listing.end:#x} on"}
        return {"kind": "edge", "text": f"more from {listing.end:#x} on", "target": f"{listing.end:#x}"}

    def _arrows(self, jumps: list[tuple[int, int, bool, Any]]) -> dict[str, Any]:
        window = self._window()
        found = []
        for number, target, here, taken in jumps:
            to = self._rows.of(target)
            if to is not None and to in window:
                found.append((number, to, here, taken))
        placed = lanes([(number, to) for number, to, _, _ in found])
        arrows = []
        for (number, to, here, taken), lane in zip(found, placed, strict=True):
            arrow: dict[str, Any] = {"from": number, "to": to, "lane": lane}
            if here:
                arrow["here"] = True
                arrow["taken"] = taken is not False
            arrows.append(arrow)
        return {"arrows": arrows, "lanes": max(placed, default=-1) + 1}

    # --- what the page and notebooks ask for

    @action
    def show(self, first: int, count: int) -> None:
        """Sends the rows from the `first`-th on."""
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in (first, count)):
            raise MisuseError(f"cannot show {count!r} rows from {first!r}")
        self._first, self._count = first, min(max(count, 40), _MOST_ROWS)
        if self._moment is None:
            return
        if self.session.state(self.cpu) == "stopped" and not self.session.is_busy(self.cpu):
            self.refresh()
        else:  # as of the last stop
            self._first = max(0, min(first, self._rows.total - 1))
            self.view = self._view(self._moment)

    @action
    def goto(self, where: str | int) -> None:
        """Shows an address, a symbol or an expression (``loop+8``, ``rip``, ``rax-0x10``), and stops following rip.

        Raises:
            MisuseError: it means no address, or the vcpu runs.
        """
        self._check_idle("look elsewhere")
        address = self._address(where)
        if address != self._at:
            self._back = [*self._back[-_HISTORY:], self._at]
            self._forward = []
        self._go(address)

    @action
    def back(self) -> None:
        """Shows what was shown before the last `goto`."""
        self._travel(self._back, self._forward, "back")

    @action
    def forward(self) -> None:
        """Shows what was shown before the last `back`."""
        self._travel(self._forward, self._back, "forward")

    def _travel(self, source: list[int], other: list[int], way: str) -> None:
        self._check_idle("look elsewhere")
        if not source:
            raise MisuseError(f"there is nothing to go {way} to")
        other.append(self._at)
        self._go(source.pop())

    def show_address(self, gva: int) -> None:
        """Called by `Session.show`."""
        self.goto(gva)

    def _go(self, address: int) -> None:
        self._at, self._shown_for = address, ()
        if self.follow:
            self.follow = False  # draws
        else:
            self.refresh()

    def _address(self, where: str | int) -> int:
        symbols = self.cpu.symbols
        if isinstance(where, str) and where not in symbols:
            text = where.strip()
            if text.startswith("cs:"):  # an offset, as rip is one
                return self.cpu.mode.linear(symbols.resolve(text[3:].strip()))
            return evaluate(self.cpu, text)[0]
        if isinstance(where, bool):
            raise MisuseError(f"{where!r} is no address")
        return symbols.resolve(where)

    @action
    def toggle(self, where: str | int) -> None:
        """Removes the breakpoints at an address, or sets one if there is none.

        Raises:
            MisuseError: not an address, or the vcpu runs.
            AddressError, UnsupportedError: as `Breakpoints.add`.
        """
        self._check_idle("change breakpoints")
        address = self._address(where)
        breakpoints = self.cpu.breakpoints
        there = [each for each in breakpoints if not each.is_watchpoint and each.address == address]
        for each in there:
            breakpoints.remove(each)
        if not there:
            breakpoints.add(address)
        self.session.changed()

    @action
    def run_to(self, where: str | int) -> None:
        """Runs until rip is at an address.

        Raises:
            MisuseError: not an address.
            BusyError: the vcpu runs.
        """
        self._check_idle("run to another place")
        cpu, address = self.cpu, self._address(where)
        self.session.start(self, cpu, lambda: cpu.run_until(address))

    def _check_idle(self, what: str) -> None:
        if self.session.is_busy(self.cpu):
            raise MisuseError(f"vcpu {self.cpu.index} runs; pause it to {what}")

    # --- without a page

    def lines(self) -> list[Line]:
        return disassembly_text.lines(self.view, show_bytes=self.show_bytes)

    def table(self) -> Table:
        return disassembly_text.table(self.view)
