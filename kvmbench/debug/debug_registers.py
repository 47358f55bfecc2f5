"""DR6 and DR7 with their bits named.

Source: SDM volume 3, "Debug Registers"; APM volume 2, "Debug Registers".
"""

from __future__ import annotations

from typing import ClassVar

from kvmbench.debug.flags import NamedBits


class Dr6(NamedBits):
    """DR6: what the last debug exception was for. BLD and RTM are set when *nothing* happened."""

    BITS: ClassVar[dict[str, int]] = {
        "B0": 0, "B1": 1, "B2": 2, "B3": 3, "BLD": 11, "BD": 13, "BS": 14, "BT": 15, "RTM": 16,
    }  # fmt: skip
    __slots__ = ()


class Dr7(NamedBits):
    """DR7: which of DR0 to DR3 are on, on what access (RW: 0 execute, 1 write, 3 any), and how long."""

    BITS: ClassVar[dict[str, int]] = {
        "L0": 0, "G0": 1, "L1": 2, "G1": 3, "L2": 4, "G2": 5, "L3": 6, "G3": 7, "LE": 8, "GE": 9,
        "RTM": 11, "GD": 13,
    }  # fmt: skip
    FIELDS: ClassVar[dict[str, tuple[int, int]]] = {
        "RW0": (16, 2), "LEN0": (18, 2), "RW1": (20, 2), "LEN1": (22, 2),
        "RW2": (24, 2), "LEN2": (26, 2), "RW3": (28, 2), "LEN3": (30, 2),
    }  # fmt: skip
    __slots__ = ()
