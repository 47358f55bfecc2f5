"""Other virtual machines of this process, whose events may be those of the same thread."""

from __future__ import annotations

import os

#: What a trace says where there are some and its log has holes,
WITH_HOLES = "other machines are in this process: events of KVM_RUNs whose rows were lost are left out"
#: and where it has none.
WITHOUT_LOG = "other machines are in this process: without the log, what the same thread did for them counts too"
_DESCRIPTORS = "/proc/self/fd"
# What the kernel calls the descriptor that KVM_CREATE_VM gives.
_VM = "anon_inode:kvm-vm"


def count_vms() -> int:
    """How many VMs this process has open, whoever in it made them; 0 where nothing tells."""
    found = 0
    try:
        names = os.listdir(_DESCRIPTORS)
    except OSError:
        return 0
    for name in names:
        try:
            found += os.readlink(f"{_DESCRIPTORS}/{name}") == _VM
        except OSError:  # closed meanwhile
            continue
    return found
