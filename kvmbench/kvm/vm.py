"""A virtual machine: memory, interrupt controllers, clock, and the vcpus in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmbench.arguments import integer
from kvmbench.errors import MisuseError
from kvmbench.kvm.descriptor import AttributedDescriptor, array_struct, struct_bytes
from kvmbench.kvm.device import Device
from kvmbench.kvm.eventfd import EventFd
from kvmbench.kvm.region import Region
from kvmbench.kvm.stats import Stats
from kvmbench.kvm.vcpu import VCPU
from kvmbench.uapi import constants as c
from kvmbench.uapi import ffi

if TYPE_CHECKING:
    from kvmbench.host.client import Core


class MsrFilterRange(NamedTuple):
    """MSRs [base, base + len(allowed)), each with whether the guest may access it.

    `access` is KVM_MSR_FILTER_READ, KVM_MSR_FILTER_WRITE, or both or-ed: what the range speaks of.
    """

    base: int
    allowed: Sequence[bool]
    access: int


class VM(AttributedDescriptor):
    """A virtual machine; `System.create_vm` makes it. Closing it closes its vcpus, regions, devices and eventfds."""

    _noun = "VM"

    def __init__(self, core: Core, handle: int) -> None:
        super().__init__(core, handle)

    # What it is made of.

    def add_region(self, gpa: int, size_bytes: int, *, flags: int = 0) -> Region:
        """Gives the guest memory, all zeros.

        Capability: USER_MEMORY; READONLY_MEM for KVM_MEM_READONLY.
        Source: KVM API, KVM_SET_USER_MEMORY_REGION.

        Args:
            gpa: guest-physical address, a multiple of 4096.
            size_bytes: a multiple of 4096, more than 0.
            flags: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, or both or-ed.

        Raises:
            AddressError: there is a region already.
            MisuseError: address or size is not a multiple of the page.
        """
        handle = self.core.add_region(self._open_handle(), gpa, size_bytes, flags)
        return Region(self, handle, gpa=gpa, size_bytes=size_bytes, flags=flags)

    def create_vcpu(self, id: int = 0) -> VCPU:
        """Adds a virtual processor. The thread that makes it should be the one to use it.

        Capability: basic; at most MAX_VCPUS of them, with ids below MAX_VCPU_ID.
        Source: KVM API, KVM_CREATE_VCPU.

        Args:
            id: also its APIC id.

        Raises:
            KvmIoctlError: the id is taken (EEXIST) or too large (EINVAL).
        """
        return VCPU(self, self.core.create_vcpu(self._open_handle(), id), id)

    def create_device(self, type: int, *, flags: int = 0) -> Device | None:
        """Makes an in-kernel device; with KVM_CREATE_DEVICE_TEST it only asks whether it could: None.

        Capability: DEVICE_CTRL. Source: KVM API, KVM_CREATE_DEVICE.

        Args:
            type: KVM_DEV_TYPE_*.
            flags: 0 or KVM_CREATE_DEVICE_TEST.

        Raises:
            KvmIoctlError: this KVM has no such device (ENODEV).
        """
        handle = self.core.create_device(self._open_handle(), type, flags)
        return Device(self.core, handle, self) if handle else None

    def get_stats_fd(self) -> Stats:
        """Opens KVM's statistics of this VM.

        Capability: BINARY_STATS_FD. Source: KVM API, KVM_GET_STATS_FD.
        """
        return Stats(self)

    # What it can do.

    def check_extension(self, capability: int) -> int:
        """Asks for a capability of this VM: 0 when it has not got it.

        Capability: CHECK_EXTENSION_VM. Source: KVM API, KVM_CHECK_EXTENSION.
        """
        return self._call("KVM_CHECK_EXTENSION", capability)

    def enable_cap(self, capability: int, *args: int, flags: int = 0) -> None:
        """Switches a capability on, with up to four numbers whose meaning is the capability's.

        Only capabilities whose arguments are plain numbers: the core's table has them (core/ioctl_special.c).
        Capability: ENABLE_CAP_VM. Source: KVM API, KVM_ENABLE_CAP.

        Raises:
            MisuseError: the capability is not in the core's table for VMs.
            KvmIoctlError: KVM has not got it, or refuses the arguments (EINVAL).
        """
        self._enable_cap(capability, args, flags)

    def set_tss_addr(self, gpa: int) -> None:
        """Says where three free pages below 4 GiB are, for real mode on Intel without unrestricted guest.

        Capability: SET_TSS_ADDR. Source: KVM API, KVM_SET_TSS_ADDR.
        """
        self._call("KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """Says where one free page below 4 GiB is, for the same; to be called before the first vcpu is made.

        Capability: SET_IDENTITY_MAP_ADDR. Source: KVM API, KVM_SET_IDENTITY_MAP_ADDR.

        Raises:
            KvmIoctlError: there is a vcpu already (EINVAL).
        """
        self._ioctl("KVM_SET_IDENTITY_MAP_ADDR", gpa.to_bytes(8, "little"))

    def set_boot_cpu_id(self, id: int) -> None:
        """Says which vcpu is the bootstrap processor (0 unless set); before any vcpu is made.

        Capability: SET_BOOT_CPU_ID. Source: KVM API, KVM_SET_BOOT_CPU_ID.
        """
        self._call("KVM_SET_BOOT_CPU_ID", id)

    def set_nr_mmu_pages(self, pages: int) -> None:
        """Limits the pages that shadow page tables may take, at least 64; 0 lets KVM choose.

        Capability: MMU_SHADOW_CACHE_CONTROL. Source: KVM API, KVM_SET_NR_MMU_PAGES.
        """
        self._call("KVM_SET_NR_MMU_PAGES", pages)

    # Interrupt controllers, lines and routes.

    def create_irqchip(self) -> None:
        """Puts PICs, an I/O APIC and a local APIC a vcpu into the kernel; before any vcpu is made.

        HLT then waits inside KVM_RUN and no longer exits.
        Capability: IRQCHIP. Source: KVM API, KVM_CREATE_IRQCHIP.

        Raises:
            KvmIoctlError: there is one already (EEXIST), or a vcpu (EINVAL).
        """
        self._call("KVM_CREATE_IRQCHIP")

    def get_irqchip(self, chip_id: int) -> Any:
        """State of one controller: ``struct kvm_irqchip *`` with ``chip.pic`` or ``chip.ioapic``.

        Capability: IRQCHIP. Source: KVM API, KVM_GET_IRQCHIP.

        Args:
            chip_id: KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE or KVM_IRQCHIP_IOAPIC.
        """
        return self._get("KVM_GET_IRQCHIP", ffi.new("struct kvm_irqchip *", {"chip_id": chip_id}))

    def set_irqchip(self, irqchip: Any) -> None:
        """Sets the state of the controller that ``chip_id`` names.

        Capability: IRQCHIP. Source: KVM API, KVM_SET_IRQCHIP.
        """
        self._set("KVM_SET_IRQCHIP", irqchip, {})

    def set_gsi_routing(self, entries: Iterable[Any]) -> None:
        """Replaces the table that says which pin or message each interrupt number (GSI) goes to.

        Capability: IRQ_ROUTING; at most as many entries as that says.
        Source: KVM API, KVM_SET_GSI_ROUTING.

        Args:
            entries: ``struct kvm_irq_routing_entry``, or dictionaries of its members, such as
                ``{"gsi": 4, "type": KVM_IRQ_ROUTING_IRQCHIP, "u": {"irqchip": {"irqchip": 2, "pin": 4}}}``.
        """
        self._set_list("KVM_SET_GSI_ROUTING", "nr", "entries", entries)

    def irq_line(self, irq: int, level: int) -> None:
        """Sets the level, 1 or 0, of a line of the in-kernel interrupt controllers; a pulse is two calls.

        Capability: IRQCHIP. Source: KVM API, KVM_IRQ_LINE.

        Raises:
            KvmIoctlError: the VM has no interrupt controllers (ENXIO).
        """
        self._set("KVM_IRQ_LINE", None, {"irq": irq, "level": level})

    def irq_line_status(self, irq: int, level: int) -> int:
        """`irq_line` that tells what became of it: above 0 delivered, 0 one was pending, below 0 masked.

        Capability: IRQ_INJECT_STATUS. Source: KVM API, KVM_IRQ_LINE (the status variant is described there).
        """
        line = ffi.new("struct kvm_irq_level *", {"irq": irq, "level": level})
        return int(self._get("KVM_IRQ_LINE_STATUS", line).status)

    def signal_msi(self, *, address: int, data: int) -> int:
        """Sends a message-signalled interrupt; above 0: delivered, 0: the guest has it masked.

        Capability: SIGNAL_MSI. Source: KVM API, KVM_SIGNAL_MSI.
        """
        halves = {"address_lo": address & 0xFFFFFFFF, "address_hi": address >> 32, "data": data}
        return self._ioctl("KVM_SIGNAL_MSI", struct_bytes(ffi.new("struct kvm_msi *", halves)))[0]

    # Interval timer.

    def create_pit2(self, *, flags: int = 0) -> None:
        """Puts an i8254 timer into the kernel; `create_irqchip` comes first.

        Capability: PIT2. Source: KVM API, KVM_CREATE_PIT2.

        Args:
            flags: 0, or KVM_PIT_SPEAKER_DUMMY to have port 0x61 served too.

        Raises:
            KvmIoctlError: there is a PIT already (EEXIST), or no irqchip (ENOENT, newer kernels only).
        """
        self._set("KVM_CREATE_PIT2", None, {"flags": flags})

    def get_pit2(self) -> Any:
        """State of the timer: ``struct kvm_pit_state2 *``.

        Capability: PIT_STATE2. Source: KVM API, KVM_GET_PIT2.
        """
        return self._get("KVM_GET_PIT2")

    def set_pit2(self, pit: Any = None, /, **fields: Any) -> None:
        """Sets the state of the timer, or with keywords changes these members of it.

        Capability: PIT_STATE2. Source: KVM API, KVM_SET_PIT2.
        """
        self._set("KVM_SET_PIT2", pit, fields, self.get_pit2)

    def reinject_control(self, pit_reinject: bool) -> None:
        """Says whether timer ticks that the guest missed are given to it later.

        Capability: REINJECT_CONTROL. Source: KVM API, KVM_REINJECT_CONTROL.
        """
        # The header declares the ioctl without its struct.
        control = ffi.new("struct kvm_reinject_control *", {"pit_reinject": int(pit_reinject)})
        self._ioctl("KVM_REINJECT_CONTROL", struct_bytes(control))

    # Time.

    def get_clock(self) -> Any:
        """kvmclock now, in ns: ``struct kvm_clock_data *``.

        ``flags`` say what else is filled in: KVM_CLOCK_REALTIME, KVM_CLOCK_HOST_TSC, and whether all vcpus
        see one clock (KVM_CLOCK_TSC_STABLE).
        Capability: ADJUST_CLOCK. Source: KVM API, KVM_GET_CLOCK.
        """
        return self._get("KVM_GET_CLOCK")

    def set_clock(self, clock: Any = None, /, **fields: Any) -> None:
        """Sets kvmclock: a struct, or ``clock=`` in ns; with KVM_CLOCK_REALTIME it runs on from ``realtime``.

        Capability: ADJUST_CLOCK. Source: KVM API, KVM_SET_CLOCK.

        Raises:
            KvmIoctlError: flags other than KVM_CLOCK_REALTIME and what `get_clock` gives (EINVAL).
        """
        self._set("KVM_SET_CLOCK", clock, fields)

    def get_tsc_khz(self) -> int:
        """The TSC's frequency in kHz that new vcpus get.

        Capability: VM_TSC_CONTROL. Source: KVM API, KVM_GET_TSC_KHZ.
        """
        return self._call("KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, khz: int) -> None:
        """Sets the TSC's frequency in kHz for all vcpus; before any is made.

        Capability: VM_TSC_CONTROL. Source: KVM API, KVM_SET_TSC_KHZ.

        Raises:
            KvmIoctlError: the processor cannot scale its TSC to that, or there is a vcpu (EINVAL).
        """
        self._call("KVM_SET_TSC_KHZ", khz)

    # What stays out of user space.

    def create_eventfd(self) -> EventFd:
        """Makes an eventfd for `ioeventfd` and `irqfd`. Source: eventfd(2)."""
        return EventFd(self)

    def ioeventfd(
        self,
        eventfd: EventFd,
        addr: int,
        length: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """Has a guest's write raise an eventfd's count by 1; the guest goes on, and nobody learns what was written.

        KVM decodes a write to memory all the same; kvm_intel with EPT does not, for `length` 0.
        Capability: IOEVENTFD; IOEVENTFD_ANY_LENGTH for `length` 0. Source: KVM API, KVM_IOEVENTFD.

        Args:
            eventfd: one of this VM's.
            addr: guest-physical address, or the port.
            length: of the write in bytes: 1, 2, 4 or 8; 0 for any.
            datamatch: only for this value; needs a length.
            pio: `addr` is a port.
            deassign: take it back; the same arguments again.

        Raises:
            ClosedError: the eventfd is closed.
            MisuseError: it is another VM's, a number does not fit, or `datamatch` without a length.
            KvmIoctlError: there is one already for this write (EEXIST), or none to take back (ENOENT); the range
                wraps around (EINVAL).
        """
        handle = _eventfd_handle(eventfd, self, "eventfd")
        integer(addr, "addr", 0, (1 << 16) - 1 if pio else (1 << 64) - 1)
        if integer(length, "length") not in (0, 1, 2, 4, 8) or (pio and length == 8):
            raise MisuseError(f"length={length!r}: a write has 1, 2, 4 or 8 bytes (a port's at most 4); 0 is any")
        if pio and addr + length > 1 << 16:
            raise MisuseError(f"a write of {length} bytes to port {addr:#x} ends beyond port 0xffff")
        flags = c.KVM_IOEVENTFD_FLAG_PIO * bool(pio) | c.KVM_IOEVENTFD_FLAG_DEASSIGN * bool(deassign)
        if datamatch is not None:
            if not length:
                raise MisuseError("datamatch needs a length: 1, 2, 4 or 8")
            integer(datamatch, "datamatch", 0, (1 << 8 * length) - 1)
            flags |= c.KVM_IOEVENTFD_FLAG_DATAMATCH
        argument = ffi.new(
            "struct kvm_ioeventfd *",
            {"addr": addr, "len": length, "datamatch": datamatch or 0, "flags": flags},
        )
        argument.fd = ffi.cast("int32_t", handle)
        self._ioctl("KVM_IOEVENTFD", struct_bytes(argument))

    def irqfd(self, eventfd: EventFd, gsi: int, *, resample: EventFd | None = None, deassign: bool = False) -> None:
        """Has an eventfd's rise interrupt the guest: a pulse on the line, or the message of the route.

        Capability: IRQFD; IRQFD_RESAMPLE for `resample`. Source: KVM API, KVM_IRQFD.

        Args:
            eventfd: one of this VM's; `EventFd.write` raises it, and so does a guest's write with `ioeventfd`.
            gsi: the interrupt's number in the table of `set_gsi_routing`.
            resample: level-triggered: the line stays up until the guest acknowledges the interrupt, then this
                eventfd is raised.
            deassign: take it back.

        Raises:
            ClosedError: an eventfd is closed.
            MisuseError: one is another VM's, or `gsi` is no 32-bit number.
            KvmIoctlError: the VM has no interrupt controllers (EINVAL), or the eventfd interrupts already (EBUSY).
        """
        flags = c.KVM_IRQFD_FLAG_DEASSIGN * bool(deassign)
        fields = {"fd": _eventfd_handle(eventfd, self, "eventfd"), "gsi": integer(gsi, "gsi", 0, (1 << 32) - 1)}
        if resample is not None:
            flags |= c.KVM_IRQFD_FLAG_RESAMPLE
            fields["resamplefd"] = _eventfd_handle(resample, self, "resample")
        self._set("KVM_IRQFD", None, {**fields, "flags": flags})

    def register_coalesced_mmio(self, addr: int, size_bytes: int, *, pio: bool = False) -> None:
        """Has KVM keep writes to a range back in a ring, 169 at most; `VCPU.take_coalesced` takes them out.

        Reads leave the guest as ever, and so do writes that cross the range's end or find the ring full. Who serves
        exits must take what is in the ring first; `kvmbench.Machine.coalesce` has that done.
        Capability: COALESCED_MMIO; COALESCED_PIO for ports. Source: KVM API, KVM_REGISTER_COALESCED_MMIO.

        Args:
            addr: guest-physical address, or the first port.
            size_bytes: of the range.
            pio: these are ports.

        Raises:
            MisuseError: a number does not fit, or this is no range.
            KvmIoctlError: no more such ranges (ENOSPC).
        """
        self._set("KVM_REGISTER_COALESCED_MMIO", None, _zone(addr, size_bytes, pio))

    def unregister_coalesced_mmio(self, addr: int, size_bytes: int, *, pio: bool = False) -> None:
        """Ends it for all such ranges within this one; what is in the ring stays there.

        Capability: COALESCED_MMIO; COALESCED_PIO for ports. Source: KVM API, KVM_UNREGISTER_COALESCED_MMIO.
        """
        self._set("KVM_UNREGISTER_COALESCED_MMIO", None, _zone(addr, size_bytes, pio))

    # What leaves the guest.

    def x86_set_msr_filter(self, ranges: Iterable[MsrFilterRange], *, default_deny: bool = False) -> None:
        """Says which MSRs the guest may access; others fault, or exit with KVM_CAP_X86_USER_SPACE_MSR.

        Capability: X86_MSR_FILTER. Source: KVM API, KVM_X86_SET_MSR_FILTER.

        Args:
            ranges: at most 16, of at most 12288 MSRs each; none takes the filter away.
            default_deny: whether MSRs in no range are denied.
        """
        filter = ffi.new("struct kvm_msr_filter *", {"flags": int(default_deny)})
        bitmaps = b""
        ranges = list(ranges)
        if len(ranges) > c.KVM_MSR_FILTER_MAX_RANGES:
            raise MisuseError(f"an MSR filter has at most {c.KVM_MSR_FILTER_MAX_RANGES} ranges")
        for target, wanted in zip(filter.ranges, ranges, strict=False):
            target.base, target.nmsrs, target.flags = wanted.base, len(wanted.allowed), wanted.access
            bits = sum(1 << index for index, allowed in enumerate(wanted.allowed) if allowed)
            # KVM copies whole longs.
            bitmaps += bits.to_bytes((len(wanted.allowed) + 63) // 64 * 8, "little")
        # The bitmaps follow the struct and the core puts the pointers in.
        self._ioctl("KVM_X86_SET_MSR_FILTER", struct_bytes(filter) + bitmaps)

    def set_pmu_event_filter(self, events: Iterable[int], *, action: int, fixed_counter_bitmap: int = 0) -> None:
        """Says which performance events the guest may count.

        Capability: PMU_EVENT_FILTER. Source: KVM API, KVM_SET_PMU_EVENT_FILTER.

        Args:
            events: event select and unit mask, as in IA32_PERFEVTSELx.
            action: KVM_PMU_EVENT_ALLOW these only, or KVM_PMU_EVENT_DENY these.
            fixed_counter_bitmap: the same for fixed counters, a bit each.
        """
        filter = array_struct("struct kvm_pmu_event_filter", "nevents", "events", events)
        filter.action, filter.fixed_counter_bitmap = action, fixed_counter_bitmap
        self._ioctl("KVM_SET_PMU_EVENT_FILTER", struct_bytes(filter))


def _eventfd_handle(eventfd: EventFd, vm: VM, what: str) -> int:
    if not isinstance(eventfd, EventFd):
        raise MisuseError(f"{what}={eventfd!r}: give an EventFd, as VM.create_eventfd() makes it")
    return eventfd.handle_for(vm)


def _zone(addr: int, size_bytes: int, pio: bool) -> dict[str, int]:
    end = 1 << 16 if pio else 1 << 64
    integer(addr, "addr", 0, end - 1)
    integer(size_bytes, "size_bytes", 1, min(end - addr, (1 << 32) - 1))
    return {"addr": addr, "size": size_bytes, "pio": int(bool(pio))}
