"""KVM's own statistics of a VM or vcpu, which need no tracing and no root."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvmbench.errors import InternalError
from kvmbench.kvm.descriptor import Descriptor
from kvmbench.uapi import constants as c
from kvmbench.uapi import ffi

_Kinds = TypeVar("_Kinds", bound=IntEnum)

_HEADER_BYTES: int = ffi.sizeof("struct kvm_stats_header")
_DESCRIPTOR_BYTES: int = ffi.sizeof("struct kvm_stats_desc")


class StatKind(IntEnum):
    """What a statistic is: a count that only grows, a level, the highest level, or a histogram."""

    CUMULATIVE = c.KVM_STATS_TYPE_CUMULATIVE
    INSTANT = c.KVM_STATS_TYPE_INSTANT
    PEAK = c.KVM_STATS_TYPE_PEAK
    LINEAR_HISTOGRAM = c.KVM_STATS_TYPE_LINEAR_HIST
    LOG_HISTOGRAM = c.KVM_STATS_TYPE_LOG_HIST


class StatUnit(IntEnum):
    """What a statistic counts; NONE for things and events."""

    NONE = c.KVM_STATS_UNIT_NONE
    BYTES = c.KVM_STATS_UNIT_BYTES
    SECONDS = c.KVM_STATS_UNIT_SECONDS
    CYCLES = c.KVM_STATS_UNIT_CYCLES
    BOOLEAN = c.KVM_STATS_UNIT_BOOLEAN


@dataclass(frozen=True, kw_only=True)
class StatDescriptor:
    """What KVM says of one statistic.

    Attributes:
        name: KVM's, such as ``halt_exits``.
        kind: how it behaves; a number that this library does not know where KVM has a new one.
        unit: what `scale` times the raw value is in; likewise.
        scale: such as 1e-9 for nanoseconds.
        count: how many values: 1, or the buckets of a histogram.
        offset: of the first value in the data block, in bytes.
        bucket_size: width of a linear histogram's buckets, in raw units; else 0.
    """

    name: str
    kind: StatKind | int
    unit: StatUnit | int
    scale: float
    count: int
    offset: int
    bucket_size: int


@dataclass(frozen=True)
class StatsSample(Mapping[str, "int | NDArray[np.uint64]"]):
    """All values at one time, by name: a number, or an array of a histogram's buckets.

    Attributes:
        descriptors: what the values are, by name.
    """

    descriptors: Mapping[str, StatDescriptor]
    _values: Mapping[str, NDArray[np.uint64]] = field(repr=False)

    def __getitem__(self, name: str) -> int | NDArray[np.uint64]:
        values = self._values[name]
        return int(values[0]) if self.descriptors[name].count == 1 else values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def scaled(self, name: str) -> float:
        """A single value in its unit: seconds, bytes, cycles.

        Raises:
            KeyError: there is no such statistic.
            TypeError: it is a histogram.
        """
        value = self[name]
        if not isinstance(value, int):
            raise TypeError(f"{name} is a histogram of {len(value)} buckets")
        return value * self.descriptors[name].scale

    def since(self, earlier: StatsSample) -> dict[str, int]:
        """How much each cumulative value grew, those that did not left out."""
        grown: dict[str, int] = {}
        for name, descriptor in self.descriptors.items():
            now, before = self[name], earlier.get(name, 0)
            if descriptor.kind == StatKind.CUMULATIVE and isinstance(now, int) and isinstance(before, int):
                grown[name] = now - before
        return {name: by for name, by in grown.items() if by}


class Stats(Descriptor):
    """A statistics file; `VM.get_stats_fd` and `VCPU.get_stats_fd` open it.

    What there is to read differs from kernel to kernel; `descriptors` tells.

    Source: KVM API, KVM_GET_STATS_FD.

    Attributes:
        id: KVM's name of the object, such as ``kvm-1234`` or ``kvm-1234/vcpu-0``.
        descriptors: the statistics by name.
    """

    _noun = "statistics file"

    def __init__(self, parent: Descriptor) -> None:
        super().__init__(parent.core, parent.core.open_stats(parent._open_handle()), parent)
        try:
            header = self._struct("struct kvm_stats_header", 0, _HEADER_BYTES)
            self.id = _text(self._bytes(header.id_offset, header.name_size))
            self.descriptors = self._read_descriptors(header)
            self._data_offset = int(header.data_offset)
            ends = (descriptor.offset + descriptor.count * 8 for descriptor in self.descriptors.values())
            self._data_bytes = max(ends, default=0)
        except BaseException:
            self.close()
            raise

    def read(self) -> StatsSample:
        """Reads all values at once."""
        data = self._bytes(self._data_offset, self._data_bytes)
        values = {
            name: np.frombuffer(data, dtype="<u8", count=descriptor.count, offset=descriptor.offset)
            for name, descriptor in self.descriptors.items()
        }
        return StatsSample(self.descriptors, values)

    def _read_descriptors(self, header: Any) -> dict[str, StatDescriptor]:
        # Each descriptor has the name behind it, padded to name_size.
        stride = _DESCRIPTOR_BYTES + header.name_size
        block = self._bytes(header.desc_offset, header.num_desc * stride)
        found: dict[str, StatDescriptor] = {}
        for start in range(0, len(block), stride):
            raw = ffi.new("struct kvm_stats_desc *")
            ffi.memmove(raw, block[start : start + _DESCRIPTOR_BYTES], _DESCRIPTOR_BYTES)
            base = 2 if raw.flags & c.KVM_STATS_BASE_MASK == c.KVM_STATS_BASE_POW2 else 10
            name = _text(block[start + _DESCRIPTOR_BYTES : start + stride])
            found[name] = StatDescriptor(
                name=name,
                kind=_known(StatKind, raw.flags & c.KVM_STATS_TYPE_MASK),
                unit=_known(StatUnit, raw.flags & c.KVM_STATS_UNIT_MASK),
                scale=float(base) ** raw.exponent,
                count=raw.size,
                offset=raw.offset,
                bucket_size=raw.bucket_size,
            )
        return found

    def _struct(self, kind: str, offset: int, size: int) -> Any:
        struct = ffi.new(f"{kind} *")
        ffi.memmove(struct, self._bytes(offset, size), size)
        return struct

    def _bytes(self, offset: int, length: int) -> bytes:
        data = self.core.read_stats(self._open_handle(), offset, length)
        if len(data) < length:
            raise InternalError(f"the statistics file ends {length - len(data)} bytes before its header says")
        return data


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("ascii", "replace")


def _known(kinds: type[_Kinds], value: int) -> _Kinds | int:
    try:
        return kinds(value)
    except ValueError:
        return value
