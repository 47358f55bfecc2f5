"""wire.h as Python sees it, against the compiler and against KVM's own structs."""

from __future__ import annotations

from kvmbench import uapi
from kvmbench.core import wire
from kvmbench.uapi.layout import layouts

LAYOUTS = layouts(wire.ffi)


def test_every_message_has_the_layout_that_the_compiler_gives_it(compiled_layouts):
    for (tag, path), found in compiled_layouts(LAYOUTS, "wire.h").items():
        layout = LAYOUTS[tag]
        assert found == (layout.members[path][:2] if path else (0, layout.size_bytes)), f"{tag}.{path}"


def test_no_message_has_padding_that_wire_h_does_not_spell_out():
    assert "struct kb_stop" in LAYOUTS
    for tag, layout in LAYOUTS.items():
        end = 0
        for path, member in layout.members.items():
            assert member.offset == end, f"{tag}: a hole before {path}"
            end = member.offset + member.size_bytes
        assert layout.size_bytes == end, f"{tag}: padding at the end"


def test_every_message_begins_with_the_header_except_what_messages_hold():
    inside = {"header", "row", "watch", "history", "entry", "trace_chunk", "log_row", "kernel_range", "kernel_got"}
    first = {tag: next(iter(layout.members)) for tag, layout in LAYOUTS.items()}
    assert {tag for tag, name in first.items() if name != "header"} == {f"struct kb_{name}" for name in inside}


def test_a_stop_has_room_for_just_what_the_kernel_writes():
    stop = LAYOUTS["struct kb_stop"].members
    for member, struct in (("regs", "kvm_regs"), ("sregs", "kvm_sregs"), ("events", "kvm_vcpu_events")):
        assert stop[member].size_bytes == uapi.ffi.sizeof(f"struct {struct}"), member
    assert stop["run"].size_bytes == wire.KB_RUN_BYTES


def test_the_first_bytes_of_kvm_run_cover_its_exit_union():
    union_end = uapi.ffi.offsetof("struct kvm_run", "kvm_valid_regs")
    assert union_end == wire.KB_RUN_BYTES


def test_a_row_starts_with_the_registers_in_the_kernels_order():
    row, regs = LAYOUTS["struct kb_row"], layouts(uapi.ffi)["struct kvm_regs"]
    assert list(row.members.items())[: len(regs.members)] == list(regs.members.items())


def test_numbers_of_wire_h_have_the_values_that_the_compiler_gives_them(run_c):
    names = [name for name in vars(wire) if name.startswith("KB_")]
    assert {"KB_EXECUTE", "KB_CAUSE_KICK", "KB_MAX_MESSAGE_BYTES"} <= set(names)
    lines = ["#include <stdio.h>", "#include <wire.h>", "int main(void) {"]
    lines += [f'printf("{name} %lld\\n", (long long){name});' for name in names]
    found = {name: int(value) for name, value in run_c("\n".join([*lines, "return 0; }"]))}
    assert found == {name: getattr(wire, name) for name in names}


def test_enums_name_their_numbers():
    assert wire.Cause(wire.KB_CAUSE_DEADLINE) is wire.Cause.DEADLINE
    assert wire.Kind(wire.KB_EXECUTE).name == "EXECUTE"
    assert wire.Status(wire.KB_TOO_LARGE) is wire.Status.TOO_LARGE
