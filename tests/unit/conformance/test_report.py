"""A report in words, as HTML, data frame and JSON."""

from __future__ import annotations

import json
import re

import pytest

from kvmbench.conformance import Report


def test_a_report_counts_its_answers_by_whose_the_differences_are(report: Report):
    assert report.summary == "1 hold, 2 differ (1 KVM, 1 UNEXPLAINED), 1 cannot be tried"
    assert [result.point.name for result in report.differences] == ["kvm.tf.hidden", "kvm.int3.cpl0"]
    assert [result.point.name for result in report.unexplained] == ["kvm.int3.cpl0"]


def test_a_difference_is_told_from_where_it_begins(report: Report):
    assert report["kvm.tf.hidden"].how == (
        "stepped: TF clear; afterwards: TF clear instead of stepped: TF set; afterwards: TF set from entry 2 on"
    )
    assert report["kvm.int3.cpl0"].how == "<SHUTDOWN> instead of #BP at sw_bp; done"
    assert report["kvm.pcid"].how == "no PCID"
    assert report["kvm.gd"].how == ""
    with pytest.raises(KeyError, match=r"no point 'kvm.int4'"):
        report["kvm.int4"]


def test_text_has_a_line_a_point_with_words(report: Report):
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report)
    assert lines[1].split() == ["\u2713", "kvm.gd", "holds"]
    assert "differs: UNEXPLAINED (<SHUTDOWN> instead of" in lines[3]
    assert "cannot be tried (no PCID)" in lines[4]


def test_html_says_in_words_what_it_says_in_colour_and_escapes_what_guests_did(report: Report):
    text = report._repr_html_()
    assert "\u2713 holds" in text
    assert "\u2260 differs: KVM" in text
    assert "\u2013 cannot be tried" in text
    assert "&lt;SHUTDOWN&gt;" in text
    assert "<SHUTDOWN>" not in text
    colours = re.findall(r"solid (#[0-9A-F]{6})", text)
    assert len(colours) == 4
    assert len(set(colours)) == 4


def test_a_data_frame_has_a_row_a_point(report: Report):
    frame = report.to_dataframe()
    assert list(frame.index) == ["kvm.gd", "kvm.tf.hidden", "kvm.int3.cpl0", "kvm.pcid"]
    assert frame.loc["kvm.tf.hidden", ["answer", "cause", "quirks"]].tolist() == ["differs", "KVM", "tf-hidden"]
    assert frame["answer"].value_counts()["differs"] == 2


def test_json_has_everything(report: Report):
    plain = json.loads(report.to_json())
    assert plain["provenance"]["module"] == "kvm_amd"
    assert [result["answer"] for result in plain["results"]] == ["holds", "differs", "differs", "cannot be tried"]
    assert [result["unexplained"] for result in plain["results"]] == [False, False, True, False]
