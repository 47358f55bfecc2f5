"""Saved figures say where they come from, in the picture and in the file."""

from __future__ import annotations

import json
import re
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from kvmbench import plot
from kvmbench.debug.record import StepRecord
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance


def png_chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG file, read as its specification lays them out."""
    data, at, chunks = path.read_bytes(), 8, []
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def png_texts(path: Path) -> dict[str, str]:
    texts = {}
    for kind, body in png_chunks(path):
        if kind == b"tEXt":
            key, _, value = body.partition(b"\0")
            texts[key.decode("latin-1")] = value.decode("latin-1")
        elif kind == b"zTXt":
            key, _, value = body.partition(b"\0")
            texts[key.decode("latin-1")] = zlib.decompress(value[1:]).decode("latin-1")
    return texts


def test_png_and_svg_are_both_written(rec: StepRecord, tmp_path: Path) -> None:
    files = plot.save(plot.registers(rec), tmp_path / "deep" / "run")
    assert files == [tmp_path / "deep" / "run.png", tmp_path / "deep" / "run.svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(files[1])


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_suffix_asks_for_one_file(rec: StepRecord, tmp_path: Path, suffix: str, start: bytes) -> None:
    (path,) = plot.save(plot.exits(rec), tmp_path / f"run{suffix}")
    assert path.read_bytes().startswith(start)


def test_a_dot_in_the_name_is_no_suffix(rec: StepRecord, tmp_path: Path) -> None:
    names = [path.name for path in plot.save(plot.exits(rec), tmp_path / "linux-6.1")]
    assert names == ["linux-6.1.png", "linux-6.1.svg"]


def test_the_png_carries_its_provenance(rec: StepRecord, tmp_path: Path) -> None:
    (path,) = plot.save(plot.registers(rec), tmp_path / "run.png")
    texts = png_texts(path)
    assert texts["Description"] == str(rec.provenance)
    assert texts["Title"] == "Registers after each step"
    assert texts["Creation Time"] == rec.provenance.created
    (exact,) = json.loads(texts["kvmbench provenance"])
    assert Provenance.from_json(json.dumps(exact)) == rec.provenance


def test_the_png_is_for_print(rec: StepRecord, tmp_path: Path) -> None:
    (path,) = plot.save(plot.registers(rec), tmp_path / "run.png")
    chunks = dict(png_chunks(path))
    per_metre, _, unit = struct.unpack(">IIB", chunks[b"pHYs"])
    assert (round(per_metre * 0.0254), unit) == (300, 1)
    assert struct.unpack_from(">I", chunks[b"IHDR"])[0] > 1800


def test_the_svg_carries_its_provenance_and_outlined_fonts(rec: StepRecord, tmp_path: Path) -> None:
    (path,) = plot.save(plot.registers(rec), tmp_path / "run.svg")
    text = path.read_text(encoding="utf-8")
    assert str(rec.provenance) in text
    assert "&quot;kernel&quot;" in text or '"kernel"' in text
    assert "<text" not in text


def test_the_footer_stands_in_the_picture_below_everything_else(rec: StepRecord, tmp_path: Path) -> None:
    figure = plot.registers(rec)[0].get_figure()
    (with_footer,) = plot.save(figure, tmp_path / "run.svg")
    bare = tmp_path / "bare.svg"
    figure.savefig(bare, bbox_inches="tight", pad_inches=0.08)
    heights = [float(re.search(r'height="([\d.]+)pt"', path.read_text())[1]) for path in (with_footer, bare)]  # type: ignore[index]
    assert heights[0] > heights[1] + 6


def test_saving_leaves_the_figure_as_it_was(rec: StepRecord, tmp_path: Path) -> None:
    figure = plot.registers(rec)[0].get_figure()
    before = [len(figure.texts), tuple(figure.get_size_inches())]
    plot.save(figure, tmp_path / "run")
    assert [len(figure.texts), tuple(figure.get_size_inches())] == before


def test_the_same_data_give_the_same_svg(rec: StepRecord, tmp_path: Path) -> None:
    first, second = (plot.save(plot.exits(rec), tmp_path / name)[0].read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


def test_a_figure_of_two_hosts_names_both(rec: StepRecord, tmp_path: Path) -> None:
    _, axes = plt.subplots(2, layout="constrained")
    other = StepRecord(rec.rows, rec.start, provenance=Provenance(kind="local", kernel="6.18", module="kvm_pvm"))
    plot.registers(rec, names=["rax"], ax=axes[0])
    plot.registers(other, names=["rax"], ax=axes[1])
    (path,) = plot.save(axes[0], tmp_path / "two.png")
    assert png_texts(path)["Description"] == f"{rec.provenance}; {other.provenance}"


def test_a_figure_of_your_own_takes_the_provenance_given(tmp_path: Path) -> None:
    figure, ax = plt.subplots()
    ax.plot([1, 2])
    (path,) = plot.save(figure, tmp_path / "own.png", provenance=Provenance(kind="local", kernel="6.18"))
    assert png_texts(path)["Description"] == "local, Linux 6.18"
    (path,) = plot.save(figure, tmp_path / "unknown.png")
    assert png_texts(path)["Description"] == "host unknown"


def test_what_is_no_figure_or_format_is_refused(rec: StepRecord, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="expected a figure"):
        plot.save("figure", tmp_path / "x")
    with pytest.raises(MisuseError, match="expected a figure"):
        plot.save([], tmp_path / "x")
    with pytest.raises(MisuseError, match=r"saved as .png, .svg, .pdf, not '.gif'"):
        plot.save(plot.exits(rec), tmp_path / "x.gif")
    assert list(tmp_path.iterdir()) == []
