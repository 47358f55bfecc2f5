"""Hosts side by side, and the page that is made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmbench import cli
from kvmbench.conformance import HOSTS, POINTS, Matrix, survey
from kvmbench.conformance.matrix import named
from kvmbench.conformance.support_page import FIRST_LINE, cell, columns, described, page
from kvmbench.errors import MisuseError

PAGE = Path(__file__).parents[3] / "docs" / "support.md"


def test_the_text_has_a_column_a_host_and_says_what_is_missing(matrix: Matrix):
    text = str(matrix)
    assert text.splitlines()[0].split() == ["npt=1", "local"]
    assert "UNEXPLAINED on npt=1: kvm.int3.cpl0: <SHUTDOWN> instead of" in text
    assert "ept=1: not there: Bochs is missing" in text
    assert "tf-hidden (KVM; points: 1 on npt=1)" in text
    assert matrix.unexplained == {"npt=1": ("kvm.int3.cpl0",)}


def test_html_and_json_have_all_hosts(matrix: Matrix):
    assert "<th" in matrix._repr_html_()
    assert "local</th>" in matrix._repr_html_()
    plain = json.loads(matrix.to_json())
    assert list(plain["reports"]) == ["npt=1", "local"]
    assert plain["absent"] == {"ept=1": "Bochs is missing"}
    assert plain["quirks"]["tf-hidden"]["met"] == {"npt=1": ["kvm.tf.hidden"]}


def test_hosts_are_named(matrix: Matrix):
    assert named(None) == HOSTS
    assert list(named(["ept=0", "ssh://there"])) == ["ept=0", "ssh://there"]
    with pytest.raises(MisuseError, match="no host 'npt'"):
        named(["npt"])


def test_a_host_that_cannot_be_opened_is_absent_and_says_why():
    matrix = survey(["ssh://nobody@127.0.0.1:1"], "kvm.gd")
    assert list(matrix.reports) == []
    assert "127.0.0.1" in matrix.absent["ssh://nobody@127.0.0.1:1"]


def test_a_page_can_be_read_back(matrix: Matrix):
    text = page(matrix)
    assert text.splitlines()[0] == FIRST_LINE
    assert columns(text) == {
        label: {
            point.name: cell(next((one for one in report.results if one.point == point), None))
            for point in matrix.points
        }
        for label, report in matrix.reports.items()
    }
    assert described(text)["npt=1"] == "appliance: Linux 6.1.0, kvm_amd npt=1, QEMU (TCG) 7.2"
    assert columns(text)["npt=1"]["kvm.tf.hidden"] == "differs: tf-hidden"


def test_the_page_in_docs_has_the_points_of_the_code_and_nothing_unexplained():
    text = PAGE.read_text(encoding="utf-8")
    assert text.splitlines()[0] == FIRST_LINE
    found = columns(text)
    assert list(found) == list(HOSTS)
    for label, answers in found.items():
        assert list(answers) == [point.name for point in POINTS], label
        assert not [name for name, answer in answers.items() if "unexplained" in answer or answer == "not run"], label


def test_the_command_lists_points_and_refuses_hosts_and_points_that_there_are_not(capsys):
    assert cli.main(["conformance", "--list", "--point", "kvm.int3.*"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["kvm.int3.cpl0", "kvm.int3.cpl3"]
    assert cli.main(["conformance", "npt=2"]) == 1
    assert "no host 'npt=2'" in capsys.readouterr().err
    assert cli.main(["conformance", "local", "--point", "kvm.int4"]) == 1
    assert "no point fits 'kvm.int4'" in capsys.readouterr().err


def test_the_command_fails_when_no_host_can_be_opened(capsys):
    assert cli.main(["conformance", "ssh://nobody@127.0.0.1:1", "--point", "kvm.gd"]) == 1
    assert "not there" in capsys.readouterr().err
