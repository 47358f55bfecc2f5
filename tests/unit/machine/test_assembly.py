"""Assembly: what the programs hold, and what is said when there is none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvmbench.errors import AssemblyError, HostUnavailable, LoadError, MisuseError
from kvmbench.machine.assembly import assemble

MIXED = """
.code16
start16:
    mov ax, 0x1234
    ljmp 8, offset start32
.code32
start32:
    mov eax, 0x12345678
    ljmp 16, offset start64
.code64
start64:
    mov rax, 0x123456789abcdef0
    hlt
.data
value: .quad 7
.bss
room: .skip 64
"""


def test_code_of_three_widths_may_stand_in_one_source() -> None:
    program = assemble(MIXED, bits=16)
    ((gpa, code),) = program.segments
    assert gpa == 0x1000
    assert code == bytes.fromhex(
        "b83412ea08100800b878563412ea14100000100048b8f0debc9a78563412f40700000000000000"
    )
    assert dict(program.symbols) == {
        "start16": 0x1000, "start32": 0x1008, "start64": 0x1014, "value": 0x101F, "room": 0x1027,
    }  # fmt: skip
    assert program.blank == ((0x1027, 64),)
    assert program.bits == 16


def test_each_instruction_has_its_line_and_text() -> None:
    program = assemble("start:\n  mov eax, 1 # one\n\n  inc eax\nhere: hlt", at=0x2000)
    assert dict(program.lines) == {
        0x2000: (2, "mov eax, 1 # one"), 0x2005: (4, "inc eax"), 0x2007: (5, "here: hlt"),
    }  # fmt: skip


def test_the_entry_is_at_unless_there_is_a_start_label_or_one_is_named() -> None:
    source = "nop\n{}: nop\nother: hlt"
    assert assemble(source.format("first"), at=0x3000).entry == 0x3000
    assert assemble(source.format("_start"), at=0x3000).entry == 0x3001
    assert assemble(source.format("_start"), at=0x3000, entry="other").entry == 0x3002
    assert assemble(source.format("_start"), at=0x3000, entry=0x3002).entry == 0x3002


def test_constants_are_no_symbols() -> None:
    program = assemble("SIZE = 16\nmov eax, SIZE\nhlt")
    assert program.segments[0][1] == bytes.fromhex("b810000000f4")
    assert "SIZE" not in program.symbols


def test_symbols_of_another_program_can_be_used_and_own_labels_win() -> None:
    program = assemble(
        "mov eax, offset there\nmov ebx, offset here\nhere: hlt", symbols={"there": 0x5678, "here": 1}
    )
    assert program.segments[0][1] == bytes.fromhex("b878560000bb0a100000f4")


def test_data_without_code_is_a_program_too() -> None:
    program = assemble(".data\nword: .quad 0x11", at=0x4000)
    assert program.segments == ((0x4000, (0x11).to_bytes(8, "little")),)


def test_every_error_is_named_with_its_line_its_text_and_the_assemblers_words() -> None:
    with pytest.raises(AssemblyError) as caught:
        assemble("nop\nfrobnicate rax\nnop\nmov [rax], 5\n", name="lab.S")
    text = str(caught.value)
    assert text.splitlines()[0] == "lab.S: 2 errors"
    assert "line 2: frobnicate rax" in text
    assert "no such instruction: `frobnicate rax'" in text
    assert "line 4: mov [rax], 5" in text
    assert "ambiguous operand size" in text
    assert "/tmp" not in text


def test_undefined_symbols_are_named_with_their_lines_in_order() -> None:
    with pytest.raises(AssemblyError) as caught:
        assemble("nop\njmp nowhere\nmov rax, offset missing\n")
    text = str(caught.value)
    assert text.index("line 2: jmp nowhere") < text.index("line 3: mov rax, offset missing")
    assert "undefined reference to `nowhere'" in text
    assert "undefined reference to `missing'" in text


def test_a_16_bit_reference_beyond_64_kib_is_an_error_with_its_line() -> None:
    with pytest.raises(AssemblyError, match=r"line 2: mov ax, \[value\]\n +relocation truncated"):
        assemble("nop\nmov ax, [value]\n.data\nvalue: .word 0", at=0x20000, bits=16)


def test_an_alignment_that_the_load_address_breaks_is_refused() -> None:
    with pytest.raises(AssemblyError, match="boundary that at=0x1008 is not on"):
        assemble("nop\n.align 16\nhlt", at=0x1008)


@pytest.mark.parametrize("source", ["", "# nothing\n", "SIZE = 3\n"])
def test_a_source_that_makes_nothing_is_refused(source: str) -> None:
    with pytest.raises(AssemblyError, match="no code or data"):
        assemble(source)


def test_warnings_are_kept() -> None:
    program = assemble(".code16\nmov ax, 0x12345\n")
    assert any("shortened" in warning and "line 2" in warning for warning in program.warnings)


def test_the_same_source_is_assembled_once() -> None:
    source = "mov eax, 77\nhlt"
    first = assemble(source)
    start = time.perf_counter()
    assert assemble(source) is first
    assert time.perf_counter() - start < 0.002, "the cache took as long as an assembler"
    assert assemble(source, at=0x9000) is not first


def test_nobody_can_change_a_cached_program() -> None:
    program = assemble("loop: jmp loop")
    with pytest.raises(TypeError):
        program.symbols["loop"] = 1  # type: ignore[index]


def test_a_path_is_read_and_gives_the_name(tmp_path: Path) -> None:
    path = tmp_path / "guest.S"
    path.write_text("hlt\n", encoding="utf-8")
    assert assemble(path).name == "guest.S"
    with pytest.raises(LoadError, match=r"missing\.S"):
        assemble(tmp_path / "missing.S")


def test_include_files_are_looked_for_where_the_caller_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "common.inc").write_text("VALUE = 0x42\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    source = '.include "common.inc"\nmov al, VALUE'
    assert assemble(source).segments[0][1] == b"\xb0\x42"
    (tmp_path / "common.inc").write_text("VALUE = 0x43\n", encoding="utf-8")
    assert assemble(source).segments[0][1] == b"\xb0\x43", "a changed file is read again"


def test_without_an_assembler_the_message_has_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostUnavailable, match="install"):
        assemble("mov eax, 4711")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bits": 8}, "bits=8"),
        ({"at": -1}, "at=-1"),
        ({"entry": "nosuch"}, "nosuch"),
        ({"symbols": {"a b": 1}}, "a b"),
    ],
)
def test_options_that_cannot_be_right_are_named(options: dict[str, object], word: str) -> None:
    with pytest.raises(MisuseError, match=word):
        assemble("label: hlt", **options)  # type: ignore[arg-type]
