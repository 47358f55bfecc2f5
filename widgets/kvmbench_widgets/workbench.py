"""`Workbench`: all panels on one machine, arranged together."""

from __future__ import annotations

from typing import Any, ClassVar

import traitlets

from kvmbench_widgets.breakpoints import Breakpoints
from kvmbench_widgets.console import Console
from kvmbench_widgets.controls import Controls
from kvmbench_widgets.disassembly import Disassembly
from kvmbench_widgets.exits import Exits
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.memory import Memory
from kvmbench_widgets.panel import Panel
from kvmbench_widgets.registers import Registers
from kvmbench_widgets.stack import Stack

# In the order of their keys, 1 to 8.
_PANELS: dict[str, type[Panel]] = {
    "controls": Controls,
    "disassembly": Disassembly,
    "registers": Registers,
    "stack": Stack,
    "memory": Memory,
    "breakpoints": Breakpoints,
    "exits": Exits,
    "console": Console,
}


class Workbench(Panel):
    """Registers, disassembly, memory, stack, exits, breakpoints, console and controls: ``kw.Workbench(m)``.

    Each panel is an attribute: ``wb.registers``, ``wb.memory``, ... ; all show the vcpu chosen in the controls.

    Attributes:
        children: panel name to its widget's id, for the page.
        arrangement: where the reader put the splitters, which tabs are in front, what is hidden; kept by the
            browser too, for the next notebook.
    """

    MODULE = "workbench"
    TITLE = "Workbench"
    THEIRS: ClassVar[frozenset[str]] = frozenset({"arrangement"})

    children = traitlets.Dict().tag(sync=True)
    arrangement = traitlets.Dict().tag(sync=True)

    controls: Controls
    disassembly: Disassembly
    registers: Registers
    stack: Stack
    memory: Memory
    breakpoints: Breakpoints
    exits: Exits
    console: Console

    def __init__(self, target: Any, **traits: Any) -> None:
        self.panels: dict[str, Panel] = {}
        super().__init__(target, **traits)
        for name, kind in _PANELS.items():
            self.panels[name] = kind(self.cpu)
            setattr(self, name, self.panels[name])
        self.children = {name: f"anywidget:{panel.model_id}" for name, panel in self.panels.items()}
        self.controls.observe(lambda change: self._choose(change["new"]), "vcpu")

    def _choose(self, vcpu: int) -> None:
        self.cpu = self.machine.cpus[vcpu]
        for panel in self.panels.values():
            if panel.cpu is not self.cpu:
                panel.cpu = self.cpu

    def make_view(self) -> dict[str, Any]:
        return {"emulated": self.machine.host.info.emulated}

    def lines(self) -> list[Line]:
        lines: list[Line] = []
        for name in ("controls", "disassembly", "registers", "stack"):
            panel = self.panels[name]
            lines += [[Span(panel.TITLE, "name")], *panel.lines(), []]
        return lines[:-1]

    def table(self) -> Table:
        """The tables of all panels, a cell a row: they have no columns in common."""
        rows = []
        for panel in self.panels.values():
            columns, each = panel.table()
            for number, row in enumerate(each):
                rows += [(panel.TITLE, number, column, value) for column, value in zip(columns, row, strict=True)]
        return Table(("panel", "row", "column", "value"), rows)

    def close(self) -> None:
        """Closes the panels too; the machine stays."""
        for panel in self.panels.values():
            panel.close()
        super().close()
