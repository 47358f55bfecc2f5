"""What the objects of this package share: a handle in the core, ioctls on it, and its end.

The methods with an underscore are what makes an ioctl's wrapper a line or two; see docs/adding-an-ioctl.md.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Mapping, Sequence
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvmbench.arguments import refused_plainly
from kvmbench.errors import ClosedError, HostLost, KvmIoctlError, MisuseError
from kvmbench.uapi import IOCTLS, ffi

if TYPE_CHECKING:
    from kvmbench.host.client import Core


class Descriptor:
    """Something that takes ioctls: /dev/kvm, a VM, a vcpu, a device.

    A context manager; closing it twice is no error, using it afterwards is.

    Attributes:
        core: the core that holds it.
        handle: its number there.
    """

    # What messages call it.
    _noun = "descriptor"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # What cffi says of a value that is no number names neither the ioctl nor the argument.
        for name, method in list(vars(cls).items()):
            if isinstance(method, FunctionType) and not name.startswith("_") and _takes_arguments(method):
                setattr(cls, name, refused_plainly(method))

    def __init__(self, core: Core, handle: int, parent: Descriptor | None = None) -> None:
        self.core = core
        self.handle = handle
        self._parent = parent
        self._is_closed = False

    @property
    def closed(self) -> bool:
        """True after `close()`, also that of its VM or its host."""
        return self._is_closed or self.core.closed or (self._parent is not None and self._parent.closed)

    def close(self) -> None:
        """Closes it and everything made from it; idempotent."""
        if not self.closed:
            self._is_closed = True
            # A host that is gone, or being closed by another thread, has nothing left to close.
            with contextlib.suppress(HostLost, ClosedError):
                self.core.close_handle(self.handle)
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self._noun}{' (closed)' if self.closed else ''}>"

    def _open_handle(self) -> int:
        if self.closed:
            raise ClosedError(f"the {self._noun} is closed")
        return self.handle

    def _ioctl(self, name: str, data: bytes = b"", *, value: int = 0, out_bytes: int = 0) -> tuple[int, bytes]:
        return self.core.ioctl(self._open_handle(), name, data, value=value, out_bytes=out_bytes)

    def _call(self, name: str, value: int = 0) -> int:
        # No argument, or a number; what ioctl() returned.
        if not 0 <= value < 1 << 64:
            raise MisuseError(f"{name}: {value} is no 64-bit number")
        return self._ioctl(name, value=value)[0]

    def _get(self, name: str, argument: Any = None) -> Any:
        # A struct that KVM fills in; `argument` where it also reads it. The result is the caller's own.
        sent = b"" if argument is None else struct_bytes(argument)
        return struct_from(IOCTLS[name].struct, self._ioctl(name, sent)[1])

    def _set(self, name: str, struct: Any, fields: Mapping[str, Any], current: Any = None) -> None:
        # A struct that KVM reads: `struct`, or what `current` gives (else zeros) with `fields` changed.
        kind = IOCTLS[name].struct
        if struct is not None and fields:
            raise MisuseError(f"{name}: give a {kind} or fields, not both")
        if struct is None:
            struct = ffi.new(f"{kind} *") if current is None else current()
            set_fields(struct, fields, name)
        elif not isinstance(struct, ffi.CData) or ffi.typeof(struct) not in _spellings(kind):
            raise MisuseError(f"{name} takes a {kind}, not {struct!r}")
        self._ioctl(name, struct_bytes(struct))

    def _enable_cap(self, capability: int, args: Sequence[int], flags: int) -> None:
        if len(args) > 4:
            raise MisuseError(f"KVM_ENABLE_CAP takes up to 4 arguments, not {len(args)}")
        fields = {"cap": capability, "flags": flags, "args": list(args)}
        try:
            self._set("KVM_ENABLE_CAP", None, fields)
        except MisuseError as error:
            raise MisuseError(
                f"capability {capability!r} of a {self._noun} is not in the core's table of those whose "
                "arguments are plain numbers (core/ioctl_special.c), or an argument is no 64-bit number"
            ) from error

    def _get_list(self, name: str, array: str, entries: int) -> Any:
        # A header and as many array entries as KVM has, at most `entries`.
        kind = IOCTLS[name].struct
        item = ffi.sizeof(dict(ffi.typeof(kind).fields)[array].type.item)
        return struct_from(kind, self._ioctl(name, out_bytes=ffi.sizeof(kind) + entries * item)[1], array)

    def _set_list(self, name: str, count: str, array: str, entries: Iterable[Any]) -> int:
        # A header that counts the entries behind it; what ioctl() returned.
        struct = array_struct(IOCTLS[name].struct, count, array, entries)
        return self._ioctl(name, struct_bytes(struct))[0]


def _takes_arguments(method: FunctionType) -> bool:
    code = method.__code__
    return code.co_argcount + code.co_kwonlyargcount > 1 or bool(code.co_flags & (CO_VARARGS | CO_VARKEYWORDS))


class AttributedDescriptor(Descriptor):
    """A descriptor with attributes: values by group and number, the smallest of KVM's extension points."""

    def has_device_attr(self, group: int, attr: int) -> bool:
        """Says whether there is an attribute, without reading it.

        Capability: DEVICE_CTRL (devices), SYS_ATTRIBUTES, VM_ATTRIBUTES, VCPU_ATTRIBUTES.
        Source: KVM API, KVM_HAS_DEVICE_ATTR.
        """
        try:
            self._ioctl("KVM_HAS_DEVICE_ATTR", _attr_bytes(group, attr))
        except KvmIoctlError as error:
            if error.errno in (errno.ENXIO, errno.ENOTTY, errno.EPERM):
                return False
            raise
        return True

    def get_device_attr(self, group: int, attr: int, *, size_bytes: int = 8) -> bytes:
        """Reads an attribute of `size_bytes` bytes, at most 4096.

        Capability: as for `has_device_attr`.
        Source: KVM API, KVM_GET_DEVICE_ATTR.

        Raises:
            KvmIoctlError: there is none (ENXIO), or it cannot be read (EPERM).
        """
        return self._ioctl("KVM_GET_DEVICE_ATTR", _attr_bytes(group, attr), out_bytes=size_bytes)[1]

    def set_device_attr(self, group: int, attr: int, data: bytes) -> None:
        """Writes an attribute, of which KVM reads as many bytes of `data` as it has.

        Capability: as for `has_device_attr`.
        Source: KVM API, KVM_SET_DEVICE_ATTR.

        Raises:
            KvmIoctlError: there is none (ENXIO), or it cannot be written (EPERM).
        """
        self._ioctl("KVM_SET_DEVICE_ATTR", _attr_bytes(group, attr) + data)


