"""Why and where a vcpu stopped.

A `Stop` is made after every step, so making one must cost next to nothing
beside the step itself: it takes what it is given and decodes the instruction,
the mode and the changed registers only when they are looked at.

What can be looked at later, and what cannot: registers come with the stop and
stay as they were, and so do the bytes at rip where the host could send them.
Where it could not, or the instruction crosses into another page, they are read
from guest memory at the first look; if the vcpu has moved on by then, the stop
says that it read late rather than pass the bytes off as those of its moment.
"""

from __future__ import annotations

import html
from dataclasses import FrozenInstanceError, dataclass, field
from enum import StrEnum
from typing import Any, NoReturn, Protocol, Self

from kvmbench.debug import style
from kvmbench.debug.fault import Fault
from kvmbench.debug.instruction import DECODER, MAX_BYTES, Instruction
from kvmbench.debug.mode import CodeMode
from kvmbench.debug.register_file import RegisterFile
from kvmbench.debug.register_view import changes_text
from kvmbench.debug.state import Stopped
from kvmbench.debug.symbols import Symbols
from kvmbench.uapi.vectors import vector_name


class Cause(StrEnum):
    """Why a vcpu stopped. Each compares equal to its text: ``stop.cause == "breakpoint"``."""

    #: The steps asked for are done.
    STEP = "step"
    #: A breakpoint of yours was reached; its instruction has not run yet.
    BREAKPOINT = "breakpoint"
    #: Watched memory was accessed; the instruction that did it has run.
    WATCHPOINT = "watchpoint"
    #: The address or condition given to run_until or step over and out was reached.
    UNTIL = "until"
    #: An exit kind that you asked to catch.
    CATCH = "catch"
    #: KVM left to user space with an exit that nothing handles.
    EXIT = "exit"
    #: HLT with nothing that could wake the vcpu.
    HALT = "halt"
    #: Triple fault or reset.
    SHUTDOWN = "shutdown"
    #: The guest ended itself through its exit port.
    GUEST_EXIT = "guest exit"
    #: An INT3 or #DB of the guest's own, which is no breakpoint of yours.
    GUEST_DEBUG = "guest debug trap"
    #: The deadline passed.
    DEADLINE = "deadline"
    #: Ctrl-C, the stop button or `interrupt()`.
    INTERRUPTED = "interrupted"
    #: KVM could not run the vcpu: a failed entry, an internal error, an errno of KVM_RUN.
    ERROR = "error"


class StoppedState(Protocol):
    """A vcpu's registers as they were at a stop: copied out, never changed afterwards."""

    @property
    def regs(self) -> Any:
        """``struct kvm_regs``."""

    @property
    def sregs(self) -> Any:
        """``struct kvm_sregs``."""

    @property
    def code(self) -> bytes:
        """The bytes at rip at the stop, as many as were sent; empty if none were."""


class StopContext(Protocol):
    """The vcpu a stop belongs to, for what is decoded later."""

    @property
    def stop_serial(self) -> int:
        """A number that changes whenever the vcpu runs, or code at rip may have been rewritten."""

    @property
    def symbols(self) -> Symbols:
        """Names and lines of what is loaded."""

    def read_code(self, gva: int, length_bytes: int) -> bytes:
        """Up to `length_bytes` bytes of code at a linear address; fewer, or none, where nothing is mapped."""


# The fields, without the freezing: a frozen dataclass of this size takes 2.3 us to fill through
# object.__setattr__, a plain one 0.4 us. Stop.__new__ fills a plain one and then makes it a Stop.
@dataclass(slots=True, init=False, repr=False, unsafe_hash=True)
class _Fields:
    cause: Cause
    rip: int
    exit: Any
    steps: int
    elapsed_ns: int
    dr6: int | None
    entered_vector: int | None
    tainted: str
    breakpoint: Any
    vcpu: int
    error: str
    held: str
    fault: Fault | None
    # The registers at this stop and at the one before; bytes where nobody has looked at them yet.
    _state: StoppedState | bytes | None = field(compare=False)
    _before: StoppedState | bytes | None = field(compare=False)
    _context: StopContext | None = field(compare=False)
    _serial: int = field(compare=False)
    # (Instruction or None, whether it was read late), once somebody has looked.
    _seen: tuple[Instruction | None, bool] | None = field(compare=False)


