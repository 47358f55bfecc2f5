"""KVM's breakpoints: INT3, the four debug registers with every kind and length, DR7.GD."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

from kvmbench.conformance.bare import DONE, ENABLE, HW_BP, INJECT_BP, SW_BP, Bare
from kvmbench.conformance.point import Attempt, Layer, Topic
from kvmbench.errors import KvmIoctlError

TOPIC = Topic("Breakpoints, by KVM itself", Layer.KVM)
SELFTEST = "Linux, tools/testing/selftests/kvm/x86/debug_regs.c"
DR6 = 'SDM volume 3, "Debug Status Register (DR6)"'
DR7 = 'SDM volume 3, "Debug Control Register (DR7)"'
LENGTHS = (1, 2, 4, 8)

# --- INT3

_INT3 = f"nop\nsw_bp: int3\nafter: nop\n{DONE}"


def _int3(user: bool) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        with Bare(host, _INT3, user=user) as guest:
            guest.debug(SW_BP)
            told = guest.run()
            yield told
            if told.startswith("#BP"):
                guest.go_to("after")
                yield guest.run()

    return attempt


for _cpl in (0, 3):
    TOPIC.add(
        f"int3.cpl{_cpl}",
        f"INT3 at CPL {_cpl} leaves the guest with rip on it",
        ("#BP at sw_bp", "done"),
        _int3(_cpl == 3),
        item=13 if _cpl == 0 else 8,
        source=f"{SELFTEST}; KVM API, KVM_SET_GUEST_DEBUG",
    )

# --- execution

_EXECUTE = f"nop\nhw_bp: nop\nafter: nop\n{DONE}"


def _execute(registers: tuple[int, ...], user: bool) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        for n in registers:
            with Bare(host, _EXECUTE, user=user) as guest:
                guest.breakpoint(n, "hw_bp")
                told = guest.run()
                yield told
                if told.startswith("#DB"):
                    yield guest.run()
                    guest.debug()
                    yield guest.run()

    return attempt


def _then_on(guest: Bare) -> Iterator[str]:
    """A stop, and the guest's end once nothing is debugged any more."""
    told = guest.run()
    yield told
    if told.startswith("#DB"):
        guest.debug()
        yield guest.run()


def _hit(n: int, where: str) -> str:
    return f"#DB at {where}, dr6 {0xFFFF0FF0 | 1 << n:#x}"


for _n in range(4):
    TOPIC.add(
        f"execute.dr{_n}",
        f"DR{_n} stops before its instruction, and again on a second run from there",
        (_hit(_n, "hw_bp"), _hit(_n, "hw_bp"), "done"),
        _execute((_n,), False),
        item=9,
        source=f"{SELFTEST}; {DR6}",
    )
TOPIC.add(
    "execute.cpl3",
    "the same for all four at CPL 3",
    tuple(told for n in range(4) for told in (_hit(n, "hw_bp"), _hit(n, "hw_bp"), "done")),
    _execute((0, 1, 2, 3), True),
    item=13,
    source=f"{SELFTEST}; {DR6}",
)


@TOPIC.point(
    "execute.two",
    "two registers on one instruction are both named in DR6",
    "#DB at hw_bp, dr6 0xffff0ff5",
    "done",
    item=11,
    source=DR6,
)
def _two(host: Any) -> Iterator[str]:
    with Bare(host, _EXECUTE) as guest:
        at = guest.at("hw_bp")
        guest.debug(HW_BP, [at, 0, at, 0, 0, 0, 0, 0x400 | 2 | 2 << 4])
        yield from _then_on(guest)


# --- data

# For each length: an access of that many bytes, one of the byte behind them, and the end.
_PARTS = {1: ("byte", "al"), 2: ("word", "ax"), 4: ("dword", "eax"), 8: ("qword", "rax")}
_WRITES = "".join(
    f"""
w{size}:      mov {kind} ptr [value], {register}
w{size}_hit:  mov byte ptr [value + {size}], al
w{size}_past: out 0xf4, al
r{size}:      mov {register}, {kind} ptr [value]
r{size}_hit:  mov al, byte ptr [value + {size}]
r{size}_past: out 0xf4, al
"""
    for size, (kind, register) in _PARTS.items()
)
_DATA = f"{_WRITES}\n.balign 16\nvalue: .fill 32, 1, 0\n"


def _data(registers: tuple[int, ...], accesses: str, kind: int, user: bool) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        with Bare(host, _DATA, user=user) as guest:
            for n in registers:
                for size in LENGTHS:
                    for access in accesses:
                        guest.breakpoint(n, "value", kind=kind, size_bytes=size)
                        guest.go_to(f"{access}{size}")
                        told = guest.run()
                        yield told
                        if told == "done":
                            continue
                        if not told.startswith("#DB"):
                            return
                        yield guest.run()

    return attempt


def _data_hits(registers: tuple[int, ...], accesses: str) -> tuple[str, ...]:
    return tuple(
        told
        for n in registers
        for size in LENGTHS
        for access in accesses
        for told in (_hit(n, f"{access}{size}_hit"), "done")
    )


for _n in range(4):
    TOPIC.add(
        f"write.dr{_n}",
        f"DR{_n} stops after a write to its 1, 2, 4 or 8 bytes, not after one to the byte behind",
        _data_hits((_n,), "w"),
        _data((_n,), "w", 1, False),
        item=13,
        source=f"{SELFTEST}; {DR7}",
    )
