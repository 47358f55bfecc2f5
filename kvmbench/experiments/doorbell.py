"""What a guest pays to ring: exits to user space, eventfds, coalesced writes, hypercall, MSR, CPUID.

The experiment of the commit that brought ioeventfd to KVM (Linux d34e6b175e61, 2009), whose figures are printed beside
ours; docs/doorbell.md explains both. `benchmarks/doorbell.py` prints them, notebook 04 draws them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvmbench.arguments import integer, spelled_out
from kvmbench.core import wire
from kvmbench.debug.machine import Machine
from kvmbench.debug.stop import Cause
from kvmbench.errors import MisuseError
from kvmbench.host.host import Host
from kvmbench.machine import Device, StopRequest
from kvmbench.uapi import Capability

# us a round trip, of Linux d34e6b175e61.
PUBLISHED_US = {"MMIO, user space": 9.09, "MMIO, ioeventfd": 5.00, "PIO, ioeventfd": 2.72}
REFERENCE = "MMIO, user space"
TRIES = 5

_END = 0x520
_PAGES = 0x4000_0000
_OUT = "out dx, al"
# A hypercall's number, one of CPUID's leaves.
_MOVE = "mov eax, 1"
_LOOP, _LOOP_AND_MOVE = "the loop alone", "the loop and a MOV"
# A coalesced write that finds the ring full leaves the guest: Linux 6.1 takes it for full at 85 entries.
_RING_ROUNDS = 80


@dataclass(frozen=True)
class Ring:
    """One way to ring.

    Attributes:
        instruction: what the guest does, again and again.
        before: what it does once, before the first.
        each: what it must do before each, without which the empty loop is measured too.
        leaves: it exits to user space, so the loop in C sees each.
        ioeventfd: (address, bytes, is a port) of the eventfd to be registered.
        coalesced: (address, bytes, is a port) of the range to be coalesced.
        python: a Python device answers instead of a loop in C.
    """

    name: str
    instruction: str
    before: str = ""
    each: str = ""
    leaves: bool = False
    ioeventfd: tuple[int, int, bool] | None = None
    coalesced: tuple[int, int, bool] | None = None
    python: bool = False


def _page(number: int) -> int:
    return _PAGES + number * 0x1000


def _store(gpa: int) -> str:
    return f"mov [{gpa:#x}], eax"


def rings(hypercall: str) -> list[Ring]:
    """All of them; `hypercall` is the vendor's instruction."""
    return [
        Ring(_LOOP, ""),
        Ring(_LOOP_AND_MOVE, "", each=_MOVE),
        Ring("MMIO, user space", _store(_page(0)), leaves=True),
        Ring("PIO, user space", _OUT, "mov dx, 0x500", leaves=True),
        Ring("MMIO, user space, Python", _store(_page(0)), leaves=True, python=True),
        Ring("PIO, user space, Python", _OUT, "mov dx, 0x500", leaves=True, python=True),
        Ring("MMIO, ioeventfd", _store(_page(1)), ioeventfd=(_page(1), 4, False)),
        Ring("MMIO, ioeventfd, any length", _store(_page(2)), ioeventfd=(_page(2), 0, False)),
        Ring("PIO, ioeventfd", _OUT, "mov dx, 0x504", ioeventfd=(0x504, 1, True)),
        Ring("MMIO, coalesced", _store(_page(3)), coalesced=(_page(3), 4, False)),
        Ring("PIO, coalesced", _OUT, "mov dx, 0x508", coalesced=(0x508, 1, True)),
        Ring("hypercall", hypercall, each=_MOVE),
        Ring("RDMSR", "rdmsr", "mov ecx, 0x4b564d01"),
        Ring("CPUID", "cpuid", each=_MOVE),
    ]


@dataclass(frozen=True)
class RoundTrip:
    """What one way costs on one host, without the loop around it.

    Attributes:
        name: of the `Ring`.
        us: median of the repeats, each the shortest of `TRIES`; of the core's clock, which is emulator time where the
            host is emulated; with a Python device of this process's clock.
        low_us, high_us: quartiles: half of the repeats lie between them.
        ratio: to user-space MMIO of the same repeat, median; None for what Python answers, which has another clock.
        low_ratio, high_ratio: its quartiles.
        exits: exits from the guest a ring, as KVM counts them (`exits` of its statistics); None: not counted.
        emulated: instructions that KVM's emulator ran a ring (`insn_emulation`), the loop's left out; likewise.
        why_not: what happened instead, where it does not work; all figures are then 0 or None.
    """

    name: str
    us: float = 0.0
    low_us: float = 0.0
    high_us: float = 0.0
    ratio: float | None = None
    low_ratio: float | None = None
    high_ratio: float | None = None
    exits: float | None = None
    emulated: float | None = None
    why_not: str = ""


class Bell(Device):
    """Answers in Python, and ends a run at the end of the rounds."""

    name = "bell"
    ports = (range(0x500, 0x510), range(_END, _END + 1))
    mmio = (range(_PAGES, _page(4)),)

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        return StopRequest("end") if port == _END else None

    def mmio_write(self, gpa: int, value: int, size_bytes: int) -> None:
        return None


