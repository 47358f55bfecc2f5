"""Figures of what happened, with matplotlib: data in, artists out.

Every function takes data (a `StepRecord`, a trace) and ``ax=None``, draws into
the Axes it is given or into a new figure, and returns the artists. None calls
``show()``, none changes rcParams, none asks the guest for anything. `save`
writes a figure as PNG and SVG with the host it came from.

matplotlib is loaded with this package, which ``import kvmbench`` does not do.
"""

from __future__ import annotations

try:
    import matplotlib as _matplotlib  # noqa: F401 - only to say plainly what is missing
except ImportError as error:  # pragma: no cover - needs an environment without matplotlib
    raise ImportError("kvmbench.plot needs matplotlib: pip install 'kvmbench[plot]'") from error

from kvmbench.plot.conformance import conformance
from kvmbench.plot.control_flow import control_flow
from kvmbench.plot.exit_flame import exit_flame
from kvmbench.plot.exit_heat_map import exit_heat_map
from kvmbench.plot.exit_latency import exit_latency
from kvmbench.plot.exit_timeline import exit_timeline
from kvmbench.plot.exits import exits
from kvmbench.plot.figure import save
from kvmbench.plot.hot_addresses import hot_addresses
from kvmbench.plot.registers import registers

__all__ = [
    "conformance",
    "control_flow",
    "exit_flame",
    "exit_heat_map",
    "exit_latency",
    "exit_timeline",
    "exits",
    "hot_addresses",
    "registers",
    "save",
]
