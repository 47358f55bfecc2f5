"""One decoded instruction, and the decoder that makes and caches them.

Capstone decodes; nothing here knows x86 encodings. It is used in its lite
form, which gives text but no operand details: details cost more than twice as
much, and what stepping must know (a call, a return, a repeated string
instruction, where a branch goes) is in the text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import capstone

from kvmbench.debug.symbols import Symbols
from kvmbench.errors import MisuseError

#: No x86 instruction is longer (SDM volume 2, "Instruction Format").
MAX_BYTES = 15

_INTERRUPTS = frozenset({"int", "int1", "int3", "into"})
_CALLS = frozenset({"call", "lcall"})
_RETURNS = frozenset(
    {"ret", "retf", "retfq", "iret", "iretd", "iretq", "sysret", "sysretq", "sysexit", "sysexitq", "uiret"}
)
_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
# Instructions kept by a decoder. One takes about 400 bytes; a guest that runs more distinct addresses than
# this is decoded at 5 us an instruction instead of 0.5.
_CACHE_LIMIT = 65536
_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_RIP_RELATIVE = re.compile(r"\[rip(?: (?P<sign>[+-]) (?P<distance>\w+))?\]")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction as it would be executed.

    Attributes:
        address: its offset in the code segment, as rip has it; the linear address when CS has base 0.
        bytes: its encoding, 1 to 15 bytes.
        mnemonic: with prefixes, such as ``rep movsb``; ``.byte`` when the bytes are no instruction.
        operands: as capstone prints them, Intel syntax.
        bits: the code width it was decoded for: 16, 32 or 64.
        target: where a direct near call or jump goes (an offset, like `address`), else None.
        label: ``loop+0x3``, or an empty string.
        target_label: the same for `target`, or for the memory a rip-relative operand names.
        line: number of its source line, or None.
        source: text of that line, stripped.
    """

    address: int
    bytes: bytes
    mnemonic: str
    operands: str
    bits: int
    target: int | None = None
    label: str = ""
    target_label: str = ""
    line: int | None = None
    source: str = ""

    @property
    def size_bytes(self) -> int:
        """Length of the encoding."""
        return len(self.bytes)

    @property
    def next_address(self) -> int:
        """Offset of the instruction that follows in memory."""
        return self.address + len(self.bytes)

    @property
    def operation(self) -> str:
        """The mnemonic without prefixes: ``movsb`` of ``rep movsb``."""
        return self.mnemonic.rpartition(" ")[2]

    @property
    def is_valid(self) -> bool:
        """False for bytes that are no instruction."""
        return self.mnemonic != ".byte"

    @property
    def is_call(self) -> bool:
        """A near or far call, direct or not. Not ``int``, ``syscall`` or ``vmcall``."""
        return self.operation in _CALLS

    @property
    def is_ret(self) -> bool:
        """A return of any kind: from a call, an interrupt or a system call."""
        return self.operation in _RETURNS

    @property
    def is_interrupt(self) -> bool:
        """A software interrupt: ``int n``, ``int3``, ``int1``, ``into``."""
        return self.operation in _INTERRUPTS

    @property
    def is_rep(self) -> bool:
        """A repeated string instruction, which a single step leaves after every round."""
        first, _, rest = self.mnemonic.partition(" ")
        return first.startswith("rep") and bool(rest) and not self.is_ret

    @property
    def text(self) -> str:
        """Mnemonic and operands, with a branch target as a symbol where it has one."""
        if not self.operands:
            return self.mnemonic
        if self.target is not None and self.target_label:
            return f"{self.mnemonic} {self.target_label}"
        return f"{self.mnemonic} {self.operands}"

    @property
    def comment(self) -> str:
        """What the operands point at, when `text` does not show it: ``counter+0x8``."""
        return self.target_label if self.target is None else ""

    def __repr__(self) -> str:
        where = f"{self.address:#x} {self.label}".rstrip()
        note = f"  ; {self.comment}" if self.comment else ""
        return f"Instruction: {where}  {self.bytes.hex(' ')}  {self.text}{note}"


# What decoding alone tells, before any symbol: cached, since symbols may come and go.
@dataclass(frozen=True, slots=True)
class _Decoded:
    bytes: bytes
    mnemonic: str
    operands: str
    target: int | None
    # Offset that a rip-relative operand names.
    pointed: int | None


@cache
def _engine(bits: int) -> Any:
    # One capstone handle a width for the whole process. Decoding holds the GIL, so threads may share it.
    try:
        mode = _MODES[bits]
    except KeyError:
        raise MisuseError(f"code of {bits!r} bits cannot be decoded: give 16, 32 or 64") from None
    return capstone.Cs(capstone.CS_ARCH_X86, mode)


@cache
def _sweeper(bits: int) -> Any:
    # With skipdata capstone goes on behind bytes that are no instruction; its "length" of those is one byte on x86.
    _engine(bits)  # checks the width
    engine = capstone.Cs(capstone.CS_ARCH_X86, _MODES[bits])
    engine.skipdata = True
    return engine


