"""`.venv`: made once, filled by pip, thrown away when its making was interrupted.

Facts this rests on:

- A pip that is killed while it copies a package leaves metadata that a later
  pip takes for a finished installation. So a marker file stands in `.venv`
  from before the first change to after the last one, and a `.venv` with the
  marker is not mended but made afresh (pip's cache makes that quick).
- The extension module is compiled into the checkout, so `git clean` can remove
  it while `.venv` still says it is installed: the stamp names it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import packages
from checkout import LOGS, PYTHON, ROOT, STATE, VENV, environment
from progress import SetupError, Timer, run_logged, step_done
from stamp import Stamp, fingerprint

EXTRAS = "notebook,test"
_MARKER = STATE / "unfinished"


def ensure(*, lock: int) -> bool:
    """Makes `.venv` and installs the project with its dependencies, unless that is done.

    Args:
        lock: descriptor of the set-up's lock. What fills `.venv` holds it too, so
            that after `kill -9` of the workbench the next one waits for a pip that
            lives on instead of deleting under its hands.

    Returns:
        True when something was done (a line was printed).

    Raises:
        SetupError: the venv or the installation failed.
    """
    installed = Stamp(STATE / "packages")
    key = _key()
    if not _MARKER.exists() and installed.holds(key):
        return False
    if VENV.is_symlink() or (VENV.exists() and not VENV.is_dir()):
        raise SetupError(f"{VENV} is not a folder of this checkout. Move it away: the workbench makes its own.")
    if _MARKER.exists() or not _usable():
        _make(lock)
    installed.remove()
    _MARKER.parent.mkdir(parents=True, exist_ok=True)
    _MARKER.touch()
    try:
        _install(lock)
    except SetupError:
        # pip ended by itself: it builds before it installs and takes back what it cannot finish.
        _MARKER.unlink()
        raise
    _MARKER.unlink()
    installed.write(key, made=[PYTHON, VENV / "bin" / "pytest", VENV / "bin" / "kvmbench", *_extensions()])
    return True


def _key() -> str:
    # What the installation depends on: it compiles the core, and leaves the rest of kvmbench where it is.
    core = ROOT / "kvmbench" / "core"
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", core / "build.py", *core.glob("*.[ch]")]
    files += [project / "pyproject.toml" for project in _projects()]
    uapi = ROOT / "kvmbench" / "uapi"
    files += uapi.glob("*.h")
    interpreter = [sys.version, os.path.realpath(sys.executable)]
    # A compiler that came later must lead to a core.
    return fingerprint(files, facts=[str(ROOT), EXTRAS, *interpreter, f"compiler: {_can_compile()}"])


def _projects() -> list[Path]:
    # The distributions of this checkout: kvmbench, and the widgets once they are there.
    return [path for path in (ROOT, ROOT / "widgets") if (path / "pyproject.toml").is_file()]


def _extensions() -> list[Path]:
    return sorted((ROOT / "kvmbench" / "core").glob("_core*.so"))


def _usable() -> bool:
    # A .venv someone made by hand is used as it is, when it can do the work.
    if not PYTHON.exists():
        return False
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([PYTHON, "-I", "-c", check], capture_output=True, check=False).returncode == 0


def _make(lock: int) -> None:
    again = VENV.exists()
    timer = Timer()
    if again:
        shutil.rmtree(VENV)
    _MARKER.parent.mkdir(parents=True)
    _MARKER.touch()
    run_logged(
        [sys.executable, "-I", "-m", "venv", str(VENV)],
        name=".venv",
        log=LOGS / "venv.log",
        pass_fds=[lock],
        env=environment(),
    )
    version = ".".join(str(part) for part in sys.version_info[:3])
    step_done(".venv", f"made{' afresh' if again else ''} with Python {version}", timer.seconds)


def _install(lock: int) -> None:
    timer = Timer()
    # The core is optional for pip (setup.py); where a compiler is at hand its failure is ours to show.
    required = {"KVMBENCH_REQUIRE_CORE": "1"} if _can_compile() else {}
    command = [
        str(PYTHON),
        "-I",
        "-m",
        "pip",
        "install",
        "--no-input",
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    for project in _projects():
        command += ["-e", f"{project}[{EXTRAS}]" if project == ROOT else str(project)]
    run_logged(
        command,
        name="Python packages",
        log=LOGS / "pip.log",
        env=environment(**required),
        cwd=ROOT,
        pass_fds=[lock],
    )
    # An import of a checkout whose modules are not compiled yet takes half as long again.
    run_logged(
        [str(PYTHON), "-I", "-m", "compileall", "-q", str(ROOT / "kvmbench"), str(ROOT / "widgets")],
        name="Python packages",
        log=LOGS / "compileall.log",
        env=environment(),
        cwd=ROOT,
    )
    core = "core compiled" if _extensions() else "no core: `local` will not work"
    step_done("Python packages", f"installed, {core}", timer.seconds)


def _can_compile() -> bool:
    needed = {"gcc", "libc6-dev", "linux-libc-dev"}
    found = {item.package for item in packages.requirements(for_tests=False) if item.present()}
    headers = any(name.endswith("-dev") and name.startswith("python3") for name in found)
    return os.uname().machine == "x86_64" and needed <= found and headers
