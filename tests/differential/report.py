"""Tells a divergence: the guest's code, both rows, and the guest as a test."""

from __future__ import annotations

from kvmbench.debug.instruction import DECODER
from kvmbench.debug.register_table import INTEGER

from .compare import Divergence
from .guest import NAMES, PLAIN_MEMORY
from .setting import CODE


def listing(divergence: Divergence) -> str:
    """The code of a guest, the instruction marked."""
    guest = divergence.guest
    image = guest.image
    lines = []
    for offset, instruction in image.instructions.items():
        decoded = DECODER.decode(image.code[offset - CODE :][:15], bits=guest.setting.bits, address=offset)
        mark = ">" if offset == divergence.offset else " "
        lines.append(f"{mark} {offset:#06x}  {decoded.bytes.hex(' '):32} {decoded.text}  ; {instruction.name}")
    return "\n".join(lines)


def describe(divergence: Divergence, *, whole: bool = True) -> str:
    """Everything about a divergence."""
    guest = divergence.guest
    one, other = divergence.one, divergence.other
    lines = [
        f"{guest.name}: {one.host} and {other.host} part "
        + (f"at step {divergence.step}" if divergence.step is not None else "at the end"),
    ]
    lines += [f"    {name:10} {one.host}: {a}   {other.host}: {b}" for name, a, b in divergence.what]
    step = divergence.step
    if step is not None:
        before = one.start if step == 0 or not len(one.rows) else one.rows[min(step, len(one.rows)) - 1]
        lines.append("  before: " + _row(before))
        for outcome in (one, other):
            if step < len(outcome.rows):
                lines.append(f"  {outcome.host:6}: " + _row(outcome.rows[step]))
            else:
                lines.append(f"  {outcome.host:6}: ended after {len(outcome.rows)} steps: {outcome.end}")
    if whole:
        lines.append(listing(divergence))
        lines.append(as_test(divergence))
    return "\n".join(lines)


def _row(row: object) -> str:
    values = {name: int(row[name]) for name in INTEGER}  # type: ignore[index]
    return " ".join(f"{name}={value:x}" for name, value in values.items() if value or name in ("rip", "rflags"))


def as_test(divergence: Divergence) -> str:
    """The guest as a test for test_differential.py, where memory does not matter; else how to see it again."""
    guest = divergence.guest
    kept = ",".join(map(str, guest.kept or range(len(guest.pieces))))
    hosts = f"{divergence.one.host} {divergence.other.host}"
    again = f"# again: python -m tests.differential --hosts {hosts} --guest {guest.name}"
    if (guest.data, guest.stack) != PLAIN_MEMORY:
        return f"{again}  # pieces {kept}"
    registers = {name: value for name, value in zip(NAMES, guest.registers, strict=True) if value}
    shown = "".join(f", {name}={value:#x}" for name, value in registers.items() if name not in ("rsp", "rbp"))
    image = guest.image
    ends = [*list(image.instructions)[1:]]
    code = [
        f'        ("{image.instructions[at].name}", "{image.code[at - CODE : end - CODE].hex()}"),'
        for at, end in zip(image.instructions, ends, strict=False)
    ]
    title = "_".join(guest.name.split("/")[1:3]).partition("+")[0].replace("-", "_")
    return "\n".join(
        (
            again,
            f"def test_guest_{title}(agree):",
            "    agree(",
            f'        "{guest.setting.name}",',
            "        [",
            *("    " + line for line in code),
            "        ],",
            f"        rflags={guest.rflags:#x}{shown},",
            "    )",
        )
    )
