"""Wrong calls: each gets a message that names the thing and the value, and the machine stays usable."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import AddressError, ClosedError, LoadError, MisuseError

Call = tuple[Callable[[kb.Machine], Any], str]


def refused(m: kb.Machine, calls: list[Call]) -> None:
    """Every call is refused with its words, and none changes what the machine does."""
    for number, (call, words) in enumerate(calls):
        with pytest.raises((MisuseError, LoadError, AttributeError)) as caught:
            call(m)
        assert re.search(words, str(caught.value)), f"call {number}: {caught.value}"
    m.load_asm("mov eax, 5; hlt")
    m.cpu.step()
    assert m.cpu.regs.rax == 5
    assert not len(m.cpu.breakpoints)


@pytest.fixture
def loaded(host: kb.Host) -> Iterator[kb.Machine]:
    """A machine with a loop in it."""
    with kb.Machine(host, memory="1M") as machine:
        machine.load_asm("start: mov eax, 5\nloop: inc rax\njmp loop\n")
        yield machine


def test_machines_that_cannot_be(host, loaded):
    make = lambda *args, **options: lambda m: kb.Machine(host, *args, **options)  # noqa: E731
    refused(
        loaded,
        [
            (lambda m: kb.Machine("x"), r"a machine needs a host .* not 'x'"),
            (lambda m: kb.Machine(), r"missing .* 'host'; it is called as Machine\(host"),
            (make("16M"), r"it is called as Machine\(host"),
            (make(bogus=1), r"Machine\(\) has no option 'bogus'; there are host, memory"),
            (make(memroy="2M"), r"no option 'memroy'; did you mean 'memory'\?"),
            (make(vcpus=0), r"vcpus=0: a machine has 1 to"),
            (make(vcpus="2"), r"vcpus='2': give an integer"),
            (make(vcpus=True), r"vcpus=True: give an integer"),
            (make(memory=None), r"memory=None is not a size"),
            (make(mode="lnog"), r"mode='lnog': choose one of real"),
            (make(cpl="0"), r"cpl='0': a machine starts at CPL 0 or 3"),
            (make(devices=5), r"devices=5.* give a list of devices"),
            (make(devices=[5]), r"5 is no device; derive it"),
            (make(devices=[kb.Machine]), r"is no device \(a class: make one of it"),
            (make(mapped=[5]), r"mapped=\[5\]: give a list"),
            (make(mapped=[("a", 1)]), r"mapped gpa='a': give an integer"),
        ],
    )


def test_programs_that_are_none(loaded):
    refused(
        loaded,
        [
            (lambda m: m.load_asm(5), r"source=5: give the source as text"),
            (lambda m: m.load_asm(b"nop"), r"source=b'nop': give the source as text"),
            (lambda m: m.load_asm("nop", at="x"), r"at='x' is not a guest-physical address"),
            (lambda m: m.load_asm("nop", entry=1.5), r"entry=1.5: give an integer"),
            (lambda m: m.load_asm("strat: nop", entry="start"), r"did you mean 'strat'\?"),
            (lambda m: m.load_asm("nop", symbols=5), r"symbols=5: give a dictionary"),
            (lambda m: m.load_asm("nop", symbols={5: 1}), r"symbol 5 = 1 is not a name"),
            (lambda m: m.load_asm("nop", symbols={"a": "x"}), r"symbols\['a'\]='x': give an integer"),
            (lambda m: m.load_asm("nop", entyr=5), r"load_asm\(\) has no option 'entyr'; did you mean 'entry'\?"),
            (lambda m: m.load_elf(None), r"cannot load None: give the path of a file, or its bytes"),
            (lambda m: m.load_flat(b"\x90", entry="x"), r"entry='x': give an integer"),
            (lambda m: m.load_flat(5), r"cannot load 5"),
            (lambda m: m.load_multiboot(5), r"cannot load 5"),
            (lambda m: m.attach(5), r"5 is no device"),
            (lambda m: m.fw_cfg.add_file("x", 5), r"fw_cfg file 'x' takes bytes, not 5"),
            (lambda m: m.fw_cfg.add_file(5, b""), r"fw_cfg file name 5"),
        ],
    )


def test_memory_that_is_asked_for_oddly(loaded):
    def assign(key: Any, value: Any) -> Callable[[kb.Machine], None]:
        return lambda m: m.memory.__setitem__(key, value)

    calls: list[Call] = [
        *(
            (lambda m, key=key: m.memory[key], r"is not an address; give an integer")
            for key in (None, "x", 1.5, (0, 1))
        ),
        (lambda m: m.memory[0:"x"], r"'x' is not an address"),
        (lambda m: m.memory[1 << 70], r"is not guest memory; there is 0x0 to 0xfffff"),
        (assign("x", 5), r"'x' is not an address"),
        (assign(slice(0, 4), b"12345"), r"takes 4 bytes, not 5"),
        (assign(0, "x"), r"memory\[0x0\] = 'x': a byte is 0 to 255"),
        (assign("x", "y"), r"'x' is not an address"),
        (lambda m: m.memory.read("x", 5), r"'x' is not an address"),
        (lambda m: m.memory.read(0, "x"), r"size_bytes='x': give an integer"),
        (lambda m: m.memory.read(1.5, 1), r"1.5 is not an address"),
        (lambda m: m.memory.read(0, 1.5), r"size_bytes=1.5: give an integer"),
        (lambda m: m.memory.write(None, b"a"), r"None is not an address"),
        (lambda m: m.memory.write(0, "abc"), r"takes bytes, a bytearray or an array, not str"),
        (lambda m: m.memory.fill("x", 5), r"'x' is not an address"),
        (lambda m: m.memory.fill(0, 5, "x"), r"byte='x': give an integer"),
        (lambda m: m.memory.fill(0, 5, 256), r"byte=256: give at least 0 and at most 255"),
        (lambda m: m.memory.read_u64("x"), r"'x' is not an address"),
        (lambda m: m.memory.read_u64(1.5), r"1.5 is not an address"),
        (lambda m: m.memory.write_u64(0, "x"), r"'x' is not an integer"),
        (lambda m: m.memory.write_u8(0, None), r"None is not an integer"),
        (lambda m: m.memory.as_array("u8", gpa="x"), r"'x' is not an address"),
        (lambda m: m.memory.as_array("u8", count="x"), r"count='x': give an integer"),
        (lambda m: m.memory.as_array("u8", cuont=1), r"did you mean 'count'\?"),
        (lambda m: m.memory.snapshot("x"), r"'x' is not an address"),
        (lambda m: m.memory.changes(5), r"5 is no snapshot"),
        (lambda m: m.memory.restore(None), r"None is no snapshot"),
        (lambda m: m.memory.dump("x"), r"'x' is not an address"),
        (lambda m: m.memory.dirty_pages(5), r"5 is not a region"),
        (lambda m: m.memory.find("x"), r"'x' is not an address"),
        (lambda m: m.memory.holds(0, "x"), r"size_bytes='x': give an integer"),
    ]
    refused(loaded, calls)


def test_a_vcpu_that_is_told_nonsense(loaded):
    # `refused` loads another program at the end; `loop` is known until then.
    refused(
        loaded,
        [
            (lambda m: m.cpu.step("x"), r"cannot step 'x' instructions; give a positive number"),
            (lambda m: m.cpu.step(deadline_s=-1), r"a deadline is a positive number of seconds.* not -1"),
            (lambda m: m.cpu.run(deadline=-1), r"Cpu.run\(\) has no option 'deadline'; did you mean 'deadline_s'\?"),
            (lambda m: m.cpu.run(5), r"it is called as Cpu.run\(\*, deadline_s=None\)"),
            (lambda m: m.cpu.run_until("lopo"), r"no symbol 'lopo'; did you mean 'loop'\?"),
            (lambda m: m.cpu.step_out(limit="x"), r"limit='x': give an integer"),
            (lambda m: m.cpu.record(steps=-1), r"cannot record -1 steps; give a positive number"),
            (lambda m: m.cpu.record(1 << 62), r"do not fit this machine's memory; record pieces"),
            (lambda m: m.cpu.record(), r"it is called as Cpu.record\(steps, \*"),
            (lambda m: m.cpu.breakpoints.add(None), r"None is not an address"),
            (lambda m: m.cpu.breakpoints.add("loop", conditon=1), r"did you mean 'condition'\?"),
            (lambda m: m.cpu.breakpoints.add("loop", mechanism="INT"), r"no mechanism 'INT'; did you mean 'INT3'\?"),
            (lambda m: m.cpu.breakpoints.remove("loop"), r"no breakpoint 'loop'; there are none"),
            (lambda m: m.cpu.watch("x", 3), r"no symbol 'x'; there are loop, start"),
            (lambda m: m.cpu.watch("loop", "x"), r"size_bytes='x': give an integer"),
            (lambda m: m.cpu.watch("loop", 8, "z"), r"'w' \(write\) or 'rw'.* not 'z'"),
            (lambda m: m.cpu.watch("loop", 8, "w", bogus=1), r"watch\(\) has no option 'bogus'"),
            (lambda m: m.cpu.catches.add("mmoi"), r"no exit kind 'mmoi'; did you mean 'mmio'\?"),
            (lambda m: m.cpu.catches.add("io", port="x"), r"port='x': give an integer"),
            (lambda m: m.cpu.translate("x"), r"gva='x': give an integer"),
            (lambda m: m.cpu.read("loop", -1), r"length_bytes=-1: give at least 0"),
            (lambda m: m.cpu.disassemble(count=-1), r"count=-1: give at least 0"),
            (lambda m: m.cpu.regs.rxa, r"no register 'rxa'; did you mean rax\?"),
            (lambda m: setattr(m.cpu.regs, "RAX", 1), r"no register 'RAX'; did you mean rax\?"),
            (lambda m: setattr(m.cpu.regs, "rip", "loop"), r"an integer, such as m.symbols\['loop'\]"),
            (lambda m: setattr(m.cpu.regs.rflags, "ZF", 1), r"assign regs.rflags = regs.rflags.replace\(ZF=1\)"),
            (lambda m: setattr(m.cpu.regs.cs, "base", 5), r"assign dataclasses.replace\(regs.cs, base=5\)"),
            (lambda m: m.cpu.vcpu.translate("x"), r"VCPU.translate\('x'\): .* called as VCPU.translate\(gva\)"),
            (lambda m: m.vm.create_vcpu("x"), r"VM.create_vcpu\('x'\)"),
            (lambda m: m.cpu.vcpu.set_msrs(5), r"VCPU.set_msrs\(5\)"),
        ],
    )


def test_a_recording_that_is_asked_for_oddly(loaded):
    rec = loaded.cpu.record(10)
    refused(
        loaded,
        [
            (lambda m: rec["x"], r"rec\['x'\]: give the number of a step or a slice"),
            (lambda m: rec["a":"b"], r"rec\['a':'b'\]"),
            (lambda m: rec.rxa, r"did you mean rax\?"),
            (lambda m: rec.changed("rxa"), r"no column 'rxa'; did you mean 'rax'\?"),
            (lambda m: rec.first_difference(5), r"compared with another StepRecord, not 5"),
            (lambda m: rec.save(None), r"path=None: give the name of a file"),
            (lambda m: rec.to_csv(5), r"path=5: give the name of a file"),
            (lambda m: kb.StepRecord.load(5), r"path=5: give the name of a file"),
        ],
    )


def test_hosts_that_are_misspelt():
    for options, words in (
        ({"ntp": 0}, r"no option 'ntp'; did you mean 'npt'\?"),
        ({"quite": True}, r"did you mean 'quiet'\?"),
        ({"vcpus": "x"}, r"vcpus='x': give an integer"),
        ({"memory": None}, r"memory=None: a number with M or G"),
        ({"npt": "yes"}, r"npt='yes': give 0 \(shadow paging\) or 1"),
        ({"parameters": [1]}, r"parameters=\[1\]: give a dictionary"),
        ({"progress": 5}, r"progress=5: give a function"),
    ):
        with pytest.raises(MisuseError, match=words):
            kb.connect("appliance", **options)
    for words_given in ("-v", 5, [5]):
        with pytest.raises(MisuseError, match=r"ssh_options=.*: give a list of words"):
            kb.connect("ssh://server", ssh_options=words_given)


def test_memory_of_a_closed_host_is_closed_too(fresh_host):
    m = kb.Machine(fresh_host, memory="1M")
    m.memory.write(0x100, b"data")
    snapshot = m.memory.snapshot(0, 4096)
    assert m.memory.read(0x100, 4) == b"data"
    fresh_host.close()
    for access in (
        lambda: m.memory.read(0x100, 4),
        lambda: m.memory[0x100],
        lambda: m.memory[0x100:0x104],
        lambda: m.memory.read_u64(0x100),
        lambda: m.memory.write(0x100, b"x"),
        lambda: m.memory.write_u64(0x100, 1),
        lambda: m.memory.fill(0x100, 1),
        lambda: m.memory.as_array("u1"),
        lambda: m.memory.changes(snapshot),
        lambda: m.memory.snapshot(),
    ):
        with pytest.raises(ClosedError, match="the host is closed"):
            access()
    with pytest.raises((AddressError, ClosedError)):
        m.memory.find(1 << 40)


@pytest.mark.parametrize(
    ("name", "bad", "said"),
    [
        ("handlers", [], r"cpu.handlers = \[\]: there are enter, over"),
        ("handlers", "Over", r"did you mean 'over'"),
        ("rep", None, r"cpu.rep = None: there are iteration, whole"),
        ("hold_interrupts", "no", r"hold_interrupts='no': give True or False"),
        ("held", "no", r"held='no': give True or False"),
    ],
)
def test_what_a_cpu_cannot_be_told_is_refused(host, name, bad, said):
    with kb.Machine(host, memory="1M") as m:
        before = getattr(m.cpu, name)
        with pytest.raises(MisuseError, match=said):
            setattr(m.cpu, name, bad)
        assert getattr(m.cpu, name) == before


@pytest.mark.parametrize("name", ["handler", "hold_interupts", "last_stops", "step_count"])
def test_a_misspelt_attribute_of_a_cpu_is_refused(host, name):
    with kb.Machine(host, memory="1M") as m:
        with pytest.raises(AttributeError, match=name):
            setattr(m.cpu, name, "over")
        assert name not in dir(m.cpu)
        assert {"handlers", "last_record", "step", "regs"} <= set(dir(m.cpu))


def test_counts_are_integers_of_any_kind_and_never_true(host):
    with kb.Machine(host, memory="1M") as m:
        m.load_asm("nop\n" * 8 + "hlt", at=0x1000)
        assert m.cpu.step(np.int64(2)).rip == 0x1002
        assert len(m.cpu.record(np.uint8(2))) == 2
        for call in (lambda: m.cpu.record(True), lambda: m.cpu.breakpoints.add(True), lambda: m.cpu.watch(True)):
            with pytest.raises(MisuseError, match="True"):
                call()
        assert m.cpu.regs.rip == 0x1004


def test_memory_of_a_closed_machine_on_an_open_host(host):
    m = kb.Machine(host, memory="1M")
    m.memory.write(0x100, b"data")
    m.close()
    with pytest.raises(ClosedError, match="the machine is closed"):
        m.memory.read(0x100, 4)
