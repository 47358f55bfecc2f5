"""Where things are in this checkout, and the environment its programs run in."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STATE = VENV / ".workbench"  # stamps; inside .venv so that deleting it forgets them too
OUT = ROOT / "out"
LOGS = OUT / "log"
NOTEBOOKS = ROOT / "notebooks"
BENCHMARKS = ROOT / "benchmarks"

# Settings that would send pip's packages, or Python's imports, somewhere other than .venv.
_MISLEADING = (
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONUSERBASE",
    "__PYVENV_LAUNCHER__",
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_USER",
    "PIP_PYTHON",
    "PIP_DRY_RUN",
    "PIP_IGNORE_INSTALLED",
)


def environment(**extra: str) -> dict[str, str]:
    """The environment for programs of `.venv`: ours on PATH first, misleading settings gone.

    Everything else stays, PIP_* (indexes, certificates, time limits) included.
    """
    env = {name: value for name, value in os.environ.items() if name not in _MISLEADING}
    env["VIRTUAL_ENV"] = str(VENV)
    env["PATH"] = f"{PYTHON.parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    env.update(extra)
    return env


def relative(path: Path) -> str:
    """`path` as a person in the checkout would type it."""
    try:
        return str(path.relative_to(ROOT))
    except ValueError:
        return str(path)
