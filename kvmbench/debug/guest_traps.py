"""INT3 of the guest's own, which KVM hands to us while breakpoints of ours are INT3, and which goes back to the guest.

Its #DB goes back in the core (`trap_flag_hand_on`), which knows our debug registers; our INT3 addresses are known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

BP_VECTOR = 3


def hand_on_int3(cpu: Cpu) -> None:
    """Has KVM deliver #BP at the next entry; rip, which is on the INT3, moves behind it on the way.

    Source: KVM API, KVM_SET_VCPU_EVENTS; KVM has kept the instruction's length from the exit.
    """
    events = cpu.vcpu.get_vcpu_events()
    events.exception.injected = 1
    events.exception.nr = BP_VECTOR
    events.exception.has_error_code = 0
    cpu.vcpu.set_vcpu_events(events)
