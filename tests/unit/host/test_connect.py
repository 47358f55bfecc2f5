"""Which host a name means; nothing is started here."""

from __future__ import annotations

import os

import pytest

import kvmbench as kb
from kvmbench.errors import HostUnavailable, MisuseError
from kvmbench.host.selfcheck import NAMES, Mechanisms


def test_a_name_that_means_no_host_is_refused_with_those_there_are():
    with pytest.raises(MisuseError, match="no host 'remote'; there are local, appliance"):
        kb.connect("remote")


def test_an_option_that_the_host_has_not_got_is_named():
    with pytest.raises(MisuseError, match="host 'local' has no option 'npt'; there are sudo, agent, quiet"):
        kb.connect("local", npt=0)


def test_the_environment_names_the_host_where_the_caller_names_none(monkeypatch):
    monkeypatch.setenv("KVMBENCH_HOST", "remote")
    with pytest.raises(MisuseError, match=r"\$KVMBENCH_HOST: no host 'remote'"):
        kb.connect()
    with pytest.raises(MisuseError, match="no host 'other'"):
        kb.connect("other")


def test_the_summary_of_a_self_check_names_only_what_is_lacking():
    both = frozenset({0, 3})
    everything = dict.fromkeys(NAMES, both)
    assert Mechanisms(**everything).summary == ""
    assert Mechanisms(**everything).complete
    some = everything | {"step": frozenset({0}), "int3": frozenset()}
    assert Mechanisms(**some).summary == "single step at CPL 0 only; no INT3"
    assert not Mechanisms(**some).complete


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(MisuseError, match="a host is named by a str, not 123; there are local, appliance"):
        kb.connect(123)


def test_a_host_named_by_the_environment_tells_its_progress_too(monkeypatch, tmp_path, capsys):
    # A QEMU that tells its version, and an apt that knows nothing: the start gets as far as its first lines.
    for name, body in (
        ("qemu", "echo 'QEMU emulator version 9.9.9'"),
        ("apt-get", "echo 'E: no route' >&2; exit 100"),
        ("apt-cache", "exit 100"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("KVMBENCH_QEMU", str(tmp_path / "qemu"))
    monkeypatch.setenv("KVMBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KVMBENCH_HOST", "appliance")
    said = []
    for arguments, options in ((("appliance",), {}), ((), {}), ((), {"quiet": True})):
        with pytest.raises(HostUnavailable, match="E: no route"):
            kb.connect(*arguments, **options)
        said.append(capsys.readouterr().err)
    assert said[0].startswith("the system's package lists lead to no kernel: ")
    assert said[1] == said[0]
    assert said[2] == ""
