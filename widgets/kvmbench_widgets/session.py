"""What all widgets on one machine share: who runs the guest, and who must hear that it stopped.

Facts first. A message from the page is handled on the kernel's main thread, or,
with ipykernel 7 and JupyterLab 4.4, on a thread of its own (a subshell). A guest
may run for hours. So the guest is run by a thread of its own a vcpu, the handler
returns at once, and Pause arrives while the guest runs.

What is drawn is made under one lock, `Session.lock`, which nobody holds while the
guest runs; panels only look at a vcpu that is stopped.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from kvmbench.debug.cpu import Cpu
from kvmbench.debug.machine import Machine
from kvmbench.errors import BusyError, HostLost, MisuseError

if TYPE_CHECKING:
    from kvmbench_widgets.panel import Panel

# A step is over before anybody could read "running"; what lasts longer is shown, this often.
_SHOW_RUNNING_S = 0.1
_TICK_S = 0.1
_IDLE_S = 30.0
# So long a click waits for the step of the click before it.
_SETTLE_S = 0.25


class Session:
    """The widgets of one machine. `Session.of(machine)` gives the one there is.

    Attributes:
        machine: the machine.
        lock: held while views are made and messages handled; never while the guest runs.
    """

    _all: ClassVar[weakref.WeakKeyDictionary[Machine, Session]] = weakref.WeakKeyDictionary()

    def __init__(self, machine: Machine) -> None:
        self._machine = weakref.ref(machine)
        self.lock = threading.RLock()
        self._panels: weakref.WeakSet[Panel] = weakref.WeakSet()
        self._workers: dict[int, _Worker] = {}
        self._shown_running: set[int] = set()
        self._seen: tuple[Any, ...] = ()
        self._ticker: threading.Thread | None = None
        self._ticker_guard = threading.Lock()

    @classmethod
    def of(cls, machine: Machine) -> Session:
        """The machine's session, made at the first call."""
        found = cls._all.get(machine)
        if found is None:
            found = cls._all[machine] = cls(machine)
            _watch_cells()
        return found

    @property
    def machine(self) -> Machine:
        machine = self._machine()
        assert machine is not None  # panels hold it
        return machine

    def join(self, panel: Panel) -> None:
        """From now on the panel hears of every change."""
        self._panels.add(panel)

    def panels(self) -> list[Panel]:
        """The open panels, in the order they were made."""
        return sorted((panel for panel in list(self._panels) if panel.comm is not None), key=lambda each: each.number)

    def state(self, cpu: Cpu) -> str:
        """ "stopped", "running", "lost" or "closed"."""
        if self.machine.host.lost:
            return "lost"
        if self.machine.closed:
            return "closed"
        return "running" if cpu.running or cpu.index in self._shown_running else "stopped"

    def start(self, panel: Panel, cpu: Cpu, job: Callable[[], object]) -> None:
        """Runs `job`, which moves the vcpu, on the vcpu's thread; an error is shown under `panel`.

        Raises:
            BusyError: the vcpu is running.
        """
        worker = self._workers.get(cpu.index)
        if worker is None:
            worker = self._workers[cpu.index] = _Worker(self, cpu.index)
        if cpu.running or not worker.take(panel, job):
            raise BusyError(f"vcpu {cpu.index} is running; pause it first")
        self._tick_while_running()

    def pause(self) -> None:
        """Stops every vcpu that runs, those too whose job has been taken and has not begun."""
        for worker in self._workers.values():
            worker.pausing = worker.busy
        for cpu in self.machine.cpus:
            cpu.interrupt()

    def settle(self, cpu: Cpu) -> None:
        """Waits until a job that began just now has ended: the second of two quick clicks is no mistake.

        Not to be called with `lock` held: the end of a job takes it.
        """
        worker = self._workers.get(cpu.index)
        if worker is not None and cpu.index not in self._shown_running:
            worker.idle.wait(_SETTLE_S)

    def is_busy(self, cpu: Cpu) -> bool:
        """Whether a job of a widget, or a cell, is running the vcpu."""
        worker = self._workers.get(cpu.index)
        return cpu.running or (worker is not None and worker.busy)

    def wait(self, cpu: Cpu, timeout_s: float | None = None) -> bool:
        """Waits until no job of a widget moves the vcpu, and what came of it is drawn; False if it still runs."""
        worker = self._workers.get(cpu.index)
        return worker is None or worker.idle.wait(timeout_s)

    def show(self, cpu: Cpu, gva: int, what: str = "code") -> None:
        """Brings a linear address into sight in every open panel on the vcpu that shows "code" or "data".

        Raises:
            MisuseError: there is no such panel.
        """
        found = [panel for panel in self.panels() if what in panel.SHOWS and panel.cpu is cpu]
        if not found:
            name = {"code": "Disassembly", "data": "Memory"}[what]
            raise MisuseError(f"no open panel shows {gva:#x}; kw.{name}(m) does")
        for panel in found:
            panel.show_address(gva)

    def changed(self) -> None:
        """Draws everything anew; what comes out the same is not sent."""
        with self.lock:
            self._seen = self._look()
            for panel in self.panels():
                panel.refresh()

    def changed_since(self) -> None:
        """`changed`, if a cell has moved or written the guest."""
        if self._look() != self._seen:
            self.changed()

    def _look(self) -> tuple[Any, ...]:
        machine = self._machine()
        if machine is None:
            return ()
        # A state is a new object after every stop and write; memory has no such mark, so cells always redraw it.
        states = tuple(id(cpu.state.current) for cpu in machine.cpus)
        serials = tuple(cpu.stop_serial for cpu in machine.cpus)
        return (machine.closed, machine.host.lost, states, serials, time.monotonic_ns())

    def _tick_while_running(self) -> None:
        with self._ticker_guard:
            if self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, name="kvmbench ticker", daemon=True)
                self._ticker.start()

    # While a guest runs, only what is live (exits, console) is drawn, ten times a second at most.
    def _tick(self) -> None:
        time.sleep(_SHOW_RUNNING_S)
        while True:
            with self._ticker_guard:
                # A job is taken before its start looks for a ticker: none is left without one.
                if not any(worker.busy for worker in self._workers.values()):
                    self._ticker = None
                    return
            with self.lock:
                # Under the lock: the end of a job, which draws the stop, must have the last word.
                busy = {index for index, worker in self._workers.items() if worker.busy}
                self._shown_running |= busy
                for panel in self.panels():
                    with self.showing(panel):  # or one panel's fault would end the pictures of all
                        if panel.cpu.index in busy or panel.cpu.running:  # a job may run all vcpus
                            panel.show_running()
                        panel.tick()
                # A vcpu that was just about to start has not heard the first call (test_a_pause_right_after_...).
                if any(worker.pausing and worker.busy for worker in self._workers.values()):
                    for cpu in self.machine.cpus:
                        cpu.interrupt()
            time.sleep(_TICK_S)

    @contextmanager
    def showing(self, panel: Panel) -> Iterator[None]:
        """An error inside is shown under the panel; a lost host under all."""
        try:
            yield
        except HostLost as error:
            for each in self.panels():
                each.fail(error)
        except (Exception, SystemExit) as error:  # a condition may call exit(), which must not end the vcpu's thread
            panel.fail(error)

    def finished(self, worker: _Worker) -> None:
        """Called by a worker when its job is over."""
        with self.lock:
            # Not before the lock is held: who sees the vcpu idle and takes the lock sees what came of the job.
            worker.busy = False
            self._shown_running.discard(worker.index)
            try:
                if self._machine() is not None:
                    self.changed()
            finally:
                worker.idle.set()


