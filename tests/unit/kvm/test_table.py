"""The wrappers, the core's table of ioctls and the header name the same things."""

from __future__ import annotations

import re
from pathlib import Path

from kvmbench import kvm, uapi

PACKAGE = Path(kvm.__file__).parent
CORE = PACKAGE.parent / "core"

# Served by messages of their own, whose methods have the ioctl's name too.
BY_MESSAGE = {"KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_CREATE_DEVICE", "KVM_GET_STATS_FD"}


def table() -> set[str]:
    text = (CORE / "ioctls.c").read_text()
    body = text[text.index("static const struct entry table[]") :]
    body = body[: body.index("\n};")]
    pairs = re.findall(r"\b(?:NONE|VALUE|IN|OUT|INOUT|SPECIAL)\((KVM_\w+)|ARRAY\(\w+, (KVM_\w+)", body)
    return {one or other for one, other in pairs}


def wrapped() -> set[str]:
    return {
        name
        for path in PACKAGE.glob("*.py")
        for name in re.findall(r'"(KVM_[A-Z0-9_]+)"', path.read_text())
    }


def test_every_ioctl_of_the_cores_table_is_in_the_header():
    names = table()
    assert len(names) > 70
    assert names <= set(uapi.IOCTLS)


def test_every_ioctl_that_a_wrapper_asks_for_is_in_the_cores_table():
    names = wrapped()
    assert len(names) > 60
    assert names - table() == set()


def test_every_wrapper_has_the_name_of_its_ioctl():
    methods = {
        name
        for kind in (kvm.System, kvm.VM, kvm.VCPU, kvm.Device)
        for name in dir(kind)
        if not name.startswith("_")
    }
    for ioctl in wrapped() | BY_MESSAGE:
        assert ioctl.removeprefix("KVM_").lower() in methods, ioctl


def test_every_wrapper_names_its_capability_and_its_entry_in_the_api():
    for kind in (kvm.System, kvm.VM, kvm.VCPU, kvm.Device):
        for ioctl in wrapped() | BY_MESSAGE:
            method = getattr(kind, ioctl.removeprefix("KVM_").lower(), None)
            if method is not None:
                assert "Capability:" in method.__doc__, f"{kind.__name__}.{method.__name__}"
                assert re.search(r"Source: (KVM API|Documentation/)", method.__doc__), method
