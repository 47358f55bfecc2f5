"""The picture of a conformance matrix: bars that add up, words for colours, its hosts in the file."""

from __future__ import annotations

import pytest
from matplotlib.patches import Patch, Rectangle

from kvmbench import plot
from kvmbench.conformance import POINTS, QUIRKS, Answer, Matrix, Report, Result
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance


def make_report(module: str, answers: dict[str, Answer]) -> Report:
    results = tuple(Result(point, answers.get(point.name, Answer.HOLDS), quirks=QUIRKS[:1]) for point in POINTS)
    return Report(module, Provenance(kind="appliance", module=module, parameters={"npt": "1"}), results)


def bars(drawn):
    return [one for one in drawn if isinstance(one, Rectangle)]


def test_many_points_are_drawn_by_family_and_every_point_is_counted():
    drawn = plot.conformance(make_report("kvm_amd", {"kvm.gd": Answer.DIFFERS}))
    ax = bars(drawn)[0].axes
    families = list(dict.fromkeys(".".join(point.name.split(".")[:2]) for point in POINTS))
    assert [label.get_text() for label in ax.get_yticklabels()] == families
    assert [label.get_text() for label in ax.get_xticklabels()] == ["kvm_amd npt=1"]
    texts = [text.get_text() for text in ax.texts if text.get_text()]
    assert sum(int(text.split("/")[1]) for text in texts) + sum(
        1 for family in families if sum(p.name.startswith(family + ".") or p.name == family for p in POINTS) == 1
    ) == len(POINTS)


def test_few_points_have_a_row_each_and_hosts_a_column_each():
    few = Report("a", Provenance(module="kvm_amd"), tuple(Result(p, Answer.HOLDS) for p in POINTS[:3]))
    other = Report("b", Provenance(module="kvm_intel"), tuple(Result(p, Answer.DIFFERS) for p in POINTS[:3]))
    drawn = plot.conformance(Matrix({"npt=1": few, "ept=1": other}))
    ax = bars(drawn)[0].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == [point.name for point in POINTS[:3]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["npt=1", "ept=1"]
    assert len(bars(drawn)) == 6


def test_colours_have_words_and_hatching():
    drawn = plot.conformance(make_report("kvm_amd", {"kvm.gd": Answer.DIFFERS, "kvm.pcid": Answer.CANNOT}))
    handles = {one.get_label(): one for one in drawn if type(one) is Patch}
    assert list(handles) == ["holds", "differs", "cannot be tried"]
    assert len({one.get_hatch() for one in handles.values()}) == 3
    unexplained = Report("a", Provenance(), (Result(POINTS[0], Answer.DIFFERS),))
    assert "differs, unexplained" in {one.get_label() for one in plot.conformance(unexplained) if type(one) is Patch}


def test_the_hosts_are_in_the_file(tmp_path):
    reports = {"one": make_report("kvm_amd", {}), "two": make_report("kvm_intel", {})}
    (path,) = plot.save(plot.conformance(reports), tmp_path / "matrix.svg")
    text = path.read_text()
    assert "kvm_amd" in text
    assert "kvm_intel" in text


@pytest.mark.parametrize("source", [None, {"a": 1}, {}, Report("a", Provenance(), ())])
def test_something_else_is_refused(source):
    with pytest.raises(MisuseError, match=r"conformance\(\) draws what|nothing to draw"):
        plot.conformance(source)
