"""A 16550A serial port whose line is a Python buffer.

Written from the register descriptions in the PC16550D data sheet. What the
guest sends is there at once (the transmitter is always empty again), and what
is fed in with `write` waits without limit, as on a line with flow control; so
overrun, parity and framing errors do not occur.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kvmbench.errors import MisuseError
from kvmbench.machine.device import Device, StopRequest

# Offsets from the base port.
_DATA, _IER, _IIR_FCR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)

_IER_RECEIVED, _IER_EMPTY, _IER_MODEM = 1, 2, 8
_IIR_NONE, _IIR_MODEM, _IIR_EMPTY, _IIR_RECEIVED = 1, 0, 2, 4
_IIR_FIFO = 0xC0
_LCR_DLAB = 0x80
_MCR_DTR, _MCR_RTS, _MCR_OUT1, _MCR_OUT2, _MCR_LOOP = 1, 2, 4, 8, 0x10
_LSR_READY, _LSR_EMPTY = 1, 0x60  # THRE and TEMT
_MSR_CTS, _MSR_DSR, _MSR_RI, _MSR_DCD = 0x10, 0x20, 0x40, 0x80
_MSR_LINES = _MSR_CTS | _MSR_DSR | _MSR_DCD  # what a terminal at the other end raises


class Serial(Device):
    """One port of 8 registers.

    Args:
        base: first of its ports; COM1 is 0x3f8.
        irq: called with 1 and 0 when the interrupt line rises and falls (OUT2 gates it, as on a PC).

    Attributes:
        output: everything the guest has sent, in bytes; nothing is dropped.
    """

    def __init__(self, base: int = 0x3F8, *, irq: Callable[[int], object] | None = None) -> None:
        self.base = base
        self.name = f"serial at {base:#x}"
        self.ports = [range(base, base + 8)]
        self.irq = irq
        self.output = bytearray()
        self._level = 0
        self.reset()

    def reset(self) -> None:
        """Empties both directions and sets every register to its value after reset."""
        self.output.clear()
        self._input: deque[int] = deque()
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._divisor = 12  # 9600 baud
        self._msr = _MSR_LINES
        self._empty_pending = False
        self._update()

    @property
    def text(self) -> str:
        """What the guest has sent, as UTF-8; bytes that are none become U+FFFD."""
        return self.output.decode("utf-8", "replace")

    @property
    def waiting(self) -> int:
        """Bytes fed in that the guest has not read yet."""
        return len(self._input)

    def write(self, data: bytes | str) -> None:
        """Feeds bytes (text as UTF-8) to the guest.

        Raises:
            MisuseError: neither bytes nor text.
        """
        if isinstance(data, str):
            data = data.encode()
        if not isinstance(data, bytes | bytearray | memoryview):
            raise MisuseError(f"serial input must be bytes or text, not {type(data).__name__}")
        self._input.extend(bytes(data))
        self._update()

    def port_out(self, port: int, value: int, size_bytes: int) -> StopRequest | None:
        """Writes a register; wider accesses are split into bytes as the ISA bus does."""
        if size_bytes != 1:
            for n in range(size_bytes):
                if port + n < self.base + 8:
                    self.port_out(port + n, value >> 8 * n & 0xFF, 1)
            return None
        offset = port - self.base
        if offset == _DATA and not self._lcr & _LCR_DLAB:
            if self._mcr & _MCR_LOOP:
                self._input.append(value)
            else:
                self.output.append(value)
            # The byte is out at once, so the holding register has just become empty again.
            if self._ier:
                self._empty_pending = True
                self._update()
            return None
        self._set(offset, value)
        return None

    def _set(self, offset: int, value: int) -> None:
        if offset == _DATA:
            self._divisor = self._divisor & 0xFF00 | value
        elif offset == _IER:
            if self._lcr & _LCR_DLAB:
                self._divisor = self._divisor & 0xFF | value << 8
                return
            # Enabling the transmitter's interrupt while it is empty raises it at once.
            if value & _IER_EMPTY and not self._ier & _IER_EMPTY:
                self._empty_pending = True
            self._ier = value & 0xF
        elif offset == _IIR_FCR:
            if value & 2 or (value ^ self._fcr) & 1:
                self._input.clear()
            self._fcr = value & 0xC9
        elif offset == _LCR:
            self._lcr = value
        elif offset == _MCR:
            self._mcr = value & 0x1F
            self._modem_lines()
        elif offset == _SCR:
            self._scr = value
        self._update()

    def port_in(self, port: int, size_bytes: int) -> int:
        """Reads a register; wider accesses are split into bytes as the ISA bus does."""
        if size_bytes != 1:
            return sum(
                (self.port_in(port + n, 1) if port + n < self.base + 8 else 0xFF) << 8 * n
                for n in range(size_bytes)
            )
        offset = port - self.base
        if offset == _LSR:
            return _LSR_EMPTY | (_LSR_READY if self._input else 0)
        if offset == _DATA:
            if self._lcr & _LCR_DLAB:
                return self._divisor & 0xFF
            value = self._input.popleft() if self._input else 0
            self._update()
            return value
        if offset == _IER:
            return self._divisor >> 8 if self._lcr & _LCR_DLAB else self._ier
        if offset == _IIR_FCR:
            source = self._source()
            if source == _IIR_EMPTY:
                # Reading the source is what acknowledges this one.
                self._empty_pending = False
                self._update()
            return source | (_IIR_FIFO if self._fcr & 1 else 0)
        if offset == _MSR:
            value, self._msr = self._msr, self._msr & 0xF0
            self._update()
            return value
        return (self._lcr, self._mcr, 0, 0, self._scr)[offset - _LCR]

    def _modem_lines(self) -> None:
        # In loopback the four outputs come back as the four inputs.
        lines = _MSR_LINES
        if self._mcr & _MCR_LOOP:
            lines = (
                (_MSR_CTS if self._mcr & _MCR_RTS else 0)
                | (_MSR_DSR if self._mcr & _MCR_DTR else 0)
                | (_MSR_RI if self._mcr & _MCR_OUT1 else 0)
                | (_MSR_DCD if self._mcr & _MCR_OUT2 else 0)
            )
        changed = (lines ^ self._msr) >> 4 & 0xF
        # The delta of RI is set only when the line falls.
        if lines & _MSR_RI:
            changed &= ~4
        self._msr = lines | self._msr & 0xF | changed

    def _source(self) -> int:
        # The enabled source of highest priority.
        if self._ier & _IER_RECEIVED and self._input:
            return _IIR_RECEIVED
        if self._ier & _IER_EMPTY and self._empty_pending:
            return _IIR_EMPTY
        if self._ier & _IER_MODEM and self._msr & 0xF:
            return _IIR_MODEM
        return _IIR_NONE

    def _update(self) -> None:
        level = int(self._source() != _IIR_NONE and bool(self._mcr & _MCR_OUT2) and not self._mcr & _MCR_LOOP)
        if level != self._level:
            self._level = level
            if self.irq is not None:
                self.irq(level)

    def __repr__(self) -> str:
        return f"Serial({self.base:#x}, {len(self.output)} bytes sent, {len(self._input)} waiting)"
