"""kvmbench's steps: every instruction once, in order, and nothing of it seen by the guest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from kvmbench.conformance.debugged import DEADLINE_S, Debugged
from kvmbench.conformance.point import Attempt, CannotTry, Layer, Topic
from kvmbench.conformance.points import kvm_steps
from kvmbench.conformance.points.kvm_breakpoints import DR6, SELFTEST
from kvmbench.conformance.points.kvm_exits import COMPLETION, MMIO_GPA
from kvmbench.conformance.points.kvm_steps import SINGLE_STEP, TF
from kvmbench.errors import MisuseError

TOPIC = Topic("cpu.step()", Layer.KVMBENCH)
FRAMES = 'SDM volume 3, "Exception- or Interrupt-Handler Procedures"'
CPL0 = (("step", 0),)

_PLAIN = "a: mov eax, 1\nb: add eax, 2\nc: jmp e\nd: nop\ne: nop\nf: nop\nend: hlt\n"


def _listed(*labels: str) -> tuple[str, ...]:
    return tuple(f"step at {label}" for label in labels)


def _modes(mode: str, user: bool) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        with Debugged(host, _PLAIN, mode=mode, user=user) as guest:
            yield from guest.steps(5)

    return attempt


for _mode, _user in (("real", 0), ("protected", 0), ("protected", 1), ("pae", 0), ("long", 0), ("long", 1)):
    TOPIC.add(
        f"step.{_mode}.cpl{3 * _user}",
        f"visits each instruction in {_mode} mode at CPL {3 * _user}",
        _listed("b", "c", "e", "f", "end"),
        _modes(_mode, bool(_user)),
        item=12 if _mode == "real" else 13,
        source=SINGLE_STEP,
        # The self-check's steps at CPL 3 are of long mode.
        needs=(("step", 3),) if _user and _mode == "long" else CPL0,
    )


@TOPIC.point(
    "step.recorded",
    "a recording has the same steps",
    *_listed("b", "c", "e", "f", "end"),
    "halt",
    item=1,
    source=SINGLE_STEP,
    needs=CPL0,
)
def _recorded(host: Any) -> Iterator[str]:
    with Debugged(host, _PLAIN) as guest:
        rec = guest.cpu.record(10)
        names = {address: label for label, address in guest.program.symbols.items()}
        for rip in rec.rip.tolist()[:5]:
            yield f"step at {names.get(rip, hex(rip))}"
        yield str(guest.cpu.last_stop.cause) if guest.cpu.last_stop is not None else "no stop"


@TOPIC.point(
    "step.moved",
    "goes on from a rip that was written",
    *_listed("b", "f", "end"),
    item=1,
    source=SINGLE_STEP,
    needs=CPL0,
)
def _moved(host: Any) -> Iterator[str]:
    with Debugged(host, _PLAIN) as guest:
        yield guest.step()
        guest.cpu.regs.rip = guest.at("e")
        yield from guest.steps(2)


@TOPIC.point(
    "step.dr6",
    "each stop of a step has the DR6 of a step, whatever bits vendor, kernel or other guests leave in it",
    *("dr6 0xffff4ff0",) * 3,
    item=11,
    source=DR6,
    needs=CPL0,
)
def _dr6(host: Any) -> Iterator[str]:
    with Debugged(host, _PLAIN) as guest:
        for _ in range(3):
            dr6 = guest.cpu.step(deadline_s=DEADLINE_S).dr6
            yield f"dr6 {dr6:#x}" if dr6 is not None else "no dr6"


@TOPIC.point(
    "step.threads",
    "two threads may step one vcpu in turn",
    *_listed("b", "c", "e", "f"),
    item=16,
    source="kvmbench, docs/design.md, Threads",
    needs=CPL0,
)
def _threads(host: Any) -> Iterator[str]:
    with Debugged(host, _PLAIN) as guest:
        seen: list[str] = []
        for _ in range(2):
            seen.append(guest.step())
            worker = threading.Thread(target=lambda: seen.append(guest.step()))
            worker.start()
            worker.join()
        yield from seen


# --- the kernel's selftest, and interrupts


def _with_interrupt(host: Any, source: str) -> Debugged:
    guest = Debugged(
        host,
        f"{kvm_steps.PENDING}ready: nop\n{source}end: hlt\n{kvm_steps.EOI}",
        irqchip=True,
        handlers={0x60: "handler"},
    )
    try:
        guest.cpu.catches.add("io", port=0xF5)
        told = guest.run()
        if not told.startswith("catch"):
            raise CannotTry(f"the guest did not get to send itself an interrupt: {told}")
        guest.cpu.catches.clear()
        guest.cpu.regs.rip = guest.at("ready")
    except BaseException:
        guest.machine.close()
        raise
    return guest


@TOPIC.point(
    "step.selftest",
    "STI, XOR, CPUID, MOV, WRMSR(TSC_DEADLINE) and CLI are a step each while an interrupt waits",
    *_listed("ss_start", "s_xor", "s_cpuid", "s_mov", "s_wrmsr", "s_cli", "s_end"),
    "handler ran 0 times",
    item=13,
    source=SELFTEST,
    needs=CPL0,
)
def _selftest(host: Any) -> Iterator[str]:
    with _with_interrupt(host, kvm_steps.SELFTEST_CODE) as guest:
        yield from guest.steps(7)
        yield f"handler ran {guest.cpu.regs.rbp} times"


@TOPIC.point(
    "step.interrupt",
    "with interrupts not held a step stops at the handler's first instruction and says which",
    "step at handler, entered 96",
    "frame: TF clear",
    item=4,
    source=FRAMES,
    needs=CPL0,
)
def _interrupt(host: Any) -> Iterator[str]:
    with _with_interrupt(host, kvm_steps.STI) as guest:
        try:
            guest.cpu.hold_interrupts = False
        except MisuseError as error:  # pragma: no cover - every KVM since 5.12 has it
            raise CannotTry(str(error)) from error
        # One or two instructions later: the shadow of STI has a point of its own.
        for told in guest.steps(4):
            if told not in _listed("s_sti", "s1", "s2"):
                yield told
                break
        image = guest.machine.memory.read_u64(int(guest.cpu.regs.rsp) + 16)
        yield f"frame: TF {'set' if image & TF else 'clear'}"


@TOPIC.point(
    "step.sti-shadow",
    "with interrupts not held, the instruction behind STI runs before the interrupt is taken",
    *_listed("s_sti", "s1", "s2"),
    "step at handler, entered 96",
    item=5,
    source='SDM volume 2, "STI"',
    needs=CPL0,
)
def _sti_shadow(host: Any) -> Iterator[str]:
    with _with_interrupt(host, kvm_steps.STI) as guest:
        guest.cpu.hold_interrupts = False
        yield from guest.steps(4)


@TOPIC.point(
    "step.mov-ss",
    "MOV SS takes the next instruction along, as on every processor",
    *_listed("m_ss", "m_then", "m_end"),
    item=5,
    source='SDM volume 3, "Masking Exceptions and Interrupts When Switching Stacks"',
    needs=CPL0,
)
def _mov_ss(host: Any) -> Iterator[str]:
    with Debugged(host, kvm_steps.MOV_SS) as guest:
        yield from guest.steps(3)


# --- what the guest sees of it


@TOPIC.point(
    "step.pushf",
    "PUSHF stores the guest's flags, POPF takes nothing away",
    *_listed("push", "look", "end"),
    "image: TF clear",
    item=3,
    source='SDM volume 2, "PUSHF"',
    needs=CPL0,
)
def _pushf(host: Any) -> Iterator[str]:
    with Debugged(host, "a: nop\npush: pushfq\nlook: pop rax\nend: nop\nhlt\n") as guest:
        yield from guest.steps(3)
        yield f"image: TF {'set' if guest.cpu.regs.rax & TF else 'clear'}"


_ENTERED = """
        mov edx, 0
        mov ebx, 0x20000000
