"""Guest debug held against the manuals on each host: every difference has a name, and docs/support.md says the same."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest

import kvmbench as kb
from kvmbench import cli, conformance
from kvmbench.conformance import POINTS, QUIRKS, Answer, Report
from kvmbench.conformance.support_page import cell, columns, described
from kvmbench.errors import ClosedError, MisuseError

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
# Columns of the page, by the names of the hosts of the contract suite; an agent answers one point otherwise.
COLUMNS = {"local": "local", "npt1": "npt=1", "npt0": "npt=0", "intel": "ept=1", "intel0": "ept=0"}
BY_NAME = {point.name: point for point in POINTS}

_reports: dict[int, Report] = {}


@pytest.fixture
def report(host: kb.Host) -> Report:
    """All points on a host, run once."""
    if id(host) not in _reports:
        _reports[id(host)] = conformance.run(host)
    return _reports[id(host)]


def test_every_point_is_answered_and_every_difference_explained(report: Report):
    assert [result.point for result in report.results] == list(POINTS)
    assert all(result.why for result in report.results if result.answer is Answer.CANNOT)
    told = [f"{result.point.name}: {result.how}" for result in report.unexplained]
    assert not told, f"{report.host} differs and nobody knows why:\n" + "\n".join(told)


def test_what_cannot_be_tried_is_the_host_s_not_ours(report: Report):
    names = [result.point.name for result in report.results if result.answer is Answer.CANNOT]
    assert len(names) <= len(POINTS) // 8, names


def test_no_quirk_claims_a_difference_that_is_not_there(host: kb.Host, report: Report):
    idle = [
        f"{quirk.name} on {result.point.name}: {result.cell}"
        for result in report.results
        for quirk in QUIRKS
        # Which byte a breakpoint has, depends on its mechanism.
        if quirk.concerns(result.point.name, host.info) and quirk.cause != "kvmbench"
        if result.answer is Answer.HOLDS
    ]
    assert not idle, "\n".join(idle)


def test_the_page_in_docs_says_what_the_host_says(request: pytest.FixtureRequest, report: Report):
    label = COLUMNS.get(request.node.callspec.params["host"])
    if label is None:
        pytest.skip("the page has no column for this way to a host")
    text = PAGE.read_text(encoding="utf-8")
    if described(text).get(label) != report.host:
        pytest.skip(f"the page was made on another host: {described(text).get(label)}")
    found = columns(text)[label]
    assert {result.point.name: cell(result) for result in report.results} == found


def test_a_difference_without_a_quirk_is_unexplained(host: kb.Host):
    (result,) = conformance.run(host, "kvm.tf.hidden", quirks=()).results
    assert result.answer is Answer.DIFFERS
    assert result.unexplained
    assert "instead of" in result.how


def test_a_planted_fault_is_unexplained_where_other_differences_are_known(host: kb.Host):
    point = BY_NAME["kvm.tf.hidden"]

    def planted(host):
        yield from list(point.attempt(host))[:2]
        yield "afterwards: TF gone"

    (result,) = conformance.run(host, [dataclasses.replace(point, attempt=planted)]).results
    assert result.unexplained


def test_progress_names_each_point_before_it_is_tried(host: kb.Host):
    said = []
    conformance.run(host, "kvm.t*", lambda place, count, point: said.append((place, count, point.name)))
    assert said[0] == (0, len(said), said[0][2])
    assert [place for place, _, _ in said] == list(range(len(said)))


def test_something_else_than_a_host_is_refused():
    with pytest.raises(MisuseError, match=r"needs a host from kvmbench\.connect"):
        conformance.run("local")


def test_a_closed_host_is_refused(need):
    try:
        host = kb.connect("local", quiet=True)
    except kb.KvmbenchError as error:
        need("local", f"no local host: {error}")
    host.close()
    with pytest.raises(ClosedError, match="the host is closed"):
        conformance.run(host)


def test_a_host_that_is_lost_is_opened_again_and_goes_on(need, monkeypatch):
    def deadly(host):
        os.kill(host.core.hello()["agent_pid"], signal.SIGKILL)
        host.core.hello()
        yield "never said"

    alive, dead, last = BY_NAME["kvm.tf.hidden"], BY_NAME["kvm.tf.own"], BY_NAME["kvmbench.step.recorded"]
    points = (alive, dataclasses.replace(dead, attempt=deadly), last)
    monkeypatch.setattr("kvmbench.conformance.matrix.HOSTS", {"agent": ("local", {"agent": True})})
    matrix = conformance.survey(["agent"], points)
    if matrix.absent:
        need("local", f"no local host: {matrix.absent['agent']}")
    report = matrix.reports["agent"]
    assert [result.point.name for result in report.results] == [alive.name, dead.name, last.name]
    assert report[last.name].answer is Answer.HOLDS
    assert report[dead.name].why.startswith("the host was lost: ")


def test_the_command_prints_a_matrix_and_its_status_tells_unexplained_differences(need, capsys, monkeypatch):
    try:
        kb.connect("local", quiet=True).close()
    except kb.KvmbenchError as error:
        need("local", f"no local host: {error}")
    assert cli.main(["conformance", "local", "--point", "kvm.tf.*"]) == 0
    out = capsys.readouterr().out
    assert "kvm.tf.hidden" in out
    assert "differs: KVM" in out
    wrong = dataclasses.replace(BY_NAME["kvm.tf.own"], expected=("never seen",))
    monkeypatch.setattr("kvmbench.conformance.matrix.chosen", lambda points: (wrong,))
    assert cli.main(["conformance", "local"]) == 1
    assert "unexplained on local: kvm.tf.own" in capsys.readouterr().err
