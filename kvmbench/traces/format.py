"""What the kernel says of its events: the `format` files of tracefs, and `header_page`.

Layouts differ from kernel to kernel and are no stable interface, so nothing here is known beforehand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from kvmbench.errors import LoadError

_FIELD = re.compile(
    r"^\s*field:(?P<what>[^;]+);\s*offset:\s*(?P<offset>\d{1,9});\s*size:\s*(?P<size>\d{1,9});(\s*signed:\s*(?P<signed>\d);)?"
)
_NAME_AND_COUNT = re.compile(r"(?P<name>\w+)\s*(\[(?P<count>[^\]]*)\])?$")
_WIDTHS = (1, 2, 4, 8)
# Longest event and farthest field believed; the ring buffer's page is no larger.
_MOST_BYTES = 1 << 16


#: The field of a row that holds what follows the event's fixed part.
TAIL = "tail"


@dataclass(frozen=True)
class Field:
    """A field of an event.

    Attributes:
        name: as the kernel calls it; common fields begin with ``common_``.
        offset: in the event's bytes.
        size_bytes: of all of it.
        signed: whether it is a signed number.
        c_type: as the kernel declares it.
        count: elements of an array; 1: it is none; 0: an array that ends with the event.
        located: it holds length << 16 | offset of its bytes (``__data_loc``).
    """

    name: str
    offset: int
    size_bytes: int
    signed: bool
    c_type: str
    count: int = 1
    located: bool = False

    @property
    def dtype(self) -> np.dtype[np.generic] | None:
        """Its numpy type; None for what ends with the event."""
        if self.size_bytes == 0 or self.count == 0:
            return None
        element, rest = divmod(self.size_bytes, self.count)
        if rest or element not in _WIDTHS:
            return np.dtype((np.void, self.size_bytes))
        if self.count > 1 and self.c_type.replace("const ", "").startswith("char"):
            return np.dtype((np.bytes_, self.size_bytes))
        number = np.dtype(f"<{'i' if self.signed else 'u'}{element}")
        return number if self.count == 1 else np.dtype((number, self.count))


@dataclass(frozen=True)
class EventFormat:
    """An event as the kernel describes it.

    Attributes:
        system: its group: "kvm", "kvmmmu".
        name: "kvm_exit".
        id: the number its records carry.
        fields: in the kernel's order, the common ones first.
        print_format: how the kernel would print it.
    """

    system: str
    name: str
    id: int
    fields: tuple[Field, ...]
    print_format: str = field(default="", repr=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of its fixed part."""
        return max((f.offset + f.size_bytes for f in self.fields), default=0)

    @cached_property
    def has_tail(self) -> bool:
        """Whether bytes follow its fixed part: text of its own, or what a located field points at."""
        return any(f.located or f.dtype is None for f in self.fields)

    @property
    def dtype(self) -> np.dtype[np.void]:
        """A structured type of its fixed part, offsets as the kernel has them."""
        return self.dtype_of(self.size_bytes)

    def dtype_of(self, row_bytes: int) -> np.dtype[np.void]:
        """`dtype` with rows of that size; what is behind the fixed part is in no field but in `TAIL`."""
        kept = [(f, f.dtype) for f in self.fields]
        named = [(f.name, dtype, f.offset) for f, dtype in kept if dtype is not None]
        if row_bytes > self.size_bytes:
            named.append((TAIL, np.dtype((np.void, row_bytes - self.size_bytes)), self.size_bytes))
        return np.dtype(
            {
                "names": [name for name, _, _ in named],
                "formats": [dtype for _, dtype, _ in named],
                "offsets": [offset for _, _, offset in named],
                "itemsize": max(self.size_bytes, row_bytes),
            }
        )

    @property
    def own_fields(self) -> tuple[Field, ...]:
        """Its fields without the common ones."""
        return tuple(f for f in self.fields if not f.name.startswith("common_"))


def parse_format(text: str, *, system: str = "") -> EventFormat:
    """Reads a `format` file.

    Args:
        text: what the file says.
        system: the group, which the file does not tell.

    Raises:
        LoadError: it is no description of an event.
    """
    name = re.search(r"^name:\s*(\S+)", text, re.MULTILINE)
    number = re.search(r"^ID:\s*(\d{1,9})$", text, re.MULTILINE)
    if name is None or number is None:
        raise LoadError(f"no description of an event: it begins {text[:60]!r}")
    printed = re.search(r"^print fmt:\s*(.*)", text, re.MULTILINE | re.DOTALL)
    fields = tuple(_parse_field(line) for line in text.splitlines() if line.strip().startswith("field:"))
    if len({f.name for f in fields}) < len(fields):
        raise LoadError(f"the description of {name[1]} has a field twice")
    found = EventFormat(system, name[1], int(number[1]), fields, printed[1].strip() if printed else "")
    if not found.size_bytes:
        raise LoadError(f"the description of {name[1]} has no fields")
    return found


def _parse_field(line: str) -> Field:
    found = _FIELD.match(line)
    declared = _NAME_AND_COUNT.search(found["what"].strip()) if found else None
    if found is None or declared is None:
        raise LoadError(f"a field that is none: {line.strip()!r}")
    what = found["what"].strip()
    c_type = what[: declared.start()].strip()
    offset, size = int(found["offset"]), int(found["size"])
    if offset + size > _MOST_BYTES:
        raise LoadError(f"a field beyond any event: {line.strip()!r}")
    located = c_type.startswith(("__data_loc", "__rel_loc"))
    count = 1
    if declared["count"] is not None and not located:
        count = int(declared["count"]) if re.fullmatch(r"\d{1,9}", declared["count"]) else _count(c_type, size)
    elif located:
        # The declaration is of what it points at: "__data_loc char[] name".
        c_type = c_type.removesuffix("[]").strip()
    name = declared["name"] if declared["name"] != TAIL else f"{TAIL}_"
    return Field(name, offset, size, found["signed"] == "1", c_type, count, located)


def _count(c_type: str, size: int) -> int:
    # The length is an expression of the kernel's: the size is there, the element's is known for plain types.
    if size == 0:
        return 0
    width = {"char": 1, "u8": 1, "__u8": 1, "u16": 2, "u32": 4, "u64": 8, "long": 8}.get(c_type.split()[-1], 1)
    return max(1, size // width)


@dataclass(frozen=True)
class PageLayout:
    """A page of the ring buffer.

    Attributes:
        size_offset: of the number of bytes that are used.
        data_offset: of the first event.
    """

    size_offset: int = 8
    data_offset: int = 16


def parse_header_page(text: str) -> PageLayout:
    """Reads `events/header_page`.

    Raises:
        LoadError: it describes no page, or one of another sort of machine.
    """
    fields = {f.name: f for f in map(_parse_field, (ln for ln in text.splitlines() if ln.strip().startswith("field:")))}
    try:
        layout = PageLayout(fields["commit"].offset, fields["data"].offset)
        timestamp, size = fields["timestamp"], fields["commit"]
    except KeyError as error:
        raise LoadError(f"the description of a page of the ring buffer has no {error.args[0]}") from None
    if timestamp.offset != 0 or size.size_bytes != 8:
        raise LoadError(f"pages of a machine of {size.size_bytes * 8} bits: only those of 64 are read")
    return layout
