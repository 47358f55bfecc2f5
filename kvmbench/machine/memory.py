"""Guest memory by guest-physical address.

Facts that shape it. On ``local`` the core's memory is mapped into this
process: eight bytes cost about 0.3 us, and an array can be a window on the
guest's RAM. On every other host each call is a round trip (150 us on the AMD
appliance, 45 ms on the Intel one), so reads are of the length asked for and
never more, and zeroing is one short message (`fill`).
"""

from __future__ import annotations

import operator
import struct
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from kvmbench.arguments import integer, spelled_out
from kvmbench.errors import AddressError, ClosedError, MisuseError
from kvmbench.kvm import VM
from kvmbench.kvm.region import PAGE_BYTES
from kvmbench.machine.hexdump import HexDump
from kvmbench.machine.region import Region
from kvmbench.machine.size import page_multiple, parse_size, show_size
from kvmbench.machine.snapshot import Snapshot, append, differences
from kvmbench.uapi import constants

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")

# Matches no address: stands for "no region with a view was used yet".
_NOWHERE = (1, 0, memoryview(b""))


class Memory:
    """The memory of one VM; ``m.memory`` of a machine.

    Addresses are guest-physical. Ranges may cross from one region into the next where they touch.

    Raises (every access):
        AddressError: the range is not all memory; the message says what memory there is.
        ClosedError: the machine or host was closed.
    """

    def __init__(self, vm: VM) -> None:
        self._vm = vm
        self._closed = False
        self._regions: tuple[Region, ...] = ()
        # (first address, address behind the last, bytes) of the region used last; one tuple, so that another
        # thread never sees half of a change.
        self._hot: tuple[int, int, memoryview] = _NOWHERE
        # What guest debug wrote into code while a vcpu runs (`kvmbench.debug.overlay.Overlay`), or None.
        self._overlay: Any = None
        # Mapped memory is read without a word to the core, which so cannot refuse when the host is closed.
        vm.core.when_closed(self)

    @property
    def regions(self) -> tuple[Region, ...]:
        """All regions by ascending address."""
        return self._regions

    @property
    def size_bytes(self) -> int:
        """How much memory there is in all."""
        return sum(region.size_bytes for region in self._regions)

    @spelled_out
    def map(
        self,
        gpa: int,
        size: int | str,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
        name: str = "",
    ) -> Region:
        """Adds zeroed memory at an address (KVM_SET_USER_MEMORY_REGION).

        Args:
            gpa: of its first byte, a multiple of 4096.
            size: in bytes or as "16M"; a multiple of 4096.
            readonly: the guest's writes become MMIO exits; writes from here still work.
            log_dirty: note which pages the guest writes, for `dirty_pages`.

        Raises:
            MisuseError: not on a page, or not whole pages.
            AddressError: it overlaps memory that is there.
        """
        self._check_open()
        size_bytes = page_multiple(size, "size")
        first = _address(gpa)
        if first % PAGE_BYTES:
            raise MisuseError(f"memory at gpa {first:#x} does not begin on a {PAGE_BYTES}-byte page")
        if first + size_bytes > 1 << 52:
            raise AddressError(f"memory at gpa {first:#x} + {size_bytes:#x} leaves the 52-bit address space")
        for other in self._regions:
            if first < other.end and other.gpa < first + size_bytes:
                raise AddressError(f"memory at gpa {first:#x} + {size_bytes:#x} bytes overlaps the memory at {other}")
        flags = constants.KVM_MEM_READONLY if readonly else 0
        flags |= constants.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0
        handle = self._vm.core.add_region(self._vm.handle, first, size_bytes, flags)
        region = Region(self._vm, handle, gpa=first, size_bytes=size_bytes, flags=flags, name=name)
        self._regions = tuple(sorted((*self._regions, region), key=lambda each: each.gpa))
        return region

    def unmap(self, region: Region) -> None:
        """Takes a region away from the guest; arrays made from it keep its bytes.

        Raises:
            MisuseError: it is not a region of this memory.
        """
        self._check_open()
        if region not in self._regions:
            raise MisuseError(f"{region} is not a region of this memory")
        self._regions = tuple(each for each in self._regions if each is not region)
        self._hot = _NOWHERE
        region.close()

    def find(self, gpa: int, size_bytes: int = 1) -> tuple[Region, int]:
        """The region that holds all of a range, and the offset in it.

        Raises:
            AddressError: there is none.
        """
        _check_range(gpa, size_bytes)
        for region in self._regions:
            if region.gpa <= gpa and gpa + size_bytes <= region.end:
                return region, gpa - region.gpa
        raise self._outside(gpa, size_bytes)

    def holds(self, gpa: int, size_bytes: int = 1) -> bool:
        """True if all of a range is memory."""
        try:
            self._pieces(gpa, size_bytes)
        except AddressError:
            return False
        return True

    # --- bytes

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Copies bytes out of the guest."""
        try:
            first, end, view = self._hot
            if first <= gpa and size_bytes >= 0 and gpa + size_bytes <= end:
                return view[gpa - first : gpa - first + size_bytes].tobytes()
            pieces = self._pieces(gpa, size_bytes)
            if len(pieces) == 1:
                return self._read(*pieces[0])
            return b"".join(self._read(*piece) for piece in pieces)
        except TypeError:
            _check_range(gpa, size_bytes)
            raise

    def write(self, gpa: int, data: Any) -> None:
        """Copies bytes (any buffer: bytes, bytearray, a numpy array) into the guest.

        Raises:
            MisuseError: not a buffer.
        """
        if type(data) is not bytes:
            data = _bytes(data)
        size = len(data)
        gpa = _address(gpa)
        first, end, view = self._hot
        if first <= gpa and gpa + size <= end:
            view[gpa - first : gpa - first + size] = data
            return
        done = 0
        for region, offset, length in self._pieces(gpa, size):
            piece = data[done : done + length]
            overlay = self._overlay
            if overlay is None:
                self._write(region, offset, piece)
            else:
                with overlay.lock:
                    self._write(region, offset, overlay.kept(gpa + done, piece))
            done += length

    @spelled_out
    def fill(self, gpa: int, size: int | str, byte: int = 0) -> None:
        """Sets a range to one byte; on a remote host a single short message.

        Raises:
            MisuseError: `byte` is not 0 to 255.
        """
        byte = integer(byte, "byte", 0, 0xFF)
        for region, offset, length in self._pieces(gpa, parse_size(size)):
            if not length:
                continue
            overlay = self._overlay
            if overlay is None:
                region.fill(offset, length, byte)
                continue
            with overlay.lock:
                region.fill(offset, length, byte)
                for at, kept in overlay.filled(region.gpa + offset, length, byte):
                    self._write(region, at - region.gpa, kept)

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: int | slice) -> int | bytes:
        """``memory[gpa]`` is a byte's value, ``memory[gpa:end]`` are bytes."""
        if type(key) is slice:
            start, stop = key.start, key.stop
            if key.step is not None or type(start) is not int or type(stop) is not int:
                start, stop = self._bounds(key)
            first, end, view = self._hot
            if first <= start <= stop <= end:
                return view[start - first : stop - first].tobytes()
            if stop < start:
                raise AddressError(f"range {start:#x}:{stop:#x} ends before it begins")
            return self.read(start, stop - start)
        return self.read(_address(key), 1)[0]

    def __setitem__(self, key: int | slice, value: Any) -> None:
        """``memory[gpa] = 0x90`` or ``memory[gpa:end] = bytes`` of just that length."""
        if not isinstance(key, slice):
            if not isinstance(value, int) or not 0 <= value <= 0xFF:
                raise MisuseError(f"memory[{_address(key):#x}] = {value!r}: a byte is 0 to 255")
            self.write(key, bytes((value,)))
            return
        start, stop = self._bounds(key)
        data = _bytes(value)
        if len(data) != stop - start:
            raise MisuseError(f"memory[{start:#x}:{stop:#x}] takes {max(stop - start, 0)} bytes, not {len(data)}")
        self.write(start, data)

    # --- numbers, little-endian

    def read_u8(self, gpa: int) -> int:
        """One byte."""
        return self.read(gpa, 1)[0]

    def read_u16(self, gpa: int) -> int:
        """Two bytes as an unsigned number."""
        return int(_U16.unpack(self.read(gpa, 2))[0])

    def read_u32(self, gpa: int) -> int:
        """Four bytes as an unsigned number."""
        return int(_U32.unpack(self.read(gpa, 4))[0])

    def read_u64(self, gpa: int) -> int:
        """Eight bytes as an unsigned number."""
        try:
            first, end, view = self._hot
            if first <= gpa and gpa + 8 <= end:
                return int(_U64.unpack_from(view, gpa - first)[0])
        except TypeError:
            _check_range(gpa, 8)
            raise
        return int(_U64.unpack(self.read(gpa, 8))[0])

    def write_u8(self, gpa: int, value: int) -> None:
        """One byte; a negative or larger value is cut to its low bits."""
        self.write(gpa, bytes((_number(value) & 0xFF,)))

    def write_u16(self, gpa: int, value: int) -> None:
        """Two bytes; a negative or larger value is cut to its low bits."""
        self.write(gpa, _U16.pack(_number(value) & 0xFFFF))

    def write_u32(self, gpa: int, value: int) -> None:
        """Four bytes; a negative or larger value is cut to its low bits."""
        self.write(gpa, _U32.pack(_number(value) & 0xFFFF_FFFF))

    def write_u64(self, gpa: int, value: int) -> None:
        """Eight bytes; a negative or larger value is cut to its low bits."""
        self.write(gpa, _U64.pack(_number(value) & 0xFFFF_FFFF_FFFF_FFFF))

    # --- views, copies, pictures

    @spelled_out
    def as_array(self, dtype: npt.DTypeLike = "u1", gpa: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """Guest memory as a numpy array.

        On ``local`` the array *is* the guest's memory: writes go through, and what the guest writes shows. On
        other hosts it is a copy made now, and read-only (``array.flags.writeable`` is False).

        Args:
            dtype: numpy's: "u1" for bytes, "u8" for 64-bit words.
            count: how many elements; as many as fit to the end of the region unless given.

        Raises:
            AddressError: the elements do not lie within one region.
            MisuseError: not a dtype of plain numbers or structs.
        """
        self._check_open()
        try:
            kind = np.dtype(dtype)
        except TypeError as error:
            raise MisuseError(f"dtype={dtype!r} is none of numpy's: {error}") from error
        if kind.hasobject or kind.itemsize == 0:
            raise MisuseError(f"dtype={dtype!r} cannot stand for bytes in memory")
        if count is not None:
            count = integer(count, "count", 0)
        region, offset = self.find(gpa, 0 if count is None else count * kind.itemsize)
        if count is None:
            count = (region.size_bytes - offset) // kind.itemsize
        if region.view is not None:
            return np.frombuffer(region.view, kind, count, offset)
        # frombuffer of bytes gives a read-only array.
        data = region.read(offset, count * kind.itemsize)
        return np.frombuffer(data, kind, count)

    @spelled_out
    def snapshot(self, gpa: int | None = None, size: int | str | None = None) -> Snapshot:
        """A copy of all memory, or of a range.

        Take it while no vcpu runs. On a remote host the memory travels over the channel: name a range there.
        """
        self._check_open()
        if gpa is None:
            ranges = [(region, 0, region.size_bytes) for region in self._regions]
        else:
            ranges = self._pieces(gpa, PAGE_BYTES if size is None else parse_size(size))
        return Snapshot(tuple((region.gpa + offset, self._copy(region, offset, n)) for region, offset, n in ranges))

    def changes(self, snapshot: Snapshot) -> list[tuple[int, int]]:
        """Pairs of (gpa, length in bytes) that differ from a snapshot, exact to the byte, ascending."""
        if not isinstance(snapshot, Snapshot):
            raise MisuseError(f"{snapshot!r} is no snapshot; m.memory.snapshot() makes one")
        found: list[tuple[int, int]] = []
        for start, before in snapshot.pieces:
            done = 0
            for region, offset, length in self._pieces(start, len(before)):
                now = self._array(region, offset, length)
                if self._overlay is not None:
                    now = self._overlay.shown(region.gpa + offset, now)
                ranges = differences(before[done : done + length], now)
                append(found, ((start + done + where, count) for where, count in ranges))
                done += length
        return found

    def restore(self, snapshot: Snapshot) -> None:
        """Writes a snapshot back, only where memory differs."""
        for gpa, length in self.changes(snapshot):
            for start, before in snapshot.pieces:
                if start <= gpa < start + len(before):
                    # A change may go on into the next piece, where two regions touch.
                    piece = before[gpa - start : gpa - start + length]
                    self.write(gpa, piece)
                    gpa, length = gpa + len(piece), length - len(piece)
                    if not length:
                        break

    @spelled_out
    def dump(self, gpa: int, size: int | str = 128) -> HexDump:
        """A hex dump of a range; prints as text and shows as HTML."""
        return HexDump(gpa, self.read(gpa, parse_size(size)))

    @spelled_out
    def dirty_pages(self, region: Region | None = None) -> list[int]:
        """Addresses of the pages that the guest wrote since the last call (KVM_GET_DIRTY_LOG).

        Raises:
            MisuseError: the region was mapped without ``log_dirty=True``.
        """
        self._check_open()
        regions = [region] if region is not None else [each for each in self._regions if each.logs_dirty_pages]
        found: list[int] = []
        for each in regions:
            if not isinstance(each, Region):
                raise MisuseError(f"{each!r} is not a region; they are in m.memory.regions")
            if not each.logs_dirty_pages:
                raise MisuseError(f"no dirty log of the memory at {each}: map it with log_dirty=True")
            pages = np.flatnonzero(each.dirty_log())
            found += (each.gpa + pages * PAGE_BYTES).tolist()
        return found

    def close(self) -> None:
        """Ends access; called when the machine closes. Arrays made before keep their bytes."""
        self._closed = True
        self._hot = _NOWHERE
        self._regions = ()

    # --- inside

    def _check_open(self) -> None:
        if self._closed or self._vm.core.closed:
            raise self._gone()

    def _gone(self) -> ClosedError:
        owner = "host" if self._vm.core.closed else "machine"
        return ClosedError(f"the {owner} is closed, and the memory with it")

    def host_closed(self) -> None:
        """Called by the core when the host closes: no more access without asking."""
        self._hot = _NOWHERE

    def _pieces(self, gpa: int, size_bytes: int) -> list[tuple[Region, int, int]]:
        # (region, offset, length) of each part of a range, in order; one at least.
        self._check_open()
        _check_range(gpa, size_bytes)
        if size_bytes < 0:
            raise AddressError(f"gpa {gpa:#x}: a size of {size_bytes} bytes is negative")
        pieces: list[tuple[Region, int, int]] = []
        at, left = gpa, size_bytes
        for region in self._regions:
            if region.gpa <= at < region.end or (at == region.end and not left and not pieces):
                length = min(left, region.end - at)
                pieces.append((region, at - region.gpa, length))
                at, left = at + length, left - length
                if not left:
                    break
        if left or not pieces:
            raise self._outside(gpa, size_bytes)
        if len(pieces) == 1 and pieces[0][0].view is not None:
            region = pieces[0][0]
            hot = (region.gpa, region.end, pieces[0][0].view)
            if self._overlay is None:  # and no other thread comes between this and the next line
                self._hot = hot
        return pieces

    def _outside(self, gpa: int, size_bytes: int) -> AddressError | ClosedError:
        if self._closed or self._vm.core.closed:
            return self._gone()
        there = ", ".join(str(region) for region in self._regions[:6]) or "none yet"
        more = ", ..." if len(self._regions) > 6 else ""
        return AddressError(f"gpa {gpa:#x} + {size_bytes:#x} bytes is not guest memory; there is {there}{more}")

    def hide(self, overlay: Any) -> None:
        """Called by guest debug: what reads do not show and writes go around, or None.

        Arrays of `as_array` that were made on ``local`` are the memory itself and hide nothing.
        """
        self._overlay = overlay
        self._hot = _NOWHERE

    def _read(self, region: Region, offset: int, length: int) -> bytes:
        while True:
            overlay = self._overlay
            if region.view is not None:
                data = region.view[offset : offset + length].tobytes()
            else:
                data = region.read(offset, length) if length else b""
            if overlay is self._overlay:  # else it changed while we were reading
                return data if overlay is None else overlay.shown(region.gpa + offset, data)

    @staticmethod
    def _write(region: Region, offset: int, data: Any) -> None:
        if region.view is not None:
            region.view[offset : offset + len(data)] = data
        else:
            region.write(offset, bytes(data))

    def _array(self, region: Region, offset: int, length: int) -> npt.NDArray[np.uint8]:
        if region.view is not None:
            return np.frombuffer(region.view, np.uint8, length, offset)
        return np.frombuffer(region.read(offset, length), np.uint8)

    def _copy(self, region: Region, offset: int, length: int) -> npt.NDArray[np.uint8]:
        while True:
            overlay = self._overlay
            data = self._array(region, offset, length)
            if region.view is not None:
                data = data.copy()
            if overlay is self._overlay:
                break
        if overlay is not None:
            data = overlay.shown(region.gpa + offset, data)
        data.flags.writeable = False
        return data

    def _bounds(self, key: slice) -> tuple[int, int]:
        if key.step not in (None, 1):
            raise MisuseError(f"memory[...:...:{key.step}]: memory has no steps; slice the bytes or use as_array")
        ends = (self._regions[0].gpa, self._regions[-1].end) if self._regions else (0, 0)
        start = ends[0] if key.start is None else _address(key.start)
        stop = ends[1] if key.stop is None else _address(key.stop)
        return start, stop

    def __len__(self) -> int:
        return self.size_bytes

    def __repr__(self) -> str:
        if self._closed:
            return "Memory(closed)"
        return f"Memory({show_size(self.size_bytes)}: {', '.join(str(each) for each in self._regions)})"


def _address(gpa: Any) -> int:
    try:
        number = operator.index(gpa)
    except TypeError:
        raise MisuseError(f"{gpa!r} is not an address; give an integer, such as 0x2000 or m.symbols['name']") from None
    if number < 0:
        raise AddressError(f"gpa {number:#x} is negative; addresses count from 0")
    return number


def _check_range(gpa: Any, size_bytes: Any) -> None:
    # What an address and a size must be for any range at all; whether it is memory, the regions say.
    _address(gpa)
    integer(size_bytes, "size_bytes")


def _number(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise MisuseError(f"{value!r} is not an integer; bytes are written with memory.write") from None


def _bytes(data: Any) -> memoryview:
    try:
        view = memoryview(data)
    except TypeError:
        raise MisuseError(
            f"memory takes bytes, a bytearray or an array, not {type(data).__name__}; "
            "for a number use write_u64 and the like"
        ) from None
    # An empty array cannot be cast.
    return view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
