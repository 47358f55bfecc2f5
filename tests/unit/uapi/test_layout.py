"""The compiler is the judge of what cffi makes of the KVM structs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvmbench import uapi
from kvmbench.uapi import generate
from kvmbench.uapi.layout import layouts

LAYOUTS = layouts(uapi.ffi)


def expected(tag: str, path: str) -> tuple[int, int]:
    if not path:
        return 0, LAYOUTS[tag].size_bytes
    member = LAYOUTS[tag].members[path]
    if member.bit_size >= 0:
        return member.offset * 8 + member.bit_offset, -member.bit_size
    return member.offset, member.size_bytes


@pytest.fixture
def same_header(compiler):
    here, committed = generate.linux_version(), uapi.constants.LINUX_VERSION_CODE
    if here != committed:
        pytest.skip(f"the kernel header is {here:#x} and the committed files are from {committed:#x}")


def test_every_struct_and_member_lies_where_the_compiler_puts_it(same_header, compiled_layouts):
    measured = compiled_layouts(LAYOUTS, "linux/kvm.h", "linux/kvm_para.h")
    assert len(measured) > 800
    wrong = {key: (expected(*key), found) for key, found in measured.items() if expected(*key) != found}
    assert wrong == {}


def test_the_table_of_members_holds_bitfields_unions_and_flexible_arrays():
    ioapic = LAYOUTS["struct kvm_ioapic_state"].members
    assert ioapic["redirtbl[0].fields.remote_irr"].bit_size == 1
    assert ioapic["redirtbl[0].bits"].size_bytes == 8
    assert LAYOUTS["struct kvm_run"].members["io.port"].offset == 32 + 2
    assert LAYOUTS["struct kvm_msrs"].members["entries"] == (8, 0, -1, -1)
    assert LAYOUTS["struct kvm_irqchip"].members["chip.pic"].size_bytes == 16


@pytest.mark.parametrize(
    "name",
    [
        "kvm_run", "kvm_regs", "kvm_sregs", "kvm_sregs2", "kvm_fpu", "kvm_xsave", "kvm_xcrs",
        "kvm_msrs", "kvm_msr_list", "kvm_cpuid2", "kvm_vcpu_events", "kvm_debugregs",
        "kvm_guest_debug", "kvm_mp_state", "kvm_translation", "kvm_interrupt", "kvm_irq_routing",
        "kvm_irqchip", "kvm_irq_level", "kvm_lapic_state", "kvm_pit_state2", "kvm_pit_config",
        "kvm_clock_data", "kvm_enable_cap", "kvm_signal_mask", "kvm_device_attr",
        "kvm_stats_header", "kvm_stats_desc", "kvm_userspace_memory_region", "kvm_dirty_log",
        "kvm_msr_filter", "kvm_nested_state", "kvm_coalesced_mmio_ring",
    ],
)
def test_the_struct_that_the_library_needs_is_there(name):
    assert LAYOUTS[f"struct {name}"].size_bytes > 0


def test_a_flexible_array_can_be_given_any_length():
    msrs = uapi.ffi.new("struct kvm_msrs *", {"nmsrs": 3, "entries": 3})
    msrs.entries[2].data = 7
    assert uapi.ffi.sizeof(msrs[0]) == 8 + 3 * 16
    with pytest.raises(IndexError):
        msrs.entries[3].data = 1


def test_an_anonymous_union_is_reached_as_in_c():
    run = uapi.ffi.new("struct kvm_run *")
    run.mmio.phys_addr = 0xFEE00000
    assert run.hw.hardware_exit_reason == 0xFEE00000


def test_every_integer_constant_has_the_value_that_the_compiler_gives_it(same_header, run_c):
    names = [name for name in vars(uapi.constants) if name.startswith(("KVM", "MSR_KVM", "SYNC_REGS"))]
    assert len(names) > 700
    lines = [f"#include <{header}>" for header in ("stdio.h", "linux/kvm.h", "linux/kvm_para.h")]
    lines.append("int main(void) {")
    lines += [f'printf("{name} %lld\\n", (long long)({name}));' for name in names]
    for name, value in run_c("\n".join([*lines, "return 0; }"])):
        known = getattr(uapi.constants, name)
        assert int(value) % (1 << 64) == known % (1 << 64), name


def test_the_abi_alone_loads_neither_compiler_nor_numpy():
    # A bare package stands in for kvmbench, whose own imports are another matter.
    package = str(generate.PACKAGE)
    code = (
        "import sys, types; kvmbench = types.ModuleType('kvmbench'); "
        f"kvmbench.__path__ = [{package!r}]; sys.modules['kvmbench'] = kvmbench; "
        "import kvmbench.uapi; print(*sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    modules = done.stdout.split()
    assert "_cffi_backend" in modules
    assert {"cffi", "pycparser", "numpy", "subprocess"}.isdisjoint(modules)
