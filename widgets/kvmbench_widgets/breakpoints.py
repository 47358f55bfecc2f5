"""`Breakpoints`: the breakpoints and watchpoints of a vcpu: what stops it, how often, and on which condition."""

from __future__ import annotations

import ast
import builtins
from typing import Any

from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.cpu import Cpu
from kvmbench.errors import MisuseError
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.panel import Panel, action

_NAMES = ("cpu", "regs", "m")
_NOUNS = {"x": "execute", "w": "write", "rw": "read or write"}


class Condition:
    """A Python expression, to be asked at each hit: ``Condition("regs.rax > 5")``.

    It is evaluated in this kernel with the names ``cpu``, ``regs`` and ``m`` (the
    machine), and may do whatever a cell may do.

    Attributes:
        text: the expression.

    Raises:
        MisuseError: it is no expression, or uses a name that is not there.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            tree = ast.parse(text, mode="eval")
            self._code = compile(tree, "<condition>", "eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            words = error.msg if isinstance(error, SyntaxError) else str(error)
            raise MisuseError(f"the condition {text!r} is no Python expression: {words}") from None
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        # Those that the expression itself gives, in a comprehension or with := or lambda.
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        for node in names:
            if node.id not in own and node.id not in _NAMES and not hasattr(builtins, node.id):
                raise MisuseError(f"no name {node.id!r} in a condition; there are cpu, regs and m, as in regs.rax > 5")

    def __call__(self, cpu: Cpu) -> Any:
        return eval(self._code, {"cpu": cpu, "regs": cpu.regs, "m": cpu.machine})

    def __repr__(self) -> str:
        return f"Condition({self.text!r})"


class Breakpoints(Panel):
    """What stops a vcpu: ``kw.Breakpoints(cpu)``."""

    MODULE = "breakpoints"
    TITLE = "Breakpoints"

    def make_view(self) -> dict[str, Any]:
        stop = self.cpu.last_stop
        hit = stop.breakpoint if stop is not None and stop.is_current else None
        return {"vcpu": self.cpu.index, "rows": [self._row(each, each is hit) for each in self.cpu.breakpoints]}

    def _row(self, one: Breakpoint, hit: bool) -> dict[str, Any]:
        row: dict[str, Any] = {
            "number": one.number,
            "place": self.cpu.symbols.label(one.address) or one.label,
            "address": f"{one.address:#x}",
            "kind": one.kind,
            "size_bytes": one.size_bytes,
            "noun": _NOUNS[one.kind] + (f", {one.size_bytes} B" if one.is_watchpoint else ""),
            "mechanism": str(one.mechanism),
            "why": repr(one).strip("<>"),
            "enabled": one.enabled,
            "hits": f"{one.hits:,}",
            "passes": f"{one.passes:,}",
            "condition": _text(one.condition),
            "notes": _notes(one),
        }
        if hit:
            row["hit"] = True
        return row

    @action
    def add(self, where: str | int, kind: str = "x", size_bytes: int = 8, condition: str = "") -> None:
        """Sets a breakpoint ("x") or a watchpoint ("w" or "rw" of `size_bytes`).

        Args:
            condition: a Python expression for a `Condition`, or "" for none.

        Raises:
            MisuseError: not a place, kind, size or condition; or the vcpu runs.
            AddressError: nothing is mapped there.
            UnsupportedError: no mechanism for it works on this host.
        """
        self._check_idle("set a breakpoint")
        if not isinstance(where, (str, int)) or isinstance(where, bool) or where == "":
            raise MisuseError(f"{where!r} is no place for a breakpoint: give a symbol or an address")
        weighed = self._condition(condition)
        breakpoints = self.cpu.breakpoints
        if kind == "x":
            breakpoints.add(where, condition=weighed)
        else:
            breakpoints.watch(where, size_bytes, kind, condition=weighed)
        self.session.changed()

    @action
    def remove(self, number: int) -> None:
        """Removes one, given its number."""
        self._check_idle("remove a breakpoint")
        self.cpu.breakpoints.remove(self._of(number))
        self.session.changed()

    @action
    def enable(self, number: int, on: bool = True) -> None:
        """Lets one stop the guest, or not."""
        self._check_idle("change a breakpoint")
        if not isinstance(on, bool):
            raise MisuseError(f"on={on!r}: give True or False")
        self._of(number).enabled = on
        self.session.changed()

    @action
    def set_condition(self, number: int, text: str) -> None:
        """Gives one another condition, or none if `text` is empty."""
        self._check_idle("change a breakpoint")
        self._of(number).condition = self._condition(text)
        self.session.changed()

    @action
    def goto(self, number: int) -> None:
        """Shows its place in `Disassembly`, or in `Memory` if it is a watchpoint."""
        one = self._of(number)
        self.session.show(self.cpu, one.address, "data" if one.is_watchpoint else "code")

    def _of(self, number: int) -> Breakpoint:
        if isinstance(number, bool):
            raise MisuseError(f"no breakpoint {number!r}")
        return self.cpu.breakpoints[number]

    def _condition(self, text: str) -> Condition | None:
        if not isinstance(text, str):
            raise MisuseError(f"a condition is Python text such as 'regs.rax > 5', not {text!r}")
        return Condition(text.strip()) if text.strip() else None

    def _check_idle(self, what: str) -> None:
        if self.session.is_busy(self.cpu):
            raise MisuseError(f"vcpu {self.cpu.index} runs; pause it to {what}")

    def lines(self) -> list[Line]:
        rows = self.view.get("rows", ())
        if not rows:
            return [[Span("no breakpoints", "dim")]]
        place = max(len(row["place"]) for row in rows)
        noun = max(len(row["noun"]) for row in rows)
        lines: list[Line] = []
        for row in rows:
            line = [Span(f"{row['number']:>3} ", "dim"), Span("● " if row["enabled"] else "○ ", "bad")]
            line.append(Span(f"{row['place']:{place}}  ", "changed" if "hit" in row else "name"))
            line.append(Span(f"{row['address']}  {row['noun']:{noun}}  {row['mechanism']:14}  "))
            line.append(Span(f"{row['hits']} hit{'' if row['hits'] == '1' else 's'}"))
            if row["condition"]:
                line.append(Span(f", {row['passes']} passed  if {row['condition']}"))
            if row["notes"]:
                line.append(Span(f"  ({'; '.join(row['notes'])})"))
            lines.append(line)
        return lines

    def table(self) -> Table:
        return Table(
            ("number", "place", "address", "kind", "size_bytes", "mechanism", "enabled", "hits", "passes",
             "condition", "remark"),
            [
                (
                    row["number"], row["place"], row["address"], row["kind"], row["size_bytes"], row["mechanism"],
                    int(row["enabled"]), row["hits"].replace(",", ""), row["passes"].replace(",", ""),
                    row["condition"], row["why"],
                )
                for row in self.view.get("rows", ())
            ],
        )  # fmt: skip


def _notes(one: Breakpoint) -> list[str]:
    # What a reader has to know to tell why it stopped the guest, or did not, beside its counts.
    notes = []
    if one.shared is not None:
        notes.append(f"shared breakpoint {one.shared.number} of all vcpus, {one.shared.hits:,} hits in all")
    if one.cr3 is not None:
        notes.append(f"cr3 {one.cr3:#x} only, {one.elsewhere:,} elsewhere")
    ignore = one.ignore if one.shared is None else one.shared.ignore
    if ignore:
        notes.append(f"ignores the next {ignore:,}")
    if one.temporary:
        notes.append("temporary")
    return [*notes, *one.remarks, *([one.conflict] if one.conflict else [])]


def _text(condition: Any) -> str:
    if condition is None:
        return ""
    # One that a cell gave has no text of ours.
    return condition.text if isinstance(condition, Condition) else getattr(condition, "__name__", repr(condition))
