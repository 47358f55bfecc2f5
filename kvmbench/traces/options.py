"""What `kb.trace` is asked for, checked."""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvmbench.arguments import integer, nearest
from kvmbench.errors import MisuseError
from kvmbench.machine.size import parse_size

#: Where a guest marks its own progress: the port to which PC firmware writes its progress codes.
MARK_PORT = 0x80
#: All of KVM's events but those of its MMU, of which a page fault makes dozens.
DEFAULT_EVENTS = ("kvm/*",)
_LEAST_BUFFER, _MOST_BUFFER = 64 << 10, 1 << 30
_LEAST_LIMIT = 1 << 20
_MOST_LOG_ROWS = 1 << 24


@dataclass(frozen=True)
class Options:
    """Checked options of a trace.

    Attributes:
        patterns: names of events, with ``*`` and ``?``.
        insist: these were asked for by name, so doing without them is an error.
        log_rows: room of each vcpu's log in the core; 0: no log.
        buffer_bytes: of each processor's ring buffer in the kernel.
        limit_bytes: after so much the trace ends.
        own_only: leave out what other processes of the host do.
        mark_port: OUT to it marks; None: nothing does.
    """

    patterns: tuple[str, ...]
    insist: bool
    log_rows: int
    buffer_bytes: int
    limit_bytes: int
    own_only: bool
    mark_port: int | None


def check_options(
    events: str | Iterable[str] | None,
    *,
    log: bool,
    buffer: int | str,
    log_rows: int,
    limit: int | str,
    own_only: bool,
    mark_port: int | None,
) -> Options:
    """Checks what a caller gave.

    Raises:
        MisuseError: a value that cannot be.
    """
    patterns: tuple[str, ...] = DEFAULT_EVENTS
    if events is not None:
        given = (events,) if isinstance(events, str) else tuple(events) if isinstance(events, Iterable) else (None,)
        if not all(isinstance(name, str) and name for name in given):
            raise MisuseError(f"events are names such as 'kvm_exit' or 'kvm/*', not {events!r:.80}")
        patterns = given
    for name, flag in (("log", log), ("own_only", own_only)):
        if not isinstance(flag, bool):
            raise MisuseError(f"{name} is True or False, not {flag!r}")
    if not log and not patterns:
        raise MisuseError("a trace without events and without its log would hold nothing")
    buffer_bytes, limit_bytes = parse_size(buffer, "buffer"), parse_size(limit, "limit")
    if not _LEAST_BUFFER <= buffer_bytes <= _MOST_BUFFER:
        raise MisuseError(f"buffer is what each processor's ring holds, 64K to 1G, not {buffer!r}")
    if limit_bytes < _LEAST_LIMIT:
        raise MisuseError(f"limit is how much a trace may take, 1M at least, not {limit!r}")
    rows = integer(log_rows, "log_rows", 16, _MOST_LOG_ROWS)
    if mark_port is not None:
        integer(mark_port, "mark_port", 0, 0xFFFF)
    return Options(
        patterns,
        events is not None and bool(patterns),
        1 << (rows - 1).bit_length() if log else 0,
        buffer_bytes,
        limit_bytes,
        own_only,
        mark_port,
    )


def choose_events(patterns: Sequence[str], there: Sequence[str]) -> tuple[str, ...]:
    """The events that patterns mean, in the kernel's order.

    Args:
        patterns: "kvm_exit", "kvm/kvm_exit", "kvm:kvm_exit", "kvmmmu/*".
        there: what the kernel has, as "kvm/kvm_exit".

    Raises:
        MisuseError: a pattern that matches nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        wanted = pattern.replace(":", "/")
        wanted = wanted if "/" in wanted else f"*/{wanted}"
        found = fnmatch.filter(there, wanted)
        if not found:
            near = nearest(wanted.split("/")[-1], [name.split("/")[1] for name in there])
            systems = sorted({f"{name.split('/')[0]}/*" for name in there})
            said = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(systems)}"
            raise MisuseError(f"this kernel has no event {pattern!r}: {said}")
        chosen.update(found)
    return tuple(name for name in there if name in chosen)


def advice(error_number: int) -> str:
    """What to do about tracefs that cannot be had."""
    if error_number in (errno.EPERM, errno.EACCES):
        return '; tracing takes root: kb.connect("local", sudo=True), or kb.connect("appliance")'
    return ""
