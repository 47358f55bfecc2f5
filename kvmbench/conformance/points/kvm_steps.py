"""KVM's single step: where it leads, what it hides, and what of it the guest sees."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmbench.conformance.bare import BLOCKIRQ, DONE, ENABLE, HW_BP, STEP, Bare
from kvmbench.conformance.point import Attempt, CannotTry, Layer, Topic
from kvmbench.conformance.points.kvm_breakpoints import SELFTEST
from kvmbench.uapi import constants as c

TOPIC = Topic("Single steps, by KVM itself", Layer.KVM)
SINGLE_STEP = 'SDM volume 3, "Single-Step Exception Condition"'
TF = 1 << 8


def step_at(where: str, dr6: int = 0xFFFF4FF0) -> str:
    """How a step that ended there is told."""
    return f"#DB at {where}, dr6 {dr6:#x}"


# --- where a step leads

_PLAIN = "a: mov eax, 1\nb: add eax, 2\nc: jmp e\nd: nop\ne: nop\nf: nop\n" + DONE


def _modes(mode: str, user: bool) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        with Bare(host, _PLAIN, mode=mode, user=user) as guest:
            for told in guest.steps(5):
                yield told
                if told == "SHUTDOWN":
                    return
            guest.debug()
            yield guest.run()

    return attempt


for _mode, _user in (("real", 0), ("protected", 0), ("protected", 1), ("pae", 0), ("long", 0), ("long", 1)):
    TOPIC.add(
        f"step.{_mode}.cpl{3 * _user}",
        f"steps in {_mode} mode at CPL {3 * _user} stop after each instruction",
        (*(step_at(label) for label in ("b", "c", "e", "f", "done")), "done"),
        _modes(_mode, bool(_user)),
        item=12 if _mode == "real" else 13,
        source=SINGLE_STEP,
    )


@TOPIC.point(
    "step.armed-once",
    "one KVM_SET_GUEST_DEBUG is enough for many steps",
    *(step_at(label) for label in ("b", "c", "e", "f", "done")),
    "done",
    item=1,
    source="KVM API, KVM_SET_GUEST_DEBUG",
)
def _armed_once(host: Any) -> Iterator[str]:
    with Bare(host, _PLAIN) as guest:
        guest.debug(STEP)
        for _ in range(5):
            told = guest.run()
            yield told
            if not told.startswith("#DB"):
                return
        guest.debug()
        yield guest.run()


@TOPIC.point(
    "step.moved",
    "a step from a rip that was written after KVM_SET_GUEST_DEBUG stops after one instruction",
    step_at("f"),
    "done",
    item=1,
    source="KVM API, KVM_SET_GUEST_DEBUG and KVM_SET_REGS",
)
def _moved(host: Any) -> Iterator[str]:
    with Bare(host, _PLAIN) as guest:
        guest.debug(STEP)
        guest.arm()
        guest.go_to("e")
        told = guest.run()
        yield told
        if told != "done":
            guest.debug()
            yield guest.run()


@TOPIC.point(
    "step.and-breakpoint",
    "a step onto a breakpoint, and from it: DR6 names the step, then the breakpoint",
    step_at("b"),
    step_at("b", 0xFFFF0FF1),
    item=9,
    source='SDM volume 3, "Debug Exceptions": instruction breakpoints are faults, single steps are traps',
)
def _and_breakpoint(host: Any) -> Iterator[str]:
    with Bare(host, _PLAIN) as guest:
        registers = [guest.at("b"), 0, 0, 0, 0, 0, 0, 0x402]
        guest.debug(STEP | HW_BP, registers)
        yield guest.run().replace("0xffff4ff1", "0xffff4ff0")  # B0 may say already what comes next
        yield guest.run()


# --- the kernel's selftest

PENDING = """
        mov ecx, 0x1b                  # IA32_APIC_BASE: x2APIC on
        rdmsr
        or eax, 0xc00
        wrmsr
        mov ecx, 0x80f                 # SVR: the APIC is enabled
        mov eax, 0x1ff
        xor edx, edx
        wrmsr
        mov ecx, 0x830                 # ICR: an interrupt to itself, vector 0x60
        mov eax, 0x44060
        wrmsr
        xor ebp, ebp
        out 0xf5, al
