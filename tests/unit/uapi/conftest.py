"""What the tests of `uapi` share: running a small C program against the machine's kernel headers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

COMPILER = shutil.which("gcc") or shutil.which("cc")

# (struct tag, member path or "") to (offset, size).
Places = dict[tuple[str, str], tuple[int, int]]

CORE = Path(__file__).resolve().parents[3] / "kvmbench" / "core"


@pytest.fixture
def compiler() -> str:
    if COMPILER is None:
        pytest.skip("no C compiler: apt-get install gcc")
    probe = subprocess.run(
        [COMPILER, "-E", "-"], input="#include <linux/kvm.h>\n", capture_output=True, text=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip("no <linux/kvm.h>: apt-get install linux-libc-dev")
    return COMPILER


@pytest.fixture
def run_c(compiler: str, tmp_path: Path) -> Callable[[str], list[list[str]]]:
    """Compiles C source, runs it and returns its output as words of lines."""

    def run(source: str) -> list[list[str]]:
        program = tmp_path / "program"
        (tmp_path / "program.c").write_text(source)
        source_file = str(tmp_path / "program.c")
        command = [compiler, "-std=gnu11", "-w", "-I", str(CORE), "-o", str(program), source_file]
        subprocess.run(command, check=True)
        output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
        return [line.split() for line in output.splitlines()]

    return run


@pytest.fixture
def compiled_layouts(run_c: Callable[[str], list[list[str]]]) -> Callable[..., Places]:
    """What the compiler says of structs: offset and size or, for a bitfield, first bit and -width."""

    def measure(layouts: dict, *headers: str) -> Places:
        lines = ["#include <stdio.h>", "#include <stddef.h>", "#include <string.h>"]
        lines += [f"#include <{header}>" for header in headers]
        lines.append(
            "static void bits(const char *name, const unsigned char *p, int n) {"
            "int first = -1, width = 0;"
            "for (int i = 0; i < n * 8; i++)"
            "    if (p[i / 8] >> i % 8 & 1) { if (first < 0) first = i; width++; }"
            'printf("%s %d %d\\n", name, first, -width); }'
        )
        lines.append("int main(void) {")
        names: list[tuple[str, str]] = []
        for tag, layout in layouts.items():
            names.append((tag, ""))
            lines.append(f'printf("{len(names) - 1} 0 %zu\\n", sizeof({tag}));')
            for path, member in layout.members.items():
                names.append((tag, path))
                index = len(names) - 1
                if member.bit_size >= 0:
                    call = f'bits("{index}", (void *)&x, sizeof(x));'
                    lines.append(f"{{ static {tag} x; x.{path} = -1; {call} }}")
                    continue
                # A flexible array has an offset but no size.
                size = f"sizeof((({tag} *)0)->{path})" if member.size_bytes else "(size_t)0"
                lines.append(f'printf("{index} %zu %zu\\n", offsetof({tag}, {path}), {size});')
        lines.append("return 0; }")
        return {names[int(row[0])]: (int(row[1]), int(row[2])) for row in run_c("\n".join(lines))}

    return measure
