"""A virtual processor: its registers and all other state that KVM keeps of it.

One class for one descriptor, so it is long; its methods are independent of each other. Running it is another
matter: `kvmbench.debug` does that, with messages of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from kvmbench.errors import MisuseError
from kvmbench.kvm.coalesced import CoalescedWrite, coalesced_writes
from kvmbench.kvm.descriptor import AttributedDescriptor, array_struct, struct_bytes, struct_from
from kvmbench.kvm.msrs import read_msrs, write_msrs
from kvmbench.kvm.stats import Stats
from kvmbench.uapi import Capability, constants, ffi

if TYPE_CHECKING:
    from kvmbench.kvm.vm import VM

MAX_CPUID_ENTRIES = 256
# Header and two pages: a VMCS and its shadow, the most that any vendor's nested state takes.
NESTED_STATE_BYTES = 128 + 2 * 4096


class VCPU(AttributedDescriptor):
    """A virtual processor; `VM.create_vcpu` makes it.

    Each get method returns a struct that is the caller's own; changing it changes nothing until it is set.
    Each set method takes such a struct, or keywords that change these members of the state as it is now::

        vcpu.set_regs(rip=0x1000, rflags=2)

    All of them raise BusyError while the vcpu runs.

    Attributes:
        vm: the VM it belongs to.
        id: its number there.
    """

    _noun = "vcpu"

    def __init__(self, vm: VM, handle: int, id: int) -> None:
        super().__init__(vm.core, handle, vm)
        self.vm = vm
        self.id = id

    def __repr__(self) -> str:
        return f"<vcpu {self.id}{' (closed)' if self.closed else ''}>"

    # Registers.

    def get_regs(self) -> Any:
        """General registers, RIP and RFLAGS: ``struct kvm_regs *``.

        After an I/O or MMIO exit they are those before the instruction was completed; and while
        single-stepping KVM hides RFLAGS.TF.
        Capability: basic. Source: KVM API, KVM_GET_REGS.
        """
        return self._get("KVM_GET_REGS")

    def set_regs(self, regs: Any = None, /, **fields: Any) -> None:
        """Sets general registers, RIP and RFLAGS; drops an exception that was about to be raised.

        Capability: basic. Source: KVM API, KVM_SET_REGS.
        """
        self._set("KVM_SET_REGS", regs, fields, self.get_regs)

    def get_sregs(self) -> Any:
        """Segments, descriptor tables and control registers: ``struct kvm_sregs *``.

        Capability: basic. Source: KVM API, KVM_GET_SREGS.
        """
        return self._get("KVM_GET_SREGS")

    def set_sregs(self, sregs: Any = None, /, **fields: Any) -> None:
        """Sets segments, descriptor tables and control registers.

        Capability: basic. Source: KVM API, KVM_SET_SREGS.

        Raises:
            KvmIoctlError: control bits that no processor has together, or CR4 bits that CPUID does not offer
                (EINVAL).
        """
        self._set("KVM_SET_SREGS", sregs, fields, self.get_sregs)

    def get_sregs2(self) -> Any:
        """As `get_sregs`, with the PAE page-directory pointers: ``struct kvm_sregs2 *``.

        Capability: SREGS2. Source: KVM API, KVM_GET_SREGS2.
        """
        return self._get("KVM_GET_SREGS2")

    def set_sregs2(self, sregs: Any = None, /, **fields: Any) -> None:
        """As `set_sregs`, with the PAE page-directory pointers.

        Capability: SREGS2. Source: KVM API, KVM_SET_SREGS2.
        """
        self._set("KVM_SET_SREGS2", sregs, fields, self.get_sregs2)

    def get_debugregs(self) -> Any:
        """DR0 to DR3, DR6 and DR7 as the guest has them: ``struct kvm_debugregs *``.

        Capability: DEBUGREGS. Source: KVM API, KVM_GET_DEBUGREGS.
        """
        return self._get("KVM_GET_DEBUGREGS")

    def set_debugregs(self, debugregs: Any = None, /, **fields: Any) -> None:
        """Sets the guest's debug registers; not those that `set_guest_debug` puts in their place.

        Capability: DEBUGREGS. Source: KVM API, KVM_SET_DEBUGREGS.
        """
        self._set("KVM_SET_DEBUGREGS", debugregs, fields, self.get_debugregs)

    # Floating point and vectors.

    def get_fpu(self) -> Any:
        """x87 and SSE state: ``struct kvm_fpu *``. `get_xsave` has all of it.

        Capability: basic. Source: KVM API, KVM_GET_FPU.
        """
        return self._get("KVM_GET_FPU")

    def set_fpu(self, fpu: Any = None, /, **fields: Any) -> None:
        """Sets x87 and SSE state.

        Capability: basic. Source: KVM API, KVM_SET_FPU.
        """
        self._set("KVM_SET_FPU", fpu, fields, self.get_fpu)

    def get_xsave(self) -> Any:
        """The first 4096 bytes of the XSAVE area: ``struct kvm_xsave *``, in the host's standard format.

        Capability: XSAVE. Source: KVM API, KVM_GET_XSAVE.
        """
        return self._get("KVM_GET_XSAVE")

    def get_xsave2(self) -> Any:
        """The whole XSAVE area: ``struct kvm_xsave *`` whose ``extra`` holds what is beyond 4096 bytes.

        Capability: XSAVE2, which counts the bytes. Source: KVM API, KVM_GET_XSAVE2.
        """
        size = self.vm.check_extension(Capability.XSAVE2)
        return struct_from("struct kvm_xsave", self._ioctl("KVM_GET_XSAVE2", out_bytes=size)[1], "extra")

    def set_xsave(self, xsave: Any) -> None:
        """Sets the XSAVE area, as `get_xsave` or `get_xsave2` returned it.

        Capability: XSAVE. Source: KVM API, KVM_SET_XSAVE.

        Raises:
            KvmIoctlError: it holds state that the host's XCR0 does not allow (EINVAL).
        """
        self._set("KVM_SET_XSAVE", xsave, {})

    def get_xcrs(self) -> Any:
        """Extended control registers: ``struct kvm_xcrs *`` with ``nr_xcrs`` ``xcrs``; XCR0 alone, so far.

        Capability: XCRS. Source: KVM API, KVM_GET_XCRS.
        """
        return self._get("KVM_GET_XCRS")

    def set_xcrs(self, xcrs: Any = None, /, **fields: Any) -> None:
        """Sets extended control registers.

        Capability: XCRS. Source: KVM API, KVM_SET_XCRS.
        """
        self._set("KVM_SET_XCRS", xcrs, fields, self.get_xcrs)

    # MSRs and CPUID.

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Values of MSRs by index, in the order asked for; `kvmbench.uapi.msrs` has their names.

        Capability: basic. Source: KVM API, KVM_GET_MSRS.

        Raises:
            UnsupportedError: KVM does not let one of them be read; the message names it.
        """
        return read_msrs(self._ioctl, indices)

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Sets MSRs, in the order given.

        Capability: basic. Source: KVM API, KVM_SET_MSRS.

        Raises:
            UnsupportedError: KVM refuses one, which the message names; those before it are set.
        """
        write_msrs(self._ioctl, values)

    def get_cpuid2(self) -> Any:
        """What CPUID says in this vcpu: ``struct kvm_cpuid2 *`` with ``nent`` ``entries``.

        Capability: EXT_CPUID. Source: KVM API, KVM_GET_CPUID2.
        """
        found = self._get_list("KVM_GET_CPUID2", "entries", MAX_CPUID_ENTRIES)
        # Linux 6.1 leaves nent as large as the room it was given (mended by "KVM: x86: Update number of entries
        # for KVM_GET_CPUID2 on success, not fail"): what follows the last entry is the core's zeros.
        filled = [index for index, entry in enumerate(found.entries) if any(struct_bytes(entry))]
        count = filled[-1] + 1 if filled else 0
        return array_struct("struct kvm_cpuid2", "nent", "entries", found.entries[0:count])

    def set_cpuid2(self, cpuid: Any) -> None:
        """Says what CPUID answers and so which features the vcpu has; once, before it first runs.

        Capability: EXT_CPUID. Source: KVM API, KVM_SET_CPUID2.

        Args:
            cpuid: ``struct kvm_cpuid2 *`` as `System.get_supported_cpuid` returns it, or entries: each a
                ``struct kvm_cpuid_entry2`` or a dictionary of its members.

        Raises:
            KvmIoctlError: an entry is not possible, or the vcpu has run with another CPUID (EINVAL).
        """
        entries = cpuid.entries[0 : cpuid.nent] if isinstance(cpuid, ffi.CData) else cpuid
        self._set_list("KVM_SET_CPUID2", "nent", "entries", entries)

    # Events.

    def get_vcpu_events(self) -> Any:
        """Exceptions, interrupts and NMIs that are pending or being delivered: ``struct kvm_vcpu_events *``.

        Capability: VCPU_EVENTS. Source: KVM API, KVM_GET_VCPU_EVENTS.
        """
        return self._get("KVM_GET_VCPU_EVENTS")

    def set_vcpu_events(self, events: Any = None, /, **fields: Any) -> None:
        """Sets what `get_vcpu_events` shows; ``flags`` say which of the optional members count.

        Capability: VCPU_EVENTS. Source: KVM API, KVM_SET_VCPU_EVENTS.

        Raises:
            KvmIoctlError: a vector above 31 or 2 for an exception, or an unknown flag (EINVAL).
        """
        self._set("KVM_SET_VCPU_EVENTS", events, fields, self.get_vcpu_events)

    def interrupt(self, vector: int) -> None:
        """Queues an external interrupt for when the vcpu next runs, in place of one queued before.

        It is delivered whether or not the guest has interrupts enabled: look at RFLAGS.IF first.

        Only without an in-kernel interrupt controller, whose lines `VM.irq_line` sets.
        Capability: basic. Source: KVM API, KVM_INTERRUPT.

        Raises:
            KvmIoctlError: there is an in-kernel controller (ENXIO), or the vector is above 255 (EINVAL).
        """
        self._set("KVM_INTERRUPT", None, {"irq": vector})

    def nmi(self) -> None:
        """Queues a non-maskable interrupt.

        Capability: USER_NMI. Source: KVM API, KVM_NMI.
        """
        self._call("KVM_NMI")

    def smi(self) -> None:
        """Queues a system management interrupt.

        Capability: X86_SMM. Source: KVM API, KVM_SMI.
        """
        self._call("KVM_SMI")

    def get_lapic(self) -> Any:
        """The local APIC's register page: ``struct kvm_lapic_state *``; needs an in-kernel controller.

        Capability: IRQCHIP. Source: KVM API, KVM_GET_LAPIC.
        """
        return self._get("KVM_GET_LAPIC")

    def set_lapic(self, lapic: Any) -> None:
        """Sets the local APIC's registers; needs an in-kernel controller.

        Capability: IRQCHIP. Source: KVM API, KVM_SET_LAPIC.
        """
        self._set("KVM_SET_LAPIC", lapic, {})

    def get_mp_state(self) -> int:
        """What the vcpu is about: KVM_MP_STATE_RUNNABLE, _HALTED, _UNINITIALIZED, ...

        Capability: MP_STATE. Source: KVM API, KVM_GET_MP_STATE.
        """
        return int(self._get("KVM_GET_MP_STATE").mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """Sets what the vcpu is about; KVM_MP_STATE_RUNNABLE wakes it from HLT.

        Capability: MP_STATE. Source: KVM API, KVM_SET_MP_STATE.

        Raises:
            KvmIoctlError: a state that only an in-kernel interrupt controller allows (EINVAL).
        """
        self._set("KVM_SET_MP_STATE", None, {"mp_state": mp_state})

    # Memory as the vcpu sees it.

    def translate(self, gva: int) -> Any:
        """Walks the guest's page tables for a linear address: ``struct kvm_translation *``.

        Trust ``valid`` and ``physical_address`` only: on x86 ``writeable`` is always 1 and ``usermode`` 0.
        Capability: basic. Source: KVM API, KVM_TRANSLATE.
        """
        return self._get("KVM_TRANSLATE", ffi.new("struct kvm_translation *", {"linear_address": gva}))

    def take_coalesced(self) -> list[CoalescedWrite]:
        """Takes the writes that KVM kept back (`VM.register_coalesced_mmio`), oldest first; also while it runs.

        The ring is the VM's: each write comes once, whichever vcpu made it and whichever is asked.
        Capability: COALESCED_MMIO, which says where in a vcpu's mapping the ring is.
        Source: KVM API, KVM_REGISTER_COALESCED_MMIO.

        Raises:
            AddressError: what should be the ring's indices lies outside it; nothing is taken.
        """
        return coalesced_writes(self.core.take_coalesced(self._open_handle()))

    # Time.

    def get_tsc_khz(self) -> int:
        """The TSC's frequency in kHz.

        Capability: GET_TSC_KHZ. Source: KVM API, KVM_GET_TSC_KHZ.
        """
        return self._call("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Sets the TSC's frequency in kHz.

        Capability: TSC_CONTROL for other than about the host's. Source: KVM API, KVM_SET_TSC_KHZ.

        Raises:
            KvmIoctlError: the processor cannot scale its TSC to that (EINVAL).
        """
        self._call("KVM_SET_TSC_KHZ", khz)

    def kvmclock_ctrl(self) -> None:
        """Tells the guest's kvmclock that it was paused, so that its watchdog does not bark.

        Capability: KVMCLOCK_CTRL. Source: KVM API, KVM_KVMCLOCK_CTRL.

        Raises:
            KvmIoctlError: the guest has not set kvmclock up (EINVAL).
        """
        self._call("KVM_KVMCLOCK_CTRL")

    # Control.

    def set_guest_debug(self, control: int, *, debugreg: Iterable[int] = ()) -> None:
        """Says which debug events leave the guest; 0 for none.

        Running a vcpu sets this anew each time, so what is set here lasts only until then.
        Capability: SET_GUEST_DEBUG; SET_GUEST_DEBUG2 says which bits of `control` there are.
        Source: KVM API, KVM_SET_GUEST_DEBUG.

        Args:
            control: KVM_GUESTDBG_ENABLE, with KVM_GUESTDBG_SINGLESTEP, _USE_SW_BP, _USE_HW_BP, _BLOCKIRQ, ...
            debugreg: up to eight values for the debug registers, for KVM_GUESTDBG_USE_HW_BP.

        Raises:
            KvmIoctlError: an unknown bit (EINVAL), or an exception is pending that injecting another would
                lose (EBUSY).
        """
        registers = list(debugreg)
        if len(registers) > 8:
            raise MisuseError(f"there are 8 debug registers, not {len(registers)}")
        debug = ffi.new("struct kvm_guest_debug *", {"control": control, "arch": {"debugreg": registers}})
        self._set("KVM_SET_GUEST_DEBUG", debug, {})

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """Says which signals are blocked while the vcpu runs; None: those of its thread.

        The core's own signal, by which a run is interrupted, is never blocked.
        Capability: basic. Source: KVM API, KVM_SET_SIGNAL_MASK.

        Args:
            signals: numbers from 1 to 64 in the host's numbering.
        """
        if signals is None:
            self._ioctl("KVM_SET_SIGNAL_MASK")
            return
        mask = 0
        for signal in signals:
            if not 1 <= signal <= 64:
                raise MisuseError(f"signals are numbered from 1 to 64, not {signal}")
            mask |= 1 << (signal - 1)
        bits = mask.to_bytes(8, "little")
        self._ioctl("KVM_SET_SIGNAL_MASK", len(bits).to_bytes(4, "little") + bits)

    def enable_cap(self, capability: int, *args: int, flags: int = 0) -> None:
        """Switches a capability of the vcpu on; see `VM.enable_cap`.

        Capability: ENABLE_CAP. Source: KVM API, KVM_ENABLE_CAP.

        Raises:
            MisuseError: the capability is not in the core's table for vcpus.
            KvmIoctlError: KVM has not got it, or refuses the arguments (EINVAL).
        """
        self._enable_cap(capability, args, flags)

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """Sets how many machine-check banks the guest has, and their abilities, as in IA32_MCG_CAP.

        Capability: MCE. Source: KVM API, KVM_X86_SETUP_MCE.
        """
        self._ioctl("KVM_X86_SETUP_MCE", mcg_cap.to_bytes(8, "little"))

    def x86_set_mce(self, mce: Any = None, /, **fields: Any) -> None:
        """Raises a machine check: ``bank``, ``status``, ``addr``, ``misc``, ``mcg_status``.

        Capability: MCE. Source: KVM API, KVM_X86_SET_MCE.
        """
        self._set("KVM_X86_SET_MCE", mce, fields)

    def get_nested_state(self) -> bytes:
        """What KVM keeps of a guest that is a hypervisor: ``struct kvm_nested_state`` and its data.

        Capability: NESTED_STATE. Source: KVM API, KVM_GET_NESTED_STATE.
        """
        return self._ioctl("KVM_GET_NESTED_STATE", out_bytes=NESTED_STATE_BYTES)[1]

    def set_nested_state(self, state: bytes) -> None:
        """Sets what `get_nested_state` returned.

        Capability: NESTED_STATE. Source: KVM API, KVM_SET_NESTED_STATE.
        """
        self._ioctl("KVM_SET_NESTED_STATE", state)

    def get_stats_fd(self) -> Stats:
        """Opens KVM's statistics of this vcpu.

        Capability: BINARY_STATS_FD. Source: KVM API, KVM_GET_STATS_FD.
        """
        return Stats(self)

    def get_tsc_offset(self) -> int:
        """What is added to the host's TSC to make the guest's, as an unsigned 64-bit number.

        Capability: VCPU_ATTRIBUTES. Source: Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET.
        """
        value = self.get_device_attr(constants.KVM_VCPU_TSC_CTRL, constants.KVM_VCPU_TSC_OFFSET)
        return int.from_bytes(value, "little")

    def set_tsc_offset(self, offset: int) -> None:
        """Sets what is added to the host's TSC, modulo 2**64.

        Capability: VCPU_ATTRIBUTES. Source: Documentation/virt/kvm/devices/vcpu.rst, KVM_VCPU_TSC_OFFSET.
        """
        data = (offset % (1 << 64)).to_bytes(8, "little")
        self.set_device_attr(constants.KVM_VCPU_TSC_CTRL, constants.KVM_VCPU_TSC_OFFSET, data)
