"""Hosts by the short names of the command line: ``local``, ``npt=1``, ``npt=0``, ``ept=1``, ``ept=0``."""

from __future__ import annotations

from typing import Any

import kvmbench as kb

NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "local": ("local", {}),
    "npt=1": ("appliance", {"npt": 1}),
    "npt=0": ("appliance", {"npt": 0}),
    "ept=1": ("appliance:intel", {"ept": 1}),
    "ept=0": ("appliance:intel", {"ept": 0}),
}


def open_host(name: str) -> kb.Host:
    """Connects to one of NAMES, or to whatever else `kvmbench.connect` takes."""
    spec, options = NAMES.get(name, (name, {}))
    return kb.connect(spec, quiet=True, **options)
