"""`Console`: the serial line both ways, and the debug console at port 0xe9.

A guest can send megabytes a second, so what is new travels as a message of its own
and never more than `_PIECE` at once; the last `_TAIL` characters are part of the
widget's state, which is read when a page loads or a notebook is saved, not on each change.
"""

from __future__ import annotations

import codecs
from typing import Any, ClassVar

import traitlets

from kvmbench.errors import MisuseError
from kvmbench.machine.debugcon import DebugConsole
from kvmbench.machine.serial import Serial
from kvmbench_widgets.export import Line, Span, Table
from kvmbench_widgets.panel import Panel, action, check_utf8

_TAIL = 65536
_PIECE = 65536
# Of what was sent before, so much is compared to see whether the device was reset and has begun anew.
_PROOF = 64
_MOST_INPUT = 65536
_NEWLINES = {"cr": "\r", "lf": "\n", "none": ""}
_LINES_IN_TEXT = 40
# Other keys that a terminal sends as one control character.
_KEYS = {"Esc": 0x1B, "Tab": 0x09, "Backspace": 0x7F}


class _Stream:
    """What one device has sent: how far it was read, and the end of it as text."""

    def __init__(self, name: str, title: str, device: Serial | DebugConsole) -> None:
        self.name, self.title, self.device = name, title, device
        self.start()

    def start(self) -> None:
        self.done = 0
        self.proof = b""
        self.sent = 0  # characters so far, those skipped among them
        self.tail = ""
        self.cut = False  # whether something came before the tail
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pull(self) -> dict[str, Any] | None:
        """What is new, as a message for the page; None if nothing is."""
        output = self.device.output
        size = len(output)
        if size < self.done or output[self.done - len(self.proof) : self.done] != self.proof:
            self.start()
            message: dict[str, Any] = {"reset": True}
        elif size == self.done:
            return None
        else:
            message = {}
        start = self.done
        if size - start > _PIECE:
            skipped = size - start - _PIECE
            start += skipped
            self._decoder.reset()
            self.tail = ""
            self.cut = True
            message["skipped"] = skipped
        data = bytes(output[start:size])
        text = self._decoder.decode(data)
        self.done = size
        self.proof = bytes(output[max(0, size - _PROOF) : size])
        self.cut |= len(self.tail) + len(text) > _TAIL
        self.tail = (self.tail + text)[-_TAIL:]
        # Where it goes, counted in characters: a page that missed a message asks for all anew.
        message |= {"do": "text", "stream": self.name, "from": self.sent, "text": text}
        self.sent += len(text)
        return message

    def clear(self) -> None:
        self.tail, self.cut = "", False

    def state(self) -> dict[str, Any]:
        return {"text": self.tail, "end": self.sent, "cut": self.cut}


