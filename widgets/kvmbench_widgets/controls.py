"""`Controls`: step, over, out, until, run, pause, reset and record, and which vcpu.

Every command runs on the vcpu's own thread (`Session.start`), so the notebook
stays free and Pause is heard while the guest runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import traitlets

from kvmbench.debug.cpu import Cpu
from kvmbench.errors import MisuseError
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.panel import Panel, action


class Controls(Panel):
    """The buttons that move the guest: ``kw.Controls(m)``.

    Attributes:
        vcpu: index of the vcpu they move.
        deadline_s: a run ends by itself after so many seconds; 0: never.
        steps: how many steps Step makes, and how many Record keeps.
        record: the `StepRecord` of the last recording made here, or None.
    """

    MODULE = "controls"
    TITLE = "Controls"
    THEIRS: ClassVar[frozenset[str]] = frozenset({"deadline_s"})

    vcpu = traitlets.Int(0).tag(sync=True)
    deadline_s = traitlets.Float(0.0).tag(sync=True)

    def __init__(self, target: Any, **traits: Any) -> None:
        self.record_made: Any = None
        super().__init__(target, **traits)
        self.set_trait("vcpu", self.cpu.index)

    @traitlets.validate("deadline_s")
    def _check_deadline(self, proposal: Any) -> float:
        value = float(proposal.value)
        if not 0 <= value < 1e9:
            raise MisuseError(f"a deadline is a number of seconds, or 0 for none; not {value}")
        return value

    @property
    def cpu(self) -> Cpu:
        return self._cpu

    @cpu.setter
    def cpu(self, cpu: Cpu) -> None:
        Panel.cpu.fset(self, cpu)  # type: ignore[attr-defined]
        self.vcpu = cpu.index

    def make_view(self) -> dict[str, Any]:
        stop = self.cpu.last_stop
        regs = self.cpu.regs
        linear = regs.mode.linear(regs.rip)
        view: dict[str, Any] = {
            "vcpus": len(self.machine.cpus),
            "rip": f"{regs.rip:#x}",
            "label": self.cpu.symbols.label(linear),
            "cause": "",
            "notes": [],
            "symbols": [name for name, _ in self.cpu.symbols][:500],
        }
        if stop is not None and stop.is_current:
            view["cause"] = str(stop.cause)
            view["notes"] = stop.notes
            if stop.instruction is not None:
                view["instruction"] = stop.instruction.text
            view["steps"] = f"{stop.steps:,}"
            view["elapsed_ns"] = str(stop.elapsed_ns)
            view["emulated"] = self.machine.host.info.emulated
        return view

    def _start(self, job: Callable[[], object]) -> None:
        self.session.start(self, self.cpu, job)

    @property
    def _deadline(self) -> float | None:
        return self.deadline_s or None

    @action
    def step(self, count: int = 1) -> None:
        """Executes `count` instructions."""
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 10_000_000_000:
            raise MisuseError(f"cannot step {count!r} instructions; give a number from 1 to 10,000,000,000")
        cpu = self.cpu
        self._start(lambda: cpu.step(count, deadline_s=self._deadline or max(5.0, count * 1e-3)))

    @action
    def over(self) -> None:
        """Steps, but runs a CALL, a REP instruction or a software interrupt to its end."""
        cpu = self.cpu
        self._start(lambda: cpu.step_over(deadline_s=self._deadline))

    @action
    def out(self) -> None:
        """Runs to the end of the current function."""
        cpu = self.cpu
        self._start(lambda: cpu.step_out(deadline_s=self._deadline))

    @action
    def until(self, where: str) -> None:
        """Runs until rip is at an address or symbol."""
        cpu = self.cpu
        address = cpu.symbols.resolve(where)  # here, so that a typo is told at once
        self._start(lambda: cpu.run_until(address, deadline_s=self._deadline))

    @action
    def run(self) -> None:
        """Runs until something stops the guest."""
        cpu = self.cpu
        self._start(lambda: cpu.run(deadline_s=self._deadline))

    @action
    def run_all(self) -> None:
        """Runs all vcpus at once until one stops."""
        machine = self.machine
        self._start(lambda: machine.run(deadline_s=self._deadline))

    @action
    def pause(self) -> None:
        """Stops the vcpu where it is; nothing if it is stopped."""
        self.session.pause()

    @action
    def reset(self) -> None:
        """Starts the machine anew: memory as loaded, vcpus at their entry."""
        if any(self.session.is_busy(cpu) for cpu in self.machine.cpus):
            raise MisuseError("the guest runs; pause it before a reset")
        self.machine.reset()
        self.session.changed()

    @action
    def record(self, steps: int = 1000) -> None:
        """Keeps every step; the rows are in `last_record` of the vcpu."""
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 10_000_000:
            raise MisuseError(f"cannot record {steps!r} steps; give a number from 1 to 10,000,000")
        cpu = self.cpu

        def job() -> None:
            self.record_made = cpu.record(steps, deadline_s=self._deadline, progress=False)

        self._start(job)

    @action
    def choose(self, vcpu: int) -> None:
        """Shows and moves another vcpu, in this panel and, in a `Workbench`, in all."""
        if isinstance(vcpu, bool) or not isinstance(vcpu, int) or not 0 <= vcpu < len(self.machine.cpus):
            raise MisuseError(f"there is no vcpu {vcpu!r}; there are 0 to {len(self.machine.cpus) - 1}")
        self.cpu = self.machine.cpus[vcpu]

    def lines(self) -> list[Line]:
        view = self.view
        if not view:
            return [[Span("nothing seen yet", "dim")]]
        line = [Span(f"vcpu {self.vcpu} "), Span(f"at {view['rip']} "), Span(view["label"], "name")]
        if view["cause"]:
            line += [Span(f"  {view['cause']}", "changed"), Span(f"  next: {view.get('instruction', '')}")]
        return [line, *([Span(note)] for note in view["notes"])]

    def table(self) -> Table:
        view = self.view
        return Table(
            ("vcpu", "rip", "label", "cause", "steps", "elapsed_ns", "notes"),
            [
                (
                    self.vcpu,
                    view.get("rip", ""),
                    view.get("label", ""),
                    view.get("cause", ""),
                    view.get("steps", "").replace(",", ""),
                    view.get("elapsed_ns", ""),
                    "; ".join(view.get("notes", ())),
                )
            ],
        )
