"""kvmbench's breakpoints and watchpoints, by whatever mechanism the host allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmbench.conformance.debugged import Debugged
from kvmbench.conformance.point import Attempt, CannotTry, Layer, Topic
from kvmbench.conformance.points.kvm_breakpoints import DR7, OWN_BP, OWN_DR
from kvmbench.debug.mechanism import Mechanism

TOPIC = Topic("cpu.breakpoints", Layer.KVMBENCH)
PROMISE = "kvmbench, docs/design.md, How a breakpoint gets its mechanism"

_LOOP = """
        mov ecx, 3
loop:   add eax, ecx
dec:    dec ecx
        jnz loop
end:    hlt
"""


def check_levels(breakpoint: Any, cpl: int, host: Any) -> None:
    """Raises CannotTry, in the self-check's words, where no mechanism works at a privilege level."""
    if cpl not in breakpoint.levels:
        said = "; ".join(one for one in host.mechanisms.shortcomings if f"at CPL {cpl}" in one)
        raise CannotTry(f"self-check: no mechanism works at CPL {cpl}: {said}")


def _loop(**options: Any) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        user = options.get("user", False)
        source = _LOOP.replace("hlt", "mov al, 7\nout 0xf4, al\n") if user else _LOOP
        with Debugged(host, source, **options) as guest:
            check_levels(guest.cpu.breakpoints.add("loop"), 3 if user else 0, host)
            for told in guest.runs(8):
                yield told if told.startswith("breakpoint") else told.split(" at ")[0]

    return attempt


for _name, _options, _end in (
    ("cpl0", {}, "halt"),
    ("cpl3", {"user": True}, "guest exit"),
    ("real", {"mode": "real"}, "halt"),
    ("protected", {"mode": "protected"}, "halt"),
    ("pae", {"mode": "pae"}, "halt"),
):
    TOPIC.add(
        f"break.{_name}",
        "stops before its instruction each time it is reached, "
        + {"cpl0": "at CPL 0", "cpl3": "at CPL 3"}.get(_name, f"in {_name} mode"),
        (*("breakpoint at loop",) * 3, _end),
        _loop(**_options),
        item=9,
        source=PROMISE,
    )


def _by(mechanism: str) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        with Debugged(host, _LOOP) as guest:
            guest.cpu.breakpoints.add("loop", mechanism=mechanism)
            for told in guest.runs(8):
                yield told if told.startswith("breakpoint") else told.split(" at ")[0]

    return attempt


for _name, _mechanism, _check in (
    ("int3", Mechanism.INT3, "int3"),
    ("debug-register", Mechanism.DEBUG_REGISTER, "hw_execute"),
    ("hlt", Mechanism.HLT, "hlt"),
    ("stepping", Mechanism.STEPPING, "step"),
):
    TOPIC.add(
        f"break.by-{_name}",
        f"the same by {_mechanism} at CPL 0",
        (*("breakpoint at loop",) * 3, "halt"),
        _by(_mechanism),
        item=9,
        source=PROMISE,
        needs=((_check, 0),),
    )


@TOPIC.point(
    "break.then-step",
    "a step from a breakpoint leads one instruction on, and a run does not hit it again",
    "breakpoint at loop",
    "step at dec",
    "breakpoint at loop",
    item=9,
    source=PROMISE,
)
def _then_step(host: Any) -> Iterator[str]:
    with Debugged(host, _LOOP) as guest:
        guest.cpu.breakpoints.add("loop")
        yield guest.run()
        yield guest.step()
        yield guest.run()


@TOPIC.point(
    "break.six",
    "six at once stop in the order of execution",
    *(f"breakpoint at b{n}" for n in range(6)),
    "halt",
    item=9,
    source=PROMISE,
)
def _six(host: Any) -> Iterator[str]:
    with Debugged(host, "nop\n" + "".join(f"b{n}: nop\n" for n in range(6)) + "end: hlt\n") as guest:
        for n in range(6):
            guest.cpu.breakpoints.add(f"b{n}")
        for told in guest.runs(10):
            yield told if told.startswith("breakpoint") else told.split(" at ")[0]


