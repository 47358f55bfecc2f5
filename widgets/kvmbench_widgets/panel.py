"""What every panel has: a vcpu, a view to draw, a state, an error in words, text without a page, and export.

A panel's Python decides what is shown and puts it into one trait, `view`; its ES
module draws that and nothing else. Addresses and register values are hex strings
there: a JSON number loses the last digits of 64 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import traitlets

from kvmbench.debug.cpu import Cpu
from kvmbench.debug.machine import Machine
from kvmbench.errors import BusyError, ClosedError, HostLost, KvmbenchError, MisuseError
from kvmbench_widgets import export
from kvmbench_widgets.export import Line, Table
from kvmbench_widgets.library import Library
from kvmbench_widgets.modules import css, esm
from kvmbench_widgets.session import Session

Action = Callable[..., None]


def action(method: Action) -> Action:
    """Marks a method that the page may call: its name is the message's ``do``, its keywords the rest."""
    method.is_action = True  # type: ignore[attr-defined]
    return method


_numbers = itertools.count()
_MOST_WORDS = 300


def _short(words: str) -> str:
    # An error quotes what was wrong, and that may have come from outside and be of any size.
    return words if len(words) <= 2 * _MOST_WORDS else f"{words[:_MOST_WORDS]} … {words[-_MOST_WORDS:]}"


def _answer_while_cells_run(comm: Any) -> None:
    # JupyterLab sends a widget's messages to a thread of their own (a subshell), but ipykernel 7.4 leads them back to
    # the thread that last wrote to the widget: the main one, where cpu.run() may be waiting for our Pause. Other
    # kernels have no such detour, and this does nothing (test_pause_is_heard_while_a_cell_runs_the_guest).
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default