def struct_bytes(struct: Any) -> bytes:
    """The bytes of a cffi struct, or of what a pointer to one points to, its flexible array included."""
    if ffi.typeof(struct).kind == "struct":
        struct = ffi.addressof(struct)
    return bytes(ffi.buffer(struct))


def struct_from(kind: str, data: bytes, array: str | None = None) -> Any:
    """An owned cffi struct with these bytes; with `array`, as long as the bytes make its flexible array."""
    if array is None:
        struct = ffi.new(f"{kind} *")
    else:
        item = dict(ffi.typeof(kind).fields)[array]
        struct = ffi.new(f"{kind} *", {array: (len(data) - item.offset) // ffi.sizeof(item.type.item)})
    ffi.memmove(struct, data, min(len(data), len(ffi.buffer(struct))))
    return struct


def array_struct(kind: str, count: str, array: str, entries: Iterable[Any]) -> Any:
    """A struct with a flexible array: `entries` are cffi structs, or dictionaries of their members."""
    entries = list(entries)
    struct = ffi.new(f"{kind} *", {count: len(entries), array: len(entries)})
    target = getattr(struct, array)
    for index, entry in enumerate(entries):
        try:
            target[index] = entry
        except (TypeError, OverflowError, KeyError) as error:
            raise MisuseError(f"{kind}.{array}[{index}]: {entry!r}: {error}") from None
    return struct


def set_fields(struct: Any, fields: Mapping[str, Any], name: str) -> None:
    """Changes members of a struct.

    Raises:
        MisuseError: there is no such member, or the value does not fit it.
    """
    for field, value in fields.items():
        try:
            setattr(struct, field, value)
        except AttributeError:
            known = ", ".join(known for known, _ in ffi.typeof(struct).item.fields if known)
            raise MisuseError(f"{name}: no field {field!r}; there are {known}") from None
        except (OverflowError, TypeError) as error:
            raise MisuseError(f"{name}: {field}={value!r}: {error}") from None


def _spellings(kind: str) -> tuple[Any, Any]:
    return ffi.typeof(f"{kind} *"), ffi.typeof(kind)


def _attr_bytes(group: int, attr: int) -> bytes:
    return struct_bytes(ffi.new("struct kvm_device_attr *", {"group": group, "attr": attr}))
