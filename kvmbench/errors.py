"""Every exception kvmbench raises, under one base.

Four causes are kept apart: misuse (`MisuseError`, a `ValueError`), something
closed by you (`ClosedError`), something the host refused or lost
(`HostError`), and our own bug (`InternalError`).
"""

from __future__ import annotations


class KvmbenchError(Exception):
    """Base of all exceptions raised by kvmbench."""


class MisuseError(KvmbenchError, ValueError):
    """An argument cannot be right whatever the host is: a bad size, name or mode."""


class AddressError(MisuseError):
    """An address or range lies outside the guest's memory, or overlaps something."""


class AssemblyError(MisuseError):
    """The assembler or linker refused the source; names each line."""


class LoadError(MisuseError):
    """A file to be loaded is truncated, of another machine, or does not fit."""


class ClosedError(KvmbenchError):
    """You closed the host, machine or vcpu that is used here."""


class HostError(KvmbenchError):
    """The host cannot do, or refused, what was asked."""


class HostUnavailable(HostError):
    """No such host can be started: no /dev/kvm, no QEMU, no kernel package, no permission.

    The message names what is missing and the command that mends it.
    """


class HostLost(HostError):
    """The agent, the emulator or ssh ended while the host was in use.

    Records already fetched stay valid; connect again for a new host.
    """


class UnsupportedError(HostError):
    """This host lacks a capability that the call needs; another host may have it."""


class BusyError(HostError):
    """The vcpu is running; stop it (`cpu.interrupt()`) or wait for it first."""


class KvmIoctlError(HostError, OSError):
    """The kernel refused an ioctl.

    Attributes:
        ioctl: its name, such as ``KVM_SET_SREGS``.
        errno: the kernel's error number.
        hint: the likely cause, or an empty string.
    """

    def __init__(self, ioctl: str, errno: int, hint: str = "") -> None:
        import os

        self.ioctl = ioctl
        self.hint = hint
        text = f"{ioctl} failed: {os.strerror(errno)} (errno {errno})"
        OSError.__init__(self, errno, f"{text}: {hint}" if hint else text)

    def __str__(self) -> str:
        return str(self.strerror)


class InternalError(KvmbenchError):
    """A bug in kvmbench: a reply or a file of its own that makes no sense."""
