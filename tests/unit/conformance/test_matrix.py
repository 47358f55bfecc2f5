"""Hosts side by side, and the page that is made of them."""

from __future__ import annotations

import dataclasses
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
    assert "\ntf-hidden (KVM): npt=1: kvm.tf.hidden\n" in text
    assert "observed:" not in text
    assert matrix.unexplained == {"npt=1": ("kvm.int3.cpl0",)}


def test_a_quirk_names_its_points_once_for_hosts_that_share_them(matrix: Matrix):
    report = matrix.reports["npt=1"]
    by_name = {point.name: point for point in POINTS}
    results = tuple(
        dataclasses.replace(report["kvm.tf.hidden"], point=by_name[name])
        for name in ("kvm.execute.dr0", "kvm.execute.dr1", "kvm.execute.cpl3", "kvm.tf.hidden")
    )
    many = dataclasses.replace(report, results=results)
    one = dataclasses.replace(report, results=results[1:3])
    text = str(Matrix({"npt=1": many, "npt=0": many, "ept=1": one}))
    assert (
        "\ntf-hidden (KVM): npt=1, npt=0: kvm.execute.dr0 .dr1 .cpl3 kvm.tf.hidden; ept=1: kvm.execute.dr1 .cpl3\n"
    ) in text


def test_verbose_text_lists_all_that_was_observed_at_each_difference(matrix: Matrix):
    text = matrix.text(verbose=True)
    assert text.startswith(str(matrix))
    assert text[len(str(matrix)) :].strip().splitlines() == [
        "npt=1: kvm.tf.hidden (tf-hidden)",
        "  expected: TF set; stepped: TF set; afterwards: TF set",
        "  observed: TF set; stepped: TF clear; afterwards: TF clear",
        "npt=1: kvm.int3.cpl0 (UNEXPLAINED)",
        "  expected: #BP at sw_bp; done",
        "  observed: <SHUTDOWN>",
    ]


def test_html_and_json_have_all_hosts(matrix: Matrix):
    assert "<th" in matrix._repr_html_()
    assert "local</th>" in matrix._repr_html_()
    plain = json.loads(matrix.to_json())
    assert list(plain["reports"]) == ["npt=1", "local"]
    assert plain["absent"] == {"ept=1": "Bochs is missing"}
    assert plain["quirks"]["tf-hidden"]["met"] == {"npt=1": ["kvm.tf.hidden"]}
    hidden = next(one for one in plain["reports"]["npt=1"]["results"] if one["point"] == "kvm.tf.hidden")
    assert hidden["quirks"] == ["tf-hidden"]
    assert hidden["observed"] == ["TF set", "stepped: TF clear", "afterwards: TF clear"]


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


def test_the_page_in_docs_has_the_words_of_the_code(matrix: Matrix):
    stored = PAGE.read_text(encoding="utf-8").splitlines()
    # Tables, indented lines and lists are of the hosts it was made on; all else is the code's.
    words = [line for line in page(matrix).splitlines() if line and line[0] not in "|- "]
    assert [line for line in words if line not in stored] == []


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
