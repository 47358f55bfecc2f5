"""Programs built with the sanitizers, once for all tests here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmbench.core import agent
from kvmbench.core.build import SOURCES

from .kernel_file import write_kernel_file

HERE = Path(__file__).parent

#: A report ends the program with this status, which nothing else here has.
REPORTED = 99
#: A refused allocation is an answer (KB_NO_MEMORY), not a fault. Leaks are looked for at the end.
OPTIONS = f"exitcode={REPORTED}:allocator_may_return_null=1:detect_leaks=1"


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For programs with sanitizers."""
    return {**os.environ, "ASAN_OPTIONS": OPTIONS, "UBSAN_OPTIONS": f"exitcode={REPORTED}:print_stacktrace=1"}


@pytest.fixture(scope="session")
def build(
    tmp_path_factory: pytest.TempPathFactory, need: Callable[[str, str], None]
) -> Callable[..., Path]:
    """Compiles C files with the sanitizers and the core's own flags; skips where gcc lacks them."""
    folder = tmp_path_factory.mktemp("sanitized")
    gcc = shutil.which("gcc")
    if gcc is None:
        need("sanitizers", "no gcc: `sudo apt-get install --no-install-recommends gcc libc6-dev`")

    def run(name: str, files: list[Path], *options: str) -> Path:
        program = folder / name
        includes = [f"-I{agent.__file__.rpartition('/')[0]}", f"-I{HERE}"]
        flags = (*agent._FLAGS, *agent._SANITIZE, *includes, *options)
        command = [str(gcc), *flags, *map(str, files), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "cannot find" in done.stderr and "asan" in done.stderr:
            need("sanitizers", "gcc has no address sanitizer here: `sudo apt-get install libgcc-12-dev` or its like")
        assert done.returncode == 0, done.stderr
        return program

    return run


@pytest.fixture(scope="session")
def fuzzer(build: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fuzz_messages with the core linked in."""
    core = [path for path in agent.sources() if path.name in SOURCES]
    memory = tmp_path_factory.mktemp("kernel") / "kcore"
    write_kernel_file(memory)
    options = ("-Wl,--wrap=mmap,--wrap=munmap", f'-DKERNEL_MEMORY="{memory}"')
    return build("fuzz_messages", [*sorted(HERE.glob("*.c")), *core], *options)