class Stop(_Fields):
    """Why a vcpu stopped, where, and what it did since the stop before. Frozen.

    Attributes:
        cause: see `Cause`.
        rip: offset of the instruction that runs next.
        exit: what KVM_RUN returned last, one class an exit reason, or None.
        steps: instructions this call completed, 0 when running freely.
        elapsed_ns: time in the core, in nanoseconds of the host's clock; in an appliance emulator time.
        dr6: the debug status KVM reported, or None if it reported none.
        entered_vector: the exception or interrupt whose handler the step landed in, or None.
        tainted: why the guest may have seen that it is being stepped, or "".
        breakpoint: the breakpoint or watchpoint hit, or None.
        vcpu: index of the vcpu.
        error: for `Cause.ERROR`, what KVM said.
        held: of several vcpus that ran together, why this one was held ("vcpu 1 hit breakpoint 2 at loop"), or "".
        fault: where a guest died that was stepped, and the last exceptions before, or None.
        state: the registers at this stop.
        before: the registers at the stop before.
    """

    __slots__ = ()

    def __new__(
        cls,
        cause: Cause,
        rip: int,
        exit: Any = None,
        steps: int = 0,
        elapsed_ns: int = 0,
        *,
        dr6: int | None = None,
        entered_vector: int | None = None,
        tainted: str = "",
        breakpoint: Any = None,
        vcpu: int = 0,
        error: str = "",
        held: str = "",
        fault: Fault | None = None,
        state: StoppedState | bytes | None = None,
        before: StoppedState | bytes | None = None,
        context: StopContext | None = None,
        serial: int = 0,
    ) -> Self:
        """Takes everything as it is; see `_Fields` for why this is not ``__init__``.

        Args:
            state, before: also as bytes that `Stopped` takes.
            context: the vcpu, for what is decoded later.
            serial: its `StopContext.stop_serial` at this stop.
        """
        self: Any = _Fields()
        self.cause = cause
        self.rip = rip
        self.exit = exit
        self.steps = steps
        self.elapsed_ns = elapsed_ns
        self.dr6 = dr6
        self.entered_vector = entered_vector
        self.tainted = tainted
        self.breakpoint = breakpoint
        self.vcpu = vcpu
        self.error = error
        self.held = held
        self.fault = fault
        self._state = state
        self._before = before
        self._context = context
        self._serial = serial
        self._seen = None
        self.__class__ = cls
        return self  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        # Only a stop of `stop_of_step` has fields that are not filled yet.
        if name not in _LATE:
            raise AttributeError(f"a Stop has no {name!r}")
        state: Any = self.state
        index = self._context.index  # type: ignore[union-attr]
        values = (_STEP, state.rip, None, 1, state.elapsed_ns, state.dr6, None, "", None, index, "", "", None, None)
        for field_name, value in zip(_LATE, values, strict=True):
            object.__setattr__(self, field_name, value)
        return getattr(self, name)

    @property
    def state(self) -> StoppedState | None:
        found = self._state
        if isinstance(found, bytes):
            found = Stopped(found)
            object.__setattr__(self, "_state", found)
        return found

    @property
    def before(self) -> StoppedState | None:
        found = self._before
        if isinstance(found, bytes):
            found = Stopped(found)
            object.__setattr__(self, "_before", found)
        return found

    def replace(self, **changes: Any) -> Stop:
        """A copy with some attributes changed, such as a stop retold: ``stop.replace(cause=Cause.UNTIL)``."""
        values = {name: getattr(self, name) for name in _REPLACEABLE}
        return Stop(**{**values, "context": self._context, "serial": self._serial, **changes})

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(
            f"a Stop is a record; {name!r} cannot be assigned (write cpu.regs to change the vcpu)"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"a Stop is a record; {name!r} cannot be deleted")

    def __reduce__(self) -> Any:
        raise TypeError("a Stop cannot be pickled: it refers to its vcpu; save what you need of it, or a StepRecord")

    @property
    def is_current(self) -> bool:
        """Whether the vcpu is still where this stop left it."""
        return self._context is not None and self._context.stop_serial == self._serial

    @property
    def mode(self) -> CodeMode | None:
        """The processor mode at the stop, or None if the state was not kept."""
        if self.state is None:
            return None
        return CodeMode.from_kvm(self.state.sregs, int(self.state.regs.rflags))

    @property
    def instruction(self) -> Instruction | None:
        """The instruction at rip, which runs next; None when memory there cannot be read.

        Decoded at the first look and kept. `instruction_is_late` tells whether
        its bytes had to be read from memory after the vcpu moved on.
        """
        return self._look()[0]

    @property
    def instruction_is_late(self) -> bool:
        """Whether `instruction` was read after the vcpu moved on, and so may not be what was there."""
        return self._look()[1]

    def _look(self) -> tuple[Instruction | None, bool]:
        if self._seen is not None:
            return self._seen
        mode, context = self.mode, self._context
        if mode is None or context is None:
            return None, False
        late, code = False, self.state.code if self.state is not None else b""
        if not DECODER.length(code, bits=mode.bits, address=self.rip) and len(code) < MAX_BYTES:
            # Nothing sent, or cut off at the end of a page.
            late = not self.is_current
            code = context.read_code(mode.linear(self.rip), MAX_BYTES) or code
        found = None
        if code:
            found = DECODER.decode(
                code, bits=mode.bits, address=self.rip, symbols=context.symbols, code_base=mode.code_base
            )
        seen = (found, late)
        object.__setattr__(self, "_seen", seen)
        return seen

    @property
    def label(self) -> str:
        """``loop+0x3``, or an empty string."""
        if self._context is None:
            return ""
        mode = self.mode
        return self._context.symbols.label(self.rip if mode is None else mode.linear(self.rip))

    @property
    def registers(self) -> RegisterFile | None:
        """All registers at the stop, as values."""
        return None if self.state is None else RegisterFile.from_kvm(self.state.regs, self.state.sregs)

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Registers that differ from the stop before: name to (before, now); empty if either is unknown."""
        if self.before is None or self.state is None:
            return {}
        before = RegisterFile.from_kvm(self.before.regs, self.before.sregs)
        return before.diff(RegisterFile.from_kvm(self.state.regs, self.state.sregs))

    @property
    def notes(self) -> list[str]:
        """What is worth saying beside cause, place and instruction, a phrase each."""
        notes = []
        if self.breakpoint is not None:
            notes.append(str(self.breakpoint))
        if self.exit is not None and self.cause not in _PLAIN:
            notes.append(str(self.exit))
        if self.error:
            notes.append(self.error)
        if self.fault is not None:
            notes.append(f"died {self.fault}" if self.cause is Cause.SHUTDOWN else str(self.fault))
        if self.entered_vector is not None:
            notes.append(f"entered vector {vector_name(self.entered_vector)}")
        if self.steps > 1:
            notes.append(f"{self.steps:,} steps")
        if self.tainted:
            notes.append(f"tainted: {self.tainted}")
        if self.held:
            notes.append(f"held: {self.held}")
        if self.vcpu:
            notes.append(f"vcpu {self.vcpu}")
        return notes

    def __repr__(self) -> str:
        parts = [f"Stop: {self.cause} at {self.rip:#x} {self.label}".rstrip()]
        text = self._instruction_text()
        if text:
            parts.append(text)
        mode = self.mode
        if mode is not None:
            parts.append(f"({mode})")
        return "  ".join(parts) + "".join(f"; {note}" for note in self.notes)

    def _instruction_text(self) -> str:
        if self.state is None or self._context is None:
            return ""
        found, late = self._look()
        text = found.text if found is not None else "(no readable memory at rip)"
        return f"{text} [read later: the vcpu has moved on]" if late else text

    def _repr_html_(self) -> str:
        found = self._look()[0]
        mode = self.mode
        head = [
            f"<b>{html.escape(str(self.cause))}</b> at {self.rip:#x}",
            style.span(self.label, "name"),
            html.escape(self._instruction_text()),
            style.span(f"({mode})", "dim") if mode is not None else "",
        ]
        lines = ["  ".join(part for part in head if part)]
        if found is not None and found.line is not None:
            lines.append(style.span(f"line {found.line}: {found.source}", "dim"))
        lines += [html.escape(note) for note in self.notes]
        if self.before is not None and self.state is not None:
            changed = changes_text(
                RegisterFile.from_kvm(self.before.regs, self.before.sregs),
                RegisterFile.from_kvm(self.state.regs, self.state.sregs),
            )
            if changed:
                lines.append(f"changed: {style.span(changed, 'changed')}")
        return style.page("".join(f"<div>{line}</div>" for line in lines))


def stop_of_step(state: bytes, before: StoppedState | bytes | None, context: StopContext, serial: int) -> Stop:
    """The stop after one plain step, the quickest way: what `state` holds is taken out when asked for.

    Args:
        state: as `Stopped` takes it.
        before: that of the stop before.
        context, serial: as `Stop` takes them.
    """
    stop: Any = _Fields()
    stop._state = state
    stop._before = before
    stop._context = context
    stop._serial = serial
    stop.__class__ = Stop
    return stop  # type: ignore[no-any-return]


_STEP = Cause.STEP
_LATE = (
    *("cause", "rip", "exit", "steps", "elapsed_ns", "dr6"),
    *("entered_vector", "tainted", "breakpoint", "vcpu", "error", "held", "fault", "_seen"),
)
_REPLACEABLE = (
    *(name for name in _Fields.__dataclass_fields__ if not name.startswith("_")),
    *("state", "before"),
)
# Causes that say all there is to say about the exit that brought them.
_PLAIN = frozenset({Cause.STEP, Cause.BREAKPOINT, Cause.WATCHPOINT, Cause.UNTIL, Cause.GUEST_DEBUG, Cause.DEADLINE})
