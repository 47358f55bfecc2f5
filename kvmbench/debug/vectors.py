"""Names of the exception vectors, as debug uses them; the table is in `kvmbench.uapi.vectors`."""

from __future__ import annotations

from kvmbench.uapi.vectors import VECTORS, vector_name

__all__ = ["VECTORS", "vector_name"]
