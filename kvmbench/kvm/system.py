"""The system: /dev/kvm itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvmbench.core.wire import KB_SYSTEM_HANDLE
from kvmbench.kvm.descriptor import AttributedDescriptor
from kvmbench.kvm.msrs import read_msrs
from kvmbench.kvm.vm import VM
from kvmbench.uapi import Capability

if TYPE_CHECKING:
    from kvmbench.host.client import Core

# KVM never has more CPUID entries (KVM_MAX_CPUID_ENTRIES); of MSRs it lists some hundreds.
MAX_CPUID_ENTRIES = 256
MAX_MSRS = 4096


class System(AttributedDescriptor):
    """What /dev/kvm can tell, and where VMs come from.

    Closing it does nothing to the host, which owns the descriptor, nor to VMs made here.
    """

    _noun = "system"

    def __init__(self, core: Core) -> None:
        super().__init__(core, KB_SYSTEM_HANDLE)

    def close(self) -> None:
        """Makes this object unusable; the host stays open. Idempotent."""
        self._is_closed = True

    def get_api_version(self) -> int:
        """The version of KVM's API: 12, and it will not change.

        Capability: basic. Source: KVM API, KVM_GET_API_VERSION.
        """
        return self._call("KVM_GET_API_VERSION")

    def check_extension(self, capability: int) -> int:
        """Asks for a capability: 0 when KVM has not got it, else 1 or what the capability counts.

        A VM may answer differently: `VM.check_extension`.
        Capability: basic. Source: KVM API, KVM_CHECK_EXTENSION.

        Args:
            capability: a `Capability`, or the number of one that is newer than this library.
        """
        return self._call("KVM_CHECK_EXTENSION", capability)

    def capabilities(self) -> dict[Capability, int]:
        """All capabilities that KVM has here, with what `check_extension` says of each."""
        answers = {capability: self.check_extension(capability) for capability in Capability}
        return {capability: answer for capability, answer in answers.items() if answer}

    def get_vcpu_mmap_size(self) -> int:
        """Bytes of a vcpu's shared mapping: kvm_run, the page for port I/O data, the coalesced ring.

        Capability: basic. Source: KVM API, KVM_GET_VCPU_MMAP_SIZE.
        """
        return self._call("KVM_GET_VCPU_MMAP_SIZE")

    def get_msr_index_list(self) -> list[int]:
        """The MSRs whose values make up a guest's state, as a VM that moves must carry them.

        Others can be read and written too. Capability: basic. Source: KVM API, KVM_GET_MSR_INDEX_LIST.
        """
        return list(self._get_list("KVM_GET_MSR_INDEX_LIST", "indices", MAX_MSRS).indices)

    def get_msr_feature_index_list(self) -> list[int]:
        """The MSRs that describe features, readable with `get_msrs` here.

        Capability: GET_MSR_FEATURES. Source: KVM API, KVM_GET_MSR_FEATURE_INDEX_LIST.
        """
        return list(self._get_list("KVM_GET_MSR_FEATURE_INDEX_LIST", "indices", MAX_MSRS).indices)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Values of feature MSRs by index: what KVM offers to guests.

        Capability: GET_MSR_FEATURES. Source: KVM API, KVM_GET_MSRS.

        Raises:
            UnsupportedError: KVM does not know one of them; the message names it.
        """
        return read_msrs(self._ioctl, indices)

    def get_supported_cpuid(self) -> Any:
        """What CPUID may say in a guest: ``struct kvm_cpuid2 *`` with ``nent`` ``entries``.

        Good to be handed to `VCPU.set_cpuid2`, perhaps with features taken out.
        Capability: EXT_CPUID. Source: KVM API, KVM_GET_SUPPORTED_CPUID.
        """
        return self._get_list("KVM_GET_SUPPORTED_CPUID", "entries", MAX_CPUID_ENTRIES)

    def get_emulated_cpuid(self) -> Any:
        """Features that KVM emulates, slowly, where the processor lacks them: ``struct kvm_cpuid2 *``.

        Capability: EXT_EMUL_CPUID. Source: KVM API, KVM_GET_EMULATED_CPUID.
        """
        return self._get_list("KVM_GET_EMULATED_CPUID", "entries", MAX_CPUID_ENTRIES)

    def get_supported_hv_cpuid(self) -> Any:
        """The Hyper-V leaves that KVM can offer: ``struct kvm_cpuid2 *``.

        Capability: SYS_HYPERV_CPUID. Source: KVM API, KVM_GET_SUPPORTED_HV_CPUID.
        """
        return self._get_list("KVM_GET_SUPPORTED_HV_CPUID", "entries", MAX_CPUID_ENTRIES)

    def x86_get_mce_cap_supported(self) -> int:
        """The machine-check abilities that a guest can have, as in IA32_MCG_CAP.

        Capability: MCE. Source: KVM API, KVM_X86_GET_MCE_CAP_SUPPORTED.
        """
        return int.from_bytes(self._ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED")[1], "little")

    def create_vm(self, type: int = 0) -> VM:
        """Makes an empty virtual machine.

        Capability: basic. Source: KVM API, KVM_CREATE_VM.

        Args:
            type: 0 for an ordinary VM; other types (protected ones) are the kernel's own.

        Raises:
            KvmIoctlError: KVM refuses the type (EINVAL), or has no memory.
        """
        self._open_handle()
        return VM(self.core, self.core.create_vm(type))
