"""Which QEMU is taken, and the command line it gets."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from kvmbench.errors import HostUnavailable
from kvmbench.host.qemu import PROGRAM, Configuration, Qemu, command, find_qemu
from kvmbench.host.saved_state import SavedStates, state_key


def program(folder: Path, says: str, name: str = PROGRAM) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho asked >> {folder / 'asked'}\n{says}\n")
    path.chmod(0o755)
    return path


def version(number: str) -> str:
    return f"echo 'QEMU emulator version {number} (Debian 1:{number})'"


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv("KVMBENCH_QEMU", raising=False)


def test_the_newest_qemu_on_path_is_taken(tmp_path: Path) -> None:
    for number in ("7.2.22", "10.0.2", "9.1.0"):
        program(tmp_path / number, version(number))
    path = ":".join(str(tmp_path / number) for number in ("7.2.22", "10.0.2", "9.1.0"))
    found = find_qemu(search_path=path)
    assert (found.version, found.path) == ("10.0.2", tmp_path / "10.0.2" / PROGRAM)


def test_the_environment_chooses_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "new", version("10.0.2"))
    chosen = program(tmp_path / "old", version("7.2.0"), "my-qemu")
    monkeypatch.setenv("KVMBENCH_QEMU", str(chosen))
    assert find_qemu(search_path=str(tmp_path / "new")).path == chosen
    monkeypatch.setenv("KVMBENCH_QEMU", "/nonexistent/qemu")
    with pytest.raises(HostUnavailable, match="KVMBENCH_QEMU is '/nonexistent/qemu'"):
        find_qemu(search_path=str(tmp_path / "new"))


def compiled(folder: Path, number: str) -> Path:
    """A program that tells a version and notes that it was asked, and no script."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    folder.mkdir(exist_ok=True)
    source = f"""
    #include <stdio.h>
    int main(void) {{
        FILE *asked = fopen("{folder / "asked"}", "a");
        fputs("asked\\n", asked);
        puts("QEMU emulator version {number}");
        return fclose(asked);
    }}"""
    path = folder / PROGRAM
    path.unlink(missing_ok=True)
    subprocess.run([compiler, "-x", "c", "-", "-o", path], input=source, text=True, check=True)
    return path


def test_the_version_is_asked_for_once_and_again_after_an_upgrade(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    compiled(folder, "7.2.22")
    first = find_qemu(search_path=str(folder))
    assert first.identity
    assert find_qemu(search_path=str(folder)) == first
    assert (folder / "asked").read_text() == "asked\n"
    compiled(folder, "10.0.2")
    second = find_qemu(search_path=str(folder))
    assert second.version == "10.0.2"
    assert second.identity != first.identity


def test_nothing_is_remembered_of_a_script_whose_program_may_change(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compiled(tmp_path / "real", "7.2.22")
    wrapper = program(tmp_path / "bin", f'exec {real} "$@"', "my-qemu")
    monkeypatch.setenv("KVMBENCH_QEMU", str(wrapper))
    first = find_qemu()
    compiled(tmp_path / "real", "10.0.2")
    second = find_qemu()
    assert (first.version, second.version) == ("7.2.22", "10.0.2")
    configuration = Configuration(tmp_path / "kernel", tmp_path / "initramfs", 256, 1, {})
    assert state_key(first, configuration) == state_key(second, configuration) == ""
    states = SavedStates(cache / "states")
    assert not states.save("", lambda descriptor: None)
    states.write_note("", {"step": [0]})
    assert states.open("") is None
    assert not (cache / "states").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}', "{damaged", '{"x": "../.."}'])
def test_a_damaged_memory_of_versions_is_made_anew(tmp_path: Path, cache: Path, content: str) -> None:
    compiled(tmp_path / "bin", "7.2.22")
    find_qemu(search_path=str(tmp_path / "bin"))
    (cache / "qemu.json").write_text(content)
    assert find_qemu(search_path=str(tmp_path / "bin")).version == "7.2.22"


def test_a_qemu_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    program(tmp_path / "broken", "echo cannot load libfoo >&2; exit 127")
    program(tmp_path / "good", version("8.2.0"))
    assert find_qemu(search_path=f"{tmp_path / 'broken'}:{tmp_path / 'good'}").version == "8.2.0"
    with pytest.raises(HostUnavailable, match="cannot load libfoo"):
        find_qemu(search_path=str(tmp_path / "broken"))


def test_no_qemu_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(HostUnavailable, match=r"apt-get install .*qemu-system-x86"):
        find_qemu(search_path=str(tmp_path))


def test_the_command_line_opens_no_network_and_carries_the_module_parameters(tmp_path: Path) -> None:
    qemu = Qemu(tmp_path / PROGRAM, "7.2.22", "x")
    configuration = Configuration(tmp_path / "kernel", tmp_path / "initramfs", 256, 2, {"kvm_amd.npt": "0"})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = command(qemu, configuration, channel=ours, monitor=theirs, memory=77)
        assert f"socket,id=channel,fd={ours.fileno()}" in words
        assert f"socket,id=monitor,fd={theirs.fileno()}" in words
    assert "-nodefaults" in words
    assert not any(
        word.startswith(("-net", "-nic", "-vnc", "-gdb", "-enable-kvm")) or "server" in word for word in words
    )
    assert words[words.index("-accel") + 1] == "tcg"
    assert "memory-backend-file,id=ram,size=256M,mem-path=/proc/self/fd/77,share=on" in words
    assert "kvm_amd.npt=0" in words[words.index("-append") + 1].split()


def test_what_decides_over_a_saved_state_holds_no_descriptor_numbers(tmp_path: Path) -> None:
    configuration = Configuration(tmp_path / "kernel", tmp_path / "initramfs", 256, 2, {})
    assert not any(re.search(r"\bfd[=/]", word) for word in configuration.arguments())


def test_a_saved_machine_is_started_without_kernel_and_does_not_write_to_what_was_saved(tmp_path: Path) -> None:
    qemu = Qemu(tmp_path / PROGRAM, "7.2.22", "x")
    configuration = Configuration(tmp_path / "kernel", tmp_path / "initramfs", 256, 2, {})
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = command(qemu, configuration, channel=ours, monitor=theirs, memory=77, saved=True)
    assert "memory-backend-file,id=ram,size=256M,mem-path=/proc/self/fd/77,share=off" in words
    assert words[words.index("-incoming") + 1] == "defer"
    assert not {"-kernel", "-initrd", "-append"} & set(words)
    assert set(configuration.machine_arguments()) <= set(words)


def test_a_kernel_in_another_form_changes_only_what_is_booted(tmp_path: Path) -> None:
    configuration = Configuration(tmp_path / "kernel", tmp_path / "initramfs", 256, 2, {})
    words = configuration.kernel_arguments(tmp_path / "vmlinux")
    assert words[words.index("-kernel") + 1] == str(tmp_path / "vmlinux")
    assert str(tmp_path / "kernel") in configuration.arguments()