class _Worker:
    """A thread that runs one vcpu: KVM wants a vcpu to stay with one thread. It ends when nothing came for a while."""

    def __init__(self, session: Session, index: int) -> None:
        self._session, self.index = session, index
        self._jobs: queue.SimpleQueue[tuple[Panel, Callable[[], object]]] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self.busy = self.pausing = False
        self.idle = threading.Event()
        self.idle.set()

    def take(self, panel: Panel, job: Callable[[], object]) -> bool:
        with self._guard:
            if self.busy:
                return False
            self.busy, self.pausing = True, False
            self.idle.clear()
            self._jobs.put((panel, job))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"kvmbench vcpu {self.index}", daemon=True)
                self._thread.start()
        return True

    def _work(self) -> None:
        while True:
            try:
                panel, job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._guard:
                    if not self.busy:
                        self._thread = None
                        return
                continue
            with self._session.showing(panel):
                panel.error = ""
                job()
            self._session.finished(self)
            del panel, job  # or the machine would live on in this thread's frame


_watching = False


def _watch_cells() -> None:
    """After each cell, panels show what the cell did; a plain Python has no cells."""
    global _watching
    if _watching:
        return
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None:
        return
    _watching = True

    def after_cell(*_: object) -> None:
        for session in list(Session._all.values()):
            session.changed_since()

    shell.events.register("post_run_cell", after_cell)
