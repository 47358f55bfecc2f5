"""The generator: what it names stays, what it encodes is what capstone reads, and nothing looks at undefined flags."""

from __future__ import annotations

import hashlib
from collections import Counter

import capstone
import pytest

from .effects import AF, CF, OF, PF, SF, STATUS, ZF, effect_of, shift_effect
from .faulting import FAULTING
from .guest import FORMAT, Guest, by_name, generate
from .setting import CODE, SETTINGS, WINDOW_BYTES, Setting

_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
# Names of ours that stand for several mnemonics, or are not the processor's.
_OWN_NAMES = {
    "movzx", "cbw", "cwd", "shl", "sal", "mov", "pop_seg", "push_seg", "mov_seg", "mov_ss", "pop_ss", "mov_cr",
    "mov_dr", "load_far", "jcxz", "loopz", "loopnz", "sgdt", "sldt", "ud2", "ud1", "fe_7", "lock_mov", "lock_nop",
    "lock_cmp", "div", "xlat", "nop",
}  # fmt: skip


def guests(count: int) -> list[Guest]:
    return [
        generate(7, number, SETTINGS[number % len(SETTINGS)], exceptions=bool(number // len(SETTINGS) % 2))
        for number in range(count)
    ]


def test_a_name_gives_the_same_guest_for_ever():
    digest = hashlib.blake2b(digest_size=8)
    for guest in guests(60):
        digest.update(guest.window + bytes(guest.rflags.to_bytes(4, "little")))
        digest.update(b"".join(value.to_bytes(8, "little") for value in guest.registers))
    # Whoever changes what is drawn raises FORMAT, and writes the new digest here.
    assert (FORMAT, digest.hexdigest()) == (1, "6ce69f215f43232e")


def test_a_guest_is_made_again_from_its_name():
    for guest in guests(40):
        again = by_name(guest.name)
        assert (again.name, again.window, again.registers) == (guest.name, guest.window, guest.registers)


def test_a_name_of_another_format_is_refused():
    with pytest.raises(ValueError, match="format 99"):
        by_name("99/1/1/long64")


def test_every_instruction_is_one_that_capstone_reads():
    for guest in guests(200):
        engine = capstone.Cs(capstone.CS_ARCH_X86, _MODES[guest.setting.bits])
        image = guest.image
        ends = [*list(image.instructions)[1:], CODE + len(image.code)]
        for (at, instruction), end in zip(image.instructions.items(), ends, strict=True):
            code = image.code[at - CODE : end - CODE]
            if (effect_of(instruction.name).reads == 0 and instruction.name in ("fe_7", "ud1")) or code[0] == 0xF0:
                continue  # no instruction, as is meant; or LOCK, which capstone refuses where it must not be
            found = next(engine.disasm(code, at), None)
            assert found is not None, f"{guest.name}: {instruction.name} {code.hex()}"
            assert found.size == len(code), f"{guest.name}: {instruction.name} is {found.mnemonic} {found.op_str}"
            mnemonics = found.mnemonic.split()
            if instruction.name not in _OWN_NAMES:
                assert mnemonics[-1].startswith(instruction.name[:3]), f"{instruction.name}: {found.mnemonic}"


def test_no_guest_looks_at_a_flag_that_is_undefined():
    for guest in guests(300):
        assert all(piece.is_sound for piece in guest.pieces), guest.name
        undefined = 0
        brought: dict[int, int] = {}
        for at, instruction in guest.image.instructions.items():
            undefined |= brought.get(at, 0)
            assert not instruction.effect.reads & undefined, f"{guest.name}: {instruction.name} at {at:#x}"
            undefined = undefined & ~instruction.effect.defines | instruction.effect.undefined
            if instruction.skip is not None:
                size = len(instruction.code)
                width = 1 if not instruction.near else 2 if guest.setting.bits == 16 else 4
                place = at - CODE + size
                distance = int.from_bytes(guest.image.code[place : place + width], "little")
                target = at + size + width + distance
                brought[target] = brought.get(target, 0) | undefined


def test_code_fits_between_the_window_and_its_end():
    for guest in guests(300):
        assert len(guest.window) == WINDOW_BYTES + len(guest.image.code)


def test_every_kind_of_piece_comes():
    seen = Counter(piece.kind for guest in guests(1500) for piece in guest.pieces)
    assert {kind.name for kind in FAULTING.kinds} <= set(seen)
    assert min(seen.values()) > 2, seen.most_common()[-5:]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_guest_keeps_some_of_its_pieces(setting: Setting):
    guest = generate(3, 4, setting)
    some = guest.keep((0, 2, 4))
    assert [piece.kind for piece in some.pieces] == [guest.pieces[n].kind for n in (0, 2, 4)]
    assert some.keep((2,)).pieces == (guest.pieces[2],)


# SDM volume 2, "SAL/SAR/SHL/SHR" and "RCL/RCR/ROL/ROR", section Flags Affected.
@pytest.mark.parametrize(
    ("name", "size", "count", "undefined"),
    [
        ("shl", 8, 0, 0),
        ("shl", 8, 32, 0),
        ("shl", 8, 1, AF),
        ("shl", 8, 7, AF | OF),
        ("shl", 8, 8, AF | OF | CF),
        ("shr", 16, 16, AF | OF | CF),
        ("sar", 8, 31, AF | OF),
        ("shl", 32, 33, AF),
        ("shl", 64, 33, AF | OF),
        ("rol", 8, 1, 0),
        ("rol", 8, 8, OF),
        ("rcl", 16, 17, OF),
        ("shld", 32, 31, AF | OF),
    ],
)
def test_undefined_flags_of_shifts_depend_on_the_count(name: str, size: int, count: int, undefined: int):
    assert shift_effect(name, size, count).undefined == undefined


@pytest.mark.parametrize(
    ("name", "undefined"),
    [
        ("and", AF),
        ("mul", SF | ZF | AF | PF),
        ("div", STATUS),
        ("bsf", STATUS & ~ZF),
        ("add", 0),
        ("aam", OF | AF | CF),
    ],
)
def test_undefined_flags_of_instructions(name: str, undefined: int):
    assert effect_of(name).undefined == undefined
