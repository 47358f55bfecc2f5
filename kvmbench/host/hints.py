"""The likely cause of a failed ioctl, in words: one table for all of KVM's ioctls.

A hint names the cause that this errno has, or the far most likely one; where several are as likely, all of
them. Sources: the Errors list of each entry in KVM's API documentation, and
arch/x86/kvm/x86.c where that is silent.
"""

from __future__ import annotations

import errno as e

_NO_IRQCHIP = "the VM has no in-kernel interrupt controller: VM.create_irqchip(), before the first vcpu"
_AFTER_VCPU = "it must be called before the VM's first vcpu is made"
_MSR_ADVICE = "the number of MSRs in one call is limited to 256"

_HINTS: dict[tuple[str, int], str] = {
    ("KVM_CREATE_VM", e.EINVAL): "this KVM has no such type of VM; 0 is the ordinary one",
    ("KVM_CREATE_VM", e.ENOMEM): "the host is out of memory, or of the processors' VM identifiers",
    ("KVM_CREATE_VM", e.EBUSY): ("another hypervisor (VirtualBox, VMware) holds the processor's virtualization"),
    ("KVM_CREATE_VCPU", e.EEXIST): "the VM has a vcpu of that id already",
    ("KVM_CREATE_VCPU", e.EINVAL): "the id is not below MAX_VCPU_ID, or the VM has MAX_VCPUS vcpus",
    ("KVM_CREATE_DEVICE", e.ENODEV): ("this KVM has no such device; KVM_CREATE_DEVICE_TEST asks without making one"),
    ("KVM_CREATE_DEVICE", e.EEXIST): "the VM has one already and cannot have two",
    ("KVM_CREATE_IRQCHIP", e.EEXIST): "the VM has interrupt controllers already",
    ("KVM_CREATE_IRQCHIP", e.EINVAL): _AFTER_VCPU,
    ("KVM_CREATE_PIT2", e.ENOENT): _NO_IRQCHIP,
    ("KVM_CREATE_PIT2", e.EEXIST): "the VM has a PIT already",
    ("KVM_GET_PIT2", e.ENXIO): "the VM has no in-kernel PIT; VM.create_pit2() makes one",
    ("KVM_SET_PIT2", e.ENXIO): "the VM has no in-kernel PIT; VM.create_pit2() makes one",
    ("KVM_REINJECT_CONTROL", e.ENXIO): "the VM has no in-kernel PIT; VM.create_pit2() makes one",
    ("KVM_GET_IRQCHIP", e.ENXIO): _NO_IRQCHIP,
    ("KVM_SET_IRQCHIP", e.ENXIO): _NO_IRQCHIP,
    ("KVM_GET_IRQCHIP", e.EINVAL): "chip_id is none of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE and _IOAPIC",
    ("KVM_SET_IRQCHIP", e.EINVAL): "chip_id is none of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE and _IOAPIC",
    ("KVM_IRQ_LINE", e.ENXIO): _NO_IRQCHIP,
    ("KVM_IRQ_LINE_STATUS", e.ENXIO): _NO_IRQCHIP,
    ("KVM_SIGNAL_MSI", e.EINVAL): _NO_IRQCHIP,
    ("KVM_GET_LAPIC", e.EINVAL): _NO_IRQCHIP,
    ("KVM_SET_LAPIC", e.EINVAL): _NO_IRQCHIP + "; or the APIC's own id was changed",
    ("KVM_SET_GSI_ROUTING", e.EINVAL): (
        "an entry has an unknown type or a pin its controller has not got, the flags are not 0, "
        "or the VM has no in-kernel interrupt controller"
    ),
    ("KVM_SET_GSI_ROUTING", e.E2BIG): "more routes than check_extension(Capability.IRQ_ROUTING) allows",
    ("KVM_IOEVENTFD", e.EEXIST): "this write has an eventfd already, or one that also takes it",
    ("KVM_IOEVENTFD", e.ENOENT): "there is none to take back: the arguments must be those that it was given with",
    ("KVM_IOEVENTFD", e.EINVAL): "the length is none of 0, 1, 2, 4, 8, or the range wraps around",
    ("KVM_IOEVENTFD", e.ENOSPC): "the VM has as many of them as KVM allows (about 1000)",
    ("KVM_IRQFD", e.EBUSY): "this eventfd interrupts already",
    ("KVM_IRQFD", e.EINVAL): _NO_IRQCHIP,
    ("KVM_REGISTER_COALESCED_MMIO", e.ENOSPC): "the VM has as many ranges as KVM allows (about 1000)",
    ("KVM_INTERRUPT", e.ENXIO): "the VM has in-kernel interrupt controllers: use VM.irq_line()",
    ("KVM_INTERRUPT", e.EEXIST): "with a split irqchip, an interrupt is queued already; run the vcpu first",
    ("KVM_INTERRUPT", e.EINVAL): "the vector is above 255",
    ("KVM_SMI", e.ENOTTY): "this KVM is built without system management mode",
    ("KVM_SET_TSS_ADDR", e.EINVAL): "the three pages do not end below 4 GiB",
    ("KVM_SET_IDENTITY_MAP_ADDR", e.EINVAL): _AFTER_VCPU,
    ("KVM_SET_BOOT_CPU_ID", e.EBUSY): _AFTER_VCPU,
    ("KVM_SET_USER_MEMORY_REGION", e.EINVAL): (
        "gpa or size is not made of 4096-byte pages, the flags are unknown, or gpa is beyond the guest's "
        "physical address width"
    ),
    ("KVM_SET_USER_MEMORY_REGION", e.EEXIST): "another memory region is there",
    ("KVM_SET_USER_MEMORY_REGION", e.ENOMEM): "the host is out of memory",
    ("KVM_GET_DIRTY_LOG", e.ENOENT): ("the region has no dirty log: add or set it with KVM_MEM_LOG_DIRTY_PAGES"),
    ("KVM_GET_DIRTY_LOG", e.ENXIO): "the VM's dirty pages are in rings, not in a log",
    ("KVM_SET_SREGS", e.EINVAL): (
        "control bits that no processor has together (CR0.PG without CR0.PE, EFER.LMA without CR4.PAE or "
        "unequal to EFER.LME and CR0.PG), CR4 bits that the vcpu's CPUID does not offer, or CR3 beyond its "
        "address width"
    ),
    ("KVM_SET_SREGS2", e.EINVAL): "as for KVM_SET_SREGS; or flags are unknown, or the PDPTRs are not valid",
    ("KVM_SET_DEBUGREGS", e.EINVAL): "flags are not 0, or DR6 or DR7 has bits set above 31",
    ("KVM_SET_VCPU_EVENTS", e.EINVAL): (
        "an exception's vector is 2 or above 31, a flag is unknown, or a member counts only with a flag or a "
        "capability that is not set"
    ),
    ("KVM_SET_MP_STATE", e.EINVAL): (
        "states other than KVM_MP_STATE_RUNNABLE need in-kernel interrupt controllers; or an INIT is pending"
    ),
    ("KVM_SET_XSAVE", e.EINVAL): ("it holds state that the host's XCR0 does not allow, or MXCSR has reserved bits set"),
    ("KVM_SET_XCRS", e.EINVAL): (
        "XCR0 has bits that the vcpu's CPUID leaf 0xd does not offer, or more than 16 registers"
    ),
    ("KVM_GET_MSRS", e.E2BIG): _MSR_ADVICE,
    ("KVM_SET_MSRS", e.E2BIG): _MSR_ADVICE,
    ("KVM_GET_MSR_INDEX_LIST", e.E2BIG): "more MSRs than room was given for",
    ("KVM_GET_SUPPORTED_CPUID", e.E2BIG): "more CPUID entries than room was given for",
    ("KVM_GET_CPUID2", e.E2BIG): "more CPUID entries than room was given for",
    ("KVM_GET_SUPPORTED_HV_CPUID", e.EINVAL): "this KVM is built without Hyper-V emulation",
    ("KVM_SET_CPUID2", e.E2BIG): "more than 256 entries",
    ("KVM_SET_CPUID2", e.EINVAL): (
        "the vcpu has run with another CPUID, or the entries contradict each other, as with a linear address "
        "width (leaf 0x80000008) other than 48 or 57"
    ),
    ("KVM_SET_TSC_KHZ", e.EINVAL): (
        "the processor cannot scale its TSC to that frequency; or, for a VM, there is a vcpu already"
    ),
    ("KVM_KVMCLOCK_CTRL", e.EINVAL): "the guest has not set kvmclock up (MSR_KVM_SYSTEM_TIME_NEW)",
    ("KVM_SET_CLOCK", e.EINVAL): "flags may hold KVM_CLOCK_REALTIME and no unknown bit",
    ("KVM_SET_GUEST_DEBUG", e.EBUSY): "an exception is pending, and KVM_GUESTDBG_INJECT_* would overwrite it",
    ("KVM_SET_GUEST_DEBUG", e.EINVAL): (
        "the guest's state is protected, or an unknown KVM_GUESTDBG_* bit: "
        "check_extension(Capability.SET_GUEST_DEBUG2) says which there are"
    ),
    ("KVM_SET_SIGNAL_MASK", e.EINVAL): "the mask is not 8 bytes long",
    ("KVM_ENABLE_CAP", e.EINVAL): (
        "this KVM has not got the capability, its arguments are not allowed, or it must be enabled before "
        "the first vcpu is made"
    ),
    ("KVM_GET_NESTED_STATE", e.EINVAL): "this KVM does not nest, or has nesting switched off (nested=0)",
    ("KVM_SET_NESTED_STATE", e.EINVAL): (
        "the state is of another vendor's processor, or the vcpu's CPUID does not offer VMX or SVM"
    ),
    ("KVM_GET_DEVICE_ATTR", e.ENXIO): "there is no such attribute",
    ("KVM_SET_DEVICE_ATTR", e.ENXIO): "there is no such attribute",
    ("KVM_GET_DEVICE_ATTR", e.EPERM): "attributes of this descriptor are not supported",
    ("KVM_SET_DEVICE_ATTR", e.EPERM): "attributes of this descriptor are not supported",
    ("KVM_X86_SET_MSR_FILTER", e.EINVAL): (
        "a range has unknown flags, more than 12288 MSRs or none at all where flags are set, or covers "
        "x2APIC MSRs, which cannot be filtered"
    ),
    ("KVM_X86_SETUP_MCE", e.EINVAL): ("no machine-check banks or more than 32, or abilities that KVM cannot emulate"),
    ("KVM_X86_SET_MCE", e.EINVAL): (
        "the bank is not one of those that VCPU.x86_setup_mce() made, or the status is not valid"
    ),
    ("KVM_GET_STATS_FD", e.ENOTTY): "statistics files came with Linux 5.14",
    ("KVM_RUN", e.EFAULT): ("the guest touched memory that the host cannot provide, or KVM could not read its state"),
    ("KVM_RUN", e.EINVAL): ("kvm_run holds bits that this KVM does not know, or the vcpu's state is impossible"),
    ("KVM_RUN", e.EAGAIN): "the vcpu waits for a signal from another (INIT, SIPI); run it again",
}

_ANY_IOCTL: dict[int, str] = {
    e.ENOTTY: "this kernel's KVM has no such ioctl, or is built without it",
    e.EIO: ("the VM was marked as broken after an earlier error, or belongs to another process: make a new one"),
    e.EFAULT: "KVM could not read or write the argument: a bug of this library",
    e.ENOMEM: "the host is out of memory",
    e.EMFILE: "too many files are open; close machines that are no longer used, or raise `ulimit -n`",
    e.ENFILE: "too many files are open on the host",
    e.EACCES: "no permission for /dev/kvm: `sudo usermod -aG kvm $USER`, then log in again",
    e.ENOENT: "there is no /dev/kvm: load the module (`sudo modprobe kvm_intel` or `kvm_amd`)",
}


def hint_for(ioctl: str, errno: int) -> str:
    """The likely cause of a failed ioctl, or an empty string.

    Args:
        ioctl: its name, such as ``KVM_SET_SREGS``.
        errno: the positive error number.
    """
    return _HINTS.get((ioctl, errno)) or _ANY_IOCTL.get(errno, "")


def hinted_ioctls() -> set[str]:
    """The ioctls that have hints of their own."""
    return {ioctl for ioctl, _ in _HINTS}
