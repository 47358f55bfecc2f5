"""The commands: what runs once everything is set up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
    """Runs the benchmarks, then prints their ratios once more as one table.

    Args:
        arguments: words choose the benchmarks whose name contains one of them;
            options (``--hosts=local``) go to each benchmark.
    """
    words = [argument for argument in arguments if not argument.startswith("-")]
    options = [argument for argument in arguments if argument.startswith("-")]
    # What has no main part is shared by those that have one.
    scripts = sorted(path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
    wanted = [path for path in scripts if not words or any(word in path.stem for word in words)]
    if not wanted:
        known = ", ".join(path.stem for path in scripts) or "none"
        say(f"workbench: no benchmark is called like {' or '.join(words)}; there are: {known}")
        return 2
    rows: list[list[str]] = []
    failed: list[str] = []
    timer = Timer()
    for script in wanted:
        say(f"\n--- {script.stem}")
        status, lines = _show([str(PYTHON), str(script), *options])
        rows += [[script.stem, *row] for row in _ratios(lines)]
        if status:
            failed.append(f"{script.stem} (status {status})")
    if rows:
        say("\n--- ratios to a plain C loop on the same host, in the same run")
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            say("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    say(f"\n{len(wanted)} benchmarks in {timer.seconds:.0f} s" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def _show(command: Sequence[str]) -> tuple[int, list[str]]:
    # Runs a program, passing its lines on as they come; returns its status and the lines.
    lines: list[str] = []
    with subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, lines


def _ratios(lines: Sequence[str]) -> Iterator[list[str]]:
    # benchmarks/measuring.py writes a line of two spaces for each host and lines of four for what was measured.
    host = ""
    for line in lines:
        if re.match(r"  \S", line):
            module = re.search(r"\b(?:npt|ept)=\w", line)
            host = line.strip().partition(":")[0] + (f" {module.group(0)}" if module else "")
        measured = re.match(r"    (\S.*?)  .*: (ratio [\d.]+ \(.*?\))(?:; (goal .*))?$", line)
        if measured:
            yield [host, measured.group(1), measured.group(2), measured.group(3) or ""]


def setup(arguments: Sequence[str]) -> int:
    """Nothing more to run: says where to go from here."""
    say(f"Next: ./workbench demo, ./workbench lab, {relative(PYTHON.parent)}/kvmbench doctor")
    return 0


def _become(command: list[str]) -> NoReturn:
    os.chdir(ROOT)
    sys.stdout.flush()
    os.execve(command[0], command, environment())