enter:  {instruction}
after:  nop
end:    hlt
handler: nop
h_next: nop
h_end:  hlt
"""


def _entering(instruction: str, vector: int, frame_at: int, **options: Any) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        source = _ENTERED.format(instruction=instruction)
        with Debugged(host, source, handlers={vector: "handler"}, **options) as guest:
            for told in guest.steps(2):
                if not told.startswith("step"):
                    yield told
            for told in guest.steps(2):
                yield told
                if not told.startswith("step"):
                    return
            image = guest.machine.memory.read_u64(int(guest.cpu.regs.rsp) + frame_at)
            yield f"frame: TF {'set' if image & TF else 'clear'}"

    return attempt


_EXCEPTIONS = (
    ("ud", "#UD", "ud2", 6, 16),
    ("de", "#DE", "div edx", 0, 16),
    ("pf", "#PF", "mov eax, [rbx]", 14, 24),
    ("gp", "#GP", "mov cr0, rbx", 13, 24),
    ("int", "INT 0x50", "int 0x50", 0x50, 16),
    ("bp", "INT3 without a breakpoint there", "int3", 3, 16),
)
for _name, _what, _instruction, _vector, _frame_at in _EXCEPTIONS:
    _entered = "80" if _vector == 0x50 else f"{_vector} (#{_name.upper()})"
    TOPIC.add(
        f"step.enters.{_name}",
        f"a step over {_what} stops at the handler's first instruction, and the frame holds the guest's flags",
        (f"step at handler, entered {_entered}", "step at h_next", "frame: TF clear"),
        _entering(_instruction, _vector, _frame_at),
        item=8 if _name == "bp" else 4,
        source=FRAMES,
        needs=CPL0,
    )


@TOPIC.point(
    "step.own-tf",
    "a guest that sets TF itself gets its #DB after each instruction while it is stepped",
    *_listed("t_or", "t_pop", "t_nop"),
    "step at handler, entered 1 (#DB)",
    "step at h_ret",
    "step at t_off",
    item=2,
    source=SINGLE_STEP,
    needs=CPL0,
)
def _own_tf(host: Any) -> Iterator[str]:
    source = """
        pushfq
