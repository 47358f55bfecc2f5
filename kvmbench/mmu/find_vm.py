"""Where the kernel keeps the `struct kvm` of a VM, and the `struct kvm_vcpu` of each vcpu.

A process's descriptor leads there: task -> files -> file -> private_data. No other way is taken, and all else that is
read begins at these structs: nothing of other VMs or programs is looked at but the list of processes by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvmbench.errors import HostError, InternalError
from kvmbench.host.kernel.program import HostKernel

_TASK = "struct task_struct"
_MOST_TASKS = 65536


@dataclass(frozen=True)
class KernelVm:
    """Addresses in the host's kernel.

    Attributes:
        kvm: of the `struct kvm`.
        vcpus: of each `struct kvm_vcpu`, in the order of the machine's vcpus.
    """

    kvm: int
    vcpus: tuple[int, ...]


def find_vm(kernel: HostKernel, vm: int, vcpus: Sequence[int]) -> KernelVm:
    """Finds a VM and its vcpus, given by their handles in the core.

    Raises:
        HostError: the process is not among the kernel's: the agent runs in a container.
        InternalError: what is found there is something else.
    """
    pid, fd = kernel.reader.descriptor(vm)
    files = _files_of(kernel, pid)
    table = kernel.u64(files + kernel.offset("struct files_struct", "fdt"))
    descriptors = kernel.u64(table + kernel.offset("struct fdtable", "fd"))

    def private_data(fd: int) -> int:
        file = kernel.u64(descriptors + 8 * fd)
        return kernel.u64(file + kernel.offset("struct file", "private_data"))

    found = KernelVm(private_data(fd), tuple(private_data(kernel.reader.descriptor(each)[1]) for each in vcpus))
    seen = kernel.reader.read(found.kvm + kernel.offset("struct kvm", "userspace_pid"), 4)
    if seen is None or int.from_bytes(seen, "little") != pid:
        raise InternalError(f"descriptor {fd} of process {pid} leads to {found.kvm:#x}, which is no struct kvm of its")
    owner = kernel.offset("struct kvm_vcpu", "kvm")
    for n, vcpu in enumerate(found.vcpus):
        if kernel.u64(vcpu + owner) != found.kvm:
            raise InternalError(f"vcpu {n} was found at {vcpu:#x}, which is no struct kvm_vcpu of {found.kvm:#x}")
    return found


def _files_of(kernel: HostKernel, pid: int) -> int:
    members = {name: kernel.offset(_TASK, name) for name in ("tasks", "tgid", "files")}
    first = min(members.values())
    size = max(members.values()) + 16 - first
    head = kernel.symbol("init_task") + members["tasks"]
    tasks = kernel.reader.list_objects(head, size, members["tasks"] - first, _MOST_TASKS)
    mine = np.flatnonzero(kernel.column(tasks.data, _TASK, "tgid", "<i4", first) == pid)
    if not len(mine):
        raise HostError(
            f"process {pid}, which holds the VM, is not among the kernel's {len(tasks.addresses):,} processes: does it "
            "run in a container, with numbers of its own?"
        )
    return int(kernel.column(tasks.data, _TASK, "files", "<u8", first)[mine[0]])
