"""The generator: what it commits is what the headers give, and --check sees a difference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable, InternalError
from kvmbench.uapi import generate
from kvmbench.uapi.header import preprocess, read_header


@pytest.fixture(scope="module")
def generated():
    try:
        return generate.generate_kvm() | generate.generate_wire()
    except HostUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture
def committed(generated, tmp_path):
    """A copy of the committed files that a test may change."""
    for path in generated:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(generate.PACKAGE / path, tmp_path / path)
    return tmp_path


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


def test_the_committed_files_are_what_the_headers_give(generated):
    assert generate.check(generated)[0] == []


def test_every_generated_file_says_so_in_its_first_line(generated):
    for path in generated:
        first = (generate.PACKAGE / path).read_text().splitlines()[0]
        assert "enerated by" in first, path
        assert "do not edit" in first, path


def test_check_names_the_file_that_was_edited(generated, committed):
    wire = {path: text for path, text in generated.items() if path.startswith("core/")}
    change(committed / "core/wire.py", "KB_WIRE_VERSION = ", "KB_WIRE_VERSION = 9")
    assert generate.check(wire, root=committed)[0] == ["core/wire.py differs from what its header gives"]


def test_check_names_the_file_that_is_missing(generated, committed):
    (committed / "core/_wire.py").unlink()
    assert generate.check(generated, root=committed)[0] == ["core/_wire.py is missing"]


def test_check_fails_where_a_struct_of_wire_h_changed(generated, committed):
    layout_free = generate.emit_cffi("kvmbench.core._wire", "struct kb_header { uint32_t size_bytes; };")
    (committed / "core/_wire.py").write_text(layout_free)
    assert "core/_wire.py differs from what its header gives" in generate.check(generated, root=committed)[0]


def test_check_forgives_another_spelling_of_the_same_layouts(generated, committed):
    text = (committed / "core/_wire.py").read_text()
    (committed / "core/_wire.py").write_text(text.replace("# auto-generated file\n", ""))
    wire = {path: text for path, text in generated.items() if path.startswith("core/")}
    differences, remarks = generate.check(wire, root=committed)
    assert differences == []
    assert remarks == ["core/_wire.py: the same layouts, written by another version of cffi"]


@pytest.fixture
def other_kernel(generated, committed):
    """Committed files that claim to come from Linux 5.0.0."""
    here = generate.linux_version()
    change(committed / "uapi/constants.py", f"LINUX_VERSION_CODE = {here:#x}", "LINUX_VERSION_CODE = 0x50000")
    return committed


def test_check_against_another_kernel_says_so_and_passes_on_what_both_know(generated, other_kernel):
    change(other_kernel / "uapi/constants.py", "KVM_CAP_HLT = 1\n", "KVM_CAP_OF_ANOTHER_KERNEL = 999\n")
    change(other_kernel / "uapi/constants.py", "KVM_STATS_TYPE_MAX = 4\n", "KVM_STATS_TYPE_MAX = 3\n")
    differences, remarks = generate.check(generated, root=other_kernel)
    assert differences == []
    assert "from Linux 5.0.0" in remarks[0]
    assert "compared only what both know" in remarks[0]


def test_check_against_another_kernel_still_sees_a_changed_value(generated, other_kernel):
    change(other_kernel / "uapi/constants.py", "KVM_CAP_HLT = 1\n", "KVM_CAP_HLT = 2\n")
    assert generate.check(generated, root=other_kernel)[0] == [
        "KVM_CAP_HLT is 0x2 in the committed files and 0x1 here"
    ]


def test_check_against_another_kernel_passes_on_exits_that_only_one_knows(generated, other_kernel):
    change(other_kernel / "uapi/hardware_exits.py", '    75: "NOTIFY",\n', '    999: "OF_ANOTHER_KERNEL",\n')
    change(other_kernel / "uapi/hardware_exits.py", '    0x400: "npf",\n', "")
    assert generate.check(generated, root=other_kernel)[0] == []


def test_check_against_another_kernel_still_sees_a_renamed_exit(generated, other_kernel):
    change(other_kernel / "uapi/hardware_exits.py", '0x400: "npf"', '0x400: "fpn"')
    assert generate.check(generated, root=other_kernel)[0] == [
        "SVM_EXIT_REASONS[0x400] is 'fpn' in the committed files and 'npf' here"
    ]


def test_check_against_another_kernel_still_sees_a_moved_member(generated, other_kernel):
    moved = generate.emit_cffi(
        "kvmbench.uapi._kvm", "struct kvm_mp_state { uint32_t before; uint32_t mp_state; };"
    )
    (other_kernel / "uapi/_kvm.py").write_text(moved)
    assert generate.check(generated, root=other_kernel)[0] == [
        "struct kvm_mp_state.mp_state is at 4 in the committed files and at 0 here"
    ]


def test_the_command_ends_with_status_0_when_all_is_the_same(generated, capsys):
    assert generate.main(["--check"]) == 0


def test_a_missing_compiler_is_named_with_what_provides_it():
    with pytest.raises(HostUnavailable, match=r"no compiler 'no-such-cc'.*apt-get install gcc"):
        preprocess("", compiler="no-such-cc")


def test_a_missing_header_is_an_error_that_quotes_the_preprocessor(generated):
    with pytest.raises(InternalError, match=r"no/such\.h"):
        read_header(["no/such.h"], own=lambda file: True)


def test_a_packed_struct_is_refused_because_its_layout_would_be_lost(generated, tmp_path):
    (tmp_path / "packed.h").write_text("struct p { char a; int b; } __attribute__((packed));\n")
    with pytest.raises(InternalError, match="attributes on members are not understood"):
        read_header(["packed.h"], own=lambda file: file.endswith("packed.h"), include=[tmp_path])


def test_a_wire_message_with_a_number_that_is_none_is_refused(generated, tmp_path, monkeypatch):
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "wire.h").write_text('#define KB_NAME "text"\nstruct kb_x { int y; };\n')
    monkeypatch.setattr(generate, "PACKAGE", tmp_path)
    with pytest.raises(InternalError, match="KB_NAME: not a number"):
        generate.generate_wire()


def test_what_cffi_cannot_express_is_rewritten_to_the_same_places(generated, tmp_path):
    (tmp_path / "shapes.h").write_text(
        "struct item { long a; };\n"
        "struct shapes {\n"
        "    char first;\n"
        "    struct { struct { } __empty_list; struct item list[]; };\n"
        "};\n"
        "struct tail {\n"
        "    int first;\n"
        "    union { char one[0]; struct { struct { } __empty_two; char two[]; }; } data;\n"
        "};\n"
        "enum { THREE = 3 };\n"
        "struct sized { char text[THREE * 2]; unsigned bits : THREE; };\n"
    )
    header = read_header(["shapes.h"], own=lambda file: file.endswith("shapes.h"), include=[tmp_path])
    ffi = generate.load_ffi(generate.emit_cffi("shapes", "\n".join(header.declarations.values())))
    assert (ffi.offsetof("struct shapes", "list"), ffi.sizeof("struct shapes")) == (8, 8)
    assert (ffi.offsetof("struct tail", "data"), ffi.sizeof("struct tail")) == (4, 4)
    assert dict(ffi.typeof("struct sized").fields)["text"].type.length == 6
    assert dict(ffi.typeof("struct sized").fields)["bits"].bitsize == 3
    assert header.closure(lambda tag: tag == "struct shapes") == ["struct item", "struct shapes"]