"""
EOI = """
handler:
        inc ebp
        push rax
        push rcx
        push rdx
        mov ecx, 0x80b                 # EOI
        xor eax, eax
        xor edx, edx
        wrmsr
        pop rdx
        pop rcx
        pop rax
handler_end:
        iretq
"""
_READY = "OUT 0xf5"


def with_interrupt(host: Any, source: str) -> Bare:
    """A guest that has run up to its label ``ready`` with interrupt 0x60 waiting and IF clear."""
    guest = Bare(host, f"{PENDING}ready: nop\n{source}{DONE}{EOI}", irqchip=True, handlers={0x60: "handler"})
    try:
        told = guest.run()
        if not told.startswith(_READY):
            raise CannotTry(f"the guest did not get to send itself an interrupt: {told}")
        guest.go_to("ready")
    except BaseException:
        guest.machine.close()
        raise
    return guest


def check_blockirq(guest: Bare) -> None:
    """Raises CannotTry where KVM has no KVM_GUESTDBG_BLOCKIRQ."""
    if not guest.machine.vm.check_extension(c.KVM_CAP_SET_GUEST_DEBUG2) & c.KVM_GUESTDBG_BLOCKIRQ:
        raise CannotTry("KVM has no KVM_GUESTDBG_BLOCKIRQ (KVM_CAP_SET_GUEST_DEBUG2)")


SELFTEST_CODE = """
ss_start: sti
s_xor:  xor eax, eax
s_cpuid: cpuid
s_mov:  mov ecx, 0x6e0                 # IA32_TSC_DEADLINE
s_wrmsr: wrmsr
s_cli:  cli
s_end:  nop
"""
_SELFTEST_LABELS = ("ss_start", "s_xor", "s_cpuid", "s_mov", "s_wrmsr", "s_cli", "s_end")


@TOPIC.point(
    "step.selftest",
    "STI, XOR, CPUID, MOV, WRMSR(TSC_DEADLINE) and CLI are a step each while an interrupt waits, held by BLOCKIRQ",
    *(step_at(label) for label in _SELFTEST_LABELS),
    "handler ran 0 times",
    item=13,
    source=SELFTEST,
)
def _selftest(host: Any) -> Iterator[str]:
    with with_interrupt(host, SELFTEST_CODE) as guest:
        check_blockirq(guest)
        yield from guest.steps(7, BLOCKIRQ)
        yield f"handler ran {guest.regs.rbp} times"


STI = "s_sti: sti\ns1: nop\ns2: nop\ns3: nop\ns4: nop\n"


@TOPIC.point(
    "blockirq.off",
    "without BLOCKIRQ a waiting interrupt is taken, one instruction after STI, and the step ends behind its handler",
    step_at("s_sti") + ", handler ran 0 times",
    step_at("s1") + ", handler ran 0 times",
    step_at("s2") + ", handler ran 0 times",
    step_at("s3") + ", handler ran 1 times",
    step_at("s4") + ", handler ran 1 times",
    item=5,
    source='SDM volume 2, "STI"; volume 3, "Priority Among Concurrent Events"',
)
def _blockirq_off(host: Any) -> Iterator[str]:
    with with_interrupt(host, STI) as guest:
        for told in guest.steps(5):
            yield f"{told}, handler ran {guest.regs.rbp} times"


@TOPIC.point(
    "blockirq.offered",
    "KVM_CAP_SET_GUEST_DEBUG2 names KVM_GUESTDBG_BLOCKIRQ",
    "offered",
    item=4,
    source="KVM API, KVM_CAP_SET_GUEST_DEBUG2",
)
def _blockirq_offered(host: Any) -> Iterator[str]:
    with Bare(host, _PLAIN) as guest:
        bits = guest.machine.vm.check_extension(c.KVM_CAP_SET_GUEST_DEBUG2)
        yield "offered" if bits & c.KVM_GUESTDBG_BLOCKIRQ else f"not offered: {bits:#x}"


@TOPIC.point(
    "blockirq.released",
    "an interrupt held by BLOCKIRQ is delivered as soon as BLOCKIRQ is gone",
    step_at("s_sti"),
    step_at("s1"),
    step_at("s2"),
    "done",
    "handler ran 1 times",
    item=4,
    source="KVM API, KVM_SET_GUEST_DEBUG, KVM_GUESTDBG_BLOCKIRQ",
)
def _blockirq_released(host: Any) -> Iterator[str]:
    with with_interrupt(host, STI) as guest:
        check_blockirq(guest)
        yield from guest.steps(3, BLOCKIRQ)
        guest.debug()
        yield guest.run()
        yield f"handler ran {guest.regs.rbp} times"


_FAULT = f"""
a:      nop
fault:  ud2
after:  nop
end:    nop
{DONE}
handler: add qword ptr [rsp], 2
h2:     nop
h3:     iretq
"""


@TOPIC.point(
    "blockirq.exceptions",
    "BLOCKIRQ holds no exceptions: a step over UD2 runs its handler, and ends behind the next instruction",
    step_at("fault"),
    step_at("end"),
    "done",
    item=4,
    source=SINGLE_STEP,
)
def _blockirq_exceptions(host: Any) -> Iterator[str]:
    with Bare(host, _FAULT, handlers={6: "handler"}) as guest:
        check_blockirq(guest)
        yield from guest.steps(2, BLOCKIRQ)
        guest.debug()
        yield guest.run()


MOV_SS = f"""
        mov ax, 0x18