@TOPIC.point(
    "break.hidden-from-host",
    "memory reads show the program's byte, not the breakpoint's",
    "breakpoint at here",
    "host reads 0x90",
    "disassembled: nop",
    item=10,
    source=PROMISE,
)
def _hidden_from_host(host: Any) -> Iterator[str]:
    with Debugged(host, "mov eax, 1\nhere: nop\nend: hlt\n") as guest:
        guest.cpu.breakpoints.add("here")
        yield guest.run()
        yield f"host reads {guest.machine.memory.read(guest.at('here'), 1)[0]:#x}"
        yield f"disassembled: {guest.cpu.disassemble('here', count=1)[0].text}"


@TOPIC.point(
    "break.hidden-from-guest",
    "the guest reads its own byte where a breakpoint is",
    "breakpoint at here",
    "guest read 0x90",
    item=10,
    source='SDM volume 3, "Breakpoint Exception (#BP)": the byte of INT3 replaces that of the program',
)
def _hidden_from_guest(host: Any) -> Iterator[str]:
    with Debugged(host, "movzx ebx, byte ptr [here]\nhere: nop\nend: hlt\n") as guest:
        guest.cpu.breakpoints.add("here")
        yield guest.run()
        yield f"guest read {guest.cpu.regs.rbx:#x}"


_OVERWRITE = """
        mov byte ptr [patch], 0xb3     # mov bl, 5 in place of mov cl, 5
        mov eax, cr3                   # serialises
        mov cr3, rax
patch:  mov cl, 5
end:    hlt
"""


@TOPIC.point(
    "break.overwritten",
    "stops also where the guest has overwritten the instruction, and leaves what it wrote",
    "breakpoint at patch",
    "halt at end+0x1",
    "bl 0x5",
    item=10,
    source=PROMISE,
)
def _overwritten(host: Any) -> Iterator[str]:
    with Debugged(host, _OVERWRITE.replace("eax, cr3", "rax, cr3")) as guest:
        guest.cpu.breakpoints.add("patch")
        told = guest.run()
        yield told
        if told.startswith("breakpoint"):
            yield guest.run()
        yield f"bl {guest.cpu.regs.bl:#x}"


_PCID = """
        mov rax, cr4
        or eax, 1 << 17
        mov cr4, rax
        mov rax, cr3
        or rax, 5
        bts rax, 63
        mov cr3, rax
here:   nop
end:    hlt
"""


@TOPIC.point(
    "break.cr3",
    "a breakpoint of one address space stops there, whatever PCID and no-flush bits CR3 was loaded with",
    "breakpoint at here",
    item=15,
    source='SDM volume 3, "Process-Context Identifiers (PCIDs)"',
)
def _cr3(host: Any) -> Iterator[str]:
    with Debugged(host, _PCID) as guest:
        leaf = next(entry for entry in guest.cpu.vcpu.get_cpuid2().entries if entry.function == 1)
        if not leaf.ecx & 1 << 17:
            raise CannotTry("KVM_GET_SUPPORTED_CPUID has no PCID")
        guest.cpu.breakpoints.add("here", cr3=int(guest.cpu.regs.cr3))
        yield guest.run()


# --- watchpoints

_PARTS = {1: ("byte", "al"), 2: ("word", "ax"), 4: ("dword", "eax"), 8: ("qword", "rax")}


def _watched(size: int, kind: str, user: bool) -> Attempt:
    words, register = _PARTS[size]
    end = "end: mov al, 7\nout 0xf4, al\n" if user else "end: hlt\n"
    source = f"""
        mov rax, 0x1122334455667788
        mov {words} ptr [value], {register}
w_hit:  mov byte ptr [value + {size}], al
w_past: mov {register}, {words} ptr [value]
r_hit:  mov al, byte ptr [value + {size}]
{end}
.balign 4096
value:  .fill 32, 1, 0
"""

    def attempt(host: Any) -> Iterator[str]:
        with Debugged(host, source, user=user) as guest:
            check_levels(guest.cpu.watch("value", size, kind), 3 if user else 0, host)
            for told in guest.runs(6):
                yield told if told.startswith("watchpoint") else told.split(" at ")[0]

    return attempt


