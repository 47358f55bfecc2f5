"""Recording single steps: pieces from the core, put together into one `StepRecord`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from kvmbench.arguments import integer
from kvmbench.core import wire
from kvmbench.debug.packed_rows import unpack
from kvmbench.debug.record import StepRecord
from kvmbench.debug.step_rows import ROW, RowBuilder, row_of
from kvmbench.debug.stop import Cause, Stop
from kvmbench.errors import KvmbenchError, MisuseError
from kvmbench.host.channel import LocalChannel
from kvmbench.host.execution import Execution

if TYPE_CHECKING:
    from kvmbench.debug.cpu import Cpu

# Rows a request may bring. In this process a piece is a quarter of a second at most anyway; over a channel it should
# last well under a second, so that the bar moves, and be long enough that the round trip does not matter.
LOCAL_ROWS = 32768
REMOTE_ROWS = 8192
# More than any machine of today has, but nobody meant more.
MOST_BYTES = 1 << 42


class Recorder:
    """One recording of one vcpu, kept even if it ends early."""

    def __init__(self, cpu: Cpu, steps: int, *, progress: bool | None) -> None:
        try:
            steps = integer(steps, "steps", 1)
        except MisuseError:
            raise MisuseError(f"cannot record {steps!r} steps; give a positive number") from None
        if steps * ROW.itemsize > MOST_BYTES:
            raise MisuseError(
                f"cannot record {steps:,} steps: at {ROW.itemsize} bytes each they do not fit this machine's memory; "
                "record pieces and save() them"
            )
        self._cpu = cpu
        self._steps = steps
        self._progress = progress
        self._local = isinstance(cpu.machine.host.core.channel, LocalChannel)
        room = min(steps, LOCAL_ROWS if self._local else REMOTE_ROWS, wire.KB_MAX_STEPS_ROWS)
        self._execution = Execution(cpu.machine.host.core, cpu.vcpu.handle, rows=room)
        self._rows = RowBuilder(steps=steps)
        self._start = row_of(cpu.state.get_regs())
        self._mode = cpu.mode
        self._bar: Any = None
        self._ended = ""

    def run(self, deadline_s: float | None) -> Stop:
        """Steps until all rows are there or something stops the guest."""
        with contextlib.ExitStack() as stack:
            if self._progress is not False:
                self._bar = stack.enter_context(progress_bar(self._steps, always=bool(self._progress)))
            try:
                stop = self._cpu.engine.go(
                    stepping=True,
                    limit=self._steps,
                    deadline_s=deadline_s,
                    execution=self._execution,
                    sink=self._take,
                )
            except KeyboardInterrupt:
                self._ended = str(Cause.INTERRUPTED)
                raise
        if stop.cause is not Cause.STEP:
            self._ended = str(stop.breakpoint or stop.cause)
        return stop

    def _take(self, execution: Execution) -> None:
        count = execution.stop.n_rows
        if not count:
            return
        data = execution.rows()
        self._rows.append(data if self._local else unpack(data, count))
        if self._bar is not None:
            self._bar.update(count)

    def record(self) -> StepRecord:
        """What has been recorded so far."""
        cpu = self._cpu
        record = StepRecord(
            self._rows.finish(),
            self._start,
            bits=self._mode.bits,
            code_base=self._mode.code_base,
            symbols=cpu.symbols,
            code=cpu.read_code,
            provenance=cpu.machine.host.provenance,
            vcpu=cpu.index,
            ended=self._ended,
        )
        # Code that cannot be read leaves the recording as it is.
        with contextlib.suppress(KvmbenchError):
            record.sample_code()
        return record


def progress_bar(total: int, *, always: bool) -> Any:
    """A bar that appears when the work takes over a second; in a notebook or a terminal."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm warns where a notebook has no ipywidgets; text serves there
        from tqdm.auto import tqdm
    return tqdm(total=total, unit="step", unit_scale=True, delay=0 if always else 1, leave=False)
