"""Bochs: what is missing is named, and the serial line carries all bytes and ends with either side."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable, MisuseError
from kvmbench.host import bochs
from kvmbench.host.bochs import Bochs, Line, configuration, find_bochs, version_of
from kvmbench.host.intel import start_intel

ALL_BYTES = bytes(range(256)) * 8


def test_without_bochs_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVMBENCH_BOCHS", raising=False)
    with pytest.raises(HostUnavailable, match=r"apt-get install .*bochs bochs-sdl bochsbios vgabios"):
        find_bochs(search_path=str(tmp_path))


def test_without_firmware_the_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bochs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.delenv("KVMBENCH_BOCHS", raising=False)
    monkeypatch.setattr(bochs, "_SHARE", (tmp_path,))
    with pytest.raises(HostUnavailable, match=r"firmware .*bochsbios"):
        find_bochs(search_path=str(tmp_path))


def test_a_program_named_by_the_environment_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMBENCH_BOCHS", "/nowhere/bochs")
    with pytest.raises(HostUnavailable, match="KVMBENCH_BOCHS"):
        find_bochs()


def test_the_version_is_read_from_the_banner() -> None:
    assert version_of("===\n     Bochs x86 Emulator 2.7\n Built from") == "2.7"
    assert version_of("nothing of the kind") == ""


def test_the_configuration_names_the_line_the_disc_and_the_rate(tmp_path: Path) -> None:
    text = configuration(
        Bochs(Path("/usr/bin/bochs"), tmp_path),
        disc=tmp_path / "a.iso",
        line="/dev/pts/7",
        console=tmp_path / "console",
        log=tmp_path / "log",
        memory_mib=256,
    )
    assert "com1: enabled=1, mode=term, dev=/dev/pts/7\n" in text
    assert f"path={tmp_path}/a.iso" in text
    assert f"ips={bochs.INSTRUCTIONS_PER_S}," in text


@pytest.mark.parametrize(
    "options",
    [{"ept": 2}, {"memory": "64M"}, {"memory": "4G"}, {"parameters": 1}, {"progress": 1}],
    ids=lambda options: next(iter(options)),
)
def test_a_value_out_of_range_is_misuse(options: dict[str, object]) -> None:
    with pytest.raises(MisuseError, match=next(iter(options))):
        start_intel(**options)  # type: ignore[arg-type]


def test_a_line_carries_every_byte_both_ways() -> None:
    line = Line()
    terminal = os.open(line.name, os.O_RDWR | os.O_NOCTTY)
    line.start()
    line.opened()
    line.socket.settimeout(10)
    try:
        line.socket.sendall(ALL_BYTES)
        came = b""
        while len(came) < len(ALL_BYTES):
            came += os.read(terminal, 4096)
        assert came == ALL_BYTES
        os.write(terminal, ALL_BYTES)
        came = b""
        while len(came) < len(ALL_BYTES):
            came += line.socket.recv(4096)
        assert came == ALL_BYTES
    finally:
        os.close(terminal)
    assert line.socket.recv(1) == b""  # the other side is gone
    line.socket.close()


def test_a_line_that_was_never_used_leaves_no_descriptor() -> None:
    before = set(os.listdir("/proc/self/fd"))
    Line().abandon()
    assert set(os.listdir("/proc/self/fd")) <= before
