"""The serial port, driven register by register as a driver does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmbench.errors import MisuseError
from kvmbench.machine.serial import Serial

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(0x3F8, 0x400)


@given(data=st.binary(max_size=200))
def test_everything_sent_is_kept_in_order(data: bytes) -> None:
    port = Serial()
    for byte in data:
        assert port.port_in(LSR, 1) & 0x20, "the transmitter is always ready"
        port.port_out(DATA, byte, 1)
    assert bytes(port.output) == data


@given(data=st.binary(max_size=200))
def test_everything_fed_in_is_read_in_order(data: bytes) -> None:
    port = Serial()
    port.write(data)
    seen = bytearray()
    while port.port_in(LSR, 1) & 1:
        seen.append(port.port_in(DATA, 1))
    assert bytes(seen) == data
    assert port.waiting == 0


def test_text_is_utf_8_and_never_fails() -> None:
    port = Serial()
    for byte in "über\n".encode() + b"\xff":
        port.port_out(DATA, byte, 1)
    assert port.text == "über\n\ufffd"
    port.write("ß")
    assert port.port_in(DATA, 1) == 0xC3


def test_input_must_be_bytes_or_text() -> None:
    with pytest.raises(MisuseError, match="int"):
        Serial().write(5)  # type: ignore[arg-type]


def test_the_divisor_latch_hides_data_and_interrupt_enable() -> None:
    port = Serial()
    port.port_out(LCR, 0x83, 1)
    port.port_out(DATA, 0x01, 1)
    port.port_out(IER, 0x02, 1)
    assert (port.port_in(DATA, 1), port.port_in(IER, 1), port.port_in(LCR, 1)) == (1, 2, 0x83)
    port.port_out(LCR, 0x03, 1)
    assert port.port_in(IER, 1) == 0
    assert port.text == ""
    port.port_out(DATA, ord("A"), 1)
    assert port.text == "A"


def test_the_scratch_register_keeps_its_value_as_probing_drivers_expect() -> None:
    port = Serial()
    for value in (0x00, 0xFF, 0xA5):
        port.port_out(SCR, value, 1)
        assert port.port_in(SCR, 1) == value


def test_loopback_brings_bytes_and_modem_lines_back() -> None:
    port = Serial()
    port.port_out(MCR, 0x1A, 1)  # loop, OUT2, RTS
    assert port.port_in(MSR, 1) & 0xF0 == 0x90  # DCD, CTS: what drivers test for
    port.port_out(DATA, 0x5A, 1)
    assert port.port_in(LSR, 1) & 1
    assert port.port_in(DATA, 1) == 0x5A
    assert port.text == ""
    port.port_out(MCR, 0x0B, 1)
    assert port.port_in(MSR, 1) & 0xF0 == 0xB0


def test_modem_line_changes_are_reported_once() -> None:
    port = Serial()
    port.port_out(MCR, 0x10, 1)  # all lines drop
    assert port.port_in(MSR, 1) == 0x0B
    assert port.port_in(MSR, 1) == 0x00


def test_interrupts_come_by_priority_and_go_when_served() -> None:
    levels: list[int] = []
    port = Serial(irq=levels.append)
    port.port_out(MCR, 0x08, 1)  # OUT2 opens the gate
    assert port.port_in(IIR, 1) == 0x01, "nothing pending"
    port.port_out(IER, 0x03, 1)
    assert levels == [1], "the empty transmitter interrupts as soon as it is allowed to"
    port.write(b"ab")
    assert port.port_in(IIR, 1) == 0x04, "received data comes first"
    port.port_in(DATA, 1)
    assert port.port_in(IIR, 1) == 0x04
    port.port_in(DATA, 1)
    assert levels == [1], "the line stays up for the transmitter"
    assert port.port_in(IIR, 1) == 0x02
    assert levels == [1, 0], "reading the source acknowledged it"
    assert port.port_in(IIR, 1) == 0x01
    port.port_out(DATA, 0x41, 1)
    assert levels == [1, 0, 1]


def test_without_out2_the_line_stays_low() -> None:
    levels: list[int] = []
    port = Serial(irq=levels.append)
    port.port_out(IER, 0x01, 1)
    port.write(b"x")
    assert levels == []
    port.port_out(MCR, 0x08, 1)
    assert levels == [1]


def test_fifo_bits_show_and_a_reset_empties_the_input() -> None:
    port = Serial()
    port.port_out(IIR, 0x01, 1)
    assert port.port_in(IIR, 1) == 0xC1
    port.write(b"abc")
    port.port_out(IIR, 0x03, 1)
    assert port.waiting == 0


def test_wide_accesses_are_split_into_bytes() -> None:
    port = Serial()
    port.port_out(LCR, 0x80, 1)
    port.port_out(DATA, 0x1234, 2)
    assert port.port_in(DATA, 2) == 0x1234
    port.port_out(SCR, 0xAABBCCDD, 4)
    assert port.port_in(SCR, 4) == 0xFFFFFFDD


def test_reset_forgets_all_and_the_repr_is_short() -> None:
    port = Serial(0x2F8)
    port.port_out(0x2F8, 0x41, 1)
    port.write(bytes(10_000))
    assert repr(port) == "Serial(0x2f8, 1 bytes sent, 10000 waiting)"
    port.reset()
    assert (port.text, port.waiting) == ("", 0)