for _n in range(4):
    TOPIC.add(
        f"access.dr{_n}",
        f"DR{_n} stops after a write or a read of its 1, 2, 4 or 8 bytes",
        _data_hits((_n,), "wr"),
        _data((_n,), "wr", 3, False),
        item=13,
        source=DR7,
    )
TOPIC.add(
    "write.cpl3",
    "all four stop after writes at CPL 3",
    _data_hits((0, 1, 2, 3), "w"),
    _data((0, 1, 2, 3), "w", 1, True),
    item=13,
    source=DR7,
)
TOPIC.add(
    "access.cpl3",
    "all four stop after writes and reads at CPL 3",
    _data_hits((0, 1, 2, 3), "wr"),
    _data((0, 1, 2, 3), "wr", 3, True),
    item=13,
    source=DR7,
)


@TOPIC.point(
    "gd",
    "DR7.GD stops before a MOV from a debug register",
    "#DB at bd_start, dr6 0xffff2ff0",
    "done",
    item=13,
    source=f"{SELFTEST}; {DR7}",
)
def _gd(host: Any) -> Iterator[str]:
    with Bare(host, f"nop\nbd_start: mov rax, dr0\nafter: nop\n{DONE}") as guest:
        guest.debug(HW_BP, [0] * 7 + [0x400 | 1 << 13])
        yield from _then_on(guest)


# --- the guest's own

OWN_DR = f"""
        mov rax, offset own
        mov dr0, rax
        mov eax, 0x402
        mov dr7, rax
        mov ebx, 0
own:    nop
after:  mov eax, 0x400                     # not left to the guest that comes next: QEMU 7.2 keeps DR7
        mov dr7, rax
{DONE}
handler: inc ebx
        or dword ptr [rsp + 16], 0x10000   # RF: or it comes again
        iretq
"""


def _own_registers(control: int) -> Attempt:
    def attempt(host: Any) -> Iterator[str]:
        with Bare(host, OWN_DR, handlers={1: "handler"}) as guest:
            guest.debug(control, [0] * 7 + [0x400])
            yield guest.run()
            yield f"own handler ran {guest.regs.rbx} times"
            own = guest.vcpu.get_debugregs().db[0]
            yield "DR0 is the guest's" if own == guest.at("own") else f"DR0 is {own:#x}"

    return attempt


TOPIC.add(
    "guest-registers",
    "the guest's own breakpoint reaches its handler",
    ("done", "own handler ran 1 times", "DR0 is the guest's"),
    _own_registers(0),
    item=9,
    source='SDM volume 3, "Debug Registers"',
)
TOPIC.add(
    "guest-registers.replaced",
    "with KVM_GUESTDBG_USE_HW_BP the guest's own breakpoint is kept, and does not fire",
    ("done", "own handler ran 0 times", "DR0 is the guest's"),
    _own_registers(HW_BP),
    item=9,
    source="Linux, arch/x86/kvm/x86.c, kvm_update_dr7; KVM API, KVM_GET_DEBUGREGS",
)

OWN_BP = f"""
        mov ebx, 0
sw_bp:  int3
after:  nop
{DONE}
handler: inc ebx
        iretq
"""


@TOPIC.point(
    "inject-bp",
    "KVM_GUESTDBG_INJECT_BP enters the guest's handler of #BP",
    "done",
    "own handler ran 1 times",
    item=8,
    source="KVM API, KVM_SET_GUEST_DEBUG",
)
def _inject(host: Any) -> Iterator[str]:
    with Bare(host, OWN_BP, handlers={3: "handler"}) as guest:
        guest.go_to("after")
        guest.debug(INJECT_BP)
        yield guest.run()
        yield f"own handler ran {guest.regs.rbx} times"


@TOPIC.point(
    "inject-while-pending",
    "a second event injected while one is pending is refused with EBUSY, not lost",
    "EBUSY",
    item=8,
    source="Linux, arch/x86/kvm/x86.c, kvm_arch_vcpu_ioctl_set_guest_debug",
)
def _inject_pending(host: Any) -> Iterator[str]:
    with Bare(host, OWN_BP, handlers={3: "handler"}) as guest:
        guest.vcpu.set_guest_debug(ENABLE | INJECT_BP)
        try:
            guest.vcpu.set_guest_debug(ENABLE | INJECT_BP)
            yield "accepted"
        except KvmIoctlError as error:
            yield errno.errorcode.get(error.errno or 0, str(error.errno))


@TOPIC.point(
    "reinject-bp",
    "a #BP that left the guest goes back to its handler through KVM_SET_VCPU_EVENTS",
    "#BP at sw_bp",
    "done",
    "own handler ran 1 times",
    item=8,
    source="KVM API, KVM_SET_VCPU_EVENTS",
)
def _reinject(host: Any) -> Iterator[str]:
    with Bare(host, OWN_BP, handlers={3: "handler"}) as guest:
        guest.debug(SW_BP)
        told = guest.run()
        yield told
        if told == "#BP at sw_bp":
            guest.debug()
            guest.go_to("after")  # #BP is a trap: its frame holds the address behind it
            events = guest.vcpu.get_vcpu_events()
            events.exception.injected, events.exception.nr, events.exception.has_error_code = 1, 3, 0
            guest.vcpu.set_vcpu_events(events)
            yield guest.run()
        yield f"own handler ran {guest.regs.rbx} times"
