"""Reading and writing MSRs in bulk, as a vcpu and the system both do it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from kvmbench.errors import UnsupportedError
from kvmbench.kvm.descriptor import array_struct, struct_bytes, struct_from
from kvmbench.uapi.msrs import msr_name

# KVM takes no more in one call (MAX_IO_MSRS in arch/x86/kvm/x86.c) and answers E2BIG.
MSRS_A_CALL = 255


class _Ioctl(Protocol):
    def __call__(self, name: str, data: bytes = ..., /) -> tuple[int, bytes]: ...


def read_msrs(ioctl: _Ioctl, indices: Iterable[int]) -> dict[int, int]:
    """Reads MSRs through KVM_GET_MSRS; see `VCPU.get_msrs`."""
    wanted = list(indices)
    values: dict[int, int] = {}
    for start in range(0, len(wanted), MSRS_A_CALL):
        part = wanted[start : start + MSRS_A_CALL]
        struct = array_struct("struct kvm_msrs", "nmsrs", "entries", ({"index": index} for index in part))
        done, data = ioctl("KVM_GET_MSRS", struct_bytes(struct))
        answer = struct_from("struct kvm_msrs", data, "entries")
        # KVM stops at the first that it refuses, and says how many it did.
        if done < len(part):
            raise UnsupportedError(f"KVM_GET_MSRS: KVM does not let {_show(part[done])} be read here")
        values |= {entry.index: entry.data for entry in answer.entries}
    return values


def write_msrs(ioctl: _Ioctl, values: Mapping[int, int]) -> None:
    """Writes MSRs through KVM_SET_MSRS; see `VCPU.set_msrs`."""
    items = list(values.items())
    for start in range(0, len(items), MSRS_A_CALL):
        part = items[start : start + MSRS_A_CALL]
        entries = ({"index": index, "data": value} for index, value in part)
        struct = array_struct("struct kvm_msrs", "nmsrs", "entries", entries)
        done, _ = ioctl("KVM_SET_MSRS", struct_bytes(struct))
        if done < len(part):
            index, value = part[done]
            raise UnsupportedError(
                f"KVM_SET_MSRS: KVM refuses {value:#x} for {_show(index)}; those before it are set"
            )


def _show(index: int) -> str:
    name = msr_name(index)
    return f"MSR {index:#x}" if name.startswith("0x") else f"MSR {index:#x} ({name})"
