"""Panels for Jupyter that show a guest on real KVM: ``import kvmbench_widgets as kw; kw.Workbench(m)``."""

from kvmbench_widgets.breakpoints import Breakpoints
from kvmbench_widgets.console import Console
from kvmbench_widgets.controls import Controls
from kvmbench_widgets.disassembly import Disassembly
from kvmbench_widgets.exit_trace import ExitTrace
from kvmbench_widgets.exits import Exits
from kvmbench_widgets.memory import Memory
from kvmbench_widgets.registers import Registers
from kvmbench_widgets.stack import Stack
from kvmbench_widgets.workbench import Workbench

__all__ = [
    "Breakpoints",
    "Console",
    "Controls",
    "Disassembly",
    "ExitTrace",
    "Exits",
    "Memory",
    "Registers",
    "Stack",
    "Workbench",
]
