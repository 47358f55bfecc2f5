"""What every panel has: a vcpu, a view to draw, a state, an error in words, text without a page, and export.

A panel's Python decides what is shown and puts it into one trait, `view`; its ES
module draws that and nothing else. Addresses and register values are hex strings
there: a JSON number loses the last digits of 64 bits.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import traitlets

from kvmbench.arguments import instead
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
    # An error quotes what was wrong, and that may have come from outside, be of any size, and be no text that can be
    # sent: half of a character that JavaScript writes in two.
    words = words.encode("utf-8", "backslashreplace").decode()
    return words if len(words) <= 2 * _MOST_WORDS else f"{words[:_MOST_WORDS]} … {words[-_MOST_WORDS:]}"


def check_utf8(text: str) -> None:
    """MisuseError for half a surrogate pair, which a page can send and UTF-8 does not have."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MisuseError(f"{text[error.start]!r} is half a character: no text has it") from None


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
    #: The traits that a page may set. With others a panel would show what is not so, or nothing any more.
    THEIRS: ClassVar[frozenset[str]] = frozenset()

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
        self._refuse_unknown(traits)
        self._cpu = target
        self.session = Session.of(target.machine)
        self.number = next(_numbers)
        super().__init__(where=str(target.machine.host.provenance), library=Library.reference(), **traits)
        _answer_while_cells_run(self.comm)
        self.on_msg(self._receive)
        self.session.join(self)
        self.refresh()

    @classmethod
    def _refuse_unknown(cls, traits: Mapping[str, Any], *others: str) -> None:
        # traitlets lets a misspelt trait pass, with a warning that a notebook does not show.
        for name in traits:
            if name not in cls.class_trait_names():
                known = sorted({*cls.THEIRS, "layout", *others})
                raise MisuseError(f"{cls.__name__} has no option {name!r}; {instead(name, known)}")

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
        ours = isinstance(error, (KvmbenchError, traitlets.TraitError))
        self.error = _short(words if ours else f"{type(error).__name__}: {words}")

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Takes traits that a page has set; what is no value of theirs is told under the panel, and changes nothing."""
        theirs = {name: value for name, value in sync_data.items() if name in self.THEIRS or name == "_view_count"}
        before = {name: getattr(self, name) for name in theirs}
        refused = theirs.keys() != sync_data.keys()
        try:
            super().set_state(theirs)
        except Exception as error:
            for name, value in before.items():
                self.set_trait(name, value)
            self.fail(error)
            refused = True
        if refused:
            self.send_state([name for name in sync_data if name in self.keys])  # the page shows what holds

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
        try:
            inspect.signature(getattr(self, name)).bind(**options)
        except TypeError as error:
            self.error = _short(f"{self.TITLE} cannot do {name!r}: {error}")
            return
        if name != "pause":
            self.session.settle(self._cpu)
        with self.session.lock:
            self.error = ""
            try:
                method(self, **options)
            except Exception as error:
                self.fail(error)

    def save(self, path: str | Path, *, format: str = "") -> None:
        """Saves what is shown: data as ``.csv``, text as ``.txt``, a picture as ``.svg`` or ``.png``.

        Args:
            path: the file; its ending decides.
            format: "csv", "txt", "svg" or "png", instead of an ending.

        Raises:
            MisuseError: another ending.
        """
        data = self._file(format or Path(path).suffix.lstrip(".").lower())
        Path(path).write_bytes(data)

    @action
    def download(self, format: str) -> None:
        """Hands the browser a file of what is shown: "csv", "txt", "svg" or "png"."""
        data = self._file(format)
        name = f"{type(self).__name__.lower()}.{format}"
        self.send({"do": "save", "name": name, "type": export.TYPES[format]}, buffers=[data])

    def _file(self, kind: str) -> bytes:
        return export.make(
            kind,
            title=self.TITLE,
            figure=self.figure,
            table=self.table,
            text=self.text,
            where=self.machine.host.provenance,
        )

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
