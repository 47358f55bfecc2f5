"""The commands: what runs once everything is set up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from checkout import BENCHMARKS, NOTEBOOKS, OUT, PYTHON, ROOT, environment, relative
from progress import Timer, say

FIRST_NOTEBOOK = NOTEBOOKS / "01-first-steps.ipynb"


def demo(arguments: Sequence[str]) -> int:
    """Runs the first notebook, or the ones named, without a browser; returns the exit status."""
    runner = ROOT / "tools" / "workbench" / "notebook_run.py"
    notebooks = [str(argument) for argument in arguments] or [str(FIRST_NOTEBOOK)]
    OUT.mkdir(exist_ok=True)
    status = 0
    for notebook in notebooks:
        status |= subprocess.run([PYTHON, runner, notebook, OUT], env=environment(), check=False).returncode
    return status


def test(arguments: Sequence[str]) -> NoReturn:
    """Becomes pytest, so that its summary comes last and its status is ours."""
    _become([str(PYTHON), "-m", "pytest", *arguments])


def lab(arguments: Sequence[str]) -> NoReturn:
    """Becomes JupyterLab on the notebooks; its token stays in force."""
    command = [str(PYTHON), "-m", "jupyterlab", str(NOTEBOOKS)]
    if os.geteuid() == 0:
        say("workbench: JupyterLab will run as root")
        command.append("--allow-root")
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or os.environ.get("BROWSER")):
        command.append("--no-browser")  # it prints the address to open instead
    _become([*command, *arguments])


def bench(arguments: Sequence[str]) -> int:
    """Runs the benchmarks (all, or those whose name contains an argument), then prints a table."""
    scripts = sorted(path for path in BENCHMARKS.glob("*.py") if not path.name.startswith("_"))
    wanted = [path for path in scripts if not arguments or any(word in path.stem for word in arguments)]
    if not wanted:
        known = ", ".join(path.stem for path in scripts) or "none"
        say(f"workbench: no benchmark is called like {' or '.join(arguments)}; there are: {known}")
        return 2
    rows: list[tuple[str, str, float]] = []
    failed = 0
    for script in wanted:
        say(f"--- {script.stem}")
        timer = Timer()
        last = ""
        with subprocess.Popen(
            [PYTHON, script],
            env=environment(),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
        failed += process.returncode != 0
        rows.append(
            (
                script.stem,
                last if process.returncode == 0 else f"failed ({process.returncode})",
                timer.seconds,
            )
        )
    say()
    width = max(len(name) for name, _, _ in rows)
    for name, result, seconds in rows:
        say(f"{name:<{width}}  {seconds:6.1f} s  {result}")
    return 1 if failed else 0


def setup(arguments: Sequence[str]) -> int:
    """Nothing more to run: says where to go from here."""
    say(f"Next: ./workbench demo, ./workbench lab, {relative(PYTHON.parent)}/kvmbench doctor")
    return 0


def _become(command: list[str]) -> NoReturn:
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execve(command[0], command, environment())