m_ss:   mov ss, ax
m_next: mov ecx, 5
m_then: nop
m_end:  nop
{DONE}
"""


@TOPIC.point(
    "step.mov-ss",
    "MOV SS takes the next instruction along: it holds off the trap until after it",
    step_at("m_ss"),
    step_at("m_then"),
    step_at("m_end"),
    item=5,
    source='SDM volume 3, "Masking Exceptions and Interrupts When Switching Stacks"',
)
def _mov_ss(host: Any) -> Iterator[str]:
    with Bare(host, MOV_SS) as guest:
        yield from guest.steps(3)


@TOPIC.point(
    "step.sti-shadow",
    "after a step over STI its shadow is there in KVM_GET_VCPU_EVENTS",
    step_at("s1"),
    f"shadow {c.KVM_X86_SHADOW_INT_STI}",
    item=5,
    source='SDM volume 2, "STI"; KVM API, KVM_GET_VCPU_EVENTS',
)
def _sti_shadow(host: Any) -> Iterator[str]:
    with Bare(host, STI + DONE) as guest:
        yield from guest.steps(1)
        yield f"shadow {guest.events.interrupt.shadow}"


_REP = f"cld\nmov esi, 0x3000\nmov edi, 0x4000\nmov ecx, 3\nrep: rep movsb\nr_next: nop\n{DONE}"


@TOPIC.point(
    "step.rep",
    "a step over REP MOVS ends after each iteration",
    step_at("rep") + ", ecx 2",
    step_at("rep") + ", ecx 1",
    step_at("r_next") + ", ecx 0",
    item=12,
    source=f'{SINGLE_STEP}; volume 2, "REP/REPE/REPZ/REPNE/REPNZ"',
)
def _rep(host: Any) -> Iterator[str]:
    with Bare(host, _REP) as guest:
        guest.vcpu.set_regs(rip=guest.at("rep"), rsi=0x3000, rdi=0x4000, rcx=3)
        for told in guest.steps(3):
            yield f"{told}, ecx {guest.regs.rcx}"


# --- what is hidden, and what the guest sees


@TOPIC.point(
    "tf.hidden",
    "KVM_GET_REGS shows the guest's own TF, stepped or not, and stepping leaves it as it was",
    "TF set",
    "stepped: TF set",
    "afterwards: TF set",
    item=2,
    source="KVM API, KVM_GET_REGS",
)
def _tf_hidden(host: Any) -> Iterator[str]:
    with Bare(host, _PLAIN) as guest:
        guest.vcpu.set_regs(rflags=2 | TF)

        def shown() -> str:
            return "TF set" if guest.vcpu.get_regs().rflags & TF else "TF clear"

        yield shown()
        guest.vcpu.set_guest_debug(ENABLE | STEP)
        yield f"stepped: {shown()}"
        guest.vcpu.set_guest_debug(0)
        yield f"afterwards: {shown()}"


_PUSHF = f"""
a:      nop
push:   pushfq
look:   pop rax
end:    nop
{DONE}
"""


@TOPIC.point(
    "tf.pushf",
    "PUSHF under single step stores the guest's flags, without the debugger's TF",
    step_at("push"),
    step_at("look"),
    "image: TF clear",
    item=3,
    source='SDM volume 2, "PUSHF"',
)
def _pushf(host: Any) -> Iterator[str]:
    with Bare(host, _PUSHF) as guest:
        yield from guest.steps(2)
        image = guest.machine.memory.read_u64(int(guest.regs.rsp))
        yield f"image: TF {'set' if image & TF else 'clear'}"


def _frame(instruction: str, vector: int) -> Attempt:
    source = f"nop\nenter: {instruction}\nafter: nop\nend: nop\n{DONE}handler: mov rbp, [rsp + 16]\nout 0xf6, al\n"

    def attempt(host: Any) -> Iterator[str]:
        with Bare(host, source, handlers={vector: "handler"}) as guest:
            yield from guest.steps(1)
            told = guest.step()
            while told.startswith("#DB"):
                guest.debug()
                told = guest.run()
            yield told.split(" at ")[0]
            yield f"frame: TF {'set' if guest.regs.rbp & TF else 'clear'}"

    return attempt


for _name, _instruction, _vector in (("exception", "ud2", 6), ("int", "int 0x50", 0x50)):
    TOPIC.add(
        f"tf.{_name}-frame",
        f"the frame of {'an exception' if _vector == 6 else 'INT n'} under single step holds the guest's flags, "
        "without the debugger's TF",
        (step_at("enter"), "OUT 0xf6", "frame: TF clear"),
        _frame(_instruction, _vector),
        item=3,
        source='SDM volume 3, "Exception- or Interrupt-Handler Procedures"',
    )


@TOPIC.point(
    "tf.interrupt-frame",
    "the frame of an interrupt under single step holds the guest's flags, without the debugger's TF",
    "frame: TF clear",
    item=3,
    source='SDM volume 3, "Exception- or Interrupt-Handler Procedures"',
)
def _interrupt_frame(host: Any) -> Iterator[str]:
    with with_interrupt(host, "sti\nnop\nnop\nnop\n") as guest:
        stack = int(guest.regs.rsp)
        for _ in guest.steps(5):
            pass
        image = guest.machine.memory.read_u64((stack & ~0xF) - 24)  # SS, RSP, RFLAGS
        yield f"frame: TF {'set' if image & TF else 'clear'}" if image else "no frame"


OWN_TF = f"""
        pushfq
        or qword ptr [rsp], 0x100
        popfq
one:    nop
two:    nop
        pushfq
        and qword ptr [rsp], ~0x100
        popfq
off:    nop
{DONE}
handler: inc ebx
        iretq
"""


@TOPIC.point(
    "tf.own",
    "a guest that sets TF itself, not debugged, gets a #DB after each instruction until it clears TF",
    "done",
    "own handler ran 5 times",
    item=2,
    source=SINGLE_STEP,
)
def _own_tf(host: Any) -> Iterator[str]:
    with Bare(host, OWN_TF, handlers={1: "handler"}) as guest:
        yield guest.run()
        yield f"own handler ran {guest.regs.rbx} times"