for _kind, _hits in (("w", ("watchpoint at w_hit",)), ("rw", ("watchpoint at w_hit", "watchpoint at r_hit"))):
    for _user in (False, True):
        for _size in (1, 2, 4, 8):
            TOPIC.add(
                f"watch.{_kind}{_size}.cpl{3 * _user}",
                f"a {'write' if _kind == 'w' else 'read and write'} watchpoint of {_size} "
                f"byte{'s' if _size > 1 else ''} at CPL {3 * _user} stops after accesses to these, not to the next",
                (*_hits, "guest exit" if _user else "halt"),
                _watched(_size, _kind, _user),
                item=9,
                source=DR7,
            )


def _watched_by(mechanism: str, kind: str) -> Attempt:
    source = """
        mov eax, 7
        mov [value], eax
w_hit:  mov ecx, [value]
r_hit:  mov [value + 4], eax
        hlt
.balign 4096
value:  .fill 32, 1, 0
"""

    def attempt(host: Any) -> Iterator[str]:
        with Debugged(host, source) as guest:
            guest.cpu.watch("value", 4, kind, mechanism=mechanism)
            for told in guest.runs(6):
                yield told if told.startswith("watchpoint") else told.split(" at ")[0]

    return attempt


for _name, _mechanism, _check, _kind in (
    ("debug-register", Mechanism.DEBUG_REGISTER, "hw_write", "w"),
    ("readonly-slot", Mechanism.READONLY_SLOT, "readonly_slot", "w"),
    ("stepping", Mechanism.STEPPING, "step", "w"),
    ("absent-slot", Mechanism.NO_SLOT, "no_slot", "rw"),
):
    TOPIC.add(
        f"watch.by-{_name}",
        f"the same by {_mechanism} at CPL 0",
        ("watchpoint at w_hit", *(("watchpoint at r_hit",) if _kind == "rw" else ()), "halt"),
        _watched_by(_mechanism, _kind),
        item=9,
        source=PROMISE,
        needs=((_check, 0),),
    )


@TOPIC.point(
    "watch.six",
    "six write watchpoints at once all stop",
    *(f"watchpoint at w{n + 1}" for n in range(6)),
    "halt",
    item=9,
    source=PROMISE,
)
def _watch_six(host: Any) -> Iterator[str]:
    code = "mov eax, 7\n" + "".join(f"w{n}: mov [value + {16 * n}], eax\n" for n in range(6)) + "w6: nop\nhlt\n"
    with Debugged(host, f"{code}.balign 4096\nvalue: .fill 128, 1, 0\n") as guest:
        for n in range(6):
            guest.cpu.watch(guest.at("value") + 16 * n, 4, "w")
        for told in guest.runs(10):
            yield told if told.startswith("watchpoint") else told.split(" at ")[0]


# --- the guest's own


@TOPIC.point(
    "own.int3",
    "the guest's own INT3 reaches its handler while a breakpoint of ours is elsewhere",
    "breakpoint at after",
    "own handler ran 1 times",
    item=8,
    source='SDM volume 3, "Breakpoint Exception (#BP)"',
)
def _own_int3(host: Any) -> Iterator[str]:
    with Debugged(host, OWN_BP.replace("out 0xf4, al", "hlt"), handlers={3: "handler"}) as guest:
        guest.cpu.breakpoints.add("after")
        for _ in range(3):
            told = guest.run()
            if not told.startswith("guest debug trap"):  # told, and then delivered
                break
        yield told
        yield f"own handler ran {guest.cpu.regs.rbx} times"


@TOPIC.point(
    "own.debug-register",
    "the guest's own debug register reaches its handler while a breakpoint of ours is elsewhere",
    "breakpoint at after",
    "own handler ran 1 times",
    item=9,
    source='SDM volume 3, "Debug Registers"',
)
def _own_register(host: Any) -> Iterator[str]:
    with Debugged(host, OWN_DR.replace("out 0xf4, al", "hlt"), handlers={1: "handler"}) as guest:
        guest.cpu.breakpoints.add("after")
        try:
            yield guest.run()
            yield f"own handler ran {guest.cpu.regs.rbx} times"
        finally:
            guest.cpu.breakpoints.clear()
            guest.run()  # so that it clears DR7: QEMU 7.2 keeps it for the guest that comes next