class Console(Panel):
    """The serial line of a machine: ``kw.Console(m)``.

    Attributes:
        newline: what Enter sends: "cr" (as a keyboard does), "lf" or "none".
        tail: the last 64 Ki characters of each stream, for a page that loads later.
    """

    MODULE = "console"
    TITLE = "Console"
    THEIRS: ClassVar[frozenset[str]] = frozenset({"newline"})

    newline = traitlets.Enum(tuple(_NEWLINES), "cr").tag(sync=True)
    tail = traitlets.Dict().tag(sync=True)

    def __init__(self, target: Any, **traits: Any) -> None:
        self._streams: dict[str, _Stream] = {}
        super().__init__(target, **traits)

    def _follow(self) -> dict[str, _Stream]:
        if not self._streams:
            machine = self.machine
            devices = (("serial", "Serial", machine.serial), ("debug", "Debug console 0xe9", machine.debugcon))
            self._streams = {name: _Stream(name, title, device) for name, title, device in devices}
        return self._streams

    def make_view(self) -> dict[str, Any]:
        return self._look()

    def _look(self) -> dict[str, Any]:
        streams = self._follow().values()
        return {
            "waiting": self.machine.serial.waiting,
            "streams": [{"name": each.name, "title": each.title, "bytes": f"{each.done:,}"} for each in streams],
        }

    def refresh(self) -> None:
        with self.session.lock:
            self._pump()
            super().refresh()
            # What a guest has sent is here even if its host is gone.
            if self.state != "stopped":
                self.view = self._look()

    def tick(self) -> None:
        if self._pump() or self.view.get("waiting") != self.machine.serial.waiting:
            self.view = self._look()

    def _pump(self) -> bool:
        new = [message for stream in self._follow().values() if (message := stream.pull()) is not None]
        for message in new:
            self.send(message)
        return bool(new)

    def get_state(self, key: Any = None, drop_defaults: bool = False) -> Any:
        """The widget's state, with what the streams have sent until now."""
        # Put in place without a word to the page, which has it already, message by message.
        self._trait_values["tail"] = {name: each.state() for name, each in self._streams.items()}
        return super().get_state(key, drop_defaults)

    @action
    def again(self) -> None:
        """Sends all that is kept: for a page that has just drawn the panel, or missed something."""
        for stream in self._follow().values():
            kept = stream.state()
            begin = kept.pop("end") - len(kept["text"])
            self.send({"do": "text", "stream": stream.name, "from": begin, "again": True, **kept})

    @action
    def write(self, text: str) -> None:
        """Sends a line to the guest, and what `newline` says behind it.

        Raises:
            MisuseError: no text, or more than 64 KiB.
        """
        if not isinstance(text, str):
            raise MisuseError(f"the serial line takes text, not {text!r}")
        check_utf8(text)
        if len(text) > _MOST_INPUT:
            raise MisuseError(f"{len(text):,} characters are more than one line; give up to {_MOST_INPUT:,}")
        self._feed(text.replace("\n", _NEWLINES[self.newline] or "\n") + _NEWLINES[self.newline])

    @action
    def control(self, key: str) -> None:
        """Sends one control character.

        Args:
            key: "A" to "Z" or one of ``@[\\]^_`` for Ctrl and that key, or "Esc", "Tab" or "Backspace".

        Raises:
            MisuseError: another key.
        """
        if isinstance(key, str) and len(key) == 1 and 0x40 <= ord(key.upper()) <= 0x5F:
            code = ord(key.upper()) & 0x1F
        elif isinstance(key, str) and key in _KEYS:
            code = _KEYS[key]
        else:
            raise MisuseError(f"no control character {key!r}: give 'A' to 'Z', 'Esc', 'Tab' or 'Backspace'")
        self._feed(chr(code))

    def _feed(self, text: str) -> None:
        self.machine.check_open()
        self.machine.serial.write(text)
        self.view = self._look()

    @action
    def clear(self, stream: str = "serial") -> None:
        """Forgets what a stream has sent so far, in the panel; `m.serial.text` keeps it.

        Raises:
            MisuseError: no such stream.
        """
        found = self._follow().get(stream) if isinstance(stream, str) else None
        if found is None:
            raise MisuseError(f"no stream {stream!r}; there are {', '.join(self._streams)}")
        found.clear()
        self.send({"do": "clear", "stream": stream})

    def _plain_lines(self) -> list[tuple[str, list[str]]]:
        # Carriage returns end lines here or stand before their ends; control sequences are left out.
        return [
            (each.name, _plain(each.tail).removesuffix("\n").split("\n"))
            for each in self._streams.values()
            if each.tail
        ]

    def lines(self) -> list[Line]:
        lines: list[Line] = []
        for name, text in self._plain_lines():
            if name != "serial":
                lines.append([Span(self._streams[name].title, "dim")])
            lines += [[Span(line.expandtabs())] for line in text[-_LINES_IN_TEXT:]]
        return lines or [[Span("nothing sent yet", "dim")]]

    def table(self) -> Table:
        return Table(
            ("stream", "line", "text"),
            [(name, n, line) for name, text in self._plain_lines() for n, line in enumerate(text, 1)],
        )


def _plain(text: str) -> str:
    """Text without terminal control: sequences out, other control characters too, line ends as newlines."""
    out: list[str] = []
    at = 0
    while at < len(text):
        one = text[at]
        at += 1
        if one == "\x1b":
            if text[at : at + 1] == "[":  # CSI: parameters, then one final character
                at += 1
                while at < len(text) and not "@" <= text[at] <= "~":
                    at += 1
            elif text[at : at + 1] == "]":  # OSC: up to BEL or ESC \
                while at < len(text) and text[at] not in "\x07\x1b":
                    at += 1
            elif text[at : at + 1] in "()*+#%":  # the choice of a character set has one character more
                at += 1
            at += 1
        elif one == "\r":
            if text[at : at + 1] != "\n":
                out.append("\n")
        elif one in "\n\t" or one.isprintable():
            out.append(one)
    return "".join(out)
