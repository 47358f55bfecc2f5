"""Unpacks recorded rows that crossed a channel (KB_PACK in wire.h).

A step changes two or three registers, so a packed row is about 25 bytes
instead of 152.  Unpacking is numpy's: per column, the values that changed are
picked out and carried forward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvmbench.core import wire
from kvmbench.debug.step_rows import ROW
from kvmbench.errors import InternalError

_COLUMNS: int = wire.KB_COLUMNS


def unpack(data: Any, count: int) -> npt.NDArray[np.void]:
    """Rows from their packed form.

    Args:
        data: bytes-like: `count` masks (u32), padding to 8 bytes, values (u64).

    Returns:
        shape (count,), dtype `step_rows.ROW`.

    Raises:
        InternalError: the lengths do not agree.
    """
    values_at = (count * 4 + 7) & ~7
    if len(data) < values_at or (len(data) - values_at) % 8:
        raise InternalError(f"{count} packed rows in {len(data)} bytes make no sense")
    masks = np.frombuffer(data, "<u4", count)
    values = np.frombuffer(data, "<u8", offset=values_at)
    bits = (masks[:, None] >> np.arange(_COLUMNS, dtype=np.uint32) & 1).astype(np.uint8)
    per_row = bits.sum(axis=1, dtype=np.int64)
    if int(per_row.sum()) != len(values):
        raise InternalError(f"packed rows announce {int(per_row.sum())} values, {len(values)} came")
    rows = np.empty(count, ROW)
    columns = rows.view("<u8").reshape(count, _COLUMNS)
    # Index of each row's first value, moved on column by column.
    position = np.cumsum(per_row) - per_row
    for column in range(_COLUMNS):
        changed = np.flatnonzero(bits[:, column])
        new = values[position[changed]]
        position[changed] += 1
        # Each row takes the latest change at or before it; 0 before the first.
        lengths = np.diff(np.concatenate((changed, [count])))
        head = changed[0] if len(changed) else count
        columns[:head, column] = 0
        columns[head:, column] = np.repeat(new, lengths)
    return rows
