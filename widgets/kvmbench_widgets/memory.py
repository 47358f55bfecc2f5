"""`Memory`: bytes of the guest, by guest-physical or by linear address, as hex and as text.

The list has a row for every 8 or 16 bytes there are, a million and more, of which
the page asks for those in sight; only the pages of memory those lie in are read,
and compared with what they held at the stop shown before.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import traitlets

from kvmbench.errors import AddressError, KvmbenchError, MisuseError
from kvmbench.kvm.region import PAGE_BYTES
from kvmbench.machine.size import show_size
from kvmbench_widgets import extents
from kvmbench_widgets.address import evaluate
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.extents import Extents
from kvmbench_widgets.pages import Page, Pages
from kvmbench_widgets.panel import Panel, action, check_utf8

_ROWS = 32
_MOST_ROWS = 2000
_MOST_EDIT_BYTES = 1 << 20
_LIVE_S = 0.3
# A page says every second or two that it shows the panel; one that was closed says nothing.
_LOOKED_AT_S = 5.0
_CHUNK_BYTES = 1 << 18
_SEARCH_S = 2.0
_MOST_LINEAR_BYTES = 1 << 26


class Memory(Panel):
    """The guest's memory: ``kw.Memory(m)``, ``kw.Memory(m, address="stack")``, ``kw.Memory(cpu, space="gva")``.

    Attributes:
        space: "gpa" for guest-physical addresses, "gva" for linear ones through the vcpu's page tables.
        width: bytes a row, 8 or 16.
        group: bytes a number, 1, 2, 4 or 8; numbers are little-endian.
        live: whether guest-physical memory is read again and again while the guest runs.
        looked_at: counted up by a page while it shows the panel.
    """

    MODULE = "memory"
    TITLE = "Memory"
    THEIRS: ClassVar[frozenset[str]] = frozenset({"space", "width", "group", "live", "looked_at"})
    SHOWS = frozenset({"data"})

    space = traitlets.Enum(("gpa", "gva"), "gpa").tag(sync=True)
    width = traitlets.Enum((8, 16), 16).tag(sync=True)
    group = traitlets.Enum((1, 2, 4, 8), 1).tag(sync=True)
    live = traitlets.Bool(True).tag(sync=True)
    looked_at = traitlets.Int(0).tag(sync=True)

    def __init__(self, target: Any, address: int | str | None = None, **traits: Any) -> None:
        """Shows memory at a place.

        Args:
            target: a machine or a vcpu.
            address: what `go` takes; None: where the guest is going to run.

        Raises:
            MisuseError: no such place, or none that is shown; or an option that is none.
        """
        self._first, self._count = 0, _ROWS
        self._pages = Pages()
        self._place: dict[str, Any] = {}
        self._seen = self._drawn = -1e9
        self._extents: Extents | None = None
        # An address to be found again among other rows, and whether it is linear and gpas are shown now.
        self._keep: tuple[int, bool] | None = None
        self._searched: tuple[str, bytes, int] = ("", b"", 0)
        super().__init__(target, **traits)
        self.observe(self._rearrange, ["space", "width"])
        self.observe(self._looked, "looked_at")
        if self.state == "stopped":
            with self.session.lock:
                if address is None:
                    self._start_at_code()
                else:
                    self.go(hex(address) if isinstance(address, int) else address)

    def _start_at_code(self) -> None:
        # Where the guest is going to run holds something; address 0 mostly does not.
        try:
            self.go("rip")
        except KvmbenchError:
            return

    def _looked(self, _: object) -> None:
        self._seen = time.monotonic()

    def _rearrange(self, change: Any) -> None:
        # Rows have other numbers now: keep the place. Of a linear address the page tables say where it lies; a
        # physical one says nothing of linear ones, and is taken as it is, which fits where memory is mapped so.
        with self.session.lock:
            self.error = ""
            translate = change["name"] == "space" and self.space == "gpa"
            if "at" in self._place and self._keep is None:
                self._keep = (int(self._place["at"], 16), translate)
            self._extents, self._first = None, 0
            if not self.session.is_busy(self.cpu):
                self.refresh()
            elif self.space == "gpa" and not translate:
                self._read_while_running()
            else:
                # Nobody can look up a linear address now: what was seen last stays, until the next stop.
                self.view = self.view | {"live": False}

    def _keep_place(self) -> None:
        if self._keep is None:
            return
        (address, translate), self._keep = self._keep, None
        try:
            self._set_place(self._translated(address) if translate else address)
        except KvmbenchError:
            self._place = {}

    # --- what is drawn

    def make_view(self) -> dict[str, Any]:
        self._pages.begin(self.machine)
        if self.space == "gva" or self._extents is None:
            self._extents = self._lay_out()
        self._keep_place()
        return self._view()

    def _lay_out(self) -> Extents:
        if self.space == "gva":
            return extents.linear(self.cpu.mode, self.width)
        return extents.physical([(each.gpa, each.end) for each in self.machine.memory.regions], self.width)

    def tick(self) -> None:
        now = time.monotonic()
        if self.state != "running" or self.space != "gpa" or not self.live:
            return
        if now - self._drawn < _LIVE_S or now - self._seen > _LOOKED_AT_S:
            return
        self._drawn = now
        self._read_while_running()

    def _read_while_running(self) -> None:
        self._pages.peek()
        if self._extents is None:
            self._extents = self._lay_out()
        if self._keep is not None and not self._keep[1]:
            self._keep_place()
        try:
            self.view = self._view(live=True)
        except KvmbenchError:
            return  # the run's own end tells what happened

    def _view(self, *, live: bool = False) -> dict[str, Any]:
        rows = self._extents or self._lay_out()
        self._first = max(0, min(self._first, rows.total - 1))
        return {
            "vcpu": self.cpu.index,
            "space": self.space,
            "width": self.width,
            "digits": rows.digits,
            "total": rows.total,
            "first": self._first,
            "live": live,
            "rows": [
                self._row(rows, row, live) for row in range(self._first, min(rows.total, self._first + self._count))
            ],
            "place": self._place,
            "regions": [{"at": f"{each.gpa:#x}", "words": str(each)} for each in self.machine.memory.regions],
        }

    def _row(self, rows: Extents, index: int, live: bool) -> dict[str, Any]:
        found = rows.at(index)
        assert found is not None  # _view asks for rows there are
        address, note = found
        row: dict[str, Any] = {"at": f"{address:0{rows.digits}x}"}
        if note:
            return row | {"note": note}
        page = self._page(address & -PAGE_BYTES, live)
        if page.data is None:
            return row | {"note": page.note}
        start = address % PAGE_BYTES
        data = page.data[start : start + self.width]
        row["hex"] = data.hex()
        if page.before is not None and page.before[start : start + self.width] != data:
            row["was"] = page.before[start : start + self.width].hex()
        if self.space == "gva":
            near = self.cpu.symbols.nearest(address + self.width - 1)
            if near is not None and near[1] < self.width:
                row["label"] = near[0]
        return row

    def _page(self, address: int, live: bool = False) -> Page:
        if self.space == "gva":
            return self._pages.linear(self.cpu, address)
        return self._pages.physical(self.machine, address, live=live)

    @action
    def show(self, first: int, count: int) -> None:
        """Sends the rows from the `first`-th on.

        Raises:
            MisuseError: not two row numbers.
        """
        if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in (first, count)):
            raise MisuseError(f"cannot show {count!r} rows from row {first!r}")
        self._first, self._count = first, min(max(count, 1), _MOST_ROWS)
        self._redraw()

    def _redraw(self) -> None:
        if not self.session.is_busy(self.cpu):
            self.refresh()
        elif self.space == "gpa":
            self._read_while_running()
        else:
            raise MisuseError("linear addresses cannot be looked up while the guest runs; pause it first")

    # --- places

    @action
    def go(self, where: str) -> None:
        """Shows an address: a number, a symbol, a register, or one of these and a distance (``rsp+8``).

        Symbols and registers are linear addresses; with `space` "gpa" the page tables say where they lie.

        Raises:
            MisuseError: no such place, or none that is shown.
        """
        if self.session.is_busy(self.cpu) and self.space == "gva":
            raise MisuseError("linear addresses cannot be looked up while the guest runs; pause it first")
        address, is_linear = evaluate(self.cpu, where)
        if is_linear and self.space == "gpa":
            address = self._translated(address, where)
        self._searched = ("", b"", 0)
        self._go(address)

    def show_address(self, gva: int) -> None:
        """Brings a linear address into sight; with `space` "gpa" what the page tables make of it."""
        self._go(self._translated(gva) if self.space == "gpa" else gva)

    def _translated(self, address: int, where: str = "") -> int:
        if self.session.is_busy(self.cpu):
            raise MisuseError(f"{where or hex(address)} is a linear address; pause the guest to look it up")
        gpa = self.cpu.translate(address)
        if gpa is None:
            raise MisuseError(f"{where or 'linear address'} = {address:#x} is not mapped")
        return gpa

    def _go(self, address: int, length: int = 0) -> None:
        self._set_place(address, length)
        self._redraw()

    def _set_place(self, address: int, length: int = 0) -> None:
        rows = self._extents
        if rows is None or self.space == "gva":
            rows = self._extents = self._lay_out()
        row = rows.row_of(address)
        if row is None:
            raise AddressError(f"{address:#x} is not in the list of {self.space}s")
        start = rows.at(row)
        assert start is not None
        self._place = {
            "n": int(self._place.get("n", 0)) + 1,
            "at": f"{address:#x}",
            "row": row,
            "column": 0 if start[1] else address - start[0],
            "length": length,
        }
        self._first = max(0, row - self._count // 3)

    @action
    def region(self, at: str) -> None:
        """Shows the region of memory that begins at a guest-physical address."""
        found = [each for each in self.machine.memory.regions if at == f"{each.gpa:#x}"]
        if not found:
            raise MisuseError(f"no region of memory begins at {at!r}")
        self.space = "gpa"
        self._go(found[0].gpa)

    @action
    def find(self, pattern: str, kind: str = "text") -> None:
        """Shows the next place that holds a text or bytes, from the last place found or gone to.

        Args:
            pattern: text, or with `kind` "hex" bytes as hex digits (``de ad be ef``).

        Raises:
            MisuseError: nothing to look for, or it was not found; the message says how far was searched.
        """
        wanted = _wanted(pattern, kind)
        if self.space == "gva" and self.session.is_busy(self.cpu):
            raise MisuseError("linear addresses cannot be searched while the guest runs; pause it first")
        start = int(self._place.get("at", "0x0"), 16)
        if self._searched[:2] == (self.space, wanted):
            start = self._searched[2]
        found, end = self._search_linear(wanted, start) if self.space == "gva" else self._search(wanted, start)
        if found is None:
            self._searched = (self.space, wanted, end)
            if end == start:
                raise MisuseError(f"{pattern!r} is nowhere in memory")
            raise MisuseError(f"{pattern!r} was not found from {start:#x} to {end:#x}; find goes on there")
        self._searched = (self.space, wanted, found + 1)
        self._go(found, len(wanted))

    def _search(self, wanted: bytes, start: int) -> tuple[int | None, int]:
        # From `start` to the end, then from the beginning; as far as the time goes, the next call goes on there.
        until = time.monotonic() + _SEARCH_S
        regions = [(each.gpa, each.end) for each in self.machine.memory.regions]
        parts = [(max(gpa, start), end) for gpa, end in regions if end > start]
        parts += [(gpa, min(end, start + len(wanted) - 1)) for gpa, end in regions if gpa < start]
        at = start
        for gpa, end in parts:
            at = gpa
            while at < end:
                # Overlapping, for what lies across two chunks; a match across two regions that touch is not found.
                data = self.machine.memory.read(at, min(_CHUNK_BYTES + len(wanted) - 1, end - at))
                place = data.find(wanted)
                if place >= 0:
                    return at + place, at
                at = min(at + _CHUNK_BYTES, end)
                if time.monotonic() > until:
                    return None, at
        return None, start

    def _search_linear(self, wanted: bytes, start: int) -> tuple[int | None, int]:
        # Pages that are not mapped cost a question each, so a search does not cross the whole address space.
        until = time.monotonic() + _SEARCH_S
        rows = self._extents or self._lay_out()
        at, tail = start, b""
        while at < start + _MOST_LINEAR_BYTES and rows.row_of(at) is not None and time.monotonic() < until:
            page = self._pages.linear(self.cpu, at & -PAGE_BYTES)
            if page.data is None:
                tail = b""
            else:
                data = tail + page.data[at % PAGE_BYTES :]
                place = data.find(wanted)
                if place >= 0:
                    return at - len(tail) + place, at
                tail = data[len(data) - len(wanted) + 1 :] if len(wanted) > 1 else b""
            at = (at & -PAGE_BYTES) + PAGE_BYTES
        return None, at

    # --- changes

    @action
    def write(self, edits: list[list[str]]) -> None:
        """Writes bytes: pairs of an address and hex digits, ``[["0x2000", "dead"]]``, in the space shown.

        Raises:
            MisuseError: not such pairs, or an address that is not mapped; nothing is written then.
            AddressError: there is no memory.
        """
        if self.space == "gva" and self.session.is_busy(self.cpu):
            raise MisuseError("linear addresses cannot be written while the guest runs; pause it first")
        pieces: list[tuple[int, bytes]] = []
        for address, data in _edits(edits):
            done = 0
            while done < len(data):
                at = address + done
                piece = data[done : done + PAGE_BYTES - at % PAGE_BYTES]
                gpa = at
                if self.space == "gva":
                    gpa = self._translated(at)
                self.machine.memory.find(gpa, len(piece))
                pieces.append((gpa, piece))
                done += len(piece)
        for gpa, piece in pieces:
            self.machine.memory.write(gpa, piece)
        if self.session.is_busy(self.cpu):
            self._read_while_running()
        else:
            self.session.changed()

    # --- without a page

    def lines(self) -> list[Line]:
        view = self.view
        if not view:
            return [[Span("nothing seen yet", "dim")]]
        kind = "guest-physical addresses" if view["space"] == "gpa" else f"linear addresses of vcpu {view['vcpu']}"
        lines: list[Line] = [[Span(kind, "dim")]]
        for row in view["rows"]:
            line = [Span(f"{row['at']}  ", "name")]
            if "note" in row:
                lines.append([*line, Span(row["note"], "dim")])
                continue
            data, was = bytes.fromhex(row["hex"]), bytes.fromhex(row.get("was", row["hex"]))
            for start in range(0, len(data), self.group):
                piece = data[start : start + self.group]
                changed = piece != was[start : start + self.group]
                line += [Span(piece[::-1].hex(), "changed" if changed else ""), Span("*" if changed else " ")]
            lines.append([*line, Span(" "), Span(_ascii(data)), Span(f"  {row.get('label', '')}", "name")])
        return lines

    def table(self) -> Table:
        return Table(
            ("address", "bytes", "text", "before", "note"),
            [
                (
                    f"0x{row['at']}",
                    row.get("hex", ""),
                    _ascii(bytes.fromhex(row.get("hex", ""))),
                    row.get("was", ""),
                    row.get("note") or row.get("label", ""),
                )
                for row in self.view.get("rows", ())
            ],
        )


def _ascii(data: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data)


def _wanted(what: str, kind: str) -> bytes:
    if not isinstance(what, str) or kind not in ("text", "hex"):
        raise MisuseError(f"cannot look for {what!r} as {kind!r}; give a text, or hex digits with kind='hex'")
    if kind == "text":
        check_utf8(what)
        found = what.encode()
    else:
        try:
            found = bytes.fromhex(what.replace("0x", " "))
        except ValueError:
            raise MisuseError(f"{what!r} is no row of bytes: give pairs of hex digits such as 'de ad'") from None
    if not found:
        raise MisuseError("there is nothing to look for: give a text or bytes")
    if len(found) > PAGE_BYTES:
        raise MisuseError(f"{show_size(len(found))} are too much to look for; give up to 4096 bytes")
    return found


def _edits(edits: Any) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    try:
        for address, data in edits:
            found.append((int(address, 16), bytes.fromhex(data)))
    except (TypeError, ValueError):
        raise MisuseError(f"cannot write {edits!r}: give pairs of an address and hex digits") from None
    if sum(len(data) for _, data in found) > _MOST_EDIT_BYTES:
        raise MisuseError("more than 1 MiB in one edit; use m.memory.write")
    if any(not 0 <= address <= (1 << 64) - len(data) for address, data in found):
        raise MisuseError(f"cannot write {edits!r}: beyond the last address")
    return found