t_or:   or qword ptr [rsp], 0x100
t_pop:  popfq
t_nop:  nop
t_off:  nop
end:    hlt
handler: and qword ptr [rsp + 16], ~0x100
h_ret:  iretq
"""
    with Debugged(host, source, handlers={1: "handler"}) as guest:
        yield from guest.steps(6)


@TOPIC.point(
    "run.own-tf",
    "and while it runs freely",
    "halt at handler",
    "own handler ran 5 times",
    item=2,
    source=SINGLE_STEP,
)
def _run_own_tf(host: Any) -> Iterator[str]:
    with Debugged(host, kvm_steps.OWN_TF.replace("out 0xf4, al", "hlt"), handlers={1: "handler"}) as guest:
        yield guest.run()
        yield f"own handler ran {guest.cpu.regs.rbx} times"


@TOPIC.point(
    "step.dies",
    "a triple fault while stepping is a shutdown that names the instruction and the exceptions before",
    "step at handler, entered 6 (#UD)",
    "shutdown",
    "named: the instruction",
    "named: 6 (#UD)",
    item=8,
    source='SDM volume 3, "Interrupt 8: Double Fault Exception (#DF)"',
    needs=CPL0,
)
def _dies(host: Any) -> Iterator[str]:
    with Debugged(
        host, "ud2\nnop\nhandler: lidt [empty]\nhlt\nempty: .fill 10, 1, 0\n", handlers={6: "handler"}
    ) as guest:
        yield guest.step()
        guest.cpu.step()
        guest.cpu.regs.rip = guest.program.entry
        stop = guest.cpu.step()
        yield guest.tell(stop)
        yield f"named: {'the instruction' if 'ud2' in str(stop) else 'nothing'}"
        yield f"named: {'6 (#UD)' if '6 (#UD)' in str(stop) else 'no exception'}"


# --- exits on the way


def _through(source: str, count: int, **options: Any) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        with Debugged(host, source, **options) as guest:
            yield from guest.steps(count)

    return attempt


_REP = "cld\nr1: mov esi, 0x3000\nr2: mov edi, 0x4000\nr3: mov ecx, 3\nrep: rep movsb\nnext: nop\nend: hlt\n"
for _name, _what, _source, _labels, _item, _options in (
    ("out", "OUT is one step", "mov dx, 0x3f8\nx: out dx, al\nnext: nop\nend: hlt\n", ("x", "next", "end"), 6, {}),
    ("in", "IN is one step", "mov dx, 0x3fd\nx: in al, dx\nnext: nop\nend: hlt\n", ("x", "next", "end"), 6, {}),
    (
        "mmio-write",
        "a write without memory is one step",
        f"mov ebx, {MMIO_GPA:#x}\nx: mov [rbx], eax\nnext: nop\nend: hlt\n",
        ("x", "next", "end"),
        12,
        {"mapped": [(MMIO_GPA, 0x20_0000)]},
    ),
    (
        "mmio-read",
        "a read without memory is one step",
        f"mov ebx, {MMIO_GPA:#x}\nx: mov eax, [rbx]\nnext: nop\nend: hlt\n",
        ("x", "next", "end"),
        12,
        {"mapped": [(MMIO_GPA, 0x20_0000)]},
    ),
    ("rep", "REP takes a step an iteration", _REP, ("r1", "r2", "r3", "rep", "rep", "rep", "next", "end"), 6, {}),
):
    TOPIC.add(
        f"step.{_name}",
        _what,
        _listed(*_labels),
        _through(_source, len(_labels), **_options),
        item=_item,
        source=COMPLETION if _name != "rep" else 'SDM volume 2, "REP/REPE/REPZ/REPNE/REPNZ"',
        needs=CPL0,
    )


@TOPIC.point(
    "step.hlt",
    "a stepped HLT is a halt, and the next step goes on behind it",
    "step at x",
    "halt at next",
    "step at end",
    item=7,
    source="KVM API, struct kvm_run, KVM_EXIT_HLT",
    needs=CPL0,
)
def _hlt(host: Any) -> Iterator[str]:
    with Debugged(host, "nop\nx: hlt\nnext: nop\nend: hlt\n") as guest:
        for _ in range(3):
            yield guest.step()


@TOPIC.point(
    "step.hlt-irqchip",
    "a HLT that waits in the kernel ends at the deadline",
    "step at x",
    "step at next",
    "deadline at next",
    item=7,
    source='SDM volume 2, "HLT"',
    needs=CPL0,
)
def _hlt_irqchip(host: Any) -> Iterator[str]:
    with Debugged(host, "nop\nx: hlt\nnext: nop\nend: hlt\n", irqchip=True) as guest:
        for _ in range(3):
            yield guest.tell(guest.cpu.step(deadline_s=0.3))


@TOPIC.point(
    "step.written-at-exit",
    "a register written at a caught IN is not overwritten when the IN is completed",
    "catch at x",
    "step at end",
    "eax 0x1234",
    item=6,
    source=COMPLETION,
    needs=CPL0,
)
def _written_at_exit(host: Any) -> Iterator[str]:
    with Debugged(host, "mov dx, 0x3fd\nx: in al, dx\nnext: nop\nend: hlt\n") as guest:
        guest.cpu.catches.add("io", port=0x3FD)
        yield guest.run()
        guest.cpu.catches.clear()
        guest.cpu.regs.rax = 0x1234
        stop = guest.cpu.step()
        yield guest.tell(stop)
        yield f"eax {guest.cpu.regs.rax:#x}"
