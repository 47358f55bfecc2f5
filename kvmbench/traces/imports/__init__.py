"""Traces that other programs took: `trace.dat` of trace-cmd, and the text of `perf script` and `trace-cmd report`."""

from __future__ import annotations

from kvmbench.traces.imports.imported import Imported
from kvmbench.traces.imports.perf_script import read_perf_script
from kvmbench.traces.imports.trace_dat import MAGIC, read_trace_dat

__all__ = ["MAGIC", "Imported", "read_perf_script", "read_trace_dat"]
