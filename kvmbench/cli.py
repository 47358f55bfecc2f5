"""The `kvmbench` command: what can be done here, and building the appliance.

Everything that starts a guest is done from Python; this command is for what
comes before: ``doctor``, ``appliance build | list | clear``, ``version``; and
``conformance``, which holds the guest debug of all hosts against the manuals.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kvmbench.errors import KvmbenchError, MisuseError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line.

    Args:
        arguments: the words after `kvmbench`; None takes them from the process.

    Returns:
        0, or 1 when what was asked failed and a sentence on standard error says
        why, or 130 after Ctrl-C. Words that make no sense end in argparse's
        SystemExit with status 2.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        status = command(options)
        sys.stdout.flush()
        return status
    except KvmbenchError as error:
        print(f"kvmbench: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # `kvmbench doctor | head`: the reader has gone, and the interpreter must not find that out at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("kvmbench: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvmbench",
        description="Step guests on real KVM: what can be done here, and building the appliance.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", help="what this machine can do, and what mends what is missing")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    doctor.add_argument("--deep", action="store_true", help="also start each host and step a guest in it (seconds)")
    doctor.set_defaults(command=_doctor)

    appliance = commands.add_parser("appliance", help="build, list or delete the appliances in the cache")
    actions = appliance.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="make the agent, and the kernel and initramfs around it")
    build.add_argument("--kernel", type=Path, metavar="FILE", help="a bzImage instead of the distribution's kernel")
    build.add_argument("--modules", type=Path, metavar="FOLDER", help="the modules of that kernel")
    build.add_argument("--refresh", action="store_true", help="fetch the distribution's present kernel again")
    build.set_defaults(command=_appliance_build)
    listing = actions.add_parser("list", help="what the cache holds, and its size")
    listing.set_defaults(command=_appliance_list)
    clear = actions.add_parser("clear", help="delete what the cache holds")
    clear.set_defaults(command=_appliance_clear)

    conformance = commands.add_parser(
        "conformance",
        help="hold the guest debug of hosts against the manuals: a matrix of hosts and points",
        description="Runs small guests on each host and compares every stop with the manuals. "
        "Ends with status 1 if a difference has no explanation, or no host could be opened.",
    )
    conformance.add_argument("names", nargs="*", metavar="HOST", help="local, npt=1, npt=0, ept=1, ept=0, ssh://...")
    conformance.add_argument("--hosts", nargs="+", default=[], metavar="HOST", help="the same")
    conformance.add_argument(
        "--point",
        action="append",
        metavar="NAME",
        help="only points of this name, with * where wanted; repeatable",
    )
    conformance.add_argument("--list", action="store_true", help="name the points and run nothing")
    conformance.add_argument(
        "-v", "--verbose", action="store_true", help="in the text, all that was expected and observed where they differ"
    )
    output = conformance.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    output.add_argument(
        "--markdown",
        nargs="?",
        const=Path("docs/support.md"),
        type=Path,
        metavar="FILE",
        help="write the page docs/support.md, or FILE, instead of text",
    )
    conformance.set_defaults(command=_conformance)

    version = commands.add_parser("version", help="print kvmbench's version")
    version.set_defaults(command=_version)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from kvmbench import doctor

    report = doctor.examine(deep=options.deep)
    print(report.to_json() if options.json else report)
    return 0


def _conformance(options: argparse.Namespace) -> int:
    from kvmbench import conformance
    from kvmbench.conformance.progress import Progress
    from kvmbench.conformance.support_page import page

    if options.list:
        for point in conformance.chosen(options.point):
            print(f"{point.name:<28}{point.title}")
        return 0
    hosts = [*options.names, *options.hosts] or None
    with Progress(sys.stderr) as progress:
        matrix = conformance.survey(hosts, options.point, progress)
    if options.markdown is not None:
        options.markdown.write_text(page(matrix), encoding="utf-8")
        print(f"wrote {options.markdown}")
    else:
        print(matrix.to_json() if options.json else matrix.text(verbose=options.verbose))
    for label, names in matrix.unexplained.items():
        print(f"kvmbench: unexplained on {label}: {', '.join(names)}", file=sys.stderr)
    return 1 if matrix.unexplained or not matrix.reports else 0


def _version(options: argparse.Namespace) -> int:
    print(f"kvmbench {importlib.metadata.version('kvmbench')}")
    return 0


def _appliance_build(options: argparse.Namespace) -> int:
    from kvmbench.host import image

    if options.modules is not None and options.kernel is None:
        raise MisuseError("--modules goes with --kernel: name the kernel whose modules they are")
    if options.refresh and options.kernel is not None:
        raise MisuseError("--refresh fetches the distribution's kernel, --kernel takes yours: give one of them")
    built = image.build(options.kernel, options.modules, refresh=options.refresh, progress=_progress)
    print(f"kernel {built.versions['kernel']} from {built.versions['origin']}")
    for path in (built.kernel, built.initramfs):
        print(f"  {path}  ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _appliance_list(options: argparse.Namespace) -> int:
    from kvmbench.doctor.appliance import FOLDERS, cached_kernels, size_bytes
    from kvmbench.host.cache import cache_directory

    cache = cache_directory()
    print(cache)
    for kernel in cached_kernels(cache):
        mark = "  <- connect('appliance')" if kernel.default else ""
        print(f"  kernel {kernel.release} from {kernel.origin}{mark}")
    for name in FOLDERS:
        folder = cache / name
        count = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
        print(f"  {name:<8}{count:4}  {size_bytes(folder) / 1e6:8.1f} MB")
    return 0


def _appliance_clear(options: argparse.Namespace) -> int:
    from kvmbench.host import image
    from kvmbench.host.cache import cache_directory

    removed = image.remove_all()
    # Saved states are of no use without the kernels they were made of; package lists are fetched again.
    for folder in (cache_directory() / "states", cache_directory() / "apt"):
        if folder.exists():
            shutil.rmtree(folder)
            removed.append(folder)
    for path in removed:
        print(f"deleted {path}")
    if not removed:
        print("nothing to delete")
    return 0


def _progress(text: str) -> None:
    print(text, flush=True)
