"""Traces for other programs: Perfetto's protobuf, Chrome's JSON, CSV and Parquet."""

from __future__ import annotations

from kvmbench.traces.export.chrome import write_chrome
from kvmbench.traces.export.columns import write_csv, write_parquet
from kvmbench.traces.export.perfetto import write_perfetto

__all__ = [
    "write_chrome",
    "write_csv",
    "write_parquet",
    "write_perfetto",
]