def instruction_length(code: bytes, *, bits: int, address: int = 0) -> int:
    """Length in bytes of the first instruction of `code`, or 0 when the bytes are none.

    Args:
        code: at least the whole instruction; 15 bytes always suffice.
        bits: 16, 32 or 64.
        address: its offset; the length does not depend on it.
    """
    return DECODER.length(code, bits=bits, address=address)


def boundaries(code: bytes, *, bits: int) -> list[int]:
    """Offsets at which the instructions of a linear sweep begin; a byte that begins none counts as one.

    It costs 0.7 us an instruction, a seventh of decoding them one by one. Give some kilobytes at a time:
    capstone sets 240 bytes aside for each instruction. One that the end of `code` cuts short falls into bytes.

    Args:
        code: what to go through, from its first byte on.
        bits: 16, 32 or 64.
    """
    return [row[0] for row in _sweeper(bits).disasm_lite(code, 0)]


class Decoder:
    """Decodes and remembers: an instruction met again costs a dictionary look-up.

    Entries are keyed by width and address and used only if the bytes are still
    the same, so self-modifying code is decoded anew.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], _Decoded] = {}
        self._invalid: dict[tuple[int, int], bytes] = {}

    def length(self, code: bytes, *, bits: int, address: int = 0) -> int:
        """Length of the first instruction in bytes, 0 when there is none."""
        known = self._decode(code, bits, address)
        return 0 if known is None else len(known.bytes)

    def decode(
        self, code: bytes, *, bits: int, address: int, symbols: Symbols | None = None, code_base: int = 0
    ) -> Instruction:
        """The first instruction of `code`; ``.byte`` with its first byte when it is none.

        Args:
            code: bytes from `address` on; 15 suffice. Fewer may cut the instruction short.
            bits: 16, 32 or 64.
            address: offset in the code segment.
            symbols: where labels and source lines come from.
            code_base: linear address of offset 0, added before asking `symbols`.

        Raises:
            MisuseError: no bytes, or another width.
        """
        if not code:
            raise MisuseError(f"no bytes to decode at {address:#x}")
        found = self._decode(code, bits, address)
        if found is None:
            found = _Decoded(bytes(code[:1]), ".byte", f"{code[0]:#04x}", None, None)
        if symbols is None:
            return Instruction(address, found.bytes, found.mnemonic, found.operands, bits, found.target)
        mask = (1 << 64) - 1 if bits == 64 else 0xFFFF_FFFF
        linear = (address + code_base) & mask
        pointed = found.target if found.target is not None else found.pointed
        line = symbols.line(linear)
        return Instruction(
            address,
            found.bytes,
            found.mnemonic,
            found.operands,
            bits,
            found.target,
            symbols.label(linear),
            "" if pointed is None else symbols.label((pointed + code_base) & mask),
            None if line is None else line[0],
            "" if line is None else line[1].strip(),
        )

    def _decode(self, code: bytes, bits: int, address: int) -> _Decoded | None:
        key = (bits, address)
        known = self._known.get(key)
        if known is not None and code[: len(known.bytes)] == known.bytes:
            return known
        window = bytes(code[:MAX_BYTES])
        if self._invalid.get(key) == window:
            return None
        if len(self._known) + len(self._invalid) >= _CACHE_LIMIT:
            self._known.clear()
            self._invalid.clear()
        row = next(_engine(bits).disasm_lite(window, address, 1), None)
        if row is None:
            self._invalid[key] = window
            return None
        _, size, mnemonic, operands = row
        found = _Decoded(
            window[:size],
            mnemonic,
            operands,
            _branch_target(mnemonic, operands, window[:size], bits),
            _pointed(operands, address + size),
        )
        self._known[key] = found
        return found


def _branch_target(mnemonic: str, operands: str, code: bytes, bits: int) -> int | None:
    operation = mnemonic.rpartition(" ")[2]
    if not (operation in ("call", "xbegin") or operation.startswith(("j", "loop"))):
        return None
    try:
        target = int(operands, 0)
    except ValueError:
        return None  # through a register or memory
    if bits == 64:
        return target
    # Capstone does not wrap 16-bit targets. With a 16-bit operand size the processor cuts the new rip to 16
    # bits (SDM volume 2, "JMP"); the prefix 0x66 swaps the size (test_a_16_bit_branch_wraps_at_64_kib).
    opcode_at = next(i for i, byte in enumerate(code) if byte not in _PREFIXES)
    swapped = 0x66 in code[:opcode_at]
    return target & (0xFFFF if (bits == 16) != swapped else 0xFFFF_FFFF)


def _pointed(operands: str, next_address: int) -> int | None:
    match = _RIP_RELATIVE.search(operands)
    if match is None:
        return None
    distance = int(match["distance"] or "0", 0)
    return (next_address + (-distance if match["sign"] == "-" else distance)) & ((1 << 64) - 1)


#: The decoder everything shares.
DECODER = Decoder()
