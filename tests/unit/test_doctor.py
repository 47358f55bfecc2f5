"""The doctor tells what is missing and what mends it, whatever the machine is like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmbench import cli, doctor
from kvmbench.doctor import appliance, emulators, local, python, toolchain, tracing
from kvmbench.doctor.finding import Finding, Status, guarded
from kvmbench.doctor.report import Report


def only(findings: Iterator[Finding], subject: str) -> Finding:
    matching = [finding for finding in findings if finding.subject == subject]
    assert len(matching) == 1, matching
    return matching[0]


def program(folder: Path, name: str, body: str) -> Path:
    """Puts an executable shell script into `folder`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A /sys/module with kvm_amd in it."""
    folder = tmp_path / "module"
    (folder / "kvm").mkdir(parents=True)
    (folder / "kvm_amd" / "parameters").mkdir(parents=True)
    (folder / "kvm_amd" / "parameters" / "npt").write_text("Y\n", encoding="utf-8")
    (folder / "ext4").mkdir()
    return folder


def examine_absent(tmp_path: Path, flags: str) -> Finding:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n", encoding="ascii")
    return only(
        local.examine(device=tmp_path / "kvm", modules=tmp_path / "none", cpuinfo=cpuinfo),
        str(tmp_path / "kvm"),
    )


def test_without_the_module_the_doctor_names_the_one_for_this_processor(tmp_path: Path) -> None:
    assert examine_absent(tmp_path, "vmx").mend == "sudo modprobe kvm_intel"
    assert examine_absent(tmp_path, "svm").mend == "sudo modprobe kvm_amd"


def test_a_machine_without_virtualization_is_told_that_nothing_mends_it(tmp_path: Path) -> None:
    guest, bare = examine_absent(tmp_path, "hypervisor"), examine_absent(tmp_path, "sse")
    assert "nested virtualization" in guest.text
    assert "neither VMX nor SVM" in bare.text
    for finding in (guest, bare):
        assert finding.status is Status.MISSING
        assert finding.mend == ""
        assert "appliance" in finding.text


def test_a_container_without_the_device_is_told_about_the_device(tmp_path: Path, modules: Path) -> None:
    finding = only(local.examine(device=tmp_path / "kvm", modules=modules), str(tmp_path / "kvm"))
    assert "--device /dev/kvm" in finding.mend


def test_a_device_that_is_not_kvm_is_called_so(modules: Path) -> None:
    found = list(local.examine(device=Path("/dev/null"), modules=modules))
    assert "not a KVM device" in only(iter(found), "/dev/null").text
    module = only(iter(found), "module")
    assert module.text == "kvm_amd, kvm"
    assert module.facts["parameters"] == {"kvm_amd": {"npt": "Y"}, "kvm": {}}


@pytest.mark.parametrize(("mode", "command"), [(0o660, "usermod -aG"), (0o600, "chmod g+rw")])
def test_a_device_one_may_not_open_comes_with_the_command_that_permits_it(
    tmp_path: Path, modules: Path, monkeypatch: pytest.MonkeyPatch, mode: int, command: str
) -> None:
    device = tmp_path / "kvm"
    device.touch(mode=mode)
    group = next((gid for gid in range(1, 100) if local._group(gid) not in ("root", str(gid))), 0)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    # Root may open everything, so the refusal has to be arranged.
    monkeypatch.setattr(local.os, "open", refuse)
    stat = os.stat(device)
    monkeypatch.setattr(type(device), "stat", lambda self, **_: os.stat_result((*stat[:5], group, *stat[6:])))
    finding = only(local.examine(device=device, modules=modules), str(device))
    assert finding.status is Status.MISSING
    assert "you may not open it" in finding.text
    assert command in finding.mend


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ("echo 'QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)'", Status.LIMITED),
        ("echo 'QEMU emulator version 9.0.2'", Status.LIMITED),
        ("echo 'QEMU emulator version 9.1.0'", Status.OK),
        ("echo 'QEMU emulator version 10.0.2 (Debian 1:10.0.2)'", Status.OK),
        ("echo no version here", Status.MISSING),
        ("echo 'error while loading shared libraries' >&2; exit 127", Status.MISSING),
    ],
)
def test_qemu_is_judged_by_the_version_it_tells(tmp_path: Path, answer: str, status: Status) -> None:
    program(tmp_path, "qemu-system-x86_64", answer)
    finding = only(emulators.examine(search_path=str(tmp_path)), "QEMU")
    assert finding.status is status
    if status is Status.LIMITED:
        assert "HLTs in place of the instruction at CPL 0" in finding.text
        assert "step through the guest (slower) at CPL 3 or with an in-kernel irqchip" in finding.text


def test_an_old_qemu_on_debian_12_comes_with_the_way_to_backports(tmp_path: Path) -> None:
    program(tmp_path, "qemu-system-x86_64", "echo QEMU emulator version 7.2.22")
    release = tmp_path / "os-release"
    release.write_text("ID=debian\nVERSION_CODENAME=bookworm\n", encoding="utf-8")
    assert "backports" in only(emulators.examine(search_path=str(tmp_path), os_release=release), "QEMU").mend
    release.write_text("ID=ubuntu\nVERSION_CODENAME=noble\n", encoding="utf-8")
    assert only(emulators.examine(search_path=str(tmp_path), os_release=release), "QEMU").mend == ""


def test_a_bochs_without_its_firmware_is_named_with_its_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "bochs", "exit 1")
    monkeypatch.delenv("KVMBENCH_BOCHS", raising=False)
    monkeypatch.setattr("kvmbench.host.bochs._SHARE", (tmp_path,))
    finding = only(emulators.examine(search_path=str(tmp_path)), "Bochs")
    assert finding.status is Status.LIMITED
    assert "firmware" in finding.text
    assert "bochsbios" in finding.mend.split()


def test_absent_programs_and_headers_each_name_their_package(tmp_path: Path) -> None:
    found = [
        *emulators.examine(search_path=str(tmp_path)),
        *toolchain.examine(search_path=str(tmp_path), include=tmp_path),
    ]
    packages = {
        "QEMU": "qemu-system-x86",
        "Bochs": "bochs-sdl",
        "as": "binutils",
        "gcc": "gcc",
        "musl-gcc": "musl-tools",
        "ssh": "openssh-client",
        "linux/kvm.h": "linux-libc-dev",
    }
    for subject, package in packages.items():
        finding = only(iter(found), subject)
        assert finding.status is Status.MISSING
        assert finding.mend.startswith("sudo apt-get install")
        assert package in finding.mend.split()


def test_a_kernel_that_was_built_is_named_and_its_size_told(tmp_path: Path) -> None:
    folder = tmp_path / "kernels" / "0123"
    folder.mkdir(parents=True)
    (folder / "kernel").write_bytes(bytes(3_000_000))
    (folder / "kernel.json").write_text('{"release": "6.1.0-1-cloud-amd64", "origin": "linux-image 6.1"}')
    damaged = tmp_path / "kernels" / "4567"
    damaged.mkdir()
    (damaged / "kernel.json").write_text("{")
    (tmp_path / "default").write_text("0123")
    found = list(appliance.examine(cache=tmp_path))
    assert only(iter(found), "kernel").status is Status.OK
    assert only(iter(found), "kernel").text == "6.1.0-1-cloud-amd64 from linux-image 6.1"
    assert "kernels 3 MB" in only(iter(found), "cache").text


def test_a_kernel_that_is_not_built_comes_with_the_way_to_one(tmp_path: Path) -> None:
    empty, programs = tmp_path / "cache", tmp_path / "bin"
    programs.mkdir()
    without_apt = only(appliance.examine(cache=empty, search_path=str(programs)), "kernel")
    assert without_apt.status is Status.MISSING
    assert "--kernel" in without_apt.mend
    for name in ("apt-get", "apt-cache", "dpkg-deb"):
        program(programs, name, "exit 1")
    with_apt = only(appliance.examine(cache=empty, search_path=str(programs)), "kernel")
    assert with_apt.status is Status.LIMITED
    assert with_apt.mend == "kvmbench appliance build"
    assert only(appliance.examine(cache=empty, search_path=str(programs)), "agent").status is Status.MISSING
    assert list(tmp_path.iterdir()) == [programs], "looking must not make the cache"


def test_the_cache_can_be_listed_and_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVMBENCH_CACHE", str(tmp_path))
    for name in ("kernels/0123/kernel", "states/1.state", "agents/1/kvmbench-agent", "selfcheck-local.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1_000_000))
    assert cli.main(["appliance", "list"]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path) in shown
    assert shown.count("1.0 MB") == 3
    assert cli.main(["appliance", "clear"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["selfcheck-local.json"]
    capsys.readouterr()
    assert cli.main(["appliance", "clear"]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


def test_an_appliance_that_cannot_be_built_is_one_sentence_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVMBENCH_CACHE", str(tmp_path))
    missing = tmp_path / "no-such-kernel"
    assert cli.main(["appliance", "build", "--kernel", str(missing)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"kvmbench: the kernel {missing} cannot be read")
    assert cli.main(["appliance", "build", "--modules", str(tmp_path)]) == 1
    assert "--modules goes with --kernel" in capsys.readouterr().err


def test_tracing_that_is_there_is_counted(tmp_path: Path) -> None:
    for event in ("kvm/kvm_exit", "kvm/kvm_entry", "kvmmmu/kvm_mmu_set_spte"):
        (tmp_path / "events" / event).mkdir(parents=True)
    (tmp_path / "instances").mkdir()
    finding = only(tracing.examine(places=(tmp_path,)), "tracefs")
    assert finding.status is Status.OK
    assert finding.facts == {"place": str(tmp_path), "kvm_events": 2, "kvmmmu_events": 1}


def test_a_tracefs_that_is_not_mounted_comes_with_the_mount(tmp_path: Path) -> None:
    filesystems = tmp_path / "filesystems"
    filesystems.write_text("nodev\tsysfs\nnodev\ttracefs\n", encoding="ascii")
    empty = (tmp_path / "tracing",)
    assert "mount -t tracefs" in only(tracing.examine(places=empty, filesystems=filesystems), "tracefs").mend
    filesystems.write_text("nodev\tsysfs\n", encoding="ascii")
    assert only(tracing.examine(places=empty, filesystems=filesystems), "tracefs").mend == ""


def test_packages_are_compared_with_what_is_declared() -> None:
    lines = [
        "pytest>=1",
        "numpy>=9999",
        "absent-one>=2",
        'absent-two; extra == "plot"',
        'absent-three; extra == "test"',
    ]
    found = list(python.examine(requirements=lines))
    assert "older than 9999" in only(iter(found), "numpy").text
    assert only(iter(found), "absent-one").status is Status.MISSING
    assert only(iter(found), "absent-one").mend == "pip install 'absent-one>=2'"
    assert only(iter(found), "absent-two").status is Status.LIMITED
    assert not [finding for finding in found if finding.subject == "absent-three"]
    assert "pytest" in only(iter(found), "packages").facts


def test_an_examination_that_fails_is_a_finding_and_keeps_what_came_before() -> None:
    good = Finding("area", "first", Status.OK, "fine")

    def examine() -> Iterator[Finding]:
        yield good
        raise RuntimeError("surprise")

    found = guarded("area", examine)
    assert found[0] is good
    assert found[1].status is Status.BROKEN
    assert "surprise" in found[1].text


def test_a_report_shows_areas_once_and_commands_unbroken() -> None:
    command = "sudo apt-get install " + " ".join(f"package-{number}" for number in range(30))
    findings = [
        Finding("tools", "as", Status.OK, "/usr/bin/as"),
        Finding("tools", "gcc", Status.MISSING, "not on PATH " * 20, mend=command),
    ]
    text = str(Report(findings, "connect() would pick nothing"))
    assert text.count("tools\n") == 1
    assert f"mend: {command}\n" in text
    assert text.endswith("\nconnect() would pick nothing")
    loaded = json.loads(Report(findings, "nothing").to_json())
    assert [finding["status"] for finding in loaded["findings"]] == ["ok", "missing"]
    assert loaded["findings"][1]["mend"] == command


def test_the_doctor_ends_with_the_host_that_connect_would_pick() -> None:
    report = doctor.examine()
    assert str(report).splitlines()[-1] == report.verdict
    assert report.verdict.startswith("connect() ")
    broken = [finding for finding in report.findings if finding.status is Status.BROKEN]
    assert broken == []
    assert {"local KVM", "tracing", "appliance", "tools", "Python"} <= {finding.area for finding in report.findings}


def test_doctor_says_it_as_json_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["findings"]
    assert shown["verdict"]


def test_doctor_works_with_an_empty_path_and_home(tmp_path: Path) -> None:
    # The worst machine: no program to be found, no home to keep a cache in.
    env = {"PATH": str(tmp_path), "HOME": "/nonexistent", "LANG": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "kvmbench", "doctor"], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "qemu-system-x86_64 is not on PATH" in done.stdout
    assert "BROKEN" not in done.stdout


def test_doctor_into_a_closed_pipe_ends_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvmbench", "doctor"],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def test_the_version_shown_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.metadata

    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"kvmbench {importlib.metadata.version('kvmbench')}\n"


@pytest.mark.parametrize("words", [[], ["bogus"], ["appliance"], ["appliance", "burn"], ["doctor", "--no-such"]])
def test_words_that_make_no_sense_end_with_status_2_and_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "usage: kvmbench" in capsys.readouterr().err
