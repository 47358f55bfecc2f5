"""Assembly source to `Program`, by GNU as and ld run as commands (about 10 ms).

The source is GNU as in Intel syntax without register prefixes. ``.code16``,
``.code32`` and ``.code64`` may be mixed in one source; ``.text``, ``.data`` and
``.bss`` follow one another from `at`. The object is always ELF64, which takes
code of every width; a 16-bit reference to an address above 0xFFFF is an error
of the linker and named as such.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kvmbench.arguments import instead, integer
from kvmbench.errors import AssemblyError, HostUnavailable, LoadError, MisuseError
from kvmbench.machine.binutils import find_tool
from kvmbench.machine.elf import program_from_elf
from kvmbench.machine.program import Program

_DEADLINE_S = 60  # a `.rept` of billions would otherwise hang the notebook

_SCRIPT = """SECTIONS {{
{symbols}
. = {at:#x};
.text {at:#x} : {{ *(.text .text.*) }}
.rodata : {{ *(.rodata .rodata.*) }}
.data : {{ *(.data .data.*) }}
.bss : {{ *(.bss .bss.*) *(COMMON) }}
/DISCARD/ : {{ *(.note .note.*) *(.comment) *(.eh_frame) }}
ASSERT({at:#x} % ALIGNOF(.text) == 0, "an .align in .text asks for a boundary that at={at:#x} is not on")
}}
"""

_AS_REMARK = re.compile(r"^(?P<file>.*?):(?P<line>\d+): (?P<kind>Error|Fatal error|Warning): (?P<text>.*)$")
_LD_PLACE = re.compile(r"^(?:\S*ld: )?(?P<file>.*?):(?:(?P<line>\d+):)?(?:\([^)]*\):)? (?P<text>.*)$")
_SYMBOL = re.compile(r"[A-Za-z_.$][\w.$]*")


def assemble(
    source: str | os.PathLike[str],
    at: int = 0x1000,
    bits: int = 64,
    *,
    entry: int | str | None = None,
    symbols: Mapping[str, int] | None = None,
    name: str | None = None,
) -> Program:
    """Assembles a source and links it to an address.

    Args:
        source: the text itself, or the `Path` of a file with it.
        at: gpa of the first byte.
        bits: width of code until the first ``.code16``, ``.code32`` or ``.code64``.
        entry: first instruction, an address or a label; the label ``_start`` if there is one, else `at`.
        symbols: further names with their addresses, such as those of a program loaded before; a label of
            the source wins over one of them.
        name: shown for the program; the file's name, or ``source.S``.

    Returns:
        The program. The same source with the same options gives the same object from a cache, unless it
        draws in files (``.include``, ``.incbin``).

    Raises:
        AssemblyError: as or ld refused; each line is named with its text and the tool's own words.
        MisuseError: `at`, `bits`, `entry` or a name in `symbols` cannot be right.
        HostUnavailable: there is no GNU as or ld for x86-64.
    """
    if not isinstance(source, str | os.PathLike):
        raise MisuseError(f"source={source!r}: give the source as text, or the Path of a file with it")
    if isinstance(source, os.PathLike):
        path = Path(source)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise LoadError(f"cannot read {os.fspath(path)!r}: {error}") from error
        name = name or path.name
    else:
        text = source
    if bits not in (16, 32, 64):
        raise MisuseError(f"bits={bits!r}: code is 16, 32 or 64 bits wide")
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < 1 << 63:
        raise MisuseError(f"at={at!r} is not a guest-physical address")
    if entry is not None and not isinstance(entry, str):
        entry = integer(entry, "entry", 0, (1 << 64) - 1)
    if symbols is not None and not isinstance(symbols, Mapping):
        raise MisuseError(f"symbols={symbols!r}: give a dictionary of names and addresses, or program.symbols")
    for label, address in (symbols or {}).items():
        if not isinstance(label, str) or not _SYMBOL.fullmatch(label):
            raise MisuseError(f"symbol {label!r} = {address!r} is not a name the assembler can take")
        integer(address, f"symbols[{label!r}]", 0, (1 << 64) - 1)
    known = tuple(sorted((symbols or {}).items()))
    # Bytes, not str: a lone surrogate in a notebook cell has no encoding and would break as's input.
    # The cache knows the source but not the files it draws in, which may change.
    cached = ".include" not in text and ".incbin" not in text
    run = _assemble if cached else _assemble.__wrapped__
    return run(text.encode("utf-8", "replace"), at, bits, entry, known, name or "source.S")


@functools.lru_cache(maxsize=128)
def _assemble(
    source: bytes,
    at: int,
    bits: int,
    entry: int | str | None,
    symbols: tuple[tuple[str, int], ...],
    name: str,
) -> Program:
    text = source.decode()
    # The lines that as counts: str.splitlines would also split at form feeds.
    lines = text.split("\n")
    with tempfile.TemporaryDirectory(prefix="kvmbench-as-") as folder:
        place = Path(folder)
        # A file before the source sets the syntax, so that the source's own line numbers stay as they are.
        (place / "prologue.s").write_text(f".intel_syntax noprefix\n.code{bits}\n", encoding="utf-8")
        (place / "program.s").write_bytes(source if source.endswith(b"\n") else source + b"\n")
        definitions = "".join(f"PROVIDE({label} = {address:#x});\n" for label, address in symbols)
        (place / "link.ld").write_text(_SCRIPT.format(at=at, symbols=definitions), encoding="utf-8")
        # -I: .include and .incbin are looked for where the caller works, not in the temporary folder.
        said = _run(
            [find_tool("as"), "--64", "-g", "-I", os.getcwd(), "-o", "program.o", "prologue.s", "program.s"],
            folder,
        )
        problems, warnings = _as_remarks(said.stderr, lines)
        if said.returncode != 0:
            raise _refusal(name, problems or [said.stderr.strip() or f"as ended with {said.returncode}"])
        said = _run(
            [find_tool("ld"), "-m", "elf_x86_64", "-N", "-T", "link.ld", "-o", "program.elf", "program.o"],
            folder,
        )
        if said.returncode != 0:
            raise _refusal(name, _ld_remarks(said.stderr, lines) or [f"ld ended with {said.returncode}"])
        data = (place / "program.elf").read_bytes()
    try:
        program = program_from_elf(data, name, text=text, bits=bits, warnings=tuple(warnings))
    except LoadError as error:
        raise AssemblyError(f"{name}: the source makes no code or data ({error})") from error
    return _with_entry(program, at, entry)


def _with_entry(program: Program, at: int, entry: int | str | None) -> Program:
    if isinstance(entry, str):
        if entry not in program.symbols:
            raise MisuseError(
                f"entry={entry!r} is not a label of {program.name}; {instead(entry, sorted(program.symbols)[:8])}"
            )
        address = program.symbols[entry]
    elif entry is None:
        address = program.symbols.get("_start", at)
    else:
        address = entry
    return replace(program, entry=address)


def _run(command: list[str], folder: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AssemblyError(
            f"{Path(command[0]).name} did not finish within {_DEADLINE_S} s; look for a huge .rept or .fill"
        ) from error
    except OSError as error:
        raise HostUnavailable(f"{command[0]} cannot be run: {error.strerror}") from error


def _refusal(name: str, problems: list[str]) -> AssemblyError:
    count = f"{len(problems)} error{'s' if len(problems) > 1 else ''}"
    shown = problems[:20]
    more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
    return AssemblyError("\n".join([f"{name}: {count}", *shown, *more]))


def _with_source(number: int, said: str, lines: list[str]) -> str:
    text = lines[number - 1].strip() if 0 < number <= len(lines) else ""
    return f"line {number}: {text}\n    {said}"


def _as_remarks(stderr: str, lines: list[str]) -> tuple[list[str], list[str]]:
    problems: list[str] = []
    warnings: list[str] = []
    for remark in stderr.splitlines():
        match = _AS_REMARK.match(remark)
        if match is None:
            continue
        number, said = int(match["line"]), match["text"]
        own = Path(match["file"]).name == "program.s"
        shown = _with_source(number, said, lines) if own else f"{match['file']}:{number}: {said}"
        (warnings if match["kind"] == "Warning" else problems).append(shown)
    return problems, warnings


def _ld_remarks(stderr: str, lines: list[str]) -> list[str]:
    problems: list[tuple[int, str]] = []
    for remark in stderr.splitlines():
        # "in function `f':" only introduces the lines after it; the warning is about -N and always there.
        if "in function `" in remark or "RWX permissions" in remark or not remark.strip():
            continue
        match = _LD_PLACE.match(remark)
        if match is None:
            problems.append((len(lines) + 1, re.sub(r"^\S*ld: ", "", remark.strip())))
        elif match["line"]:
            number = int(match["line"])
            problems.append((number, _with_source(number, match["text"], lines)))
        else:
            problems.append((len(lines) + 1, match["text"]))
    # ld reports them in an order of its own.
    return [text for _, text in sorted(problems, key=lambda problem: problem[0])]
