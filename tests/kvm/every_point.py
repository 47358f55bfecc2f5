"""A Ctrl-C at each point of the library's Python at which one can come.

CPython looks for signals at the beginning of a function, at a loop's jump back and behind a call of a function in C:
in 3.11 by the opcodes below. Which of them the next one is to be is counted here and raised through `sys.settrace`.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import kvmbench

LIBRARY = str(Path(kvmbench.__file__).parent)
_LOOKS = {dis.opmap[name] for name in ("RESUME", "JUMP_BACKWARD", "CALL", "CALL_FUNCTION_EX") if name in dis.opmap}


class Press:
    """A Ctrl-C at the `target`-th point of what is called.

    Attributes:
        where: file, line and function of the point, once it was met.
    """

    def __init__(self, target: int) -> None:
        self.where = ""
        self._left = target
        self._before: dict[FrameType, int] = {}

    def during(self, call: Callable[[], Any]) -> bool:
        """Calls; True if KeyboardInterrupt came out."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        caller = frame.f_back
        if caller is not None:
            self._before.pop(caller, None)  # behind a call of a function in Python nobody looks
        if not frame.f_code.co_filename.startswith(LIBRARY):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._opcode

    def _opcode(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event != "opcode":
            return self._opcode
        before = self._before.get(frame)
        self._before[frame] = frame.f_code.co_code[frame.f_lasti]
        if before in _LOOKS:
            self._left -= 1
            if self._left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._opcode
