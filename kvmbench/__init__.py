"""kvmbench: step virtual machines on real KVM, and see what KVM did.

    import kvmbench as kb
    host = kb.connect()                # this machine's KVM if it can do the job, else the appliance
    m = kb.Machine(host)
    m.load_asm("mov eax, 1; hlt")
    print(m.cpu.step())

Importing this package opens nothing and loads neither matplotlib nor Jupyter;
`kvmbench.plot` is loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmbench.debug.machine import Machine
from kvmbench.debug.record import StepRecord
from kvmbench.debug.stop import Cause, Stop
from kvmbench.errors import KvmbenchError
from kvmbench.host.connect import connect
from kvmbench.host.host import Host
from kvmbench.machine import Program
from kvmbench.traces.files import open_trace
from kvmbench.traces.live import trace

if TYPE_CHECKING:
    from kvmbench import plot

__all__ = [
    "Cause",
    "Host",
    "KvmbenchError",
    "Machine",
    "Program",
    "StepRecord",
    "Stop",
    "connect",
    "open_trace",
    "plot",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "plot":
        import importlib

        return importlib.import_module("kvmbench.plot")
    raise AttributeError(f"module 'kvmbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
