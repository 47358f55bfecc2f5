"""The words about exits, against what real processors' KVM modules tell: the same instruction, whoever ran it."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench.host import trace_messages
from kvmbench.traces.hardware_exits import ISA_SVM, ISA_VMX, parse_reason_table, reason_name
from kvmbench.traces.qualification import describe_exit

_COLUMNS = ("isa", "exit_reason", "info1", "info2", "intr_info", "error_code")


@pytest.fixture
def exits_of(host):
    """Runs a program from 0x1000 and gives (rip, isa, name, words) of each exit of the processor."""
    if host.info.module not in ("kvm_amd", "kvm_intel"):
        pytest.skip(f"{host.info.module} does not tell kvm_exit")

    def run(source, *, steps=0, **options):
        with kb.Machine(host, **({"memory": "4M", "mode": "long"} | options)) as m:
            m.load_asm(source, at=0x1000)
            with kb.trace(m, "kvm_exit", log=False) as t:
                for _ in range(steps):
                    m.cpu.step()
                m.cpu.run(deadline_s=20)
        events = t.events["kvm_exit"]
        rows = zip(*(events[name].tolist() for name in _COLUMNS), strict=True)
        exits = zip(events["guest_rip"].tolist(), rows, strict=True)
        return [(rip, row[0], reason_name(*row[:2]), describe_exit(*row)) for rip, row in exits]

    return run


def at(exits, rip):
    """The words of the exits at an address, without those that come from outside the guest."""
    return [words for where, _, name, words in exits if where == rip and name not in _FROM_OUTSIDE]


_FROM_OUTSIDE = ("EXTERNAL_INTERRUPT", "PREEMPTION_TIMER", "interrupt", "nmi")


def test_an_io_exit_has_direction_size_and_port(exits_of):
    exits = exits_of(
        "mov dx, 0x3f8\nmov al, 65\nout dx, al\nin ax, 0x60\nmov dx, 0xcf8\nin eax, dx\n"
        "mov ecx, 2\nmov edi, 0x2000\nmov dx, 0x1f0\ncld\nrep insw\nmov esi, 0x2000\nmov dx, 0xe9\noutsb\nhlt",
        mode="protected",
    )
    assert at(exits, 0x1006)[-1] == "out 1 byte to port 0x3f8"
    assert at(exits, 0x1007)[-1] == "in 2 bytes from port 0x60"
    assert at(exits, 0x100E)[-1] == "in 4 bytes from port 0xcf8"
    assert at(exits, 0x101E)[-1] == "in 2 bytes from port 0x1f0, string instruction, repeated"
    assert at(exits, 0x102A)[-1] == "out 1 byte to port 0xe9, string instruction"
    assert {name for rip, _, name, _ in exits if rip == 0x102B} & {"HLT", "hlt"}


def test_an_msr_exit_has_the_direction(exits_of):
    exits = exits_of("mov ecx, 0xc0000080\nrdmsr\nwrmsr\nhlt")
    assert at(exits, 0x1005) == ["read of an MSR"]
    assert at(exits, 0x1007) == ["write of an MSR"]


def test_an_exit_of_a_control_or_debug_register_names_it(exits_of):
    exits = exits_of("mov rdx, 1\nmov cr8, rdx\nmov rax, dr7\nhlt")
    isa = exits[0][1]
    # QEMU's processor has no decode assists, with which SVM would name the other register too.
    written = {ISA_VMX: ["mov to cr8 from rdx"], ISA_SVM: ["mov to cr8 from rdx", "write of cr8"]}
    read = {ISA_VMX: "mov from dr7 to rax", ISA_SVM: "mov from dr7"}
    assert at(exits, 0x1007)[0] in written[isa]
    assert at(exits, 0x100B)[0] == read[isa]


def test_a_read_where_nothing_is_has_address_and_cause(host, exits_of):
    words = at(exits_of("mov eax, [0x40000010]\nhlt", mode="protected"), 0x1000)[-1]
    assert words == {
        ("kvm_amd", True): "read of the final address, not present, gpa 0x40000010",
        ("kvm_intel", True): "read of the final address, not present",
    }.get(
        (host.info.module, nested(host)),
        "vector 14 (#PF), error code 0x0 (supervisor read, not present), address 0x40000010",
    )


def test_a_fault_in_the_delivery_of_an_interrupt_names_both(host, exits_of):
    # The IDT is memory that nobody has touched: finding the gate makes an exit. There is none: the guest dies.
    exits = exits_of(
        "lidt [table]\nhere: int 0x20\nhlt\n.org 0x100\ntable: .word 0x7ff\n.long 0x390000", mode="protected"
    )
    words = [words for _, _, _, words in exits if words.endswith("while delivering software interrupt 0x20")]
    assert words[0].removesuffix(", while delivering software interrupt 0x20") == {
        ("kvm_amd", True): "read of the final address, not present, gpa 0x390100",
        ("kvm_intel", True): "read of the final address, not present",
    }.get(
        (host.info.module, nested(host)),
        "vector 14 (#PF), error code 0x0 (supervisor read, not present), address 0x390100",
    )


def test_an_exception_has_its_vector(exits_of):
    assert "vector 6 (#UD)" in at(exits_of("ud2"), 0x1000)


def test_a_step_is_told_by_vmx_and_only_named_by_svm(exits_of):
    exits = exits_of("nop\nnop\nhlt", steps=2)
    words = {ISA_VMX: "vector 1 (#DB), single step", ISA_SVM: "vector 1 (#DB)"}[exits[0][1]]
    assert words in at(exits, 0x1001)


def test_a_task_switch_names_cause_and_selector(host, exits_of):
    if host.info.module != "kvm_intel":
        pytest.skip("QEMU's SVM lets a guest switch tasks without an exit")
    exits = exits_of(
        "lgdt [gdtr]\nmov eax, 0x18\nltr ax\n"
        "mov dword ptr [0x2020], 0x1080\nmov dword ptr [0x2024], 2\nmov dword ptr [0x204c], 0x08\n"
        "mov dword ptr [0x2048], 0x10\nmov dword ptr [0x2050], 0x10\nmov dword ptr [0x2054], 0x10\n"
        ".byte 0xea\n.long 0\n.word 0x20\n.org 0x80\nhlt\n"
        ".org 0x100\ngdtr: .word 0x27\n.long gdt\n"
        ".org 0x110\ngdt: .quad 0\n.quad 0x00cf9b000000ffff\n.quad 0x00cf93000000ffff\n"
        ".quad 0x0000890018000067\n.quad 0x0000890020000067",
        mode="protected",
    )
    assert ("TASK_SWITCH", "JMP to TSS selector 0x20") in [(name, words) for _, _, name, words in exits]


def test_the_kernels_own_names_are_the_ones_known_here_or_newer(host):
    try:
        text = trace_messages.event_format(host.core, "kvm/kvm_exit")
    except kb.KvmbenchError as error:
        pytest.skip(f"no tracefs: {error}")
    table = parse_reason_table(text)
    assert {isa: len(names) > 60 for isa, names in table.items()} == {ISA_VMX: True, ISA_SVM: True}
    for isa, names in table.items():
        known = {number: reason_name(isa, number) for number in names}
        assert {n: name for n, name in known.items() if not name.startswith("exit 0x")}.items() <= names.items()
        assert {number: reason_name(isa, number, names=table) for number in names} == names


def nested(host):
    """Whether the processor walks KVM's tables itself."""
    parameters = host.provenance.parameters
    return any(parameters.get(name, "N") in ("Y", "1") for name in ("npt", "ept"))
