"""Programs of every kind, loaded into a machine and run."""

from __future__ import annotations

import struct
import subprocess

import pytest

import kvmbench as kb
from kvmbench.errors import AddressError, AssemblyError, ClosedError, LoadError, MisuseError
from kvmbench.machine.binutils import find_tool

KERNEL = """
.intel_syntax noprefix
.code32
.set FLAGS, 3
header:
    .long 0x1badb002
    .long FLAGS
    .long -(0x1badb002 + FLAGS)
.globl _start
_start:
    cli
    mov esi, [ebx + 16]               # the command line
    mov dx, 0xe9
next:
    lodsb
    test al, al
    jz end
    out dx, al
    jmp next
end:
    hlt
"""


def build(folder, source):
    """An ELF file linked at 1 MiB."""
    (folder / "kernel.s").write_text(source, encoding="utf-8")
    subprocess.run([find_tool("as"), "--32", "-o", "kernel.o", "kernel.s"], cwd=folder, check=True)
    subprocess.run(
        [find_tool("ld"), "-m", "elf_i386", "-N", "-Ttext=0x100000", "-o", "kernel.elf", "kernel.o"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder / "kernel.elf"


def test_a_multiboot_kernel_gets_its_magic_and_prints_its_command_line(host, tmp_path):
    with kb.Machine(host) as m:
        program = m.load_multiboot(build(tmp_path, KERNEL), command_line="hello kernel")
        assert m.cpu.regs.eax == 0x2BADB002
        assert m.mode == "protected"
        assert m.cpu.regs.rip == program.symbols["_start"]
        stop = m.cpu.run(deadline_s=20)
        assert stop.cause is kb.Cause.HALT, stop
        assert m.debugcon.text == "hello kernel"
        # The machine's own mode comes back with the next ordinary program.
        m.load_asm("mov rax, cr4\nhlt")
        assert m.mode == "long"
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT


def test_a_32_bit_elf_program_runs_in_protected_mode_and_its_zeros_are_zero(host, tmp_path):
    source = ".intel_syntax noprefix\n.globl _start\n_start: mov eax, [room]\nadd eax, [seven]\nhlt\n"
    source += ".data\nseven: .long 7\n.bss\nroom: .skip 64\n"
    path = build(tmp_path, source)
    with kb.Machine(host, mode="protected") as m:
        m.memory.fill(0x100000, "64K", 0xFF)
        program = m.load_elf(path)
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert m.cpu.regs.eax == 7
        assert program.entry == 0x100000


def test_a_flat_boot_sector_runs_in_real_mode(host):
    code = bytes.fromhex("b82a00f4")  # mov ax, 42; hlt
    with kb.Machine(host, mode="real") as m:
        m.load_flat(code, 0x7C00)
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert m.cpu.regs.eax & 0xFFFF == 42


def test_loads_outside_memory_are_refused_and_the_machine_runs_on(machine, tmp_path):
    machine.load_asm("mov eax, 3\nhlt")
    with pytest.raises(AddressError, match=r"0x3000000.*memory"):
        machine.load_asm("hlt", at=0x300_0000)
    with pytest.raises(AddressError, match="over_tables=True"):
        machine.load_asm("hlt", at=0x80000)
    with pytest.raises(LoadError, match="more memory"):
        machine.load_elf(elf_at(0x4000_0000))
    with pytest.raises(MisuseError, match="cannot start in 16-bit code"):
        machine.load_asm("hlt", bits=16)
    stop = machine.cpu.run(deadline_s=20)
    assert stop.cause is kb.Cause.HALT
    assert machine.cpu.regs.eax == 3
    assert len(machine.programs) == 1


def elf_at(gpa: int) -> bytes:
    """A 64-bit ELF file with one HLT at an address."""
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, gpa, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    return ident + head + struct.pack("<IIQQQQQQ", 1, 5, 120, gpa, gpa, 1, 1, 1) + b"\xf4"


def test_a_64_bit_elf_program_runs_in_long_mode(machine):
    machine.load_elf(elf_at(0x10_0000))
    stop = machine.cpu.run(deadline_s=20)
    assert stop.cause is kb.Cause.HALT
    assert machine.cpu.regs.rip == 0x10_0001


def test_a_program_placed_without_start_leaves_the_vcpu_where_it_is(machine):
    first = machine.load_asm("mov ebx, 1\njmp there\n", symbols={"there": 0x2000})
    machine.load_asm("mov ecx, 2\nhlt", at=0x2000, start=False)
    assert machine.cpu.regs.rip == first.entry
    assert machine.cpu.run(deadline_s=20).cause is kb.Cause.HALT
    assert (machine.cpu.regs.ebx, machine.cpu.regs.ecx) == (1, 2)
    assert len(machine.programs) == 2


def test_reset_brings_back_data_devices_and_registers(host, guest):
    with kb.Machine(host, memory="2M") as m:
        program = m.load_asm(guest("count_loop.S"))
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert m.memory.read_u64(program.symbols["counter"]) == 10
        m.memory.write(0x1F0000, b"left over")
        m.reset()
        assert m.memory.read_u64(program.symbols["counter"]) == 0
        assert m.memory.read(0x1F0000, 9) == bytes(9)
        assert (m.cpu.regs.rip, m.cpu.regs.rax) == (program.entry, 0)
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert m.memory.read_u64(program.symbols["counter"]) == 10


def test_a_guest_that_died_can_be_reset_and_run_again(host, guest):
    with kb.Machine(host, memory="2M") as m:
        m.load_asm(guest("triple_fault.S"))
        for _ in range(3):
            assert m.cpu.run(deadline_s=20).cause is kb.Cause.SHUTDOWN
            m.reset()
        m.load_asm("mov eax, 9\nhlt")
        assert m.cpu.run(deadline_s=20).cause is kb.Cause.HALT
        assert m.cpu.regs.eax == 9


def test_a_closed_machine_says_so(host):
    m = kb.Machine(host, memory="2M")
    m.close()
    m.close()
    assert m.closed
    for use in (
        lambda: m.load_asm("hlt"),
        lambda: m.memory.read(0, 1),
        lambda: m.reset(),
        lambda: m.irq(4, 1),
    ):
        with pytest.raises(ClosedError):
            use()
    assert "closed" in repr(m)
    with kb.Machine(host, memory="2M") as other:
        other.load_asm("hlt")
        assert other.cpu.run(deadline_s=20).cause is kb.Cause.HALT


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": 5000}, "not a multiple of the 4096-byte page"),
        ({"memory": "lots"}, "is not a size"),
        ({"memory": "100T"}, "at most 1"),
        ({"memory": "16K"}, "more memory"),
        ({"pit": True}, "needs irqchip=True"),
        ({"mode": "real", "user": True}, "real mode has no user code"),
    ],
)
def test_machines_that_cannot_be_are_refused_before_anything_is_made(host, options, words):
    with pytest.raises(MisuseError, match=words):
        kb.Machine(host, **options)


def test_a_program_that_is_refused_leaves_the_one_before_it_ready_to_run(machine):
    machine.load_asm("mov eax, 3\nhlt")
    with pytest.raises(AssemblyError, match="line 2"):
        machine.load_asm("nop\nnonsense eax\nhlt")
    whole = elf_at(0x1000)
    with pytest.raises(LoadError):
        machine.load_elf(whole[:90])
    with pytest.raises(LoadError, match="machine"):
        machine.load_elf(whole[:18] + struct.pack("<H", 183) + whole[20:])  # EM_AARCH64
    with pytest.raises(LoadError):
        machine.load_multiboot(bytes(4096))
    assert machine.cpu.run(deadline_s=20).cause is kb.Cause.HALT
    assert (machine.cpu.regs.eax, len(machine.programs)) == (3, 1)


def test_a_machine_is_made_in_a_host_and_not_in_its_name():
    with pytest.raises(MisuseError, match=r"a host from kvmbench.connect\(\), not 'local'"):
        kb.Machine("local")
