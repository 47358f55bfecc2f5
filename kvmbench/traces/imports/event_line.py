"""A line of text as an event: who, where, when, what, as `perf script`, `trace-cmd report` and ftrace write it."""

from __future__ import annotations

import re
from typing import NamedTuple

_TIME = re.compile(r"(?:^|\s)(\d{1,10})\.(\d{6}|\d{9}):\s+")
# Behind the time: a difference (trace-cmd --ts-diff), a period (perf -F period), the event with or without its group.
_EVENT = re.compile(r"(?:\(\+?\d{1,20}\)\s+)?(?:\d{1,20}\s+)?(?:([\w-]{1,100}):)?([A-Za-z_][\w.-]{0,199}):(?:\s|$)")
_CPU = re.compile(r"\[(\d{1,5})\]$")
# trace-cmd report -l: "0d...1", the processor and the flags in one word.
_CPU_AND_FLAGS = re.compile(r"(\d{1,5})[A-Za-z.#*!+$@?][\w.#*!+$@?]{2,8}$")
_THREAD = re.compile(r"(?:(\d{1,9})/)?(\d{1,9})$")
_INSTANCE = re.compile(r"[\w.-]{1,100}:\s{2,}")
_MOST_S = 9_000_000_000
_MOST_CPU = 0xFFFF


class EventLine(NamedTuple):
    """What is said in front of an event's own text.

    Attributes:
        time_ns: of it.
        digits: behind the second's point, 6 or 9.
        cpu: 0 where it is not told.
        pid: of its process; -1: not told.
        tid: of its thread; -1: not told.
        comm: name of the thread.
        system: the event's group; "": not told.
        event: its name.
        text: what the event itself says.
    """

    time_ns: int
    digits: int
    cpu: int
    pid: int
    tid: int
    comm: str
    system: str
    event: str
    text: str


def parse_line(line: str) -> EventLine | None:
    """Takes a line apart; None: it is no event.

    Args:
        line: without its end.
    """
    time = _TIME.search(line)
    if time is None:
        return None
    event = _EVENT.match(line, time.end())
    seconds = int(time[1])
    if event is None or seconds > _MOST_S:
        return None
    head = line[: time.start()].strip()
    if head and (instance := _INSTANCE.match(head)):
        head = head[instance.end() :]
    cpu, head = _processor(head)
    if cpu > _MOST_CPU:
        return None
    pid, tid, comm = _thread(head)
    time_ns = seconds * 1_000_000_000 + int(time[2].ljust(9, "0"))
    text = line[event.end() :].strip()
    return EventLine(time_ns, len(time[2]), cpu, pid, tid, comm, event[1] or "", event[2], text)


def _processor(head: str) -> tuple[int, str]:
    # "[003]" is the last word, or flags such as "d...1" are behind it.
    for _ in range(2):
        front, _, word = head.rpartition(" ")
        if found := _CPU.match(word):
            return int(found[1]), front.rstrip()
        if _THREAD.match(word):
            break
        if found := _CPU_AND_FLAGS.match(word):
            return int(found[1]), front.rstrip()
        if not front or _CPU.search(front) is None:
            break
        head = front.rstrip()
    return 0, head


def _thread(head: str) -> tuple[int, int, str]:
    # "CPU 0/KVM 1234", "CPU 0/KVM 1230/1234", "CPU 0/KVM-1234", or the name alone.
    front, _, word = head.rpartition(" ")
    if found := _THREAD.match(word):
        tid = int(found[2])
        return int(found[1]) if found[1] else -1, tid, front.strip()
    name, dash, number = head.rpartition("-")
    if dash and number.isdecimal() and len(number) < 10:
        return -1, int(number), name.strip()
    return -1, -1, head
