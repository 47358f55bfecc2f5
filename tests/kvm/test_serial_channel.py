"""The appliance's channel over a serial line, for emulators without virtio: the agent as process 1 talks on ttyS1."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

import kvmbench as kb
from kvmbench.errors import HostUnavailable
from kvmbench.host import image as images
from kvmbench.host.client import Core
from kvmbench.host.host import Host, HostInfo
from kvmbench.host.process import Process
from kvmbench.host.qemu import find_qemu
from kvmbench.host.selfcheck import check
from kvmbench.host.stream import StreamChannel, greet
from kvmbench.host.tsc import tsc_khz

_BOOT_WITHIN_S = 60.0


# What the agent writes once the line is open and raw (core/init.c); before, the driver loses or echoes what comes.
_READY = b"\nkvmbench agent\n"


def wait_until_ready(stream: socket.socket) -> None:
    stream.settimeout(_BOOT_WITHIN_S)
    seen = b""
    while not seen.endswith(_READY):
        byte = stream.recv(1)
        if not byte:
            raise EOFError
        seen += byte


@pytest.fixture(scope="module")
def serial_host(need) -> Iterator[kb.Host]:
    """The appliance's kernel and agent in a QEMU without any virtio device."""
    try:
        qemu, image = find_qemu(), images.build()
    except HostUnavailable as error:
        need("amd", f"no appliance: {error}")
    words = "console=ttyS0 quiet oops=panic panic=-1 mitigations=off kvmbench.channel=ttyS1"
    with contextlib.ExitStack() as stack:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [
                str(qemu.path),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-machine", "pc", "-accel", "tcg", "-cpu", "max", "-m", "256M"),
                *("-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
                *("-append", f"{words} tsc_early_khz={tsc_khz()}"),
                *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
                *("-chardev", f"socket,id=channel,fd={theirs.fileno()}", "-serial", "chardev:channel"),
            ]
            process = Process("QEMU", command, pass_fds=[theirs.fileno()], die_with_parent=True)
        stack.callback(process.end)
        try:
            wait_until_ready(ours)
            assert greet(ours, timeout_s=_BOOT_WITHIN_S) == 12
        except (EOFError, TimeoutError):
            ours.close()
            pytest.fail(f"no agent on ttyS1; the console says:\n{process.output()}")
        core = Core(StreamChannel(ours, peer="the appliance", describe_end=process.describe_end))
        host = Host("serial", core, HostInfo.read(core, kind="appliance"), check(core), closer=process.end)
        yield stack.enter_context(host)


def test_a_guest_is_stepped_and_recorded_over_a_serial_line(serial_host):
    assert serial_host.mechanisms.step
    with kb.Machine(serial_host, memory="1M") as m:
        m.load_asm("xor eax, eax\nloop: inc rax\njmp loop\n")
        assert m.cpu.step().rip == 0x1002
        rec = m.cpu.record(500)
        assert len(rec) == 500
        assert m.cpu.regs.rax == int(rec.rax[-1]) == 250


def test_all_bytes_pass_a_serial_line_as_they_are(serial_host):
    # A terminal would swallow or change carriage returns, control-C, XON and XOFF.
    data = bytes(range(256)) * 256
    with kb.Machine(serial_host, memory="1M") as m:
        m.memory.write(0x10000, data)
        assert m.memory.read(0x10000, len(data)) == data
