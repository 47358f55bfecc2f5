"""QEMU's monitor: its machine protocol (QMP) over an inherited socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

from kvmbench.errors import HostUnavailable, InternalError

_ANSWER_WITHIN_S = 20.0


class Monitor:
    """One conversation with QEMU.

    Raises (every method):
        EOFError: QEMU has ended.
        TimeoutError: no answer in time.
        InternalError: the answer is no QMP.
    """

    def __init__(self, stream: socket.socket) -> None:
        stream.settimeout(_ANSWER_WITHIN_S)
        self._stream = stream
        self._lines = stream.makefile("rb")
        self._greeted = False

    def execute(self, name: str, *, fds: Sequence[int] = (), **arguments: Any) -> Any:
        """Runs one command; underscores in argument names become dashes.

        Args:
            name: the command.
            fds: descriptors that go along, for `getfd`.
            **arguments: of the command.

        Returns:
            What it returned.

        Raises:
            HostUnavailable: QEMU refused, with its words.
        """
        if not self._greeted:
            self._line()
            self._greeted = True
            self.execute("qmp_capabilities")
        request = {"execute": name, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        data = json.dumps(request).encode()
        try:
            if fds:
                socket.send_fds(self._stream, [data], list(fds))
            else:
                self._stream.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError from None
        while True:
            answer = self._line()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise HostUnavailable(f"QEMU refused {name}: {answer['error'].get('desc', answer['error'])}")
            # Anything else is an event.

    def close(self) -> None:
        """Idempotent."""
        self._lines.close()
        self._stream.close()

    def _line(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except ConnectionResetError:
            line = b""
        except TimeoutError:
            raise
        except OSError as error:  # Python reads no more from a socket that has timed out once
            raise TimeoutError("QEMU's monitor did not answer in time before") from error
        if not line:
            raise EOFError
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise InternalError(f"QEMU's monitor said {line[:80]!r}") from error
        if not isinstance(answer, dict):
            raise InternalError(f"QEMU's monitor said {line[:80]!r}")
        return answer
