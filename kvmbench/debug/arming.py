"""What has to be armed before a vcpu runs, so that its breakpoints can stop it."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvmbench.core import wire
from kvmbench.debug.breakpoint import Breakpoint
from kvmbench.debug.mechanism import KINDS, OPCODES, Mechanism
from kvmbench.errors import MisuseError
from kvmbench.uapi import constants as c

if TYPE_CHECKING:
    from kvmbench.machine.memory import Memory

_WATCH = struct.Struct("<IIQ")  # struct kb_watch
# DR7: L0 to L3 enable, LE (bit 8) and the always-one bit 10 as the SDM asks; 8 bytes are coded 2.
_DR7_BASE = 0x500
_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}


@dataclass(frozen=True)
class Plan:
    """What one KB_EXECUTE needs so that every enabled breakpoint can stop it.

    Attributes:
        control: KVM_GUESTDBG_* bits.
        debugreg: DR0 to DR3 at 0 to 3, DR7 at 7.
        registers: which breakpoint each debug register is for.
        written: breakpoints whose bytes stand in memory while the guest runs.
        stops: addresses for the stepping loop to compare.
        watches: breakpoints whose ranges it compares.
        must_step: some breakpoint needs the stepping loop.
        payload: stops and watches, packed.
        version: `Breakpoints.version` that it is for.
    """

    control: int = 0
    debugreg: tuple[int, ...] = ()
    registers: tuple[Breakpoint, ...] = ()
    written: tuple[Breakpoint, ...] = ()
    stops: tuple[int, ...] = ()
    watches: tuple[Breakpoint, ...] = ()
    must_step: bool = False
    payload: bytes = b""
    version: tuple[int, int] = (0, 0)


NOTHING = Plan()


def make_plan(active: Iterable[Breakpoint], memory: Memory, *, stepping: bool, others: Iterable[int] = ()) -> Plan:
    """Sorts the enabled breakpoints by what they need.

    While single-stepping, execute breakpoints are compared, not armed.

    Args:
        others: linear addresses where bytes stand for other vcpus; compared too, while stepping.

    Raises:
        MisuseError: more than the stepping loop takes.
    """
    active = tuple(active)
    must_step = any(one.mechanism is Mechanism.STEPPING for one in active)
    stepping = stepping or must_step
    registers = tuple(
        one for one in active if one.mechanism is Mechanism.DEBUG_REGISTER and (one.is_watchpoint or not stepping)
    )
    written = () if stepping else tuple(one for one in active if one.mechanism in OPCODES)
    addresses = {one.address for one in active if not one.is_watchpoint} | set(others) if stepping else set()
    stops = tuple(sorted(addresses))
    watches = tuple(one for one in active if one.is_watchpoint and one.mechanism is Mechanism.STEPPING)
    watched_bytes = sum(one.size_bytes for one in watches)
    if len(stops) > wire.KB_MAX_STOPS or len(watches) > wire.KB_MAX_WATCHES or watched_bytes > wire.KB_MAX_WATCH_BYTES:
        raise MisuseError(
            f"{len(stops)} breakpoints and {len(watches)} watchpoints of {watched_bytes} bytes for the stepping loop; "
            f"it takes {wire.KB_MAX_STOPS}, {wire.KB_MAX_WATCHES} and {wire.KB_MAX_WATCH_BYTES} bytes"
        )
    debugreg = [0] * 8
    for n, one in enumerate(registers):
        debugreg[n] = one.address
        debugreg[7] |= _DR7_BASE | 1 << 2 * n | KINDS[one.kind] << 16 + 4 * n
        debugreg[7] |= _LENGTHS[one.size_bytes] << 18 + 4 * n
    payload = struct.pack(f"<{len(stops)}Q", *stops)
    for one in watches:
        assert one.gpa is not None  # choose() gives the stepping loop mapped ranges only
        region, offset = memory.find(one.gpa, one.size_bytes)
        payload += _WATCH.pack(region.handle, one.size_bytes, offset)
    return Plan(
        control=c.KVM_GUESTDBG_USE_HW_BP if registers else 0,
        debugreg=tuple(debugreg) if registers else (),
        registers=registers,
        written=written or (),
        stops=stops,
        watches=watches,
        must_step=must_step,
        payload=payload,
    )
