"""What the kernel of an appliance is told, whichever emulator runs it."""

from __future__ import annotations

#: Words of the command line. The console, the rate of the counter and module parameters come besides.
KERNEL_OPTIONS = (
    "quiet",
    # Any oops or panic ends the emulator at once, and its text is in the error message.
    "oops=panic",
    "panic=-1",
    # The guests of the appliance are its user's own.
    "mitigations=off",
    "cryptomgr.notests",
    "initcall_blacklist=crypto_kdf108_init",
    "ipv6.disable=1",
    "apparmor=0",
    # Else KVM_CREATE_VM waits for the kernel's ticks, 11 ms instead of 2: a thread of KVM's joins a control group.
    "rcupdate.rcu_expedited=1",
    # The emulator is stopped for a while now and then, which must not cost the guest its best clock source.
    "tsc=nowatchdog",
)
