"""Names of the exception vectors (SDM volume 3, "Exceptions and Interrupts")."""

from __future__ import annotations

#: Vector number to the mnemonic of the manuals.
VECTORS: dict[int, str] = {
    0: "#DE", 1: "#DB", 2: "NMI", 3: "#BP", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS",
    11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 18: "#MC", 19: "#XM", 20: "#VE",
    21: "#CP", 28: "#HV", 29: "#VC", 30: "#SX",
}  # fmt: skip


def vector_name(vector: int) -> str:
    """``14 (#PF)`` for an exception, ``32`` for an interrupt."""
    return f"{vector} ({VECTORS[vector]})" if vector in VECTORS else str(vector)
