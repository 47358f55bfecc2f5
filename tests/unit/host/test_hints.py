"""Hints: the likely cause of a failed ioctl."""

from __future__ import annotations

import errno

from kvmbench.errors import KvmIoctlError
from kvmbench.host.hints import hint_for, hinted_ioctls
from kvmbench.uapi import IOCTLS


def test_every_hint_is_for_an_ioctl_that_there_is():
    assert hinted_ioctls() <= set(IOCTLS)


def test_a_hint_is_of_the_ioctl_and_the_errno():
    assert "VM.create_irqchip()" in hint_for("KVM_IRQ_LINE", errno.ENXIO)
    assert "irq_line" in hint_for("KVM_INTERRUPT", errno.ENXIO)
    assert "has a vcpu of that id" in hint_for("KVM_CREATE_VCPU", errno.EEXIST)


def test_an_errno_that_means_the_same_everywhere_has_a_hint_for_any_ioctl():
    assert "no such ioctl" in hint_for("KVM_GET_NR_MMU_PAGES", errno.ENOTTY)


def test_what_has_no_likely_cause_has_no_hint():
    assert hint_for("KVM_GET_REGS", errno.EDOM) == ""


def test_the_error_says_the_ioctl_the_errno_and_the_hint():
    error = KvmIoctlError("KVM_IRQ_LINE", errno.ENXIO, hint_for("KVM_IRQ_LINE", errno.ENXIO))
    assert str(error).startswith("KVM_IRQ_LINE failed: No such device or address (errno 6): the VM has no")
