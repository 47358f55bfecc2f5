"""Numbers, strings and compressed pieces of a file in which nothing is believed."""

from __future__ import annotations

import importlib
import struct
import zlib
from typing import Any

from kvmbench.errors import LoadError

# A piece may grow so much: pages of zeros do. Anything beyond is no trace but a bomb.
_MOST_GROWTH = 4096
_LEAST_ROOM = 1 << 20
# And all pieces of a file together, so much at most: events compress to a tenth, and take as much again as columns.
_MOST_GROWTH_OF_ALL = 64
_LEAST_ROOM_OF_ALL = 16 << 20
_MOST_BYTES = 8 << 30
# On parts of one sort.
_MOST_SENTENCES = 8


class Cursor:
    """A place in some bytes of a file.

    Attributes:
        data: the bytes.
        at: the place.
        end: no read goes beyond it.
    """

    def __init__(self, data: Any, at: int = 0, end: int | None = None) -> None:
        self.data = data
        self.end = len(data) if end is None else min(end, len(data))
        self.at = at
        if not 0 <= at <= self.end:
            raise LoadError(f"it points at byte {at:,}, and has {len(data):,}: cut off or damaged")

    @property
    def left(self) -> int:
        """Bytes from here to the end."""
        return self.end - self.at

    def take(self, count: int, what: str) -> bytes:
        """The next bytes.

        Raises:
            LoadError: there are not so many.
        """
        if count > self.left:
            raise LoadError(f"cut off or damaged: {what} takes {count:,} bytes, {self.left:,} are left")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def number(self, size: int, what: str) -> int:
        """An unsigned number of 1, 2, 4 or 8 bytes, little endian."""
        return int.from_bytes(self.take(size, what), "little")

    def string(self, what: str, most: int = 4096) -> str:
        """Text up to a zero byte."""
        found = bytes(self.data[self.at : min(self.end, self.at + most)]).find(b"\0")
        if found < 0:
            raise LoadError(f"cut off or damaged: {what} does not end")
        return self.take(found + 1, what)[:-1].decode("utf-8", "replace")

    def expect(self, text: bytes, what: str) -> None:
        """These bytes and no others.

        Raises:
            LoadError: others, or none.
        """
        found = self.take(len(text), what)
        if found != text:
            raise LoadError(f"damaged: {what} begins {found!r}, not {text!r}")


class Claims:
    """What a file says of its parts, by their sizes: no byte is of two, so together they are no more than the file.

    Without it, what points at the same bytes a thousand times would take a thousand times as long as the file is.

    Args:
        size_bytes: of the file.
    """

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes

    def add(self, size_bytes: int, what: str) -> None:
        """A part is about to be read.

        Raises:
            LoadError: more were read by now than there are.
        """
        if size_bytes > self._left:
            raise LoadError(f"damaged: it points at the same bytes again and again, here as {what}")
        self._left -= size_bytes


class Unpacker:
    """Decompresses pieces of one file.

    Args:
        name: as the file calls the method: "none", "zlib", "zstd".
        size_bytes: of the file.
    """

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name = name
        self._room = min(_MOST_BYTES, max(_LEAST_ROOM_OF_ALL, _MOST_GROWTH_OF_ALL * size_bytes))

    def unpack(self, packed: bytes, size_bytes: int) -> bytes:
        """One piece.

        Args:
            packed: its bytes in the file.
            size_bytes: what the file says it becomes.

        Raises:
            LoadError: it becomes something else, or there is nothing here that knows the method.
        """
        if size_bytes > max(_LEAST_ROOM, _MOST_GROWTH * len(packed)) or size_bytes > self._room:
            raise LoadError(f"damaged: {len(packed):,} compressed bytes are said to become {size_bytes:,}")
        self._room -= size_bytes
        try:
            data = self._decompress(packed, size_bytes)
        except LoadError:
            raise
        except Exception as error:  # each package has its own type
            raise LoadError(f"damaged: a piece compressed with {self.name} cannot be unpacked ({error})") from None
        if len(data) != size_bytes:
            raise LoadError(f"damaged: a compressed piece becomes {len(data):,} bytes, not {size_bytes:,}")
        return data

    def _decompress(self, packed: bytes, size_bytes: int) -> bytes:
        if self.name == "zlib":
            # One byte more, so that a piece which goes on beyond its size is seen.
            return zlib.decompressobj().decompress(packed, size_bytes + 1)
        if self.name == "zstd":
            return _zstd(packed, size_bytes)
        raise LoadError(
            f"it is compressed with {self.name!r}, which is not known here: write it anew with "
            "'trace-cmd convert --file-version 6 -i FILE -o NEW'"
        )


def _zstd(packed: bytes, size_bytes: int) -> bytes:
    for module, how in (("compression.zstd", _by_standard), ("zstandard", _by_zstandard), ("pyzstd", _by_standard)):
        try:
            package = importlib.import_module(module)
        except ImportError:
            continue
        return how(package, packed, size_bytes)
    raise LoadError(
        "it is compressed with zstd, and no package here knows that: pip install 'kvmbench[zstd]', or write it anew "
        "with 'trace-cmd convert --file-version 6 -i FILE -o NEW'"
    )


def _by_standard(package: Any, packed: bytes, size_bytes: int) -> bytes:
    # compression.zstd came with Python 3.14; pyzstd has the same class.
    unpacker = getattr(package, "ZstdDecompressor", None) or package.EndlessZstdDecompressor
    data: bytes = unpacker().decompress(packed, size_bytes + 1)
    return data


def _by_zstandard(package: Any, packed: bytes, size_bytes: int) -> bytes:
    data: bytes = package.ZstdDecompressor().stream_reader(packed).read(size_bytes + 1)
    return data


def first_of(sentences: list[str], what: str) -> list[str]:
    """The first few of many sentences, and how many more there are of `what`."""
    more = len(sentences) - _MOST_SENTENCES
    return [*sentences[:_MOST_SENTENCES], f"... and so of {more:,} {what} more"] if more > 0 else sentences


def number_of(data: bytes, code: str) -> tuple[int, ...]:
    """Numbers at the beginning of an option's bytes, as `struct` writes their sizes.

    Raises:
        LoadError: too few bytes.
    """
    size = struct.calcsize("<" + code)
    if len(data) < size:
        raise LoadError(f"damaged: an option of {len(data)} bytes that takes {size}")
    return struct.unpack("<" + code, data[:size])
