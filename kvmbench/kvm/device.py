"""A device that KVM emulates in the kernel, apart from the ones that have ioctls of their own."""

from __future__ import annotations

from kvmbench.kvm.descriptor import AttributedDescriptor


class Device(AttributedDescriptor):
    """What KVM_CREATE_DEVICE made: all it has are attributes.

    On x86 the only kind is VFIO (``KVM_DEV_TYPE_VFIO``), and only where the kernel has it.
    """

    _noun = "device"
