"""Python and its packages: the compiled core, and what kvmbench declares it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterable, Iterator

from kvmbench.doctor.finding import Finding, Status

AREA = "Python"
DISTRIBUTION = "kvmbench"


def examine(*, requirements: Iterable[str] | None = None) -> Iterator[Finding]:
    """Compares what is installed with what kvmbench declares.

    Args:
        requirements: requirement lines as pip writes them; None means the
            installed kvmbench's own, plots and notebooks included.
    """
    yield Finding(
        AREA,
        "interpreter",
        Status.OK,
        f"{platform.python_version()} at {sys.executable}",
        facts={"version": platform.python_version(), "executable": sys.executable},
    )
    if importlib.util.find_spec("kvmbench.core._core") is None:
        yield Finding(
            AREA,
            "core",
            Status.MISSING,
            "kvmbench.core._core is not compiled: no `local` host",
            mend="pip install --force-reinstall --no-deps -e .   (in the checkout; needs gcc and headers)",
        )
    else:
        yield Finding(AREA, "core", Status.OK, "kvmbench.core._core is compiled")
    if requirements is None:
        try:
            requirements = importlib.metadata.requires(DISTRIBUTION) or []
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                AREA,
                "packages",
                Status.LIMITED,
                "kvmbench is run from its sources, not installed",
                mend="pip install -e '.[notebook,test]'",
            )
            return
    yield from _packages(requirements)


def _packages(requirements: Iterable[str]) -> Iterator[Finding]:
    good: dict[str, str] = {}
    for line in requirements:
        matched = re.match(r"([A-Za-z0-9._-]+)", line)
        extra = re.search(r"extra == [\"'](\w+)[\"']", line)
        if matched is None or matched.group(1) == DISTRIBUTION or (extra and extra.group(1) in ("test", "dev")):
            continue
        name = matched.group(1)
        wanted = line.partition(";")[0].strip()
        use = extra.group(1) if extra else ""
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            text = f"not installed{f'; the {use} part needs it' if use else ''}"
            yield Finding(
                AREA,
                name,
                Status.MISSING if not use else Status.LIMITED,
                text,
                mend=f"pip install '{wanted}'",
            )
            continue
        minimum = re.search(r">=\s*([0-9.]+)", wanted)
        if minimum and _numbers(version) < _numbers(minimum.group(1)):
            yield Finding(
                AREA,
                name,
                Status.LIMITED,
                f"{version} is older than {minimum.group(1)}",
                mend=f"pip install '{wanted}'",
            )
        else:
            good[name] = version
    if good:
        text = ", ".join(f"{name} {version}" for name, version in good.items())
        yield Finding(AREA, "packages", Status.OK, text, facts=dict(good))


def _numbers(version: str) -> tuple[int, ...]:
    # Enough for "is it older": releases compare by their leading numbers.
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