def _source(ways: Iterable[Ring]) -> str:
    # Which loop comes next, and how many rounds, is in memory: no register is written between two measurements.
    loops = [
        f"way{n}: mov esi, [rounds]\n{ring.before}\nagain{n}: {ring.each}\n{ring.instruction}\ndec esi\njnz again{n}\n"
        "jmp finish\n"
        for n, ring in enumerate(ways)
    ]
    return (
        "start: mov rax, [chosen]\njmp rax\n"
        + "".join(f".balign 64\n{loop}" for loop in loops)
        + f"finish: mov dx, {_END:#x}\nout dx, al\njmp start\n.balign 4096\nchosen: .quad way0\nrounds: .quad 1\n"
    )


class Doorbells:
    """A machine with all rings."""

    def __init__(self, host: Host, cpl: int, ways: list[Ring]) -> None:
        self.machine = Machine(host, memory="2M", devices=[Bell()], user=cpl == 3, cpl=cpl)
        self.ways = ways
        self.eventfds = {}
        vm = self.machine.vm
        for ring in ways:
            if ring.ioeventfd is not None:
                addr, length, pio = ring.ioeventfd
                vm.ioeventfd(fd := vm.create_eventfd(), addr, length, pio=pio)
                self.eventfds[ring.name] = fd
            if ring.coalesced is not None:
                addr, size_bytes, pio = ring.coalesced
                vm.register_coalesced_mmio(addr, size_bytes, pio=pio)
        self.machine.load_asm(_source(ways), at=0x1000)

    def choose(self, ring: Ring, rounds: int) -> None:
        """Says what the guest does next."""
        m = self.machine
        way = m.symbols[f"way{self.ways.index(ring)}"]
        m.memory.write(m.symbols["chosen"], way.to_bytes(8, "little") + rounds.to_bytes(8, "little"))

    def try_once(self, ring: Ring) -> str:
        """Rings a few times with a deadline; what went wrong, or nothing."""
        self.choose(ring, 3)
        # A hypercall on kvm_pvm never ends.
        stop = self.machine.cpu.run(deadline_s=10 if self.machine.host.info.emulated else 1)
        if stop.cause is not Cause.GUEST_EXIT:
            return str(stop.cause)
        self.check(ring, 3)
        return ""

    def check(self, ring: Ring, rounds: int) -> None:
        """Raises AssertionError unless each round rang."""
        fd = self.eventfds.get(ring.name)
        assert fd is None or fd.read() == rounds, ring
        if ring.coalesced is not None:
            assert len(self.machine.cpu.vcpu.take_coalesced()) == rounds, ring

    def once(self, ring: Ring, rounds: int) -> float:
        """us for so many rounds, with the loop and the exit at its end."""
        m = self.machine
        self.choose(ring, rounds)
        if ring.python:
            start = time.perf_counter()
            stop = m.cpu.run()
            assert stop.cause is Cause.GUEST_EXIT, stop
            return (time.perf_counter() - start) * 1e6
        exits = rounds + 1 if ring.leaves else 1
        count, ns = m.host.core.raw_loop(m.cpu.vcpu.handle, wire.KB_RAW_EXITS, exits)
        assert count == exits, (ring, count)
        m.cpu.state.current = None
        self.check(ring, rounds)
        return float(ns) / 1e3

    def counted(self, ring: Ring, rounds: int) -> tuple[float | None, float | None]:
        """Exits and emulated instructions a round, as KVM counts them, with those of the loop."""
        vcpu = self.machine.cpu.vcpu
        if not self.machine.vm.check_extension(Capability.BINARY_STATS_FD):
            return None, None
        with vcpu.get_stats_fd() as stats:
            before = stats.read()
            self.once(ring, rounds)
            grown = stats.read().since(before)
        return grown.get("exits", 0) / rounds, grown.get("insn_emulation", 0) / rounds


@spelled_out
def measure(host: Host, *, cpl: int = 0, repeats: int = 9) -> list[RoundTrip]:
    """All rings on a host, those that do not work with `why_not`.

    In each repeat every ring comes once, and its loop without it before: what the machine does meanwhile is in both.

    Args:
        host: where; times are its own clock's, on an appliance emulator time, but those of Python devices wall clock.
        cpl: the guest's privilege, 0 or 3.
        repeats: 2 at least, for half of them lie in what is told of each ring.

    Raises:
        MisuseError: no host, or other numbers than these.
    """
    if not isinstance(host, Host):
        raise MisuseError(f"host={host!r:.80}: give a host, as kb.connect() gives it")
    repeats = integer(repeats, "repeats", 2)
    found = rings("vmmcall" if host.info.module == "kvm_amd" else "vmcall")
    works, why_not = [], {}
    for ring in found:
        bells = Doorbells(host, cpl, [ring])
        with bells.machine:
            reason = bells.try_once(ring)
        if reason:
            why_not[ring.name] = reason
        else:
            works.append(ring)
    bells = Doorbells(host, cpl, works)
    with bells.machine:
        taken: dict[str, list[float]] = {ring.name: [] for ring in works}
        for repeat in range(-1, repeats):
            for ring in works[2:]:
                cost = _without_loop(bells, ring)
                if repeat >= 0:  # one round to warm up
                    taken[ring.name].append(cost)
        counted = {ring.name: bells.counted(ring, _RING_ROUNDS) for ring in works}
    return [_told(ring, taken, counted, why_not) for ring in found[2:]]


