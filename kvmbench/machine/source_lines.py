"""Source lines of machine code, read from DWARF line tables by pyelftools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# About 10 us a row in Python: a kernel's 20 MB of line tables would hold a notebook up for minutes.
LINE_TABLE_LIMIT_BYTES = 4 << 20


def read_source_lines(elf: Any, text: str | None = None) -> dict[int, tuple[int, str]]:
    """Address of each instruction with a row in the line table -> (line number, text of the line).

    Args:
        elf: an `ELFFile`.
        text: the source, where the caller has it; it is then the primary file of every unit, and rows of
            other files (``.include``) are left out. Without it the files named by the table are read where
            they exist, and the text is ``name.c:12`` where they do not.

    Returns:
        An empty dict if there is no line table, or one above `LINE_TABLE_LIMIT_BYTES`.
    """
    section = elf.get_section_by_name(".debug_line")
    if section is None or section.data_size > LINE_TABLE_LIMIT_BYTES or not elf.has_dwarf_info():
        return {}
    dwarf = elf.get_dwarf_info()
    own = None if text is None else text.splitlines()
    files: dict[Path, list[str]] = {}
    found: dict[int, tuple[int, str]] = {}
    for unit in dwarf.iter_CUs():
        program = dwarf.line_program_for_CU(unit)
        if program is None:
            continue
        top = unit.get_top_DIE().attributes
        primary = _text(top["DW_AT_name"].value) if "DW_AT_name" in top else ""
        directory = _text(top["DW_AT_comp_dir"].value) if "DW_AT_comp_dir" in top else ""
        paths: dict[int, Path] = {}
        for entry in program.get_entries():
            state = entry.state
            if state is None or state.end_sequence or state.line == 0:
                continue
            path = paths.get(state.file)
            if path is None:
                path = paths[state.file] = _path(program, state.file, directory)
            if own is None:
                lines = _read(files, path)
                fallback = f"{path.name}:{state.line}"
            elif path.name == Path(primary).name:
                lines, fallback = own, ""
            else:
                continue
            inside = state.line <= len(lines)
            found[state.address] = (state.line, lines[state.line - 1].strip() if inside else fallback)
    return found


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _path(program: Any, number: int, directory: str) -> Path:
    # DWARF 5 counts files and directories from 0, and entry 0 of the directories is the compilation's; before
    # that files count from 1 and directory 0 is implied (DWARF 5, section 6.2.4).
    header = program.header
    files, directories = header["file_entry"], header["include_directory"]
    first = 0 if header["version"] >= 5 else 1
    if not first <= number < len(files) + first:
        return Path("?")
    entry = files[number - first]
    path = Path(_text(entry.name))
    if first == 0:
        if entry.dir_index < len(directories):
            path = Path(_text(directories[entry.dir_index])) / path
    elif 0 < entry.dir_index <= len(directories):
        path = Path(_text(directories[entry.dir_index - 1])) / path
    return Path(directory) / path


def _read(files: dict[Path, list[str]], path: Path) -> list[str]:
    lines = files.get(path)
    if lines is None:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []  # the usual case: built on another machine
        files[path] = lines
    return lines
