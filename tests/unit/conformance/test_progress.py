"""What is said while hosts are surveyed: one line rewritten on a terminal, a line a host elsewhere."""

from __future__ import annotations

import io

from kvmbench.conformance.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tell(stream: io.StringIO) -> str:
    with Progress(stream) as progress:
        progress("npt=1", 0, 2, "opening")
        progress("npt=1", 0, 2, "kvm.gd")
        progress("npt=1", 1, 2, "kvm.pcid")
        progress("npt=1", 2, 2, "done")
        progress("ept=1", 0, 2, "not there: no Bochs")
    return stream.getvalue()


def test_on_a_terminal_one_line_is_rewritten_for_each_host():
    lines = tell(Terminal()).split("\n")
    assert len(lines) == 3
    assert lines[0].count("\r") == 4
    assert lines[0].endswith("2/2  done")
    assert lines[1].endswith("not there: no Bochs")


def test_elsewhere_each_host_has_its_beginning_and_its_end():
    assert tell(io.StringIO()).splitlines() == ["npt=1: opening", "npt=1: done", "ept=1: not there: no Bochs"]