def _without_loop(bells: Doorbells, ring: Ring) -> float:
    # A few ms each; what disturbs a try only makes it longer, so the shortest counts.
    emulated = bells.machine.host.info.emulated
    if ring.python:
        rounds = 20 if emulated else 200
    elif ring.coalesced is not None:
        rounds = _RING_ROUNDS
    elif ring.leaves:
        rounds = 40 if emulated else 200
    else:
        rounds = 80 if emulated else 1000
    nothing = bells.ways[1 if ring.each else 0]
    tries = [(bells.once(nothing, rounds), bells.once(ring, rounds)) for _ in range(TRIES)]
    loop, ours = (min(each) for each in zip(*tries, strict=True))
    return float(ours if ring.python else ours - loop) / rounds


def _told(
    ring: Ring,
    taken: dict[str, list[float]],
    counted: dict[str, tuple[float | None, float | None]],
    why_not: dict[str, str],
) -> RoundTrip:
    if ring.name in why_not:
        return RoundTrip(ring.name, why_not=why_not[ring.name])
    times = taken[ring.name]
    ratios = [] if ring.python else [one / other for one, other in zip(times, taken[REFERENCE], strict=True)]
    nothing = _LOOP_AND_MOVE if ring.each else _LOOP
    less = [
        None if ours is None or loop is None else ours - loop
        for ours, loop in zip(counted[ring.name], counted[nothing], strict=True)
    ]
    return RoundTrip(
        ring.name,
        *_quartiles(times),
        *(_quartiles(ratios) if ratios else (None, None, None)),
        *less,
    )


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


@dataclass(frozen=True)
class Parts:
    """A round trip of user-space MMIO taken apart, by the differences of the other three; us.

    Attributes:
        exit_us: out of the guest and back in: PIO with ioeventfd.
        decode_us: the instruction found, decoded and carried out: what MMIO with ioeventfd takes more.
        user_us: to user space and back: what user-space MMIO takes more than MMIO with ioeventfd.
        predicted_us: user-space PIO, if the parts add up; None: was not measured.
        measured_us: what it was.
    """

    exit_us: float
    decode_us: float
    user_us: float
    predicted_us: float
    measured_us: float | None

    def shares(self) -> tuple[float, float, float]:
        """The three parts as shares of user-space MMIO."""
        whole = self.exit_us + self.decode_us + self.user_us
        return self.exit_us / whole, self.decode_us / whole, self.user_us / whole


def parts(us: Mapping[str, float]) -> Parts:
    """Takes times by name apart, such as `PUBLISHED_US` or ``{row.name: row.us for row in measure(host)}``.

    Raises:
        MisuseError: one of the three that are needed is missing, or was not measured.
    """
    needed = tuple(PUBLISHED_US)
    if not isinstance(us, Mapping) or any(us.get(name) is None for name in needed):
        raise MisuseError(f"us={us!r:.80}: give a dict with the times of {', '.join(map(repr, needed))}")
    exit_us, mmio, heavy = us["PIO, ioeventfd"], us["MMIO, ioeventfd"], us[REFERENCE]
    return Parts(exit_us, mmio - exit_us, heavy - mmio, heavy - mmio + exit_us, us.get("PIO, user space"))


def told_parts(us: Mapping[str, float]) -> str:
    """One line of `parts`."""
    found = parts(us)
    shares = ", ".join(
        f"{what} {part:.2f} us ({share:.0%})"
        for what, part, share in zip(
            ("exit and entry", "decoding", "user space"),
            (found.exit_us, found.decode_us, found.user_us),
            found.shares(),
            strict=True,
        )
    )
    measured = "" if found.measured_us is None else f", measured {found.measured_us:.2f}"
    return f"{shares}; so PIO to user space should take {found.predicted_us:.2f} us{measured}"


def table(found: list[RoundTrip], clock: str) -> str:
    """The rows as Markdown."""
    lines = [
        f"| way | {clock}, us | half lie in | ratio to MMIO, user space | half lie in | published | exits | emulated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.why_not:
            lines.append(f"| {row.name} | not here: {row.why_not} | | | | | | |")
            continue
        published = PUBLISHED_US.get(row.name)
        told = "" if published is None else f"{published:.2f} us, {published / PUBLISHED_US[REFERENCE]:.2f}"
        ratio = ["", ""]
        if row.ratio is not None:
            ratio = [f"{row.ratio:.2f}", f"{row.low_ratio:.2f} to {row.high_ratio:.2f}"]
        name = f"{row.name} (wall clock)" if row.ratio is None else row.name
        counts = ["" if each is None else f"{each:.2f}" for each in (row.exits, row.emulated)]
        cells = [name, f"{row.us:.2f}", f"{row.low_us:.2f} to {row.high_us:.2f}", *ratio, told, *counts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
