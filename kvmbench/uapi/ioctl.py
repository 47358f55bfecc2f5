"""The table of KVM's ioctls."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from kvmbench.uapi._ioctls import TABLE


class Ioctl(NamedTuple):
    """One ioctl of KVM.

    Attributes:
        name: as in ``<linux/kvm.h>``.
        number: what ioctl() gets as its request.
        direction: ``none`` (no argument, or a plain number), ``in`` (the kernel reads a struct), ``out`` or
            ``inout``. It repeats what the header declares, and the header is wrong in places: KVM_SET_PIT and
            KVM_SET_IRQCHIP say ``out`` though the kernel reads, KVM_GET_DEVICE_ATTR says ``in``.
        size_bytes: of the argument struct, without the elements of a flexible array; 0 for ``none``.
        struct: the argument's C type, such as ``struct kvm_regs``; empty for ``none``.
    """

    name: str
    number: int
    direction: str
    size_bytes: int
    struct: str


IOCTLS: Mapping[str, Ioctl] = MappingProxyType({row[0]: Ioctl(*row) for row in TABLE})
"""Every ioctl by name, in the header's order; those of other architectures are left out."""


def ioctl_by_number(number: int) -> Ioctl | None:
    """Finds an ioctl by its request number; where two share it, the one that the header has first."""
    return next((ioctl for ioctl in IOCTLS.values() if ioctl.number == number), None)
