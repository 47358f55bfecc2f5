"""Saving figures with the host their data came from.

A figure without its host is half a result: the same plot from kvm_amd under
QEMU and from bare metal means different things. So the file carries the
provenance in its metadata, and the picture carries it in a small line below.
"""

from __future__ import annotations

import textwrap
import weakref
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure, SubFigure

from kvmbench.arguments import file_path
from kvmbench.errors import MisuseError
from kvmbench.host.provenance import Provenance

_FORMATS = (".png", ".svg", ".pdf")
_FOOTER_POINTS = 6.5
_DPI = 300

# Which hosts' data each figure shows, noted by the functions that draw. Weak: a closed figure is forgotten.
_sources: weakref.WeakKeyDictionary[Figure, list[Provenance]] = weakref.WeakKeyDictionary()


def note_source(artist: Artist, provenance: Provenance) -> None:
    """Remembers that an artist's figure shows data from this host, for `save`."""
    known = _sources.setdefault(figure_of(artist), [])
    if provenance not in known:
        known.append(provenance)


def figure_of(drawn: Any) -> Figure:
    """The figure of an artist, an Axes, a figure, or the first of a list of them.

    Raises:
        MisuseError: none of these, or an artist that is in no figure.
    """
    if isinstance(drawn, Figure):
        return drawn
    if isinstance(drawn, SubFigure):
        return figure_of(drawn.get_figure(root=True))
    if isinstance(drawn, Artist):
        found = drawn.get_figure()
        if found is None:
            raise MisuseError(f"{drawn!r} is not in a figure (any more)")
        return figure_of(found)
    if isinstance(drawn, Iterable) and not isinstance(drawn, str | bytes):
        for part in drawn:
            return figure_of(part)
    raise MisuseError(f"expected a figure, an Axes or what a plot function returned, not {drawn!r}")


def save(drawn: Any, path: str | PathLike[str], *, provenance: Provenance | None = None) -> list[Path]:
    """Writes a figure for print: PNG at 300 dpi and SVG with outlined fonts, each with its provenance.

    The provenance goes into the metadata (PNG text chunks, the SVG's and PDF's
    own fields) and into a small line under the picture. The figure itself is
    left as it was, so it can be shown or saved again.

    Args:
        drawn: a figure, or what a plot function returned.
        path: without a suffix, ``.png`` and ``.svg`` are both written; with ``.png``, ``.svg`` or ``.pdf``
            only that. Missing directories are made.
        provenance: the host, for figures not drawn by this package; else taken from the data drawn.

    Returns:
        The files written.

    Raises:
        MisuseError: no figure, or another suffix.
        OSError: the file cannot be written.
    """
    figure = figure_of(drawn)
    target = file_path(path, "steps.png")
    if target.suffix in _FORMATS:
        targets = [target]
    elif not target.suffix or not target.suffix[1:].isalpha():
        targets = [target.with_name(target.name + suffix) for suffix in (".png", ".svg")]
    else:
        raise MisuseError(f"figures are saved as {', '.join(_FORMATS)}, not {target.suffix!r}")
    sources = [provenance] if provenance is not None else _sources.get(figure, [Provenance()])
    target.parent.mkdir(parents=True, exist_ok=True)

    footer = figure.text(0, 0, _footer(figure, sources), fontsize=_FOOTER_POINTS, color="#555555", va="top")
    footer.set_in_layout(True)
    try:
        # Lay the figure out before the footer gets its place below it, then hold the layout still.
        figure.draw_without_rendering()
        footer.set_position((0.0, -4 / 72 / figure.get_figheight()))
        for one in targets:
            with matplotlib.rc_context({"svg.fonttype": "path", "pdf.fonttype": 42, "svg.hashsalt": "kvmbench"}):
                figure.savefig(
                    one,
                    dpi=_DPI,
                    # The box around everything takes in the footer below the figure's own edge.
                    bbox_inches="tight",
                    pad_inches=0.08,
                    facecolor="white",
                    metadata=_metadata(one.suffix, figure, sources),
                )
    finally:
        footer.remove()
    return targets


def _footer(figure: Figure, sources: list[Provenance]) -> str:
    # A character of 6.5 points is about 0.046 inches wide.
    columns = max(40, int(figure.get_figwidth() / 0.046))
    lines = [line for source in sources for line in textwrap.wrap(str(source), columns)]
    return "\n".join(lines)


def _metadata(suffix: str, figure: Figure, sources: list[Provenance]) -> dict[str, Any]:
    title = _title(figure)
    described = "; ".join(str(source) for source in sources)
    exact = "[" + ", ".join(source.to_json() for source in sources) + "]"
    created = max((source.created for source in sources), default="")
    if suffix == ".png":
        # tEXt chunks; "Title", "Description", "Software" and "Creation Time" are the names PNG defines.
        found = {
            "Title": title,
            "Description": described,
            "Software": "kvmbench",
            "kvmbench provenance": exact,
        }
        return {**found, **({"Creation Time": created} if created else {})}
    if suffix == ".svg":
        # Dublin Core. Date=None keeps the time of saving out, so the same data gives the same file.
        return {
            "Title": title,
            "Description": described,
            "Source": exact,
            "Creator": "kvmbench",
            "Date": created or None,
        }
    return {
        "Title": title,
        "Subject": described,
        "Keywords": exact,
        "Creator": "kvmbench",
        "CreationDate": None,
    }


def _title(figure: Figure) -> str:
    named = [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes]
    return figure.get_suptitle() or next((name for name in named if name), "") or "kvmbench figure"
