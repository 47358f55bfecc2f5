"""Entries of KVM's ring of coalesced writes, as bytes."""

from __future__ import annotations

import struct

import pytest

from kvmbench.errors import InternalError
from kvmbench.kvm import CoalescedWrite
from kvmbench.kvm.coalesced import ENTRY_BYTES, coalesced_writes


def entry(addr: int, length: int, pio: int, data: bytes) -> bytes:
    return struct.pack("<QII8s", addr, length, pio, data)


def test_entries_come_in_order_with_as_many_bytes_as_were_written():
    raw = entry(0x4000_0000, 2, 0, b"\x34\x12\xff\xff") + entry(0x80, 1, 1, b"\7") + entry(1 << 63, 8, 0, b"\xff" * 8)
    first, second, third = coalesced_writes(raw)
    assert first == CoalescedWrite(0x4000_0000, b"\x34\x12")
    assert (first.value, second.value, third.value) == (0x1234, 7, (1 << 64) - 1)
    assert second == CoalescedWrite(0x80, b"\7", pio=True)
    assert third.addr == 1 << 63


def test_an_empty_ring_has_no_writes():
    assert coalesced_writes(b"") == []


@pytest.mark.parametrize("length", [0, 9, 0xFFFF_FFFF])
def test_a_length_that_no_write_has_is_not_believed(length):
    with pytest.raises(InternalError, match=f"a write of {length} bytes to 0x1000"):
        coalesced_writes(entry(0x1000, length, 0, b""))


def test_an_entry_that_is_cut_off_is_not_believed():
    with pytest.raises(InternalError, match="no whole number"):
        coalesced_writes(bytes(ENTRY_BYTES + 1))


def test_a_write_says_where_it_went_in_hex():
    assert repr(CoalescedWrite(0x80, b"\x10", pio=True)) == "CoalescedWrite(port 0x80, 0x10, 1 bytes)"
    assert "gpa 0x40000000, 0x1234" in repr(CoalescedWrite(0x4000_0000, b"\x34\x12"))