class Panel(anywidget.AnyWidget):
    """One panel on one vcpu. Subclasses fill `view` in `make_view`.

    Attributes:
        cpu: the vcpu shown; assign another to show that.
        view: what is drawn, as JSON; set by `refresh`.
        state: "stopped", "running", "lost" or "closed".
        error: what went wrong last, in words, or "".
        where: the host, its kernel and KVM, in one line.
        library: names the widget that holds what all panels' modules share.
    """

    #: File name of the ES module, without its ending, and the title.
    MODULE: ClassVar[str] = ""
    TITLE: ClassVar[str] = ""
    #: What `show_address` can bring into sight: "code", "data".
    SHOWS: ClassVar[frozenset[str]] = frozenset()

    view = traitlets.Dict().tag(sync=True)
    state = traitlets.Unicode("stopped").tag(sync=True)
    error = traitlets.Unicode("").tag(sync=True)
    where = traitlets.Unicode("").tag(sync=True)
    library = traitlets.Unicode("").tag(sync=True)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "MODULE" in cls.__dict__:  # not the class that add_traits derives
            cls._esm = esm(cls.MODULE)
            cls._css = css(cls.MODULE)

    def __init__(self, target: Cpu | Machine, **traits: Any) -> None:
        """Shows a vcpu, or the first of a machine.

        Raises:
            MisuseError: `target` is neither.
        """
        if isinstance(target, Machine):
            target = target.cpu
        if not isinstance(target, Cpu):
            raise MisuseError(f"{type(self).__name__} shows a vcpu (m.cpu, m.cpus[1]) or a machine, not {target!r}")
        self._cpu = target
        self.session = Session.of(target.machine)
        self.number = next(_numbers)
        super().__init__(where=str(target.machine.host.provenance), library=Library.reference(), **traits)
        _answer_while_cells_run(self.comm)
        self.on_msg(self._receive)
        self.session.join(self)
        self.refresh()

    @property
    def cpu(self) -> Cpu:
        return self._cpu

    @cpu.setter
    def cpu(self, cpu: Cpu) -> None:
        if cpu not in self._cpu.machine.cpus:
            raise MisuseError(f"{cpu!r} is no vcpu of this panel's machine")
        self._cpu = cpu
        self.refresh()

    @property
    def machine(self) -> Machine:
        return self._cpu.machine

    # What a subclass gives.

    def make_view(self) -> dict[str, Any]:
        """What to draw now. Called only while the vcpu is stopped and the host is there."""
        raise NotImplementedError

    def lines(self) -> list[Line]:
        """What the panel shows, as styled text, from `view` alone."""
        raise NotImplementedError

    def table(self) -> Table:
        """The data of what the panel shows, from `view` alone."""
        raise NotImplementedError

    def figure(self) -> Any:
        """What is shown, as a matplotlib figure for print."""
        return export.figure_of_text(self.lines(), self.TITLE)

    def show_address(self, gva: int) -> None:
        """Brings a linear address into sight; for panels whose `SHOWS` is not empty. `Session.show` calls it."""

    def tick(self) -> None:
        """Called ten times a second while a guest runs; for what is live."""

    # What every panel does.

    def refresh(self) -> None:
        """Looks at the vcpu and draws it, unless it runs or is gone; what was shown last stays then."""
        with self.session.lock:
            now = self.session.state(self._cpu)
            if now == "stopped" and self.session.is_busy(self._cpu):
                return  # between two pieces of a job, whose end draws what came of it
            if now == "stopped":
                try:
                    self.view = self.make_view()
                except BusyError:
                    now = "running"
                except HostLost as error:
                    now = "lost"
                    self.error = str(error)
                except ClosedError:
                    now = "closed"
                except Exception as error:
                    self.fail(error)  # and the other panels are drawn
            elif now == "lost":
                self.error = str(self.machine.host.lost)
            self.state = now

    def show_running(self) -> None:
        """Called while the vcpu runs."""
        self.state = "running"

    def fail(self, error: BaseException) -> None:
        """Shows an error under the panel."""
        words = str(error) or type(error).__name__
        self.error = _short(words if isinstance(error, KvmbenchError) else f"{type(error).__name__}: {words}")

    def _receive(self, _: object, message: Any, buffers: list[bytes]) -> None:
        # From the page: nothing in it is trusted to have the right shape.
        if not isinstance(message, Mapping):
            return
        options = dict(message)
        name = options.pop("do", None)
        method = getattr(type(self), name, None) if isinstance(name, str) else None
        if method is None or not getattr(method, "is_action", False):
            self.error = _short(f"{self.TITLE} cannot do {name!r}")
            return
        if name != "pause":
            self.session.settle(self._cpu)
        with self.session.lock:
            self.error = ""
            try:
                method(self, **options)
            except Exception as error:
                self.fail(error)

    @action
    def save(self, path: str | Path | None = None, *, format: str = "") -> None:
        """Saves what is shown: data as ``.csv``, a picture as ``.svg`` or ``.png``; the ending decides.

        Args:
            path: the file; None (from the page): hands the file to the browser.
            format: "csv", "svg" or "png", instead of an ending.

        Raises:
            MisuseError: another ending.
        """
        kind = format or Path(path or "").suffix.lstrip(".").lower()
        data = export.make(
            kind, title=self.TITLE, figure=self.figure, table=self.table, where=self.machine.host.provenance
        )
        if path is not None:
            Path(path).write_bytes(data)
        else:
            name = f"{type(self).__name__.lower()}.{kind}"
            self.send({"do": "save", "name": name, "type": export.TYPES[kind]}, buffers=[data])

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until what a button (or its method) started on this vcpu has ended; False if it still runs."""
        return self.session.wait(self._cpu, timeout_s)

    def text(self) -> str:
        """What the panel shows, as plain text."""
        head = f"{self.TITLE}: {self.where}" + (f" ({self.state})" if self.state != "stopped" else "")
        body = "\n".join("".join(span.text for span in line).rstrip() for line in self.lines())
        return "\n".join(part for part in (head, body, self.error) if part)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self._cpu!r}>"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        if bundle is None:
            return None
        # For consoles, text-only viewers and converters; a page with widgets draws the widget.
        bundle[0]["text/plain"] = self.text()
        return bundle
